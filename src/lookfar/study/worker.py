"""The process of one job: reads it from standard input, tells what happens as JSON lines, and last why it failed.

python -m lookfar.study.worker < job.json
"""

import json
import os
import signal
import sys
import threading
import time
from typing import Any, TextIO

from lookfar.study.work import do, from_plain
from lookfar.training.train import Interrupted

SPARSE = 0.2  # seconds between two updates that are told


def main() -> None:
    """Do the job; a process that is interrupted leaves without an answer."""
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no event
    job = from_plain(json.loads(sys.stdin.readline()))
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    try:
        reason = do(job, _Teller(told).tell)
    except (Interrupted, KeyboardInterrupt):
        sys.exit(1)
    _tell(told, {"ended": reason or ""})


class _Teller:
    """Passes events on, not every update."""

    def __init__(self, told: TextIO) -> None:
        self.told, self.last = told, -SPARSE

    def tell(self, event: dict[str, Any]) -> None:
        """Write an event as a line."""
        now = time.monotonic()
        between = event["event"] == "update" and event["update"] < event["updates"]
        if not between or now - self.last > SPARSE:
            self.last = now
            _tell(self.told, event)


def _tell(told: TextIO, line: dict[str, Any]) -> None:
    try:
        told.write(json.dumps(line) + "\n")
        told.flush()
    except BrokenPipeError:  # nobody listens any more, and the run is about to be stopped
        pass


def _leave_with_parent() -> None:
    """Stop like an interrupted run when the process that started this one is gone."""
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
