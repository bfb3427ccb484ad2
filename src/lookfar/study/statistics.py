"""Compares schemes by rows of measurements: ranks with honest ties, intervals over seeds, paired differences.

A *cell* is what schemes are compared in: one task, protocol, scratchpad and seed (and, for differences, one length).
Cells that some scheme lacks are never dropped in silence: every result names them.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean
from typing import Any, Literal, NamedTuple

import numpy as np

from lookfar.errors import UserError

Row = Mapping[str, Any]
Ties = Literal["average", "expected"]

LEVEL = 0.95  # of an interval
RESAMPLES = 10_000
EXACT = 16  # seeds up to which all signs are tried


class Cell(NamedTuple):
    """Where schemes are compared; `length` is None where a value is a mean over lengths."""

    data: str
    protocol: str
    scratchpad: str | None
    seed: int
    length: int | None = None


class Missing(NamedTuple):
    """A cell that a scheme lacks, and why."""

    scheme: str
    cell: Cell
    reason: str


@dataclass(frozen=True)
class Estimate:
    """A mean over cells, and the interval that a bootstrap over seeds gives it; None with a single seed."""

    value: float
    interval: tuple[float, float] | None
    cells: int
    seeds: int


@dataclass(frozen=True)
class Ranking:
    """The mean reciprocal rank of every scheme over the cells that all of them have."""

    schemes: Mapping[str, Estimate]
    missing: Sequence[Missing]


@dataclass(frozen=True)
class Comparison:
    """Differences of two schemes, the first minus the second, over the cells that both have.

    Attributes:
        difference: their mean.
        wins, losses, ties: in how many cells the first is higher, lower or equal.
        p_value: how often a difference as large, either way, comes up if the sign of each seed is left to chance. With
            n seeds it is never below 2 / 2^n: three seeds give 0.25 at best. None with a single seed.
    """

    difference: Estimate
    wins: int
    losses: int
    ties: int
    p_value: float | None
    missing: Sequence[Missing]


def reciprocal_ranks(values: Sequence[float], *, ties: Ties = "average") -> list[float]:
    """One over the rank of each value, the highest first; equal values get the same.

    With `average` ties share the mean of their ranks: five equal values get 1/3. With `expected` they get the mean of
    the reciprocal ranks, which is what breaking ties at random gives on average: five equal values get 137/300.
    """
    shared = []
    for value in values:
        first = 1 + sum(other > value for other in values)
        places = range(first, first + sum(other == value for other in values))
        shared.append(1 / fmean(places) if ties == "average" else fmean(1 / place for place in places))
    return shared


def mean_reciprocal_rank(
    rows: Iterable[Row], *, metric: str = "accuracy", split: str | None = "longer", ties: Ties = "average"
) -> Ranking:
    """Rank the schemes in every cell by their mean over lengths, and average one over the rank.

    Only cells in which every scheme has its mean take part; what the others lack is told. Schemes are those that have
    rows of the metric, of whatever split.

    Raises:
        UserError: there is no such cell, or a measurement is there twice.
    """
    rows = [row for row in rows if row["metric"] == metric]
    table, missing = over_lengths(rows, metric=metric, split=split)
    schemes = sorted({row["scheme"] for row in rows})
    ranks = {
        cell: reciprocal_ranks([values[scheme] for scheme in schemes], ties=ties)
        for cell, values in table.items()
        if len(values) == len(schemes)
    }
    _complete(ranks, schemes, missing, metric, split)
    found = {scheme: {cell: each[place] for cell, each in ranks.items()} for place, scheme in enumerate(schemes)}
    return Ranking({scheme: _estimate(values) for scheme, values in found.items()}, tuple(missing))


def over_lengths(
    rows: Iterable[Row], *, metric: str = "accuracy", split: str | None = "longer"
) -> tuple[dict[Cell, dict[str, float]], list[Missing]]:
    """The mean over lengths of every scheme in every cell, and which means are missing.

    Rows are those of `metric` and `split`, of every split where that is None. A scheme has a mean where it has a number
    for every length that any scheme has in the cell.

    Raises:
        UserError: a measurement is there twice.
    """
    rows = [row for row in rows if row["metric"] == metric]
    schemes = sorted({row["scheme"] for row in rows})
    curves: dict[Cell, dict[str, dict[int, float]]] = {}
    for cell, values in _table(rows, metric, split).items():
        of_cell = curves.setdefault(cell._replace(length=None), {scheme: {} for scheme in schemes})
        for scheme, value in values.items():
            of_cell[scheme][cell.length or 0] = value
    means: dict[Cell, dict[str, float]] = {}
    missing = []
    for cell, of_cell in curves.items():
        wanted, means[cell] = {length for values in of_cell.values() for length in values}, {}
        for scheme, values in of_cell.items():
            if reason := _incomplete(values, wanted):
                missing.append(Missing(scheme, cell, reason))
            else:
                means[cell][scheme] = fmean(values.values())
    return means, missing


def compare(
    rows: Iterable[Row], one: str, other: str, *, metric: str = "accuracy", split: str | None = "longer"
) -> Comparison:
    """Compare two schemes cell by cell, each length a cell of its own.

    The interval and the p-value take the seed as what is drawn: the cells of one run depend on each other, so that
    more lengths or tasks do not stand for more evidence.

    Raises:
        UserError: they share no cell, or a measurement is there twice.
    """
    table = _table([row for row in rows if row["scheme"] in (one, other)], metric, split)
    missing = [
        Missing(scheme, cell, "not measured" if scheme not in values else "not a number")
        for cell, values in table.items()
        for scheme in (one, other)
        if math.isnan(values.get(scheme, math.nan))
    ]
    incomplete = {each.cell for each in missing}
    differences = {cell: values[one] - values[other] for cell, values in table.items() if cell not in incomplete}
    _complete(differences, (one, other), missing, metric, split)
    signs = [int(np.sign(each)) for each in differences.values()]
    return Comparison(
        difference=_estimate(differences),
        wins=signs.count(1),
        losses=signs.count(-1),
        ties=signs.count(0),
        p_value=sign_flips(_by_seed(differences)),
        missing=tuple(missing),
    )


def interval(seeds: Sequence[Sequence[float]], *, level: float = LEVEL) -> tuple[float, float] | None:
    """The percentile bootstrap interval of the mean of all values, of which each seed gives some.

    Whole seeds are drawn with replacement, by a generator that always begins alike: the same values give the same
    interval. One seed tells nothing of the others: None. With fewer than about five seeds intervals are too narrow.
    """
    if len(seeds) < 2:
        return None
    sums, counts = np.array([math.fsum(each) for each in seeds]), np.array([len(each) for each in seeds])
    drawn = np.random.default_rng(0).integers(len(seeds), size=(RESAMPLES, len(seeds)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def sign_flips(seeds: Sequence[Sequence[float]]) -> float | None:
    """The two-sided p-value of a permutation test: the differences of each seed change sign together.

    Exact up to 16 seeds; beyond, 100,000 random choices of signs, by a generator that always begins alike. None with
    a single seed.
    """
    if len(seeds) < 2:
        return None
    sums = np.array([math.fsum(each) for each in seeds])
    exact = len(seeds) <= EXACT
    signs = (
        np.array(list(product((1, -1), repeat=len(seeds))))
        if exact
        else np.random.default_rng(0).choice((1, -1), size=(100_000, len(seeds)))
    )
    as_large = int((abs(signs @ sums) >= abs(sums.sum()) - 1e-9 * abs(sums).sum()).sum())
    return as_large / len(signs) if exact else (as_large + 1) / (len(signs) + 1)


def longest(lengths: Sequence[int], accuracies: Sequence[float], *, at_least: float = 0.9) -> int | None:
    """The longest length such that it and every measured length below it reach `at_least`; None if the first fails.

    A later length that reaches it again does not count, and what is not a number does not reach it.
    """
    reached = None
    for length, accuracy in _curve(lengths, accuracies):
        if not accuracy >= at_least:
            break
        reached = length
    return reached


def area(
    lengths: Sequence[int], accuracies: Sequence[float], *, first: int | None = None, last: int | None = None
) -> float:
    """The area under accuracy against length over its width, by trapezoids: the mean height, in [0, 1].

    Only measured lengths from `first` to `last` count, both included: `last=20` is the area in distribution of what
    was trained up to 20, `first=21` that beyond. The area over a single length is its accuracy.

    Raises:
        UserError: no length is left, or an accuracy is not a number.
    """
    low, high = -math.inf if first is None else first, math.inf if last is None else last
    curve = [point for point in _curve(lengths, accuracies) if low <= point[0] <= high]
    if not curve:
        wanted = f"{'' if first is None else f' from {first} on'}{'' if last is None else f' up to {last}'}"
        raise UserError(f"No length{wanted} is measured; there are {', '.join(map(str, sorted(lengths))) or 'none'}.")
    unknown = [str(length) for length, accuracy in curve if math.isnan(accuracy)]
    if unknown:
        raise UserError(f"Accuracy is not a number at length {', '.join(unknown)}; measure it or leave the length out.")
    places, heights = np.array(curve, dtype=float).T
    if len(curve) == 1:
        return float(heights[0])
    widths = np.diff(places)
    return float((widths * (heights[1:] + heights[:-1]) / 2).sum() / widths.sum())


def _curve(lengths: Sequence[int], accuracies: Sequence[float]) -> list[tuple[int, float]]:
    if len(set(lengths)) < len(lengths):
        raise UserError(f"A length is there twice: {', '.join(map(str, sorted(lengths)))}; average over seeds first.")
    return sorted(zip(lengths, accuracies, strict=True))


def _table(rows: Iterable[Row], metric: str, split: str | None) -> dict[Cell, dict[str, float]]:
    """The value of each scheme in each cell of one length."""
    table: dict[Cell, dict[str, float]] = {}
    for row in rows:
        if row["metric"] != metric or split not in (None, row.get("split")):
            continue
        cell = Cell(row["data"], row["protocol"], row.get("scratchpad"), row["seed"], row["length"])
        values = table.setdefault(cell, {})
        if row["scheme"] in values:
            raise UserError(
                f"{row['scheme']!r} has two rows of {metric} for {_spoken(cell)}; choose the rows of one run."
            )
        values[row["scheme"]] = math.nan if row["value"] is None else float(row["value"])
    return table


def _incomplete(values: Mapping[int, float], wanted: set[int]) -> str:
    """Why a scheme has no mean over the wanted lengths; empty where it has."""
    if absent := sorted(wanted - values.keys()):
        return f"not measured at length {', '.join(map(str, absent))}" if values else "not measured"
    unknown = sorted(length for length, value in values.items() if math.isnan(value))
    return f"not a number at length {', '.join(map(str, unknown))}" if unknown else ""


def _complete(
    found: Mapping[Cell, Any], schemes: Sequence[str], missing: Sequence[Missing], metric: str, split: str | None
) -> None:
    if found:
        return
    compared = " and ".join(schemes) or "no scheme"
    example = f"; {missing[0].scheme!r} is {missing[0].reason} for {_spoken(missing[0].cell)}" if missing else ""
    raise UserError(
        f"No cell has {metric} (split {split}) of {compared}{example}. Measure it, or leave the scheme out."
    )


def _spoken(cell: Cell) -> str:
    return ", ".join(f"{name} {value}" for name, value in cell._asdict().items() if value is not None)


def _estimate(values: Mapping[Cell, float]) -> Estimate:
    seeds = _by_seed(values)
    return Estimate(fmean(values.values()), interval(seeds), len(values), len(seeds))


def _by_seed(values: Mapping[Cell, float]) -> list[list[float]]:
    seeds: dict[int, list[float]] = {}
    for cell, value in values.items():
        seeds.setdefault(cell.seed, []).append(value)
    return [seeds[seed] for seed in sorted(seeds)]
