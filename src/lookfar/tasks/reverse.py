"""Reversing a sequence of symbols, in three variants."""

from collections.abc import Sequence
from random import Random
from typing import Literal

from lookfar.tasks.base import Example, Task
from lookfar.tasks.symbols import SYMBOLS, words
from lookfar.tasks.wording import NEXT, SEPARATOR, check_length


class Reverse(Task):
    """Writes a sequence of symbols from its end; the length is the number of symbols, each any of 100.

    The splits of Kazemnejad et al., 2023, arXiv 2305.19466, are `once` (`mc`), `twice` (`mc2x`: the same again,
    `[NEXT]` between) and `and_back` (`mcrv`: the original follows).
    """

    trained = range(2, 21)
    tested = range(21, 41)

    def __init__(self, *, variant: Literal["once", "twice", "and_back"] = "once") -> None:
        self.variant = variant

    @property
    def symbols(self) -> Sequence[str]:
        return words(*SYMBOLS, "Reverse:", SEPARATOR, NEXT)

    def example(self, length: int, random: Random) -> Example:
        check_length("reverse", length, 1)
        return self.problem(random.choices(SYMBOLS, k=length))

    def problem(self, symbols: Sequence[str]) -> Example:
        """The problem of these symbols."""
        source, reversed_source = " ".join(symbols), " ".join(reversed(symbols))
        after = {"once": "", "twice": f" {NEXT} {reversed_source}", "and_back": f" {NEXT} {source}"}[self.variant]
        written = reversed_source + after
        return Example(f"Reverse: {source} {SEPARATOR}", written, written)

    def answer(self, target: str) -> str | None:
        return target.strip() or None
