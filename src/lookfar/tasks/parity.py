"""Telling whether the number of ones among bits is even."""

from collections.abc import Iterator, Sequence
from functools import partial
from random import Random

from lookfar.tasks.base import Example, LaterSteps, Step, Task
from lookfar.tasks.symbols import words
from lookfar.tasks.wording import check_length, stated


class Parity(Task):
    """Tells whether the number of ones is even; the length is the number of bits.

    Split `len_tr8_ts16` of `s2s_parity` of Kazemnejad et al., 2023, arXiv 2305.19466. In its scratchpad `**` stands for
    the exclusive or.
    """

    trained = range(4, 9)
    tested = range(9, 17)
    chance = 0.5

    @property
    def symbols(self) -> Sequence[str]:
        return words("0", "Is the number of 1's even in the sequence [ , ] ? The answer is Yes No . ** par = :")

    def example(self, length: int, random: Random) -> Example:
        check_length("parity", length, 1)
        return self.problem([random.randrange(2) for _ in range(length)])

    def problem(self, bits: Sequence[int]) -> Example:
        """The problem of these bits."""
        answer = "No" if sum(bits) % 2 else "Yes"
        problem = f"Is the number of 1's even in the sequence [ {', '.join(map(str, bits))} ] ? "
        return Example(problem, f"The answer is {answer}.", answer, LaterSteps(partial(_steps, bits)))

    def answer(self, target: str) -> str | None:
        return (stated(target) or "").capitalize() or None


def _steps(bits: Sequence[int]) -> Iterator[Step]:
    parity = 0
    for place, bit in enumerate(bits):
        after = bit ^ parity
        yield Step(
            input=str(bit),
            computation=f"{bit} ** par = {bit} ** {parity}",
            output=str(after),
            variables=(f"par: {after}",),
            remaining=f"[ {', '.join(map(str, bits[place + 1 :]))} ]",
        )
        parity = after
