"""Copying a sequence of symbols, in five variants."""

from collections.abc import Sequence
from random import Random
from typing import Literal

from lookfar.tasks.base import Example, Task
from lookfar.tasks.symbols import SYMBOLS, words
from lookfar.tasks.wording import NEXT, SEPARATOR, check_length


class Copy(Task):
    """Writes a sequence of symbols again; the length is the number of symbols.

    The splits of Kazemnejad et al., 2023, arXiv 2305.19466, are `mixed` (`cmc_tr20_ts40`: any of 100 symbols),
    `mixed_twice` (`cmc2x_tr20_ts40`: the copy twice, `[NEXT]` between), `repeated` (`rsc_tr20_ts40`: one symbol many
    times), `repeated_twice` (`rsc2x_tr20_ts40`: twice as many times) and `replaced` (`rdc_tr20_ts40`: one symbol many
    times, another written for it). Their symbols come from the vocabulary of T5, up to 6,052 where one is repeated;
    these are 100 of our own, so that a length has 100 problems of one repeated symbol, and 9,900 of one replaced.
    """

    trained = range(2, 21)
    tested = range(21, 41)

    def __init__(
        self, *, variant: Literal["mixed", "mixed_twice", "repeated", "repeated_twice", "replaced"] = "mixed"
    ) -> None:
        self.variant = variant

    @property
    def symbols(self) -> Sequence[str]:
        return words(*SYMBOLS, "Copy: Replace with in", SEPARATOR, NEXT)

    def example(self, length: int, random: Random) -> Example:
        check_length("copy", length, 1)
        if self.variant.startswith("mixed"):
            return self.problem(random.choices(SYMBOLS, k=length))
        symbol, other = random.sample(SYMBOLS, 2)
        return self.problem([symbol] * length, other)

    def problem(self, symbols: Sequence[str], other: str = "") -> Example:
        """The problem of these symbols; `other` is written for each of them where they are `replaced`."""
        source = " ".join(symbols)
        if self.variant == "replaced":
            written = " ".join([other] * len(symbols))
            return Example(f"Replace {symbols[0]} with {other} in {source} {SEPARATOR}", written, written)
        twice = {"mixed_twice": f"{source} {NEXT} {source}", "repeated_twice": f"{source} {source}"}
        written = twice.get(self.variant, source)
        return Example(f"Copy: {source} {SEPARATOR}", written, written)

    def answer(self, target: str) -> str | None:
        return target.strip() or None
