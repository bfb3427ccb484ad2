"""What checkpoints cost a run: training with a save every 50 updates beside training with one at its end."""

import shutil
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from lookfar import config
from lookfar.config import Run
from lookfar.training.train import train

UPDATES, EVERY = 200, 50
SIZE = {"width": 384, "layers": 4, "heads": 6, "context": 256, "device": "cpu"}


def run(repeats: int) -> list[dict[str, Any]]:
    """Seconds from the first update to the end of training, the last checkpoint included, in pairs that take turns."""
    plain: list[float] = []
    saving: list[float] = []
    with tempfile.TemporaryDirectory() as place:
        _seconds(Path(place), UPDATES // 10, None)  # torch loads what it loads late
        for _ in range(max(5, repeats)):
            plain.append(_seconds(Path(place), UPDATES, None))
            saving.append(_seconds(Path(place), UPDATES, EVERY))
    ratios = [with_saves / without for with_saves, without in zip(saving, plain, strict=True)]
    return [
        {
            "run": f"a checkpoint every {EVERY} updates",
            "seconds": median(saving),
            "seconds_without": median(plain),
            "time_over_without": median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
            "pairs": len(ratios),
            "updates": UPDATES,
            **SIZE,
        }
    ]


def _seconds(place: Path, updates: int, every: int | None) -> float:
    marks: list[float] = []

    def watch(event: dict[str, Any]) -> None:
        if event["event"] == "start":
            marks.append(time.perf_counter())

    train(_run(updates, every), place / "run", watch)
    taken = time.perf_counter() - marks[0]
    shutil.rmtree(place / "run")
    return taken


def _run(updates: int, every: int | None) -> Run:
    return config.build(
        {
            "model": SIZE,
            "training": {"updates": updates, "batch": 4, "checkpoint_every": "none" if every is None else every},
        }
    )
