"""What models are looked at on: inputs of one number of tokens, windows of a text or held-out problems of a task."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from lookfar.analysis.base import Row
from lookfar.config import Run
from lookfar.errors import UserError
from lookfar.evaluation.base import Text
from lookfar.tasks.problems import Problems
from lookfar.training.evaluate import from_file, held_out
from lookfar.training.problems import lengths as lengths_of
from lookfar.training.problems import problems_of

SAMPLE = 256  # problems of a length among which those of as many tokens are looked for


@dataclass(frozen=True)
class Inputs:
    """Some inputs of as many tokens."""

    label: str
    tokens: Sequence[Int[Tensor, "1 t"]]
    about: Row = field(default_factory=dict)  # what their rows say of them

    @property
    def length(self) -> int:
        """Tokens of each."""
        return self.tokens[0].shape[1]


def inputs_of(
    folder: Path, run: Run, *, lengths: Sequence[int] | None, count: int, text: Path | None, farthest: int | None
) -> list[Inputs]:
    """What a run is looked at on, at each length: tokens of windows, or the lengths of problems.

    Args:
        lengths: by default what was trained, and twice that where the model can number it, or the longest problems.
        count: how many inputs, at most.
        text: a UTF-8 file in place of the run's own held-out text.
        farthest: how many positions the models have; None: any.
    """
    if run.task.name is not None:
        if text is not None:
            raise UserError(f"{folder} was trained on a task and reads its problems alone; leave {text} out.")
        return _of_task(run, lengths, count, farthest)
    found = held_out(folder, run.data, run.evaluation.split) if text is None else from_file(folder, text)
    context, tokens = run.model.context, len(found.tokens)
    twice = [context, 2 * context] if 2 * context <= min(farthest or tokens, tokens) else [context]
    return [Inputs(found.label, _windows(found, length, count)) for length in lengths or twice]


def _of_task(run: Run, lengths: Sequence[int] | None, count: int, farthest: int | None) -> list[Inputs]:
    problems = problems_of(run.task)
    longest = max(lengths_of(run, problems))
    if lengths is None and farthest is not None and problems.tokens(longest) - 1 > farthest:
        longest = problems.longest_trained
    wanted = dict.fromkeys(lengths or sorted({problems.longest_trained, longest}))
    found = [Inputs(problems.label, _solved(problems, each, count), {"problems": each}) for each in wanted]
    sizes = {each.length: each.about["problems"] for each in found}
    for each in found:
        if sizes[each.length] != each.about["problems"]:
            raise UserError(
                f"Problems of length {each.about['problems']} and {sizes[each.length]} have {each.length} tokens "
                "alike; ask for one of them."
            )
    return found


def _solved(problems: Problems, length: int, count: int) -> list[Int[Tensor, "1 t"]]:
    """The inputs of held-out problems with their right solutions: of those with as many tokens, the first ones.

    They have the most tokens that `count` problems share, or else the commonest number of them.
    """
    some = [each.encoded.tokens[:-1] for each in problems.measured(length, SAMPLE)]  # the last token is no input
    if not some:
        raise UserError(f"{problems.label} has no problem of length {length} that is not trained on; ask for another.")
    sizes = Counter(map(len, some))
    enough = [size for size, found in sizes.items() if found >= count]
    wanted = max(enough) if enough else max(sizes, key=lambda size: (sizes[size], size))
    return [torch.from_numpy(each)[None] for each in some if len(each) == wanted][:count]


def _windows(text: Text, length: int, count: int) -> list[Int[Tensor, "1 t"]]:
    """At most `count` windows of the text, evenly apart, none overlapping another."""
    room = len(text.tokens) // length
    if not room:
        raise UserError(
            f"{text.label} has {len(text.tokens):,} tokens, fewer than one input of {length:,}; ask for a shorter one."
        )
    starts = np.linspace(0, len(text.tokens) - length, min(count, room)).astype(int)
    places = [np.arange(start, start + length) for start in starts]
    return [torch.from_numpy(text.tokens[each].astype(np.int64))[None] for each in places]
