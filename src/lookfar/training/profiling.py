"""Records where the time of a few updates goes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

TRACE = "profile.json"
IDLE, WARMING, RECORDED = 1, 1, 3  # updates: of those of a start, 3 to 5 are recorded
SHOWN = 10  # operators


@contextmanager
def profiled(folder: Path, wanted: bool, tell: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """A function to call after every update; where it is wanted, the trace of a few of them is written.

    `tell` gets the costliest operators as a table, each with the time that it spends outside of others.
    """
    if not wanted:
        yield lambda: None
        return

    published = []

    def publish(profiler: profile) -> None:
        if profiler.step_num <= IDLE + WARMING:  # it ends before a first update is recorded
            return
        aside = folder / f".{TRACE}"
        profiler.export_chrome_trace(str(aside))
        aside.replace(folder / TRACE)
        tell(f"{_table(profiler)}\nThe trace is {folder / TRACE}; it opens in ui.perfetto.dev.")
        published.append(True)

    gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    plan = schedule(wait=IDLE, warmup=WARMING, active=RECORDED, repeat=1)
    with profile(activities=[ProfilerActivity.CPU, *gpu], schedule=plan, on_trace_ready=publish) as profiler:
        yield profiler.step
    if not published:
        tell(
            f"Nothing was profiled: the first {IDLE + WARMING} updates of a start are left out, and no more were done."
        )


def _table(profiler: profile) -> str:
    operators = [each for each in profiler.key_averages() if not each.key.startswith("ProfilerStep")]
    whole = max(sum(_own(each) for each in operators), 1e-9)
    costly = sorted(operators, key=_own, reverse=True)[:SHOWN]
    lines = [f"{_own(each) / 1e3:10.1f} {_own(each) / whole:6.1%} {each.count:8,}  {each.key[:60]}" for each in costly]
    return "\n".join([f"{'ms':>10} {'part':>6} {'calls':>8}  operator", *lines])


def _own(operator: Any) -> float:
    """Microseconds outside of other operators: on the GPU where there is one."""
    return operator.self_device_time_total if torch.cuda.is_available() else operator.self_cpu_time_total
