"""Telling which bracket closes next."""

from collections.abc import Sequence
from random import Random

from lookfar.errors import UserError
from lookfar.tasks.base import Example, Task
from lookfar.tasks.symbols import words
from lookfar.tasks.wording import SEPARATOR, check_length

BRACKETS = (("(", ")"), ("[", "]"), ("{", "}"), ("<", ">"))


class Dyck(Task):
    """Names the bracket that closes what is still open; the length is the number of brackets.

    The language is Dyck-(k, m): k kinds of brackets, never more than m open at once (Hewitt et al., 2020, arXiv
    2010.07515; Yao et al., 2021, arXiv 2105.11115). The last bracket always closes, so that the one that matters is not
    the last.
    """

    trained = range(3, 21)
    tested = range(21, 41)

    def __init__(self, *, kinds: int = 4, depth: int = 8) -> None:
        if not 2 <= kinds <= len(BRACKETS):
            raise UserError(f"dyck(kinds={kinds}) is not possible; there are 2 to {len(BRACKETS)} kinds of brackets.")
        if depth < 3:
            raise UserError(f"dyck(depth={depth}) leaves nothing to remember; take at least 3.")
        self.kinds = kinds
        self.depth = depth
        self.chance = 1 / kinds

    @property
    def symbols(self) -> Sequence[str]:
        return words("Close:", SEPARATOR, *(each for pair in BRACKETS for each in pair))

    def example(self, length: int, random: Random) -> Example:
        check_length("dyck", length, 3)
        written, expected = [], []
        for left in range(length - 1, -1, -1):  # brackets after this one
            must_close = left == 0 or len(expected) == self.depth
            may_close = bool(expected) and len(expected) - 1 + left - 1 >= 2  # the last one closes, and one stays open
            if must_close or (may_close and random.random() < 0.5):
                written.append(expected.pop())
            else:
                start, end = random.choice(BRACKETS[: self.kinds])
                written.append(start)
                expected.append(end)
        return self.problem(written)

    def problem(self, brackets: Sequence[str]) -> Example:
        """The problem of these brackets, of which at least one is open."""
        ends, expected = dict(BRACKETS), []
        for each in brackets:
            if each in ends:
                expected.append(ends[each])
            else:
                assert expected.pop() == each
        return Example(f"Close: {' '.join(brackets)} {SEPARATOR}", expected[-1], expected[-1])

    def answer(self, target: str) -> str | None:
        return target.strip() or None
