"""Sorting a list of symbols or of numbers."""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from random import Random
from string import digits
from typing import Literal

from lookfar.tasks.base import Example, LaterSteps, Step, Task
from lookfar.tasks.symbols import SYMBOLS, words
from lookfar.tasks.wording import check_length, spell

ORDERED = SYMBOLS[:50]  # 0-9, a-z, A-N: their order is this one


class Sort(Task):
    """Sorts a list, in which items may repeat; the length is the number of items.

    The splits of Kazemnejad et al., 2023, arXiv 2305.19466, are `digits="single"` (`len_sngd_tr8_ts16`: any of 50
    symbols, in a fixed order) and `digits="multi"` (`len_mltd_tr8_ts16`: numbers 10 to 9999). The steps of its
    scratchpad, which have no variables, exchange the first unsorted item for the least one.
    """

    trained = range(2, 9)
    tested = range(9, 17)

    def __init__(self, *, digits: Literal["single", "multi"] = "single") -> None:
        self.digits = digits

    @property
    def symbols(self) -> Sequence[str]:
        items = ORDERED if self.digits == "single" else digits
        return words(*items, "Sort the following list [ , ]. The sorted list is minimum of unsorted portion")

    def example(self, length: int, random: Random) -> Example:
        check_length("sort", length, 1)
        if self.digits == "single":
            return self.problem(random.choices(ORDERED, k=length))
        return self.problem([str(random.randint(10, 9999)) for _ in range(length)])

    def problem(self, items: Sequence[str]) -> Example:
        """The problem of these items: symbols, or numbers in decimal digits."""
        rank = ORDERED.index if self.digits == "single" else int
        ranked = [(rank(item), spell(item)) for item in items]
        answer = _list(sorted(ranked))
        problem = f"Sort the following list [ {_list(ranked)} ]. "
        return Example(problem, f"The sorted list is [ {answer} ].", answer, LaterSteps(partial(_steps, ranked)))

    def answer(self, target: str) -> str | None:
        found = re.findall(r"The sorted list is\s*\[([^\]]*)\]", target)
        return ", ".join(" ".join(item.split()) for item in found[-1].split(",")) if found else None


def _steps(ranked: Sequence[tuple[int, str]]) -> Iterator[Step]:
    rest = [*ranked]
    while rest:
        head, least = rest[0], min(rest)
        rest[rest.index(least)] = head
        del rest[0]
        yield Step(
            input=head[1],
            computation="The minimum of the unsorted portion",
            output=least[1],
            remaining=f"[ {_list(rest)} ]",
        )


def _list(ranked: Sequence[tuple[int, str]]) -> str:
    return ", ".join(item for _, item in ranked)
