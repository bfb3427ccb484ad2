"""The problems of a run: a task, its split, its vocabulary and the form in which a model reads and writes them."""

from collections.abc import Sequence
from dataclasses import dataclass

from lookfar import plugins
from lookfar.errors import UserError
from lookfar.tasks.base import Example, Task
from lookfar.tasks.encoding import Encoded, correct, encode, vocabulary_of
from lookfar.tasks.scratchpad import Scratchpad
from lookfar.tasks.sets import PATIENCE, Split

SAMPLE = 256  # problems of a length, at least, that are looked at for its longest


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
        examples: how many problems of a length will be measured.
    """

    def __init__(
        self,
        expression: str,
        *,
        lengths: Sequence[int] | None = None,
        scratchpad: str | None = None,
        bos: bool = True,
        held_out: float = 0.1,
        examples: int = SAMPLE,
    ) -> None:
        terms = plugins.parse(expression)
        if len(terms) != 1:
            raise UserError(f"{expression!r} names {len(terms)} tasks; a run is trained on one.")
        self.task: Task = plugins.build("tasks", terms[0])
        self.scratchpad = None if scratchpad is None else Scratchpad(scratchpad)
        self.bos = bos
        self.examples = examples
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

        A problem of more than `context` inputs is not cut off but drawn anew; at the door a run is refused where one in
        a few hundred is so long. What is measured is never drawn anew.

        Raises:
            UserError: none is short enough.
        """
        for draw in range(PATIENCE):
            found = self._encode(self.split.trained(seed, index, draw), checked=False)
            if context is None or len(found.tokens) <= context + 1:  # the last token is no input
                return found
        raise UserError(f"No problem of {self.label} fits into {context} tokens; set model.context higher.")

    def measured(self, length: int, count: int) -> list[Problem]:
        """Up to `count` problems of a length that are never trained on."""
        return [Problem(each, self._encode(each)) for each in self.split.measured(length, count)]

    def tokens(self, length: int) -> int:
        """The most tokens that a problem of this length has, among all that will be measured and a few more."""
        if length not in self._tokens:
            some = self.split.measured(length, max(SAMPLE, self.examples))
            if not some:
                raise UserError(
                    f"{self.label} has no problem of length {length} that is not trained on; leave the length out."
                )
            self._tokens[length] = max(
                len(self._encode(each, checked=place < SAMPLE).tokens) for place, each in enumerate(some)
            )
        return self._tokens[length]

    def correct(self, problem: Problem, written: str) -> bool:
        """Whether what was written has the right answer."""
        return correct(self.task, problem.example, written, self.scratchpad)

    def _encode(self, example: Example, *, checked: bool = True) -> Encoded:
        return encode(self.task, example, self.vocabulary, scratchpad=self.scratchpad, bos=self.bos, checked=checked)
