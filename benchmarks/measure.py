"""Medians of rivals that take turns, and the peak memory of one call."""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

Name = TypeVar("Name", bound=Hashable)
SPAN = 0.01  # seconds of one turn, at least: calls that are shorter are repeated within it


@dataclass(frozen=True)
class Time:
    """How long a call takes: the median of some turns, and the least of them."""

    seconds: float
    least: float
    repeats: int


def seconds(rivals: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The median time of each rival; they take turns, after one call each that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in range(repeats + 1):
        for name, call in rivals.items():
            started = time.perf_counter()
            call()
            if turn:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(each) for name, each in times.items()}


def turns(
    rivals: Mapping[Name, Callable[[], Any]],
    repeats: int,
    *,
    limit: float,
    wait: Callable[[], Any] | None = None,
    around: Callable[[Name], AbstractContextManager[Any]] = lambda name: nullcontext(),
    failed: Callable[[Name, Exception], Any] | None = None,
) -> dict[Name, Time]:
    """The median time of each rival; they take turns, each until it has had `repeats` or has taken `limit` seconds.

    Every rival has a first call that is not counted. `wait` returns when a device has done all that it was given.
    `around` is entered before the clock starts and left after it has stopped. With `failed`, which is told the error, a
    rival that raises one has no time, and the others go on.
    """
    running, counts = dict(rivals), {}
    times: dict[Name, list[float]] = {name: [] for name in rivals}
    for turn in range(repeats + 1):
        for name, call in list(running.items()):
            if turn and sum(times[name]) * counts[name] >= limit:
                continue
            try:
                with around(name):
                    taken = _seconds(call, counts.get(name, 1), wait)
            except Exception as error:
                if failed is None:
                    raise
                failed(name, error)
                del running[name]
                continue
            if turn:
                times[name].append(taken)
            else:
                counts[name] = max(1, min(100, round(SPAN / taken)))
    return {name: Time(statistics.median(times[name]), min(times[name]), len(times[name])) for name in running}


def _seconds(call: Callable[[], Any], count: int, wait: Callable[[], Any] | None) -> float:
    if wait:
        wait()
    started = time.perf_counter()
    for _ in range(count):
        call()
    if wait:
        wait()
    return (time.perf_counter() - started) / count


def peak_memory_on_gpu(call: Callable[[], Any]) -> int:
    """Bytes that one call adds at its peak to what is allocated on the GPU."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_memory(prepare: Callable[..., Callable[[], Any]], *arguments: Any) -> int:
    """Bytes that one call adds at its peak to what its process held before: `prepare(*arguments)` makes the call."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (prepare, arguments))


def _peak(prepare: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...]) -> int:
    call = prepare(*arguments)
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before  # not ru_maxrss, which a process inherits from the one that started it


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
