"""Evaluating a polynomial, modulo 10."""

from collections.abc import Iterator, Sequence
from functools import partial
from random import Random
from string import digits

from lookfar.tasks.base import Example, LaterSteps, Step, Task
from lookfar.tasks.symbols import words
from lookfar.tasks.wording import check_length, spell, stated_number


class Polynomial(Task):
    """Evaluates a polynomial, modulo 10; the length is the number of terms.

    Split `n_terms_tr8_ts16` of Kazemnejad et al., 2023, arXiv 2305.19466: coefficients -3 to 3, degrees 0 to 3, x from
    -2 to 2, and 0 ** 0 is 1. Answers are not evenly spread: the best constant
    guess is right in 0.12 of problems of 9 terms, in 0.104 of 16, in 0.271 of one.
    """

    trained = range(1, 9)
    tested = range(9, 17)
    chance = 0.11

    @property
    def symbols(self) -> Sequence[str]:
        return words(*digits, "Evaluate at x = - in * + ? The answer is . sum:")

    def example(self, length: int, random: Random) -> Example:
        check_length("polynomial", length, 1)
        terms = [(random.randint(-3, 3), random.randint(0, 3)) for _ in range(length)]
        return self.problem(random.randint(-2, 2), terms)

    def problem(self, x: int, terms: Sequence[tuple[int, int]]) -> Example:
        """The problem of these terms, each a coefficient and a degree."""
        total = sum(coefficient * x**degree for coefficient, degree in terms) % 10
        problem = f"Evaluate at x = {spell(x)} in {' + '.join(map(_written, terms))} ? "
        return Example(problem, f"The answer is {total}.", str(total), LaterSteps(partial(_steps, x, terms)))

    def answer(self, target: str) -> str | None:
        return stated_number(target)


def _written(term: tuple[int, int]) -> str:
    coefficient, degree = term
    return f"{spell(coefficient)} * x ** {degree}"


def _steps(x: int, terms: Sequence[tuple[int, int]]) -> Iterator[Step]:
    total = 0
    for place, (coefficient, degree) in enumerate(terms):
        power, value, factor = x**degree, coefficient * x**degree, spell(coefficient)
        after = (total + value) % 10
        yield Step(
            input=_written(terms[place]),
            computation=f"{factor} * {spell(x)} ** {degree} = {factor} * {spell(power)}",
            output=spell(value),
            variables=(f"sum: {total} + {spell(value)} = {after}",),
            remaining=" + ".join(map(_written, terms[place + 1 :])),
        )
        total = after
