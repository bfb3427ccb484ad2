"""The problems of a run: a task, its split, its vocabulary and the form in which a model reads and writes them."""

from collections.abc import Sequence
from dataclasses import dataclass

from lookfar import plugins
from lookfar.errors import UserError
from lookfar.tasks.base import Example, Task
from lookfar.tasks.encoding import Encoded, correct, encode, vocabulary_of
from lookfar.tasks.scratchpad import Scratchpad
from lookfar.tasks.sets import Split

SAMPLE = 256  # problems of a length that are looked at for its longest


@dataclass(frozen=True)
class Problem:
    """An example and its tokens."""

    example: Example
    encoded: Encoded


class Problems:
    """A task as a model is trained on it and measured by it.

    Args:
        expression: the task, such as `addition(order=reversed)`.
        lengths: those that are trained on; None: the task's own.
        scratchpad: the parts of the steps that are written before the answer; None: the answer alone.
        bos: whether every problem begins with the same token.
        held_out: the part of the problems of the trained lengths that is kept for measuring.
    """

    def __init__(
        self,
        expression: str,
        *,
        lengths: Sequence[int] | None = None,
        scratchpad: str | None = None,
        bos: bool = True,
        held_out: float = 0.1,
    ) -> None:
        terms = plugins.parse(expression)
        if len(terms) != 1:
            raise UserError(f"{expression!r} names {len(terms)} tasks; a run is trained on one.")
        self.task: Task = plugins.build("tasks", terms[0])
        self.scratchpad = None if scratchpad is None else Scratchpad(scratchpad)
        self.bos = bos
        self.split = Split(self.task, lengths, held_out=held_out)
        self.vocabulary = vocabulary_of(self.task, self.scratchpad)
        self._tokens: dict[int, int] = {}  # of the longest problem of a length
        self.name = str(terms[0]) + ", no bos" * (not bos)
        self.label = self.name + f", scratchpad={scratchpad}" * (scratchpad is not None)

    @property
    def longest_trained(self) -> int:
        """The longest length that is trained on."""
        return max(self.split.lengths)

    def trained(self, seed: int, index: int, *, context: int | None = None) -> Encoded:
        """The tokens of problem number `index` of the endless training of a seed.

        Raises:
            UserError: it is longer than `context` inputs; nothing is cut off.
        """
        return self._encode(self.split.trained(seed, index), context)

    def measured(self, length: int, count: int) -> list[Problem]:
        """Up to `count` problems of a length that are never trained on."""
        return [Problem(each, self._encode(each, None)) for each in self.split.measured(length, count)]

    def tokens(self, length: int) -> int:
        """The most tokens that a problem of this length has among a few."""
        if length not in self._tokens:
            some = self.measured(length, SAMPLE) or [_none(length, self.label)]
            self._tokens[length] = max(len(each.encoded.tokens) for each in some)
        return self._tokens[length]

    def correct(self, problem: Problem, written: str) -> bool:
        """Whether what was written has the right answer."""
        return correct(self.task, problem.example, written, self.scratchpad)

    def _encode(self, example: Example, context: int | None) -> Encoded:
        limit = None if context is None else context + 1  # the last token is no input
        return encode(self.task, example, self.vocabulary, scratchpad=self.scratchpad, bos=self.bos, context=limit)


def _none(length: int, label: str) -> Problem:
    raise UserError(f"{label} has no problem of length {length} that is not trained on; leave the length out.")
