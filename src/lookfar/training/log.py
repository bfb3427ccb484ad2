"""The log of a run: JSON lines in its folder, the same in a tracker where one is set, and events for who watches."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from lookfar.config import Run
from lookfar.training import folder as run_folder
from lookfar.training.tracking import Tracking

Watch = Callable[[dict[str, Any]], None]  # told what happens, as flat events


class Log:
    """Takes lines, each whole as soon as it is written; every line from an update has the key `update`."""

    def __init__(self, file: TextIO, tracking: Tracking, watch: Watch) -> None:
        self.file, self.tracking, self.watch = file, tracking, watch

    def write(self, line: dict[str, Any]) -> None:
        """Add a line."""
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        self.tracking.take(line)

    def note(self, line: dict[str, Any]) -> None:
        """Add a line whose `note` is for people."""
        self.write(line)
        self.tell(line["note"])

    def tell(self, text: str) -> None:
        """Say something to who watches, without writing it down."""
        self.watch({"event": "note", "text": text})


@contextmanager
def opened(folder: Path, run: Run, watch: Watch, *, silent: bool = False) -> Iterator[Log]:
    """The log of a run, to be gone on with; a silent one only tells who watches."""
    settings = run.training.model_copy(update={"tracking": None}) if silent else run.training
    tracking = Tracking(folder, run.model_copy(update={"training": settings}))
    place = Path(os.devnull) if silent else folder / run_folder.LOG
    try:
        with place.open("a", encoding="utf-8") as file:
            yield Log(file, tracking, watch)
    finally:
        tracking.close()
