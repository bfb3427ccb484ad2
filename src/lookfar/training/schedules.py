"""Learning rates as pure functions: an update and the configuration give the factor of the peak rate. No state.

Update s counts from 0. During a warm-up of W updates the factor is (s + 1) / W; the last of N updates uses exactly the
floor; no update exceeds 1.
"""

import math
from collections.abc import Callable

from lookfar.config import TrainingConfig


def constant(update: int, config: TrainingConfig) -> float:
    """The peak after the warm-up, for ever."""
    return _warmed(update, config, lambda part: 1.0)


def linear(update: int, config: TrainingConfig) -> float:
    """A straight line from the peak to the floor."""
    return _warmed(update, config, lambda part: config.floor + (1 - config.floor) * (1 - part))


def cosine(update: int, config: TrainingConfig) -> float:
    """Half a cosine from the peak to the floor."""
    return _warmed(update, config, lambda part: config.floor + (1 - config.floor) * (1 + math.cos(math.pi * part)) / 2)


SCHEDULES: dict[str, Callable[[int, TrainingConfig], float]] = {
    each.__name__: each for each in (constant, linear, cosine)
}


def rate(update: int, config: TrainingConfig) -> float:
    """The factor of the peak rate that this update uses."""
    return SCHEDULES[config.schedule](update, config)


def warmup(config: TrainingConfig) -> int:
    """How many updates the rate rises: as configured, or a twentieth of all."""
    return config.updates // 20 if config.warmup is None else config.warmup


def _warmed(update: int, config: TrainingConfig, after: Callable[[float], float]) -> float:
    rising = warmup(config)
    if update < rising:
        return (update + 1) / rising
    part = (update - rising + 1) / max(1, config.updates - rising)
    return after(min(1.0, part))
