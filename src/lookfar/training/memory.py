"""What to do where memory does not hold a piece of a batch: stop with advice, or go on in smaller pieces."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lookfar.config import Run
from lookfar.errors import UserError
from lookfar.training.processes import Processes

TEXTS = ("DefaultCPUAllocator", "out of memory", "ALLOC_FAILED")  # of a CPU, of MPS, of cuBLAS and cuDNN


class Pieces:
    """How many pieces a batch is computed in, `accumulation`: more where one of them was too large.

    An update that ran out of memory is done again from its start, gradients and random generators included, so that
    it ends as if it had been computed in the smaller pieces at once. Several processes divide every piece; what is
    too large for one of them is so for all.
    """

    def __init__(self, model: nn.Module, run: Run, processes: Processes) -> None:
        self.model, self.run, self.processes = model, run, processes
        self.lines = run.training.batch // processes.count  # of a batch, for this process
        self.accumulation = run.training.accumulation

    def go_on_with(self, accumulation: int) -> None:
        """Take the count of an earlier start, or the next above it that divides the lines of this process."""
        self.accumulation = next(
            (count for count in range(accumulation, self.lines + 1) if self.lines % count == 0), self.lines
        )

    def compute(self, update: int, gradients: Callable[[int], float], note: Callable[[dict[str, Any]], None]) -> float:
        """The loss of an update from `gradients(accumulation)`, which adds them up; `note` is told of smaller pieces.

        Raises:
            UserError: memory does not hold a piece, and training.on_out_of_memory is "stop" or the piece is one line.
        """
        while True:
            random = torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None
            more = self._more()
            stop = self.run.training.on_out_of_memory == "stop"
            try:
                loss = gradients(self.accumulation)
            except (RuntimeError, MemoryError) as error:
                if not _is_of_memory(error):
                    raise
                self._agree(failed=True)
                if stop or more is None:
                    raise UserError(self._advice(update, more)) from error
            else:
                if not self._agree(failed=False):
                    return loss
                if stop or more is None:
                    raise UserError(self._advice(update, more))
            # outside of the handler, so that nothing of the failed piece is held
            self.model.zero_grad()
            torch.set_rng_state(random[0])
            if random[1] is not None:
                torch.cuda.set_rng_state(random[1])
                torch.cuda.empty_cache()
            self.accumulation = more
            told = f"Update {update + 1} ran out of memory; from it on a batch is computed in {more} pieces."
            note({"update": update + 1, "accumulation": more, "note": told})

    def _more(self) -> int | None:
        """Twice as many pieces, or the next count that divides the lines; None: a piece is one line already."""
        least = 2 * self.accumulation
        return next((count for count in range(least, self.lines + 1) if self.lines % count == 0), None)

    def _agree(self, *, failed: bool) -> bool:
        """Whether any process failed; those of a sharded model cannot ask, and stop with the one that did."""
        if self.run.training.parallel == "sharded":
            return failed
        return bool(self.processes.largest(int(failed)))

    def _advice(self, update: int, more: int | None) -> str:
        lines, context = self.lines // self.accumulation, self.run.model.context
        ran = f"Update {update + 1} ran out of memory at {lines} × {context} tokens at once"
        if more is None:
            return f"{ran}, which is one line; take a shorter model.context, or a smaller model."
        return (
            f"{ran}; set training.on_out_of_memory='halve' and the same command goes on in smaller pieces, "
            f"or begin anew with training.accumulation={more}. Both give the same result."
        )


def _is_of_memory(error: BaseException) -> bool:
    """Not every allocator has an error of its own; some have a text only."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(each in str(error) for each in TEXTS)
