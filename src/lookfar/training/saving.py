"""Publishes checkpoints beside training: a copy is taken at once, and written while the next updates are computed.

Processes that have parts of a model write them together and wait for one another, each for its share alone.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lookfar.model.decoder import Decoder
from lookfar.training import checkpoint, distributed_checkpoint, sharding
from lookfar.training.memory import Pieces
from lookfar.training.optimizers import Optimizer
from lookfar.training.schedules import budgets


class Saver:
    """Writes one checkpoint at a time, by the first process; what fails is raised by the next verb, for all of them.

    Leaving its context waits for the last one.
    """

    def __init__(self, folder: Path, pieces: Pieces) -> None:
        self.folder, self.pieces, self.processes = folder, pieces, pieces.processes
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._last: Future[None] | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.shutdown(wait=True)

    def save(
        self, update: int, model: Decoder, optimizer: Optimizer, progress: dict[str, Any], better: float | None = None
    ) -> None:
        """Take a copy and begin to publish it; `better` is its held-out loss, where that is the lowest so far.

        All processes must come here. What is loaded does not depend on how many there are: one that has the whole
        model writes it for all, and those that have parts write their parts.
        """
        self.wait()
        config = self.pieces.run.training
        state = {
            "optimizer": optimizer.state_dict(),
            "accumulation": self.pieces.accumulation,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
            **progress,
        }

        def publish(write: Callable[[], Path]) -> None:
            write()
            if better is not None:
                checkpoint.note_best(self.folder, update, better)
            if update:
                checkpoint.thin(self.folder, config.keep, config.checkpoint_every, budgets(config.schedule))

        if sharding.sharded(model):  # at once: processes that agree in a second thread would need a group of their own
            write = self._write_shards(update, model, state)
            self.processes.only_first(partial(publish, write))
        elif self.processes.first:
            weights, state = checkpoint.weights(model), tree_map_only(Tensor, _copy, state)
            write = partial(checkpoint.save, self.folder, update, weights, state)
            self._last = self._writer.submit(publish, write)

    def _write_shards(self, update: int, model: Decoder, state: dict[str, Any]) -> Callable[[], Path]:
        """Write the shards of all processes aside; the answer publishes them, with the state that has none."""
        sharding.divide_again(model)
        optimizer = state["optimizer"]
        tensors = distributed_checkpoint.named(checkpoint.once(model), optimizer["state"])
        aside = self.processes.only_first(partial(checkpoint.begin, self.folder, update))
        with checkpoint.telling(aside, update):
            distributed_checkpoint.write(aside, tensors)
            found = self.processes.each(partial(distributed_checkpoint.hashes, aside, self.processes.rank))
        hashes = {name: value for each in found for name, value in each.items()}
        state = {**state, "optimizer": {"param_groups": optimizer["param_groups"]}}
        return partial(checkpoint.publish, aside, update, state, hashes)

    def check(self) -> None:
        """Raise what went wrong with the last checkpoint, where that is known by now."""
        failed = self._last is not None and self._last.done() and self._last.exception() is not None
        if self.processes.largest(int(failed)):
            self.wait()

    def wait(self) -> None:
        """Return once the last checkpoint is published.

        Raises:
            UserError: it could not be written.
        """
        self.processes.only_first(partial(_result, self._last))


def _result(of: "Future[None] | None") -> None:
    if of is not None:
        of.result()


def _copy(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True)
