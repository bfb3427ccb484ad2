"""Mixes several sources by weight: which one serves a line depends on the number of the line and nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, lcm
from typing import Annotated, Any

import numpy as np
from annotated_types import Gt
from jaxtyping import Int64, Integer
from pydantic import FiniteFloat, TypeAdapter, ValidationError

from lookfar import plugins
from lookfar.config import DataConfig
from lookfar.data.packing import Lines
from lookfar.errors import UserError, nearest

_PERIOD = 100_000  # lines after which the order of sources may begin again, at most

Weight = Annotated[FiniteFloat, Gt(0)]


@dataclass(frozen=True)
class Ingredient:
    """A source, what it reads, and its weight beside others."""

    source: str
    path: str | None
    weight: float


def ingredients(config: DataConfig) -> list[Ingredient]:
    """The sources of `text_file(path=books, weight=2) + python_library`, checked; nothing is read.

    Raises:
        UserError: a source that does not exist, a setting that it has not, weights that cannot be.
    """
    terms = plugins.parse(config.source)
    if config.path is not None and (len(terms) > 1 or "path" in terms[0].settings):
        raise UserError(
            f"data.path ({config.path!r}) goes with a lone source; "
            f"write it into {config.source!r} as text_file(path={config.path!r})."
        )
    found = [_ingredient(term, config.path) for term in terms]
    shares([each.weight for each in found])
    return found


def shares(weights: Sequence[float]) -> list[int]:
    """Weights as the smallest whole numbers in the same proportions.

    Raises:
        UserError: their sum is so large that the order of sources could not be laid out.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    whole = [int(each * lcm(*(each.denominator for each in exact))) for each in exact]
    parts = [each // gcd(*whole) for each in whole]
    if sum(parts) > _PERIOD:
        raise UserError(
            f"The weights {', '.join(f'{weight:g}' for weight in weights)} repeat after {sum(parts):,} lines, more "
            f"than {_PERIOD:,}; write them with fewer digits, such as 0.7 and 0.3, or 2 and 1."
        )
    return parts


def order(parts: Sequence[int]) -> Int64[np.ndarray, "period"]:
    """Which source serves each line of one period: source j serves parts[j] of them, evenly spread.

    After any number of lines each source has served its share of them to within one line. Each line of a source has
    the first and the last place at which that stays true; among those whose first place has come, the one whose last
    place is nearest is served. Source: Baruah et al., 1996, "Proportionate progress: a notion of fairness in resource
    allocation", Algorithmica 15; one resource.
    """
    period, served = sum(parts), [0] * len(parts)
    chosen = np.empty(period, np.int64)
    for place in range(period):
        due = [
            (-(-(count + 1) * period // part), source)
            for source, (count, part) in enumerate(zip(served, parts, strict=True))
            if count * period // part <= place
        ]
        chosen[place] = min(due)[1]
        served[chosen[place]] += 1
    return chosen


class Mixture:
    """Lines of several sources, each in its own order, drawn in fixed proportions.

    The count of lines served before is all that is needed to go on: it says which source serves a line, and how many
    that source has served before. A source that is small beside its weight is served several times over.

    Args:
        lines: of each source.
        weights: of each source; only their proportions matter.
    """

    def __init__(self, lines: Sequence[Lines], weights: Sequence[float]) -> None:
        self.lines = list(lines)
        self.parts = np.array(shares(weights))
        self.order = order(shares(weights))
        self.rank = np.empty_like(self.order)  # how many lines its source has served in the period before each line
        for source in range(len(lines)):
            mine = self.order == source
            self.rank[mine] = np.arange(mine.sum())

    def place(self, served: Integer[np.ndarray, "n"]) -> tuple[Int64[np.ndarray, "n"], Int64[np.ndarray, "n"]]:
        """Which source serves when that many lines were served before, and how many of them were its own."""
        periods, within = np.divmod(served.astype(np.int64), len(self.order))
        source = self.order[within]
        return source, periods * self.parts[source] + self.rank[within]

    def batch(self, first: int, count: int) -> Int64[np.ndarray, "count l"]:
        """The lines number first to first + count in the order served."""
        found = np.empty((count, self.lines[0].context + 1), np.int64)
        source, own = self.place(np.arange(first, first + count))
        for each in np.unique(source):
            found[source == each] = self.lines[each].at(own[source == each])
        return found

    def documents(self, first: int, count: int) -> Int64[np.ndarray, "count l"] | None:
        """The document of each token of those lines, as of `Lines`; None where they are joined."""
        if not self.lines[0].isolated:
            return None
        found = np.empty((count, self.lines[0].context + 1), np.int64)
        source, own = self.place(np.arange(first, first + count))
        for each in np.unique(source):
            found[source == each] = self.lines[each].documents_at(own[source == each])
        return found

    def scored(self, first: int, count: int) -> None:
        """Which tokens count as targets: all but the first of a line."""


def _ingredient(term: plugins.Term, path: str | None) -> Ingredient:
    settings: dict[str, Any] = {"path": path, "weight": 1, **term.settings}
    try:
        weight = TypeAdapter(Weight).validate_python(settings.pop("weight"))
    except ValidationError as error:
        raise UserError(f"{str(term)!r} has a weight that is not possible; it is a number above 0.") from error
    kind = plugins.find("data", term.name)
    if unknown := [key for key in settings if key not in plugins.settings(kind)]:
        hint = nearest(unknown[0], [*plugins.settings(kind), "weight"])
        raise UserError(f"{term.name!r} has no setting {unknown[0]!r}. {hint}")
    checked = plugins.check(kind, plugins.Term(term.name, settings))
    return Ingredient(term.name, checked["path"], weight)
