"""Ranks are fair to ties, intervals are over seeds, and nothing that is missing goes unsaid."""

import math
from collections import Counter
from fractions import Fraction
from itertools import chain, groupby, pairwise, permutations, product
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lookfar.errors import UserError
from lookfar.study import statistics
from lookfar.study.statistics import Cell, area, compare, interval, longest, mean_reciprocal_rank, reciprocal_ranks

ACCURACIES = st.lists(st.sampled_from((0.0, 0.25, 0.5, 1.0)), min_size=1, max_size=6)


def row(scheme, value, *, seed=0, data="copy", length=30, **more):
    named = {"protocol": "generation", "metric": "accuracy", "split": "longer", "scratchpad": None, "count": 100}
    return {"run": f"{scheme}-{seed}", "scheme": scheme, "seed": seed, "data": data, "length": length} | {
        **named,
        "value": value,
        **more,
    }


# Ranks


@given(values=ACCURACIES)
def test_expected_ranks_are_the_mean_over_every_order_of_ties(values):
    totals, orders = [Fraction(0)] * len(values), 0
    for order in permutations(range(len(values))):
        if all(values[a] >= values[b] for a, b in pairwise(order)):
            orders += 1
            for place, index in enumerate(order, start=1):
                totals[index] += Fraction(1, place)
    assert reciprocal_ranks(values, ties="expected") == pytest.approx([float(each / orders) for each in totals])


@given(values=ACCURACIES)
def test_average_ranks_are_one_over_the_mean_rank_of_ties(values):
    order = sorted(range(len(values)), key=lambda index: -values[index])
    wanted = [0.0] * len(values)
    for _, each in groupby(enumerate(order, start=1), key=lambda pair: values[pair[1]]):
        tied = list(each)
        for _, index in tied:
            wanted[index] = 1 / fmean(place for place, _ in tied)
    assert reciprocal_ranks(values) == pytest.approx(wanted)


def test_five_equal_schemes_share_their_rank():
    assert reciprocal_ranks([0.0] * 5) == pytest.approx([1 / 3] * 5)
    assert reciprocal_ranks([0.0] * 5, ties="expected") == pytest.approx([137 / 300] * 5)
    assert reciprocal_ranks([0.1, 0.9, 0.5]) == pytest.approx([1 / 3, 1, 1 / 2])


@given(values=ACCURACIES, shuffled=st.randoms(use_true_random=False))
def test_the_order_of_schemes_has_no_say(values, shuffled):
    order = list(range(len(values)))
    shuffled.shuffle(order)
    for ties in ("average", "expected"):
        ranks = reciprocal_ranks(values, ties=ties)
        assert reciprocal_ranks([values[each] for each in order], ties=ties) == [ranks[each] for each in order]


def test_schemes_are_ranked_by_their_mean_over_lengths_in_every_task_and_seed():
    rows = [row("alibi", value, length=length) for length, value in ((30, 1.0), (40, 0.0))]
    rows += [row("rope", value, length=length) for length, value in ((30, 0.4), (40, 0.4))]
    rows += [row("alibi", 0.1, data="sort", seed=1), row("rope", 0.2, data="sort", seed=1)]
    rows += [row("rope", 1.0, data="sort", seed=1, length=5, split="train_lengths"), row("rope", 9, metric="loss")]
    found = mean_reciprocal_rank(rows)
    assert {scheme: each.value for scheme, each in found.schemes.items()} == {"alibi": 0.75, "rope": 0.75}
    assert found.schemes["alibi"].cells == 2 and found.schemes["alibi"].seeds == 2
    assert found.schemes["alibi"].interval == (0.5, 1.0)
    assert not found.missing


def test_equal_means_are_ties_whatever_the_order_of_their_lengths():
    values = (0.1, 0.2, 0.3)  # as floats, another sum than backwards
    rows = [row("alibi", value, length=length) for length, value in enumerate(values)]
    rows += [row("rope", value, length=length) for length, value in enumerate(reversed(values))]
    found = mean_reciprocal_rank(rows, ties="expected").schemes
    assert found["alibi"].value == found["rope"].value == 0.75


def test_scratchpads_and_protocols_are_cells_of_their_own():
    rows = [
        row("alibi", 0.5),
        row("rope", 0.4),
        row("alibi", 0.1, scratchpad="full"),
        row("rope", 0.4, scratchpad="full"),
    ]
    assert mean_reciprocal_rank(rows).schemes["rope"].cells == 2
    assert mean_reciprocal_rank(rows).schemes["rope"].value == 0.75


def test_cells_that_a_scheme_lacks_are_told_and_count_for_nobody():
    whole = [row("alibi", 0.5), row("rope", 0.4), row("nope", 0.3)]
    holes = [
        *(row("alibi", 0.0, data="sort"), row("rope", 0.4, data="sort")),
        *(row("alibi", 0.0, seed=1), row("rope", math.nan, seed=1), row("nope", None, seed=1, length=30)),
        *(
            row("alibi", 0.0, seed=2),
            row("rope", 0.1, seed=2),
            row("nope", 0.3, seed=2),
            row("nope", 1, seed=2, length=31),
        ),
    ]
    found = mean_reciprocal_rank(whole + holes)
    assert found.schemes == mean_reciprocal_rank(whole).schemes
    assert {(each.scheme, each.cell.data, each.cell.seed, each.reason) for each in found.missing} == {
        ("nope", "sort", 0, "not measured"),
        ("nope", "copy", 1, "not a number at length 30"),
        ("rope", "copy", 1, "not a number at length 30"),
        ("alibi", "copy", 2, "not measured at length 31"),
        ("rope", "copy", 2, "not measured at length 31"),
    }


def test_a_scheme_without_a_single_cell_is_told():
    rows = [row("alibi", 0.5), row("rope", 0.4), row("nope", 1.0, split="train_lengths")]
    with pytest.raises(UserError, match="of alibi and nope and rope; 'nope' is not measured for data copy"):
        mean_reciprocal_rank(rows)


def test_nothing_to_rank_is_refused():
    with pytest.raises(UserError, match=r"No cell has accuracy .*'rope' is not a number at length 30 for data copy"):
        mean_reciprocal_rank([row("alibi", 1.0), row("rope", math.nan)])
    with pytest.raises(UserError, match=r"No cell has accuracy \(split longer\) of no scheme\. Measure it"):
        mean_reciprocal_rank([])
    with pytest.raises(UserError, match=r"'alibi' has two rows of accuracy for data copy, .* length 30; choose"):
        mean_reciprocal_rank([row("alibi", 1.0), row("alibi", 1.0, run="other")])


# Intervals


def test_a_single_seed_has_no_interval():
    assert interval([[0.1, 0.9]]) is None
    assert mean_reciprocal_rank([row("alibi", 1.0), row("rope", 0.0)]).schemes["rope"].interval is None


def test_an_interval_is_that_of_every_resample():
    """Three seeds have 27 resamples; the bootstrap draws them at random."""
    seeds = [[0.0, 0.2], [0.5], [0.9, 0.7, 0.8]]
    means = sorted(fmean(chain(*each)) for each in product(seeds, repeat=3))
    for level in (0.5, 0.8, 0.95):
        low, high = interval(seeds, level=level)
        share = [fmean(mean <= edge + 1e-9 for mean in means) for edge in (low, high)]
        below = [fmean(mean < edge - 1e-9 for mean in means) for edge in (low, high)]
        assert below[0] - 0.02 <= (1 - level) / 2 <= share[0] + 0.02
        assert below[1] - 0.02 <= (1 + level) / 2 <= share[1] + 0.02


def test_an_interval_is_always_the_same_and_narrows_with_seeds():
    values = np.random.default_rng(1).normal(size=64)
    widths = [np.diff(interval([[value] for value in values[:count]]))[0] for count in (4, 16, 64)]
    assert widths[0] > widths[1] > widths[2]
    assert interval([[value] for value in values]) == interval([[value] for value in values])


def test_an_interval_holds_the_mean_about_as_often_as_it_says():
    random = np.random.default_rng(2)
    held = [low <= 0 <= high for low, high in (interval(random.normal(size=(20, 1)).tolist()) for _ in range(200))]
    assert 0.87 <= fmean(held) <= 0.98


def test_cells_of_one_seed_are_not_taken_for_evidence():
    """Two seeds that disagree leave the matter open, however many lengths they are measured at."""
    once = [row("alibi", 0.5 + seed, seed=seed) for seed in (0, 1)] + [row("rope", 1.0, seed=seed) for seed in (0, 1)]
    often = [row(**{**each, "length": length}) for each in map(_arguments, once) for length in range(30, 80)]
    assert compare(often, "alibi", "rope").difference.interval == compare(once, "alibi", "rope").difference.interval
    assert compare(often, "alibi", "rope").p_value == compare(once, "alibi", "rope").p_value == 1.0


def _arguments(each):
    return {key: each[key] for key in ("scheme", "value", "seed", "length")}


# Differences


def test_differences_are_paired():
    rows = [row("alibi", base + 0.1, seed=seed, length=30 + seed) for seed, base in enumerate((0.1, 0.5, 0.8))]
    rows += [row("rope", base, seed=seed, length=30 + seed) for seed, base in enumerate((0.1, 0.5, 0.8))]
    found = compare(rows, "alibi", "rope")
    assert found.difference.value == pytest.approx(0.1)
    assert found.difference.interval == pytest.approx((0.1, 0.1))
    assert (found.wins, found.losses, found.ties) == (3, 0, 0)
    assert found.p_value == 2 / 8
    turned = compare(rows, "rope", "alibi")
    assert (turned.wins, turned.losses, turned.ties) == (0, 3, 0)
    assert turned.difference.value == -found.difference.value and turned.p_value == found.p_value


def test_equal_schemes_differ_in_nothing():
    rows = [row(scheme, 0.3, seed=seed) for scheme in ("alibi", "rope") for seed in range(4)]
    found = compare(rows, "alibi", "rope")
    assert (found.wins, found.losses, found.ties) == (0, 0, 4)
    assert found.difference.value == 0 and found.p_value == 1


def test_a_pair_of_which_one_is_missing_is_told():
    rows = [row("alibi", 0.5), row("rope", 0.4), row("alibi", 0.5, seed=1), row("rope", None, seed=1)]
    rows += [row("rope", 0.5, length=31)]
    found = compare(rows, "alibi", "rope")
    assert found.difference.cells == 1 and found.p_value is None
    place = {"data": "copy", "protocol": "generation", "scratchpad": None}
    assert found.missing == (
        ("rope", Cell(**place, seed=1, length=30), "not a number"),
        ("alibi", Cell(**place, seed=0, length=31), "not measured"),
    )
    with pytest.raises(
        UserError, match=r"No cell has accuracy .* of alibi and rop; 'rop' is not measured for data copy"
    ):
        compare(rows, "alibi", "rop")


def test_signs_of_many_seeds_are_drawn_and_agree_with_all_of_them(monkeypatch):
    values = (np.random.default_rng(3).normal(size=(12, 1)) + 0.5).tolist()
    exact = statistics.sign_flips(values)
    monkeypatch.setattr(statistics, "EXACT", 11)
    assert statistics.sign_flips(values) == pytest.approx(exact, abs=0.005)
    assert 0 < exact < 0.5 and exact * 2**12 % 1 == 0


def test_the_p_value_is_right_under_chance():
    """Of schemes that do not differ, at most one in ten comes out below 0.1."""
    random = np.random.default_rng(4)
    found = [statistics.sign_flips(random.normal(size=(6, 3)).tolist()) for _ in range(500)]
    assert 0.04 <= fmean(each <= 0.1 for each in found) <= 0.14
    assert Counter(each * 64 % 2 for each in found) == {0.0: 500}  # a choice of signs and its opposite come together


# Curves


def test_the_longest_length_needs_every_length_up_to_it():
    lengths, accuracies = [5, 10, 15, 20, 25], [1.0, 0.95, 0.9, 0.2, 1.0]
    assert longest(lengths, accuracies) == 15
    assert longest(lengths[::-1], accuracies[::-1]) == 15
    assert longest(lengths, accuracies, at_least=0.95) == 10
    assert longest(lengths, accuracies, at_least=0.2) == 25
    assert longest(lengths, [0.89, *accuracies[1:]]) is None
    assert longest(lengths, [1.0, math.nan, 1.0, 1.0, 1.0]) == 5
    assert longest([], []) is None


def test_the_area_is_the_mean_height():
    assert area([1, 2, 4], [1.0, 1.0, 1.0]) == 1
    assert area([4, 1, 2], [0.0, 1.0, 1.0]) == pytest.approx((1 + 1) / 3)
    assert area([10, 20], [0.2, 0.6]) == pytest.approx(0.4)
    assert area([7], [0.3]) == 0.3


def test_the_area_in_distribution_and_beyond_are_apart():
    lengths, accuracies = [10, 20, 21, 40], [1.0, 0.8, 0.5, 0.1]
    assert area(lengths, accuracies, last=20) == pytest.approx(0.9)
    assert area(lengths, accuracies, first=21) == pytest.approx(0.3)
    assert area(lengths, accuracies, first=20, last=20) == 0.8


@given(accuracies=st.lists(st.floats(0, 1), min_size=2, max_size=9), data=st.data())
def test_the_area_is_that_of_a_fine_grid(accuracies, data):
    lengths = data.draw(st.lists(st.integers(1, 99), min_size=len(accuracies), max_size=len(accuracies), unique=True))
    order = np.argsort(lengths)
    grid = np.arange(2 * min(lengths) + 0.5, 2 * max(lengths)) / 2  # in the middle of half steps
    heights = np.interp(grid, np.array(lengths)[order], np.array(accuracies)[order])
    assert area(lengths, accuracies) == pytest.approx(heights.mean(), abs=1e-9)
    assert 0 <= area(lengths, accuracies) <= 1


def test_a_curve_that_says_two_things_or_nothing_is_refused():
    with pytest.raises(UserError, match="No length from 50 on is measured; there are 10, 20"):
        area([20, 10], [1.0, 1.0], first=50)
    with pytest.raises(UserError, match="not a number at length 20; measure it"):
        area([10, 20], [1.0, math.nan])
    for measure in (area, longest):
        with pytest.raises(UserError, match="A length is there twice: 10, 10, 20; average over seeds"):
            measure([10, 20, 10], [1.0, 1.0, 0.9])
