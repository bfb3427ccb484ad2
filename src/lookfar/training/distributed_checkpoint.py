"""Writes a divided model and optimizer through torch's DCP, each process its shards, and reads them in any division.

The files are safetensors: nothing in them can be executed when they are read.
"""

import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from lookfar import files

MODEL, OPTIMIZER = "model.", "optimizer."  # how names begin: model.embedding.weight, optimizer.3.exp_avg


def write(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write this process's shards of tensors; all processes must come here, with the same names.

    Raises:
        OSError: one of the processes could not write.
    """
    with _plain_errors():
        save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))


def hashes(folder: Path, rank: int) -> dict[str, str]:
    """The hashes of the files that the process of this rank wrote."""
    return {each.name: files.digest(each) for each in sorted(folder.glob(f"shard-{rank + 1:05d}-*"))}


def read(folder: Path, into: dict[str, Tensor]) -> None:
    """Fill tensors, or the shards of them that lie here; each process reads alone, and only what it needs.

    Raises:
        OSError: a tensor is not there, or has another shape.
    """
    with warnings.catch_warnings(), _plain_errors():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # it is what `no_dist` asks for
        load(into, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)


def shapes(folder: Path, beginning: str) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """The whole shape and the type of each tensor whose name begins so, by the rest of its name."""
    known = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {
        name.removeprefix(beginning): (each.size, each.properties.dtype)
        for name, each in known.items()
        if name.startswith(beginning) and not isinstance(each, BytesStorageMetadata)
    }


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All weights, whole, by their names in the model."""
    found = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in shapes(folder, MODEL).items()}
    read(folder, {MODEL + name: each for name, each in found.items()})
    return found


def fill(weights: dict[str, Tensor], folder: Path) -> None:
    """Read all weights into those of a model.

    Raises:
        RuntimeError: they have other names or shapes.
    """
    there, own = shapes(folder, MODEL), {name: each.shape for name, each in weights.items()}
    if wrong := sorted(name for name in there.keys() | own if name not in there or there[name][0] != own.get(name)):
        raise RuntimeError(f"other names or shapes: {', '.join(wrong)}.")
    read(folder, {MODEL + name: each.detach() for name, each in weights.items()})


def named(weights: dict[str, Tensor], optimizer: dict[int, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Weights, and the state of an optimizer by the numbers of its parameters, as they are written."""
    return {MODEL + name: each for name, each in weights.items()} | {
        f"{OPTIMIZER}{number}.{key}": value for number, values in optimizer.items() for key, value in values.items()
    }


@dataclass(frozen=True)
class StoredOptimizer:
    """The state of an optimizer that stays in its files until it is known which parts of it are wanted."""

    folder: Path
    param_groups: list[dict[str, Any]]

    def read(self, parameters: list[Tensor]) -> dict[str, Any]:
        """The state for these parameters, each value divided as its parameter is, or whole."""
        into = {}
        for name, (size, dtype) in shapes(self.folder, OPTIMIZER).items():
            parameter = parameters[int(name.split(".")[0])].detach()
            alike = parameter.shape == size  # all but counts of steps
            into[name] = torch.zeros_like(parameter, dtype=dtype) if alike else torch.zeros(size, dtype=dtype)
        read(self.folder, {OPTIMIZER + name: value for name, value in into.items()})
        state: dict[int, dict[str, Tensor]] = defaultdict(dict)
        for name, value in into.items():
            number, key = name.split(".")
            state[int(number)][key] = value
        return {"state": dict(sorted(state.items())), "param_groups": self.param_groups}


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What DCP raises is no Exception; tell the first that any process had."""
    try:
        yield
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        if not isinstance(cause, Exception):  # a signal that acts at once
            raise cause from error
        raise OSError(str(cause)) from error
