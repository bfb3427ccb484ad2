"""Recalling the values of several keys out of many pairs."""

from collections.abc import Sequence
from random import Random

from lookfar.errors import UserError
from lookfar.tasks.base import Example, Task
from lookfar.tasks.symbols import words
from lookfar.tasks.wording import SEPARATOR, check_length


class MultiQueryRecall(Task):
    """Recalls the values of keys; the length is the number of pairs of a key and a value.

    Multi-query associative recall, MQAR (Arora et al., 2023, "Zoology", arXiv 2312.04927): keys differ, values may
    repeat, and up to `queries` of the keys are asked for in any order. Lengths end at the number of `keys`.
    """

    trained = range(4, 17)
    tested = range(17, 33)

    def __init__(self, *, keys: int = 160, values: int = 40, queries: int = 4) -> None:
        if min(keys, values, queries) < 1:
            raise UserError(f"multi_query_recall needs keys ({keys}), values ({values}) and queries ({queries}).")
        self.keys = keys
        self.values = values
        self.queries = queries
        self.chance = values ** -float(queries)

    @property
    def symbols(self) -> Sequence[str]:
        keys, values = (f"k{each}" for each in range(self.keys)), (f"v{each}" for each in range(self.values))
        return words("Given recall", SEPARATOR, *keys, *values)

    def example(self, length: int, random: Random) -> Example:
        check_length("multi_query_recall", length, 1)
        if length > self.keys:
            raise UserError(f"multi_query_recall has {self.keys} keys and no problem of length {length}; raise `keys`.")
        keys = random.sample(range(self.keys), length)
        pairs = {f"k{key}": f"v{random.randrange(self.values)}" for key in keys}
        return self.problem(pairs, random.sample(list(pairs), min(self.queries, length)))

    def problem(self, pairs: dict[str, str], asked: Sequence[str]) -> Example:
        """The problem of these pairs and of the keys that are asked for."""
        told = " ".join(f"{key} {value}" for key, value in pairs.items())
        written = " ".join(pairs[key] for key in asked)
        return Example(f"Given {told} recall {' '.join(asked)} {SEPARATOR}", written, written)

    def answer(self, target: str) -> str | None:
        return target.strip() or None
