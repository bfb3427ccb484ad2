"""Numbers the tokens of problems by their digits, by name: `abacus(largest=100)`, `coupled(largest=100)`."""

from collections.abc import Callable, Sequence
from inspect import Parameter
from string import digits
from typing import Annotated

import numpy as np
from annotated_types import Ge
from jaxtyping import Int64

from lookfar import plugins
from lookfar.errors import UserError
from lookfar.tasks.addition import Addition
from lookfar.tasks.digits import abacus, coupled
from lookfar.tasks.problems import Problems

Count = Annotated[int, Ge(1)]
Positions = Int64[np.ndarray, "t"]
Way = Callable[[Sequence[str], int], Positions]  # of pieces, moved up by so many

SAMPLE = 256  # problems of a length that are looked at for their longest numbers


class DigitPositions:
    """The numbers of the tokens of a task's problems; what follows a token never changes its number.

    Args:
        largest: training moves the numbers of a problem up, at most to this one.
        farthest: how many positions the model has; a number of more digits stays at the last of them. None: any.
    """

    def __init__(self, problems: Problems, way: Way, *, largest: int, farthest: int | None = None) -> None:
        self.problems, self.way, self.largest, self.farthest = problems, way, largest, farthest

    def measured(self, tokens: Sequence[int] | Int64[np.ndarray, "t"]) -> Positions:
        """The numbers of a problem that is measured, or of what is written of it so far: not moved up."""
        return self._at(tokens, 0)

    def trained(self, tokens: Sequence[int] | Int64[np.ndarray, "t"], chance: float) -> Positions:
        """The numbers of a problem that is trained on, moved up by a share `chance` (below 1) of all that is free."""
        free = max(0, self.largest - int(self.measured(tokens).max(initial=0)))
        return self._at(tokens, int(chance * (free + 1)))

    def reach(self, lengths: Sequence[int]) -> int:
        """The largest number, not moved up, of some problems of these lengths."""
        some = (each for length in lengths for each in self.problems.measured(length, SAMPLE))
        return max((int(self.measured(each.encoded.tokens).max()) for each in some), default=0)

    def _at(self, tokens: Sequence[int] | Int64[np.ndarray, "t"], offset: int) -> Positions:
        pieces = self.problems.vocabulary.pieces
        found = self.way([pieces[int(token)] for token in tokens], offset)
        return found if self.farthest is None else np.minimum(found, self.farthest - 1)


def of_abacus(problems: Problems, farthest: int | None, *, largest: Count) -> DigitPositions:
    """Each digit by its place in its number."""
    if not set(problems.task.symbols) & set(digits):
        raise UserError(f"'abacus' numbers digits, and {problems.name} has none; number its tokens consecutively.")
    if getattr(problems.task, "hints", False):
        raise UserError("'abacus' numbers digits that stand side by side; leave the hints of the task out.")

    def way(pieces: Sequence[str], offset: int) -> Positions:
        return abacus(pieces, offset=offset)

    return DigitPositions(problems, way, largest=largest, farthest=farthest)


def of_coupling(problems: Problems, farthest: int | None, *, largest: Count) -> DigitPositions:
    """Digits of one significance by one number, in operands and answer."""
    task = problems.task
    if not isinstance(task, Addition) or task.order == "plain" or task.hints or problems.scratchpad is not None:
        raise UserError(
            "'coupled' numbers additions whose answer is written at once from its least significant digit on; "
            "choose task.name='addition(order=reversed_answer, padded=true)', without a scratchpad."
        )

    def way(pieces: Sequence[str], offset: int) -> Positions:
        return coupled(pieces, start=1 + offset, reversed_operands=task.order == "reversed")

    return DigitPositions(problems, way, largest=largest, farthest=farthest)


WAYS = {"abacus": of_abacus, "coupled": of_coupling}


def names_digits(expression: str) -> bool:
    """Whether a way to number tokens is one that reads digits."""
    terms = plugins.parse(expression)
    return len(terms) == 1 and terms[0].name in WAYS


def find(expression: str, problems: Problems, farthest: int | None = None) -> DigitPositions | None:
    """The numbers of an expression for a model of so many positions, or None where it does not read digits.

    Raises:
        UserError: the task does not suit it, or a setting is missing or wrong.
    """
    if not names_digits(expression):
        return None
    (term,) = plugins.parse(expression)
    way = WAYS[term.name]
    checked = plugins.check(way, term)
    missing = [key for key, value in plugins.defaults(way).items() if value is Parameter.empty and key not in checked]
    if missing:
        raise UserError(f"{term.name!r} needs {missing[0]}: write it as {term.name}({missing[0]}=100).")
    return way(problems, farthest, **checked)
