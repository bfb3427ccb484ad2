"""Does one run of a study, in whichever process: trains it, measures it, and notes on its rows what they are of."""

import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lookfar import config, files
from lookfar.config import Run
from lookfar.errors import UserError
from lookfar.training import folder as run_folder
from lookfar.training.log import Watch
from lookfar.training.measure import about
from lookfar.training.run import run_whole
from lookfar.training.train import Diverged, Interrupted

NOTES = ("label", "spent", "candidate", "chosen_rate")  # what a study adds to rows
ERROR = "error.txt"  # why the last attempt failed


@dataclass(frozen=True)
class Job:
    """A run that is ready to be done."""

    title: str  # for who watches
    folder: Path
    run: Run
    notes: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Of the run."""
        return self.folder.name

    def to_plain(self) -> dict[str, Any]:
        """What JSON can carry to another process."""
        notes = {**self.notes, "spent": [*self.notes.get("spent", {}).items()]}
        return {"title": self.title, "folder": str(self.folder), "run": self.run.model_dump(), "notes": notes}


@runtime_checkable
class Pool(Protocol):
    """A way to do jobs, a few at a time."""

    places: int

    def start(self, job: Job) -> None:
        """Begin a job; there must be a free place."""

    def ended(self) -> tuple[str, str | None]:
        """Wait until a job ends: the name of the run, and why it failed, or None."""
        ...


def from_plain(content: Mapping[str, Any]) -> Job:
    """The job that `to_plain` gave."""
    notes = {**content["notes"], "spent": dict(content["notes"]["spent"])}
    return Job(content["title"], Path(content["folder"]), config.build(content["run"]), notes)


def do(job: Job, watch: Watch) -> str | None:
    """Train and measure a run; the answer is why it failed, or None.

    Raises:
        Interrupted: as `train`.
    """
    with suppress(OSError):
        (job.folder / ERROR).unlink(missing_ok=True)  # of an earlier attempt
    try:
        if "candidate" in job.notes and _has_diverged(job):
            return None
        try:
            run_whole(job.run, job.folder, watch)
        except Diverged:
            if "candidate" not in job.notes:
                raise
            run_folder.add_rows(job.folder, [_diverged(job)])  # a rate that is too high is an answer, too
        _note(job)
    except (Interrupted, KeyboardInterrupt):
        raise
    except UserError as error:
        return leave_reason(job.folder, str(error))
    except Exception as error:  # one run that fails must not cost the others
        return leave_reason(job.folder, f"{type(error).__name__}: {error}", trace=traceback.format_exc())
    return None


def leave_reason(folder: Path, reason: str, trace: str = "") -> str:
    """Write into a run's folder why it failed, if the disk takes it; the answer is the reason all the same."""
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        files.write(folder / ERROR, f"{(trace or reason).strip()}\n".encode(errors="replace"))
        return f"{reason} (see {folder.name}/{ERROR})" if trace else reason
    return reason


def _note(job: Job) -> None:
    """Put the notes on every row, and with each budget what it has cost."""
    spent = job.notes.get("spent") or {}
    notes = {key: value for key, value in job.notes.items() if key != "spent"}
    rows = files.read_lines(job.folder / run_folder.ROWS)
    rows_of_measuring = [{key: value for key, value in row.items() if key not in NOTES} for row in rows]
    noted = [
        {**row, **notes, **({"spent": spent[row["update"]]} if row.get("update") in spent else {})}
        for row in rows_of_measuring
    ]
    if noted != rows:
        files.write_lines(job.folder / run_folder.ROWS, noted)


def _has_diverged(job: Job) -> bool:
    rows = files.read_lines(job.folder / run_folder.ROWS)
    return any(row["metric"] == "perplexity" and row["value"] is None for row in rows)


def _diverged(job: Job) -> dict[str, Any]:
    data = run_folder.read(job.folder)[1]
    row = {**about(job.run, job.folder), "data": data, "protocol": "training", "length": job.run.model.context}
    return {**row, "metric": "perplexity", "value": None, "count": 0}
