"""Medians of rivals that take turns, and the peak memory of one call in a process of its own."""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


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
