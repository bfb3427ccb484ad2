"""Adding up many digits, modulo 10."""

from collections.abc import Iterator, Sequence
from functools import partial
from random import Random
from string import digits

from lookfar.tasks.base import Example, LaterSteps, Step, Task
from lookfar.tasks.symbols import words
from lookfar.tasks.wording import SEPARATOR, check_length, spell, stated_number


class Summation(Task):
    """Adds up single digits, modulo 10; the length is their number.

    Split `len_tr8_ts16` of `s2s_sum` of Kazemnejad et al., 2023, arXiv 2305.19466: each digit is 1 to 9.
    """

    trained = range(2, 9)
    tested = range(9, 17)
    chance = 0.1

    @property
    def symbols(self) -> Sequence[str]:
        return words(*digits, "Compute: + .", SEPARATOR, "The answer is sum =")

    def example(self, length: int, random: Random) -> Example:
        check_length("summation", length, 1)
        return self.problem([random.randint(1, 9) for _ in range(length)])

    def problem(self, terms: Sequence[int]) -> Example:
        """The problem of these digits."""
        total = sum(terms) % 10
        problem = f"Compute: {' + '.join(map(str, terms))} .{SEPARATOR}"
        return Example(problem, f"The answer is {total} .", str(total), LaterSteps(partial(_steps, terms)))

    def answer(self, target: str) -> str | None:
        return stated_number(target)


def _steps(terms: Sequence[int]) -> Iterator[Step]:
    total = 0
    for place, term in enumerate(terms):
        output, after = term + total, (term + total) % 10
        yield Step(
            input=str(term),
            computation=f"{term} + sum = {term} + {total} =",
            output=spell(output),
            variables=(f"sum: {spell(output)} = {after}",),
            remaining=" + ".join(map(str, terms[place + 1 :])),
        )
        total = after
