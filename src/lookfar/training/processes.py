"""Several processes that train one model: who is who, what they agree on, and the mean of their gradients.

They are started by torchrun, or by anything that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. One process alone
asks nobody: every verb then gives back what it got.
"""

import gc
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from lookfar.config import Run
from lookfar.errors import UserError
from lookfar.model.decoder import device_of

T = TypeVar("T")
PATIENCE = timedelta(hours=6)  # the first may prepare a text or write a checkpoint while the others wait
BUCKET = 2**24  # numbers that are sent at once


class Processes:
    """All processes of a run, as one of them sees them."""

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count = rank, count

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def only_first(self, do: Callable[[], T]) -> T:
        """What the first process gets from `do`; the others wait, and its error is a UserError of theirs."""
        if self.count == 1:
            return do()
        told: list[object] = [None, None]
        if self.first:
            try:
                told = [do(), None]
            except Exception as error:  # whatever it is: the others wait
                distributed.broadcast_object_list(
                    [None, str(error) or type(error).__name__], device=torch.device("cpu")
                )
                raise
        distributed.broadcast_object_list(told, device=torch.device("cpu"))
        if told[1] is not None:
            raise UserError(str(told[1]))
        return told[0]  # pyright: ignore[reportReturnType]  # it is what `do` gave to the first

    def each(self, do: Callable[[], T]) -> list[T]:
        """What every process gets from `do`, in their order; an OSError of one is one of all."""
        if self.count == 1:
            return [do()]
        told: list[tuple[T, None] | tuple[None, str]] = [(None, "")] * self.count
        try:
            own = do(), None
        except OSError as error:
            own = None, str(error)
        distributed.all_gather_object(told, own)
        if wrong := [error for _, error in told if error is not None]:
            raise OSError(wrong[0])
        return [found for found, _ in told]  # pyright: ignore[reportReturnType]  # it is what `do` gave to each

    def largest(self, value: int) -> int:
        """The largest value that any process has: 0 where none has anything to say."""
        return int(self._together(torch.tensor(value), distributed.ReduceOp.MAX))

    def mean(self, value: float) -> float:
        """The mean of the values of all processes."""
        if self.count == 1:
            return value
        return float(self._together(torch.tensor(value, dtype=torch.float64), distributed.ReduceOp.SUM)) / self.count

    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Put the mean over all processes in the place of each gradient; those of sharded parameters are that already.

        A gradient that no process has is left out, as one process alone would.
        """
        if self.count == 1:
            return
        whole = [each for each in parameters if each.requires_grad and not isinstance(each, DTensor)]
        known = torch.tensor([each.grad is not None for each in whole], dtype=torch.int32)
        if whole:
            self._together(known, distributed.ReduceOp.MAX)
        gradients = []
        for parameter, has in zip(whole, known.tolist(), strict=True):
            if has and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if parameter.grad is not None:
                gradients.append(parameter.grad)
        for bucket in _buckets(gradients):
            wide = torch.promote_types(bucket[0].dtype, torch.float32)  # a sum in bfloat16 would lose the smallest
            flat = torch.cat([each.flatten().to(wide) for each in bucket])
            distributed.all_reduce(flat)
            for each, mean in zip(bucket, (flat / self.count).split([each.numel() for each in bucket]), strict=True):
                each.copy_(mean.view_as(each))

    def _together(self, value: Tensor, how: distributed.ReduceOp.RedOpType) -> Tensor:
        if self.count > 1:
            distributed.all_reduce(value, how)
        return value


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """The processes that this one was started with; a group that exists already is used and left as it is.

    On GPUs each process of a machine takes its own.

    Raises:
        UserError: more processes than GPUs, one GPU named for all, or a start that is not told whole.
    """
    if distributed.is_available() and distributed.is_initialized():
        yield Processes(distributed.get_rank(), distributed.get_world_size())
        return
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes()
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(f"WORLD_SIZE is {count}, and {', '.join(missing)} is not set; start by torchrun.")
    gpu = device_of(device).type == "cuda"
    if gpu:
        _take_gpu(device)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=PATIENCE)
    try:
        yield Processes(distributed.get_rank(), distributed.get_world_size())
    finally:
        gc.collect()  # a sharded model is a circle that holds the group, whose threads must not outlive it
        distributed.destroy_process_group()


def is_first() -> bool:
    """Whether this process was started as the first of its run, or alone: the one that measures and tells."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


def check(run: Run, processes: Processes) -> None:
    """Raise a `UserError` for a run that so many processes cannot share."""
    config, count = run.training, processes.count
    if config.batch % (count * config.accumulation):
        near = -(-config.batch // (count * config.accumulation)) * count * config.accumulation
        raise UserError(
            f"training.batch ({config.batch}) must divide by processes × training.accumulation "
            f"({count} × {config.accumulation}); try training.batch={near}, or another number of processes."
        )
    if config.parallel == "sharded" and config.optimizer == "muon":
        raise UserError(
            "training.optimizer='muon' needs whole matrices, and training.parallel='sharded' divides them; "
            "set training.parallel='replicated', or training.optimizer='adamw'."
        )
    if config.parallel == "sharded" and config.on_out_of_memory == "halve" and count > 1:
        raise UserError(
            "training.on_out_of_memory='halve' cannot begin an update again while other processes wait for its shards; "
            f"with training.parallel='sharded' choose training.accumulation={2 * config.accumulation} beforehand."
        )


def _take_gpu(device: str) -> None:
    own, there = int(os.environ.get("LOCAL_RANK", os.environ["RANK"])), torch.cuda.device_count()
    if device_of(device).index is not None:
        raise UserError(f"model.device={device!r} is one GPU for all processes; set model.device='auto'.")
    if own >= there:
        raise UserError(f"There are {there} GPUs here for at least {own + 1} processes; start {there} on this machine.")
    torch.cuda.set_device(own)


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one type, in their order, up to a size that is worth a message."""
    for _, alike in groupby(gradients, key=lambda each: each.dtype):
        bucket, size = [], 0
        for each in alike:
            if bucket and size + each.numel() > BUCKET:
                yield bucket
                bucket, size = [], 0
            bucket.append(each)
            size += each.numel()
        yield bucket
