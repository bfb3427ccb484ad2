"""Learning rates are pure functions of update and configuration, and the end of a run moves where they allow it."""

import hashlib
import math
import random
import re
import signal
import sys
from bisect import bisect_left
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from lookfar import cli, config, files
from lookfar.cli.schedule import HEIGHT, WIDTH, falls, sketch
from lookfar.config import TrainingConfig
from lookfar.errors import UserError
from lookfar.study.rate_curves import corners
from lookfar.training import schedules
from lookfar.training.schedules import rate
from lookfar.training.train import Interrupted, train

SHAPES = ("linear", "sqrt", "exponential", "cosine", "inverse")
FALLING = ("linear", "cosine", "wsd")
FLOORS = st.sampled_from((0.001, 0.05, 0.1, 1 / 3, 0.9, 1.0))


def plan(schedule, updates=None, *, warmup=0, floor=0.1):
    last = max(schedules.budgets(schedule), default=1000)
    return TrainingConfig(schedule=schedule, updates=updates or last, warmup=warmup, floor=floor)


def rates(schedule, updates=None, **settings):
    config = plan(schedule, updates, **settings)
    schedules.check(config)
    return [rate(update, config) for update in range(config.updates)]


def decays(found):
    """The updates, counted from 0, at which rates begin to fall from the peak."""
    return [place for place in range(1, len(found)) if found[place] < found[place - 1] == 1]


def settings(**given):
    return ", ".join(f"{key}={value}" for key, value in given.items())


@st.composite
def plans(draw, names=tuple(schedules.SCHEDULES)):
    """Any schedule that fits."""
    name = draw(st.sampled_from(names))
    given = {}
    lengths = draw(st.lists(st.integers(1, 60), min_size=1, max_size=3))
    budgets = [sum(lengths[: place + 1]) for place in range(len(lengths))]
    if name in ("cyclic_cosine", "wsd_s"):
        given["budgets"] = budgets
    if name in ("wsd", "wsd_s"):
        given |= {"decay": draw(st.sampled_from((0.01, 0.1, 0.25, 0.5))), "shape": draw(st.sampled_from(SHAPES))}
    if name == "wsd_s":
        given |= {"mode": draw(st.sampled_from(("cumulative", "cycle"))), "rewarm": draw(st.integers(0, 5))}
    warmup = draw(st.none() | st.integers(0, min(20, budgets[-1])))
    plan = TrainingConfig(
        updates=budgets[-1], warmup=warmup, floor=draw(FLOORS), schedule=f"{name}({settings(**given)})"
    )
    assume(fits(plan))
    return plan


def fits(plan):
    state = random.getstate()  # the checks of shapes draw from it, which a strategy must not
    try:
        schedules.check(plan)
    except UserError:
        return False
    finally:
        random.setstate(state)
    return True


# What every schedule keeps


@given(plan=plans())
@example(plan=TrainingConfig(updates=6, warmup=0, floor=1.0, schedule="wsd(decay=0.5, shape=inverse)"))  # rounds up
def test_no_rate_exceeds_the_peak_and_after_the_warm_up_none_is_below_the_floor(plan):
    rising = schedules.warmup(plan)
    for update in range(plan.updates + 5):
        assert 0 < rate(update, plan) <= 1
        assert update < rising or rate(update, plan) >= plan.floor


@given(plan=plans(), seed=st.integers(0, 9))
def test_a_rate_depends_on_nothing_but_update_and_configuration(plan, seed):
    inorder = {update: rate(update, plan) for update in range(plan.updates)}
    shuffled = list(inorder)
    random.Random(seed).shuffle(shuffled)
    schedules.find.cache_clear()
    again = TrainingConfig(**plan.model_dump())
    assert {update: rate(update, again) for update in shuffled} == inorder


@given(plan=plans(("linear", "cosine", "wsd", "wsd_s", "cyclic_cosine")))
def test_the_last_update_of_every_decay_uses_exactly_the_floor(plan):
    for end in schedules.budgets(plan.schedule) or (plan.updates,):
        if end > schedules.warmup(plan):
            assert rate(end - 1, plan) == plan.floor


@given(plan=plans(("linear", "cosine", "wsd", "wsd_s", "cyclic_cosine")), later=st.integers(0, 1000))
def test_after_the_end_the_rate_stays_at_the_floor(plan, later):
    assume(plan.updates > schedules.warmup(plan))
    assert rate(plan.updates + later, plan) == plan.floor


@given(plan=plans())
def test_the_warm_up_rises_by_equal_steps_to_the_peak(plan):
    rising = schedules.warmup(plan)
    assert [rate(update, plan) for update in range(rising)] == [(update + 1) / rising for update in range(rising)]


@given(plan=plans(("wsd_s", "cyclic_cosine")))
def test_rates_rise_only_in_warm_ups_and_right_after_a_budget(plan):
    settings = schedules.find(plan.schedule).keywords
    rising = {
        0: schedules.warmup(plan),
        **{budget: max(1, settings.get("rewarm", 0)) for budget in settings["budgets"]},
    }
    allowed = {start + step for start, steps in rising.items() for step in range(steps)}
    for update in range(1, plan.updates):
        assert rate(update, plan) <= rate(update - 1, plan) or update in allowed


STEEPEST = {  # of a fall from 1 to a floor of 0.1, over its whole length
    "linear": lambda part: 0.9 * part,
    "sqrt": lambda part: 0.9 * math.sqrt(part),
    "exponential": lambda part: math.log(10) * part,
    "cosine": lambda part: 0.9 * math.pi / 2 * part,
    "inverse": lambda part: 9 * part,
}


@pytest.mark.parametrize("shape", SHAPES)
@given(updates=st.integers(20, 250), decay=st.sampled_from((0.1, 0.3, 1.0)))
def test_a_decay_has_no_jump_at_its_ends_nor_within(shape, updates, decay):
    found = [1.0, *rates(f"wsd(decay={decay}, shape={shape})", updates)]
    steps = [before - now for before, now in pairwise(found)]
    falling = sum(step > 0 for step in steps)
    assert falling == max(1, round(decay * updates))
    assert all(-1e-15 <= step <= STEEPEST[shape](1 / falling) + 1e-12 for step in steps)


# Values


@pytest.mark.parametrize(
    ("shape", "values"),
    [
        ("inverse", [0.30769231, 0.18181818, 0.12903226, 0.10989011, 0.1]),
        ("linear", [0.775, 0.55, 0.325, 0.19, 0.1]),
        ("sqrt", [0.55, 1 - 0.9 * 0.5**0.5, 1 - 0.9 * 0.75**0.5, 1 - 0.9 * 0.9**0.5, 0.1]),
        ("exponential", [10**-0.25, 10**-0.5, 10**-0.75, 10**-0.9, 0.1]),
        ("cosine", [0.1 + 0.45 * (1 + math.cos(math.pi * part)) for part in (0.25, 0.5, 0.75, 0.9, 1)]),
    ],
)
def test_each_shape_by_hand(shape, values):
    found = rates(f"wsd(shape={shape})", 1000)
    assert found[:900] == [1.0] * 900
    assert [found[899 + step] for step in (25, 50, 75, 90, 100)] == pytest.approx(values)


def test_the_exponential_halves_in_equal_times():
    found = rates("wsd(shape=exponential, decay=1)", 100, floor=0.25)
    assert found[49] == pytest.approx(0.5) and found[24] == pytest.approx(0.5**0.5)


@pytest.mark.parametrize(
    ("mode", "starts"), [("cumulative", [11_250, 22_500, 45_000]), ("cycle", [11_250, 23_750, 47_500])]
)
def test_decays_begin_where_the_paper_lets_them(mode, starts):
    paper = plan(f"wsd_s(budgets=[12500, 25000, 50000], mode={mode})", warmup=100)
    for place, start in enumerate(starts):
        before = [0, 12_500, 25_000][place]
        assert rate(max(100, before), paper) == rate((before + start) // 2, paper) == rate(start - 1, paper) == 1
        assert rate(start, paper) < 1


def test_decays_begin_where_levanter_lets_them():
    assert decays(rates("wsd_s(budgets=[300, 700, 1000], mode=cycle)")) == [270, 660, 970]


def test_three_budgets_cost_what_the_paper_counts():
    budgets, tokens = (12_500, 25_000, 50_000), 4e6
    branches = 0
    for budget in budgets[:-1]:
        branch = plan("wsd", budget, warmup=100)
        shared = bisect_left(range(100, budget), True, key=lambda update: rate(update, branch) < 1) + 100
        branches += budget - shared
    assert sum(budgets) * tokens == 350e9  # a cosine for each
    assert (budgets[-1] + branches) * tokens == 215e9
    assert schedules.budgets(f"wsd_s(budgets={list(budgets)})")[-1] * tokens == 200e9


def test_rates_come_back_to_the_peak_at_once_or_by_equal_steps():
    at_once = rates("wsd_s(budgets=[10, 30])", floor=0.2)
    assert at_once[9:12] == [0.2, 1.0, 1.0]
    stepwise = rates("wsd_s(budgets=[10, 30], rewarm=4)", floor=0.2)
    assert stepwise[9:15] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert stepwise[:10] + stepwise[14:] == at_once[:10] + at_once[14:]


def test_the_inverse_square_root_by_hand():
    found = rates("inverse_square_root", 10_000, warmup=100, floor=0.2)
    assert [found[place] for place in (49, 99, 399, 2499, 9999)] == [0.5, 1.0, 0.5, 0.2, 0.2]
    assert rates("inverse_square_root", 4)[:4] == pytest.approx([1, 2**-0.5, 3**-0.5, 0.5])


def test_a_cyclic_cosine_by_hand():
    found = rates("cyclic_cosine(budgets=[6, 10])", warmup=2, floor=0.2)
    half = 0.8 * 2**0.5 / 4
    cycle = [0.6 + half, 0.6, 0.6 - half, 0.2]
    assert found == pytest.approx([0.5, 1, *cycle, *cycle])


@pytest.mark.parametrize("name", FALLING)
def test_the_defaults_of_a_run_are_kept(name):
    """The rates of recipes that were written before schedules had settings."""
    found = [rate(update, TrainingConfig(schedule=name)) for update in (0, 49, 999, 5000)]
    assert found == [1 / 50, 1.0, 0.1, 0.1]


# How they belong together


@given(updates=st.integers(2, 120), later=st.integers(0, 120))
def test_wsd_is_a_branch_of_the_constant_rate(updates, later):
    branch, longer = rates("wsd", updates), rates("wsd", updates + later)
    falling = max(1, round(0.1 * updates))
    assert branch[:-falling] == rates("constant", updates)[:-falling] == longer[: updates - falling]


@given(plan=plans(("wsd_s",)))
def test_the_first_cycle_of_wsd_s_is_wsd(plan):
    given = schedules.find(plan.schedule).keywords
    first = given["budgets"][0]
    alone = TrainingConfig(
        updates=first,
        warmup=schedules.warmup(plan),
        floor=plan.floor,
        schedule=f"wsd(decay={given['decay']}, shape={given['shape']})",
    )
    assert [rate(update, alone) for update in range(first)] == [rate(update, plan) for update in range(first)]


@given(updates=st.integers(2, 120), warmup=st.integers(0, 20))
def test_one_cycle_of_a_cyclic_cosine_is_a_cosine(updates, warmup):
    assume(warmup < updates)
    cyclic = rates(f"cyclic_cosine(budgets=[{updates}])", warmup=warmup)
    assert cyclic == rates("cosine", updates, warmup=warmup)


@pytest.mark.parametrize("name", ["wsd_s", "cyclic_cosine"])
def test_a_later_budget_changes_no_rate_before_it(name):
    short, long = rates(f"{name}(budgets=[60, 150])"), rates(f"{name}(budgets=[60, 150, 400])")
    assert long[:150] == short


# Errors of public code


def test_the_floor_is_used_at_the_end_of_every_cycle():
    """lingua's lr_wsd is back at the peak on the step of the boundary: its floor comes at the very end only."""
    found = rates("wsd_s(budgets=[50, 100])")
    assert (found[49], found[50], found[99]) == (0.1, 1.0, 0.1)
    assert found.count(0.1) == 2


def test_budgets_that_do_not_divide_end_at_the_floor():
    """lingua opens a new cycle at the peak for what is left over: the last checkpoint is taken after a peak rate."""
    short = "wsd_s(budgets=[33, 66, 99])"
    assert [rate(update, plan(short)) for update in (98, 99, 100)] == [0.1] * 3
    with pytest.raises(UserError, match=r"updates \(100\) goes beyond the last budget of wsd_s.*\(99\); add 100"):
        schedules.check(plan(short, 100))
    assert rates("wsd_s(budgets=[33, 66, 100])")[-2:] != [1.0, 0.1]


def test_a_floor_of_nothing_is_reached_or_refused():
    """lingua divides by a floor of zero."""
    for shape in ("linear", "sqrt", "cosine"):
        assert rates(f"wsd(shape={shape})", 100, floor=0)[-1] == 0
        assert min(rates(f"wsd(shape={shape})", 100, floor=0)[:-1]) > 0
    assert rates("cosine", 100, floor=0)[-1] == 0
    for shape in ("inverse", "exponential"):
        with pytest.raises(UserError, match=rf"'{shape}' never reaches 0; set training\.floor"):
            schedules.check(plan(f"wsd(shape={shape})", floor=0))


def test_a_cyclic_cosine_has_no_jump_after_its_warm_up():
    """lingua compares a step that counts from 0 with a phase that counts from the end of the warm-up."""
    found = rates("cyclic_cosine(budgets=[200, 400])", warmup=50)
    assert found[49] == 1 > found[50] > 0.999
    assert all(abs(found[place] - found[place - 1]) < 0.0201 for place in range(1, 200))
    assert found[200] > 0.999 and found[199] == 0.1


def test_a_cosine_does_not_rise_again():
    """MiniCPM's CosineLoop is a cosine without an end."""
    found = [rate(update, plan("cosine", 100)) for update in range(300)]
    assert found == sorted(found, reverse=True)


def test_the_update_before_a_decay_is_the_last_at_the_peak():
    """A rate that is read one update late shifts the whole curve, and the last update misses the floor."""
    found = rates("wsd", 1000, warmup=10)
    assert (found[0], found[9], found[10], found[899], found[999]) == (0.1, 1, 1, 1, 0.1)
    assert 1 > found[900] > 0.9


# Refusals


@pytest.mark.parametrize(
    ("schedule", "settings", "answer"),
    [
        ("cosin", {}, "No schedule is named 'cosin'. Did you mean 'cosine'?"),
        ("wsd + cosine", {}, "No schedule is named 'wsd + cosine'."),
        ("cosine(decay=1)", {}, "'cosine' has no setting 'decay'. It has none."),
        ("wsd(decy=0.1)", {}, "'wsd' has no setting 'decy'. Did you mean 'decay'?"),
        ("wsd(decay=0)", {}, "wsd(decay=0) is not possible: Input should be greater than 0."),
        ("wsd(decay=1.5)", {}, "wsd(decay=1.5) is not possible: Input should be less than or equal to 1."),
        ("wsd(shape=root)", {}, "wsd(shape=root) is not possible: Input should be 'linear', 'sqrt'"),
        ("wsd_s", {}, "'wsd_s' needs budgets: write it as wsd_s(budgets=[1000, 2000, 4000])."),
        ("cyclic_cosine(budgets=[])", {}, "at least 1 item"),
        ("cyclic_cosine(budgets=[0])", {}, "greater than or equal to 1"),
        ("wsd_s(budgets=[1.5])", {}, "valid integer"),
        ("wsd_s(budgets=[10, 10])", {"updates": 5}, "Budgets ascend, and 10 follows 10 in [10, 10]."),
        ("cyclic_cosine(budgets=[9, 4])", {"updates": 3}, "Budgets ascend, and 4 follows 9 in [9, 4]."),
        ("cyclic_cosine(budgets=[9])", {"warmup": 9}, "A warm-up of 9 updates leaves nothing of the first budget (9)."),
        ("wsd", {"updates": 100, "warmup": 91}, "A warm-up of 91 updates and a decay of 10 (0.1 of 100) do not fit"),
        (
            "wsd_s(budgets=[1000, 1100])",
            {},
            "A re-warm-up of 0 updates and a decay of 110 (0.1 of 1100) do not fit between 1000 and the budget 1100; "
            "take a smaller decay, or a budget of 1112.",
        ),
        ("wsd_s(budgets=[100, 120], mode=cycle, rewarm=19)", {}, "A re-warm-up of 19 updates and a decay of 2 (0.1"),
        ("wsd_s(budgets=[100])", {"updates": 99, "warmup": 95}, "A warm-up of 95 updates and a decay of 10"),
        ("wsd_s(budgets=[9, 18], decay=1)", {}, "between 9 and the budget 18; take a smaller decay."),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_the_numbers(schedule, settings, answer):
    with pytest.raises(UserError) as told:
        schedules.check(TrainingConfig(schedule=schedule, **{"updates": 9, "warmup": 0, **settings}))
    assert answer in str(told.value)


@given(
    start=st.integers(1, 500),
    more=st.integers(1, 50),
    decay=st.floats(0.001, 0.95),
    mode=st.sampled_from(("cumulative", "cycle")),
    rewarm=st.integers(0, 60),
)
def test_the_budget_that_is_advised_fits(start, more, decay, mode, rewarm):
    def check(end):
        schedules.check(plan(f"wsd_s(budgets=[{start}, {end}], decay={decay}, mode={mode}, rewarm={rewarm})"))

    try:
        check(start + more)
    except UserError as error:
        assume("A re-warm-up" in str(error))
        check(int(re.search(r"a budget of (\d+)\.", str(error))[1]))


def test_cumulative_budgets_must_grow_by_the_decay():
    """T_c / T_{c-1} ≥ 1 / (1 - φ)."""
    schedules.check(plan("wsd_s(budgets=[900, 1000])"))
    with pytest.raises(UserError, match=r"0\.1 of 998"):
        schedules.check(plan("wsd_s(budgets=[900, 998])"))
    schedules.check(plan("wsd_s(budgets=[900, 910], mode=cycle)"))


def test_a_run_may_stop_before_its_last_budget_and_the_warm_up_follows_the_first():
    short = TrainingConfig(schedule="wsd_s(budgets=[1000, 4000])", updates=40)
    schedules.check(short)
    assert schedules.warmup(short) == 50
    assert rate(39, short) == 0.8


# The end of a run


@pytest.mark.parametrize(
    ("schedule", "done", "possible"),
    [
        ("constant", 1000, True),
        ("inverse_square_root", 1000, True),
        ("wsd", 900, True),
        ("wsd", 901, False),
        ("wsd(decay=0.2, shape=linear)", 800, True),
        ("wsd(decay=0.2, shape=linear)", 801, False),
        ("cosine", 50, True),
        ("cosine", 51, False),
        ("linear", 50, True),
        ("linear", 51, False),
    ],
)
def test_the_end_moves_until_rates_depend_on_it(schedule, done, possible):
    before, now = plan(schedule, 1000, warmup=50), plan(schedule, 2000, warmup=50)
    told = schedules.refusal(before, now, done)
    assert (told is None) == possible
    if told is not None:
        name = schedule.partition("(")[0]
        assert f"Rates of '{name}' depend on where the run ends from update {done} on, and {done} are done" in told
        assert f"update {done} had {rate(done - 1, before):.4g} of the peak rate" in told
        assert "can move under constant and inverse_square_root, and under wsd before its decay" in told


@pytest.mark.parametrize(
    ("later", "possible"),
    [("[1000, 2000, 4000]", True), ("[1000, 3000]", True), ("[1500]", False), ("[1000, 1999]", True)],
)
def test_budgets_that_are_not_reached_may_move(later, possible):
    before, now = plan("wsd_s(budgets=[1000, 2000])", 1000), plan(f"wsd_s(budgets={later})")
    assert (schedules.refusal(before, now, 1000) is None) == possible


@given(before=plans(), now=plans(), done=st.integers(0, 60))
def test_a_run_goes_on_exactly_where_no_rate_that_is_done_would_change(before, now, done):
    same = [rate(update, before) for update in range(done)] == [rate(update, now) for update in range(done)]
    assert (schedules.refusal(before, now, done) is None) == (same and now.updates >= done)


def test_a_warm_up_that_would_not_fit_is_not_advised():
    before, now = plan("wsd", 1000, warmup=None), plan("wsd", 52, warmup=None)
    assert "Rates of 'wsd' depend on where the run ends from update 1 on" in schedules.refusal(before, now, 10)


def test_fewer_updates_than_are_done_are_refused():
    assert "More updates are done than that: 30." in schedules.refusal(plan("constant", 40), plan("constant", 20), 30)


def test_a_warm_up_that_follows_the_end_is_told():
    before, now = plan("constant", 1000, warmup=None), plan("constant", 2000, warmup=None)
    told = schedules.refusal(before, now, 10)
    assert "it was 50 updates and would be 100. With training.warmup=50 the run can go on." in told
    assert schedules.refusal(before, plan("constant", 2000, warmup=50), 1000) is None


# Runs


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text of 60 lines of 8 bytes: a batch of 6 passes its end after 9 updates."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(f"{place:07}\n" for place in random.Random(0).sample(range(10**7), 60)))
    return file


@pytest.fixture
def a_run(text):
    def build(**training):
        content = {
            "model": {"width": 16, "layers": 1, "heads": 2, "context": 8, "scheme": "alibi", "device": "cpu"},
            "data": {"source": "text_file", "path": str(text)},
            "training": {"batch": 6, "precision": "float32", "warmup": 2, "rate": 0.01, **training},
        }
        return config.build(content)

    return build


def weights(place, update):
    return hashlib.sha256((place / "checkpoints" / str(update) / "model.safetensors").read_bytes()).hexdigest()


def logged(place):
    return [line["rate"] for line in files.read_lines(place / "log.jsonl")]


def test_an_expression_is_a_setting_of_a_recipe(a_run, tmp_path):
    run = a_run(schedule="wsd_s(budgets=[8, 20], mode=cycle)", updates=20)
    again = config.build({}, ["training.schedule=wsd_s(budgets=[8, 20], mode=cycle)"])
    assert run.training.schedule == again.training.schedule
    train(run, tmp_path)
    assert config.read_toml(tmp_path / "run.toml")["training"]["schedule"] == run.training.schedule
    assert logged(tmp_path) == [0.01 * rate(update, run.training) for update in range(20)]
    train(run, tmp_path)


def test_a_schedule_that_does_not_fit_is_refused_before_anything_is_written(a_run, tmp_path):
    for schedule, answer in (("wsd_s(budgets=[10, 11], decay=0.5)", "decay of 6"), ("cosin", "'cosine'")):
        with pytest.raises(UserError, match=answer):
            train(a_run(schedule=schedule, updates=8), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stop", [1, 7, 9, 10, 19])
def test_rates_and_weight_decay_after_a_stop_are_those_of_a_whole_run(a_run, tmp_path, stop, monkeypatch):
    """Public code comes back at the first rate, counts epochs or only the updates since the stop, or decays late."""
    from lookfar.training import optimizers

    made, adamw = [], optimizers.adamw
    monkeypatch.setattr(optimizers, "adamw", lambda *each: made.append(adamw(*each)) or made[-1])
    run = a_run(schedule="wsd_s(budgets=[8, 20], decay=0.25, rewarm=2)", updates=20)

    def interrupt(event):
        if event["event"] == "update" and event["update"] == stop:
            signal.raise_signal(signal.SIGINT)

    train(run, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(run, tmp_path / "run", interrupt)
    train(run, tmp_path / "run")
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")
    assert logged(tmp_path / "run") == [0.01 * rate(update, run.training) for update in range(20)]
    assert weights(tmp_path / "run", 20) == weights(tmp_path / "whole", 20)
    groups = [[(each["weight_decay"], each["lr"]) for each in one.param_groups] for one in made]
    assert groups[0] == groups[2]


@pytest.mark.parametrize(
    ("short", "long", "stop"),
    [
        ({"schedule": "constant", "updates": 6}, {"updates": 12}, None),
        ({"schedule": "inverse_square_root", "updates": 6}, {"updates": 12}, None),
        ({"schedule": "wsd(decay=0.5)", "updates": 12}, {"updates": 20}, 6),
        ({"schedule": "wsd_s(budgets=[6])", "updates": 6}, {"schedule": "wsd_s(budgets=[6, 14])", "updates": 14}, None),
        ({"schedule": "wsd_s(budgets=[6, 14])", "updates": 6}, {"updates": 14}, None),
        ({"schedule": "constant", "updates": 40, "warmup": None}, {"updates": 12, "warmup": 2}, 5),
    ],
)
def test_a_run_whose_end_moved_is_the_run_of_that_end(a_run, tmp_path, short, long, stop):
    def interrupt(event):
        if event["event"] == "update" and event["update"] == stop:
            signal.raise_signal(signal.SIGINT)

    whole = a_run(**{**short, **long})
    try:
        train(a_run(**short), tmp_path / "run", interrupt)
    except Interrupted:
        assert stop
    train(whole, tmp_path / "run")
    train(whole, tmp_path / "whole")
    assert weights(tmp_path / "run", whole.training.updates) == weights(tmp_path / "whole", whole.training.updates)
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")
    recipes = [config.read_toml(tmp_path / each / "run.toml") for each in ("run", "whole")]
    assert recipes[0] == recipes[1]


@pytest.mark.parametrize(
    ("before", "now", "answer"),
    [
        ({"schedule": "cosine"}, {"updates": 9}, r"training\.updates \(6 -> 9\)\. Rates of 'cosine' depend on where"),
        ({"schedule": "linear"}, {"updates": 9}, r"Rates of 'linear' depend on where the run ends from update 3 on"),
        ({"schedule": "wsd"}, {"updates": 9}, "Rates of 'wsd' depend on where the run ends from update 6 on"),
        ({"schedule": "wsd"}, {"schedule": "wsd(decay=0.5)"}, r"schedule \(wsd -> wsd\(decay=0\.5\)\)\. Rates"),
        ({"schedule": "constant"}, {"updates": 5}, "More updates are done than that: 6"),
        ({"schedule": "constant"}, {"schedule": "wsd"}, r"training\.schedule \(constant -> wsd\)\. Restore"),
        ({"schedule": "constant"}, {"warmup": 1}, r"training\.warmup \(2 -> 1\)\. Restore"),
        ({"schedule": "constant"}, {"updates": 9, "floor": 0.5}, r": training\.floor \(0\.1 -> 0\.5\)\. Restore"),
        ({"schedule": "constant"}, {"updates": 9, "rate": 0.5}, r": training\.rate \(0\.01 -> 0\.5\)\. Restore"),
    ],
)  # fmt: skip
def test_a_change_that_makes_it_another_run_is_refused_with_the_reason(a_run, tmp_path, before, now, answer):
    before = {"updates": 6, **before}
    train(a_run(**before), tmp_path)
    left = weights(tmp_path, 6)
    with pytest.raises(UserError, match=answer):
        train(a_run(**{**before, **now}), tmp_path)
    assert weights(tmp_path, 6) == left
    train(a_run(**before), tmp_path)  # what was refused has changed nothing


# The command


def command(monkeypatch, capsys, *words):
    """The exit code of `lookfar schedule`, and what it printed on stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["lookfar", "schedule", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    out, err = capsys.readouterr()
    return left.value.code or 0, out, err


def test_the_command_draws_and_counts(monkeypatch, capsys):
    code, out, _ = command(monkeypatch, capsys, "wsd_s(budgets=[1000,2000,4000])", "cosine", "constant")
    assert code == 0
    assert "wsd_s(budgets=[1000, 2000, 4000])" in out
    assert "4,000 updates, warm-up 50, mean 0.863, last 0.1" in out
    assert "falls at updates 901-1,000, 1,801-2,000, 3,601-4,000" in out
    assert "4,000 updates, warm-up 200, mean 0.548, last 0.1; falls at updates 201-4,000" in out
    assert "last 1; never falls" in out


@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_the_command_draws_every_schedule(name, monkeypatch, capsys):
    given = "(budgets=[20, 50])" if name in ("wsd_s", "cyclic_cosine") else ""
    code, out, _ = command(monkeypatch, capsys, f"{name}{given}", "--warmup", 5, "--floor", 0.2, "--updates", 50)
    assert code == 0 and "50 updates, warm-up 5" in out
    assert len(out.splitlines()) == HEIGHT + 5
    assert max(map(len, out.splitlines())) < 120


@pytest.mark.parametrize(("kind", "start"), [("svg", b"<svg"), ("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_the_command_writes_a_figure(kind, start, monkeypatch, capsys, tmp_path):
    file = tmp_path / "new" / f"rates.{kind}"
    code, out, _ = command(monkeypatch, capsys, "wsd", "cosine", "--figure", file)
    assert code == 0 and f"The figure is {file}" in out
    assert file.read_bytes().startswith(start)
    if kind == "svg":
        assert ">wsd<" in file.read_text() and ">cosine<" in file.read_text()


@given(plan=plans())
def test_a_figure_is_true_to_a_thousandth(plan):
    found = [rate(update, plan) for update in range(plan.updates)]
    points = corners(found)
    drawn = np.interp(
        range(1, plan.updates + 1), *zip(*((each["update"], each["rate"]) for each in points), strict=True)
    )
    assert abs(drawn - found).max() <= 0.001


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["cosin"], "Did you mean 'cosine'?"),
        (["wsd", "--warmup", "2000"], "warmup (2000) must not exceed updates (1000)."),
        (["wsd", "--figure", "rates.jpg"], "The figure rates.jpg must end in one of .svg, .png, .pdf."),
        (["wsd_s(budgets=[100])", "--updates", "200"], "goes beyond the last budget"),
        (["wsd(shape=inverse)", "--floor", "0"], "never reaches 0"),
    ],
)
def test_a_mistake_is_one_sentence(words, answer, monkeypatch, capsys):
    code, out, err = command(monkeypatch, capsys, *words)
    assert code == 2 and not out
    assert err.startswith("lookfar: ") and answer in err and len(err.strip().splitlines()) == 1


@given(plan=plans())
def test_a_sketch_has_its_size_and_marks_every_column(plan):
    lines = sketch([rate(update, plan) for update in range(plan.updates)])
    assert len(lines) == HEIGHT + 2
    rows = [line.partition("│")[2] for line in lines[:HEIGHT]]
    assert {len(row) for row in rows} == {WIDTH}
    assert all(any(row[column] != "\u2800" for row in rows) for column in range(WIDTH))


def test_a_sketch_is_high_where_rates_are():
    lines = sketch([1.0] * 500 + [0.0] * 500)
    assert lines[0].count("⠉") == WIDTH // 2 and lines[HEIGHT - 1].count("⣀") == WIDTH // 2 - 1


def test_falls_are_told_in_stretches():
    assert falls([1.0, 1.0, 1.0]) == "never falls"
    assert falls([1.0, 0.5, 1.0, 1.0, 0.5, 0.2]) == "falls at updates 2, 5-6"
    assert falls([1.0, 0.5] * 6) == "falls at updates 2, 4, 6, 8 and 2 times more"
