"""Addition of two numbers: plain, with reversed digits, padded, or with index hints."""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import zip_longest
from random import Random
from string import digits
from typing import Literal

from lookfar.errors import UserError
from lookfar.tasks.base import Example, LaterSteps, Step, Task
from lookfar.tasks.symbols import words
from lookfar.tasks.wording import check_length, spell, stated

HINTS = 256


class Addition(Task):
    """Adds two numbers; the length is the number of digits of the longer one.

    Without settings it is the split `len_tr8_ts16` of Kazemnejad et al., 2023, arXiv 2305.19466. `order=reversed`
    writes every number from its least significant digit on, `order=reversed_answer` only the answer (Lee et al., 2023,
    arXiv 2307.03381). `padded` fills the numbers of a problem with zeros: operands to the length, the answer to one
    digit more. `hints` writes a mark before each digit, the same for digits of the same significance, ascending in the
    plain number from a random one on (Zhou et al., 2023, arXiv 2310.16028); the same numbers with other hints are
    another problem, and hints in what a model writes are not scored.

    The digits of the two operands are drawn together: each of the pairs whose longer number has this length is as
    likely, so that lengths 1 to 8 are 64 bins and lengths 9 to 16 are 192.
    """

    trained = range(1, 9)
    tested = range(9, 17)

    def __init__(
        self,
        *,
        order: Literal["plain", "reversed", "reversed_answer"] = "plain",
        padded: bool = False,
        hints: bool = False,
    ) -> None:
        self.order = order
        self.padded = padded
        self.hints = hints

    @property
    def symbols(self) -> Sequence[str]:
        hints = (f"h{each}" for each in range(HINTS)) if self.hints else ()
        return words(*digits, "Compute + ? The answer is . , = carry:", *hints)

    def bins(self, length: int) -> list[tuple[int, int]]:
        """The digits of both operands in problems of this length."""
        return [_bin(length, each) for each in range(2 * length - 1)]

    def example(self, length: int, random: Random) -> Example:
        check_length("addition", length, 1)
        first, second = (_number(each, random) for each in _bin(length, random.randrange(2 * length - 1)))
        if self.hints and length >= HINTS:
            raise UserError(f"addition(hints=true) has {HINTS} hints and no problem of length {length}.")
        return self.problem(first, second, random.randrange(HINTS - length) if self.hints else 0)

    def problem(self, first: str, second: str, start: int = 0) -> Example:
        """The problem of two numbers in decimal digits; hints begin with the `start`th."""
        width = max(len(first), len(second))
        total, steps = _sum(first, second), LaterSteps(partial(_steps, first, second))
        if self.padded:
            first, second = first.zfill(width), second.zfill(width)
        written = total.zfill(width + 1) if self.padded else total
        operands = [self._write(each, self.order == "reversed", start + width) for each in (first, second)]
        answer = self._write(written, self.order != "plain", start + width)
        return Example(f"Compute {operands[0]} + {operands[1]} ? ", f"The answer is {answer}.", total, steps)

    def answer(self, target: str) -> str | None:
        found = re.sub(r"h\d+|\s" if self.hints else r"\s", "", stated(target) or "")
        if not re.fullmatch("[0-9]+", found):
            return None
        plain = found if self.order == "plain" else found[::-1]
        return plain.lstrip("0") or "0"

    def _write(self, number: str, backwards: bool, units: int) -> str:
        """The digits of a number; the hint of its units is the `units`th."""
        written = list(number)
        if self.hints:
            written = [f"h{units - len(number) + 1 + place} {digit}" for place, digit in enumerate(number)]
        return " ".join(reversed(written) if backwards else written)


def _number(length: int, random: Random) -> str:
    """A number of exactly this many digits; 0 has one."""
    first = random.choice(digits if length == 1 else digits[1:])
    return first + "".join(random.choices(digits, k=length - 1))


def _bin(length: int, place: int) -> tuple[int, int]:
    """The digits of both operands in one of the 2n - 1 bins of a length n."""
    return (length, place + 1) if place < length else (place - length + 1, length)


def _columns(first: str, second: str) -> Iterator[tuple[int, int]]:
    """The digits of both numbers from the right."""
    return zip_longest(map(int, reversed(first)), map(int, reversed(second)), fillvalue=0)


def _sum(first: str, second: str) -> str:
    carry, written = 0, []
    for one, other in _columns(first, second):
        carry, digit = divmod(one + other + carry, 10)
        written.append(str(digit))
    return "".join(reversed([*written, "1"] if carry else written))


def _steps(first: str, second: str) -> Iterator[Step]:
    """One for each column from the right, and one for a carry that is left."""
    carry = 0
    for done, (one, other) in enumerate(_columns(first, second), start=1):
        left = " + ".join(spell(each[: max(0, len(each) - done)].lstrip("0")) for each in (first, second))
        yield _step(one, other, carry, left)
        carry = (one + other + carry) // 10
    if carry:
        yield _step(0, 0, carry, " + ")


def _step(one: int, other: int, carry: int, left: str) -> Step:
    total = one + other + carry
    return Step(
        input=f"{one}, {other}",
        computation=f"{one} + {other} + carry = {one + other} + {carry} = {total}",
        output=str(total % 10),
        variables=(f"carry: {total // 10}",),
        remaining=left,
    )
