"""Learning rates as pure functions: an update and the configuration give the factor of the peak rate. No state.

Update s counts from 0, so the model of a budget of T updates is the one after update T - 1. During a warm-up of W
updates the factor is (s + 1) / W; the last update of a decay uses exactly the floor; no update exceeds 1.
"""

import math
from bisect import bisect_right
from collections.abc import Callable
from functools import cache, partial
from inspect import Parameter
from itertools import pairwise
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, MinLen

from lookfar import plugins
from lookfar.config import TrainingConfig
from lookfar.errors import UserError, nearest

Count = Annotated[int, Ge(0)]
Part = Annotated[float, Gt(0), Le(1)]
Budgets = Annotated[tuple[Annotated[int, Ge(1)], ...], MinLen(1)]  # updates since the start of the run, ascending
Shape = Literal["linear", "sqrt", "exponential", "cosine", "inverse"]

MOVABLE = (
    "The end can move under constant and inverse_square_root, and under wsd before its decay; wsd_s and cyclic_cosine "
    "take further budgets."
)


def constant(update: int, config: TrainingConfig) -> float:
    """The peak, for ever. Its end can move at any time."""
    return 1.0


def linear(update: int, config: TrainingConfig) -> float:
    """A straight line from the peak to the floor at the last update. Its end cannot move."""
    return _fallen("linear", _part(update, warmup(config), config.updates), config.floor)


def cosine(update: int, config: TrainingConfig) -> float:
    """Half a cosine from the peak to the floor at the last update. Its end cannot move.

    Loshchilov and Hutter, 2017, arXiv 1608.03983.
    """
    return _fallen("cosine", _part(update, warmup(config), config.updates), config.floor)


def inverse_square_root(update: int, config: TrainingConfig) -> float:
    """√(W / (s + 1)) after W updates of warm-up, never below the floor. Its end can move at any time.

    Vaswani et al., 2017, arXiv 1706.03762.
    """
    return max(config.floor, math.sqrt(max(1, warmup(config)) / (update + 1)))


def cyclic_cosine(update: int, config: TrainingConfig, *, budgets: Budgets) -> float:
    """A cosine to the floor at each budget, from the peak again after it; one warm-up. A budget can be added.

    Loshchilov and Hutter, 2017, arXiv 1608.03983; as a baseline of Wen et al., 2024, arXiv 2410.05192.
    """
    _check_ascending(budgets)
    if warmup(config) >= budgets[0]:
        raise UserError(f"A warm-up of {warmup(config)} updates leaves nothing of the first budget ({budgets[0]}).")
    start, end = _cycle(update, budgets)
    return _fallen("cosine", _part(update, start or warmup(config), end), config.floor)


def wsd(update: int, config: TrainingConfig, *, decay: Part = 0.1, shape: Shape = "sqrt") -> float:
    """Warm-up, stable, decay: the peak, then a fall to the floor over the last part of all updates.

    Its end can move until the decay has begun. Hu et al., 2024, arXiv 2404.06395; the shape `sqrt` is the 1 - √ of
    Hägele et al., 2024, arXiv 2405.18392.

    Args:
        update, config: as of `rate`.
        decay: the part of all updates that the fall takes, in (0, 1]; at least one update.
        shape: of the fall.

    Raises:
        UserError: warm-up and decay are longer than the run.
    """
    end = max(1, config.updates)
    falling = _falling(decay, end)
    if warmup(config) + falling > end:
        raise UserError(
            f"A warm-up of {warmup(config)} updates and a decay of {falling} ({decay:g} of {end}) do not fit into "
            f"{end}; take a shorter warm-up or decay."
        )
    return _fallen(shape, _part(update, end - falling, end), config.floor)


def wsd_s(
    update: int,
    config: TrainingConfig,
    *,
    budgets: Budgets,
    decay: Part = 0.1,
    shape: Shape = "inverse",
    mode: Literal["cumulative", "cycle"] = "cumulative",
    rewarm: Count = 0,
) -> float:
    """WSD simplified: one run that falls to the floor at each budget and goes on from there at the peak.

    A budget can be added at any time, and those whose decay has not begun can move. Wen et al., 2024, arXiv 2410.05192.

    Args:
        update, config: as of `rate`.
        budgets: after how many updates, counted from the start, there is a model that has decayed; ascending.
        decay: the part that each fall takes, in (0, 1]; at least one update.
        shape: of each fall.
        mode: what `decay` is a part of: all updates until the budget, or those since the budget before.
        rewarm: updates from the floor back to the peak after a budget; 0: at once.

    Raises:
        UserError: a fall, with the warm-up or re-warm-up before it, is longer than its cycle.
    """
    _check_ascending(budgets)
    for start, end in pairwise((0, *budgets)):
        _check_cycle(start, end, rewarm if start else warmup(config), decay, mode)
    start, end = _cycle(update, budgets)
    if start and update - start < rewarm and update < end:
        return 1 - (1 - config.floor) * (1 - (update - start + 1) / rewarm)  # exactly the peak at its end
    falling = _falling(decay, end if mode == "cumulative" else end - start)
    return _fallen(shape, _part(update, end - falling, end), config.floor)


SCHEDULES: dict[str, Callable[..., float]] = {
    each.__name__: each for each in (constant, linear, cosine, inverse_square_root, cyclic_cosine, wsd, wsd_s)
}


def rate(update: int, config: TrainingConfig) -> float:
    """The factor of the peak rate that this update uses, in [0, 1]; `update` counts from 0.

    After the last update, or the last budget, it is what the schedule ended with.

    Raises:
        UserError: no schedule has this name, or it does not fit into the updates.
    """
    rising = warmup(config)
    return (update + 1) / rising if update < rising else find(config.schedule)(update, config)


@cache
def find(expression: str) -> "partial[float]":
    """The schedule of an expression such as `wsd(decay=0.2)`, as a function of update and configuration.

    Raises:
        UserError: no schedule has this name, or its settings are wrong.
    """
    terms = plugins.parse(expression)
    if len(terms) != 1 or terms[0].name not in SCHEDULES:
        raise UserError(f"No schedule is named {expression!r}. {nearest(terms[0].name, list(SCHEDULES))}")
    name, schedule = terms[0].name, SCHEDULES[terms[0].name]
    checked = plugins.check(schedule, terms[0])
    if "budgets" not in checked and plugins.defaults(schedule).get("budgets") is Parameter.empty:
        raise UserError(f"{name!r} needs budgets: write it as {name}(budgets=[1000, 2000, 4000]).")
    return partial(schedule, **checked)


def name_of(expression: str) -> str:
    """The name of a schedule, without its settings."""
    return find(expression).func.__name__


def budgets(expression: str) -> tuple[int, ...]:
    """After how many updates a schedule has decayed, in order; none where only the end of the run says it."""
    return find(expression).keywords.get("budgets", ())


def ends(config: TrainingConfig) -> list[int]:
    """After how many updates a run has a model to measure: at each budget of its schedule, and at its end."""
    return sorted({*(each for each in budgets(config.schedule) if each < config.updates), config.updates})


def warmup(config: TrainingConfig) -> int:
    """How many updates the rate rises: as configured, or a twentieth of all, or of the first budget where there are."""
    return (budgets(config.schedule) or (config.updates,))[0] // 20 if config.warmup is None else config.warmup


def check(config: TrainingConfig) -> None:
    """Raise a `UserError` for a schedule that does not exist, does not fit, or ends before training does."""
    find(config.schedule)(warmup(config), config)
    last = max(budgets(config.schedule), default=config.updates)
    if config.updates > last:
        raise UserError(
            f"training.updates ({config.updates}) goes beyond the last budget of {config.schedule} ({last}); "
            f"add {config.updates} to the budgets, or set training.updates={last}."
        )


def refusal(before: TrainingConfig, after: TrainingConfig, done: int) -> str | None:
    """Why a run that has done this many updates cannot go on as `after`, in words; None: it can.

    It can where every update that is done had the rate that it would have now.
    """
    if after.updates < done:
        return f"More updates are done than that: {done}."
    if _changed(before, after, done) is None:
        return None
    kept = after.model_copy(update={"warmup": warmup(before)})
    try:
        check(kept)
    except UserError:
        kept = after
    if (changed := _changed(before, kept, done)) is None:
        return (
            f"Unless it is stated, the warm-up follows the length of the run: it was {warmup(before)} updates and "
            f"would be {warmup(after)}. With training.warmup={warmup(before)} the run can go on."
        )
    return (
        f"Rates of {name_of(before.schedule)!r} depend on where the run ends from update {changed + 1} on, and {done} "
        f"are done: update {changed + 1} had {rate(changed, before):.4g} of the peak rate and would have "
        f"{rate(changed, kept):.4g}. {MOVABLE}"
    )


def _changed(before: TrainingConfig, after: TrainingConfig, done: int) -> int | None:
    """The first update of those done whose rate would be another."""
    return next((update for update in range(done) if rate(update, before) != rate(update, after)), None)


def _part(update: int, start: int, end: int) -> float:
    """How much of the updates from start to end is over after this one."""
    return (update - start + 1) / max(1, end - start)


def _fallen(shape: Shape, part: float, floor: float) -> float:
    """From 1 where no part of a decay is over to exactly the floor where all is."""
    if floor == 0 and shape in ("inverse", "exponential"):
        raise UserError(f"A decay of the shape {shape!r} never reaches 0; set training.floor above it, as 0.1.")
    if part <= 0:
        return 1.0
    if part >= 1:
        return floor
    if shape == "inverse":
        value = 1 / (part / floor + 1 - part)
    elif shape == "exponential":
        value = floor**part
    else:
        left = {"linear": 1 - part, "sqrt": 1 - math.sqrt(part), "cosine": (1 + math.cos(math.pi * part)) / 2}[shape]
        value = floor + (1 - floor) * left
    return min(1.0, max(floor, value))


def _falling(decay: float, updates: int) -> int:
    return max(1, round(decay * updates))


def _cycle(update: int, budgets: tuple[int, ...]) -> tuple[int, int]:
    """The budgets around an update; after the last one, those around the last."""
    place = min(bisect_right(budgets, update), len(budgets) - 1)
    return (0, *budgets)[place], budgets[place]


def _check_ascending(budgets: tuple[int, ...]) -> None:
    wrong = [(a, b) for a, b in pairwise(budgets) if a >= b]
    if wrong:
        raise UserError(f"Budgets ascend, and {wrong[0][1]} follows {wrong[0][0]} in {list(budgets)}.")


def _check_cycle(start: int, end: int, rising: int, decay: float, mode: str) -> None:
    whole = end if mode == "cumulative" else end - start
    falling = _falling(decay, whole)
    if rising + falling <= end - start:
        return
    advice = "take a smaller decay"
    if decay < 1:
        least = math.ceil(((start if mode == "cumulative" else 0) + rising + 0.5) / (1 - decay))
        advice += f", or a budget of {least if mode == 'cumulative' else start + least}"
    raise UserError(
        f"{'A re-warm-up' if start else 'A warm-up'} of {rising} updates and a decay of {falling} ({decay:g} of "
        f"{whole}) do not fit between {start} and the budget {end}; {advice}."
    )
