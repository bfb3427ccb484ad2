"""Reading the bit that was written last, past any number of distractors."""

from collections.abc import Sequence
from random import Random

from lookfar.errors import UserError
from lookfar.tasks.base import Example, Task
from lookfar.tasks.wording import check_length


class FlipFlop(Task):
    """Reads the bit that was written last; the length is the number of instructions, of which the last is `r`, read.

    `w 1` writes a bit and `i 0` is to be ignored; reads in between give what was written. The first instruction writes;
    any other is ignored with the probability `ignored`, else it writes or reads. Source: Liu et al., 2023, "Exposing
    Attention Glitches with Flip-Flop Language Modeling", arXiv 2306.00946.
    """

    trained = range(5, 33)
    tested = range(33, 65)
    chance = 0.5

    def __init__(self, *, ignored: float = 0.8) -> None:
        if not 0 <= ignored <= 1:
            raise UserError(f"flip_flop(ignored={ignored}) is no probability; take 0 to 1.")
        self.ignored = ignored

    @property
    def symbols(self) -> Sequence[str]:
        return ("w", "i", "r", "0", "1")

    def example(self, length: int, random: Random) -> Example:
        check_length("flip_flop", length, 2)
        odds = (self.ignored, (1 - self.ignored) / 2, (1 - self.ignored) / 2)
        return self.problem(
            "w" + "".join(random.choices("iwr", odds, k=length - 2)), random.choices("01", k=length - 1)
        )

    def problem(self, instructions: str, bits: Sequence[str]) -> Example:
        """The problem of all instructions but the last; the bit of one that reads is what was written before."""
        written, stored = [], ""
        for instruction, bit in zip(instructions, bits, strict=True):
            stored = bit if instruction == "w" else stored
            written.append(f"{instruction} {stored if instruction == 'r' else bit}")
        return Example(f"{' '.join(written)} r ", stored, stored)

    def answer(self, target: str) -> str | None:
        return target.strip() or None
