"""Counting how often a symbol stands in a list."""

from collections.abc import Sequence
from random import Random
from string import ascii_lowercase, digits

from lookfar.errors import UserError
from lookfar.tasks.base import Example, Task
from lookfar.tasks.symbols import words
from lookfar.tasks.wording import check_length, spell, stated_number


class Counting(Task):
    """Tells how often a letter stands in a list, modulo a number; the length is that of the list.

    Counting is one of the operations studied by Zhou et al., 2023, arXiv 2310.16028. Every answer that a length allows
    is as likely, so that from length `modulo` - 1 on a constant guess is right once in `modulo` times.
    """

    trained = range(2, 21)
    tested = range(21, 41)

    def __init__(self, *, modulo: int = 10) -> None:
        if modulo < 2:
            raise UserError(f"counting(modulo={modulo}) has one answer only; take at least 2.")
        self.modulo = modulo
        self.chance = 1 / min(modulo, min(self.tested) + 1)

    @property
    def symbols(self) -> Sequence[str]:
        return words(*digits, *ascii_lowercase, "How many are in [ , ] ? The answer is .")

    def example(self, length: int, random: Random) -> Example:
        check_length("counting", length, 1)
        rest = random.randint(0, min(length, self.modulo - 1))
        count = random.choice(range(rest, length + 1, self.modulo))
        asked, *others = random.sample(ascii_lowercase, 26)
        items = [asked] * count + random.choices(others, k=length - count)
        random.shuffle(items)
        return self.problem(items, asked)

    def problem(self, items: Sequence[str], asked: str) -> Example:
        """The problem of a list of letters and the letter that is asked for."""
        count = sum(item == asked for item in items) % self.modulo
        problem = f"How many {asked} are in [ {', '.join(items)} ] ? "
        return Example(problem, f"The answer is {spell(count)}.", str(count))

    def answer(self, target: str) -> str | None:
        return stated_number(target)
