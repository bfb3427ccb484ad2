"""A run's folder: its recipe, its log, its rows, and the one process that may work in it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import lookfar
from lookfar import config, files
from lookfar.config import FREE, Run, TrainingConfig
from lookfar.errors import UserError
from lookfar.training import schedules

try:
    import fcntl
except ImportError:  # not on Windows, where a folder is not held
    fcntl = None

RECIPE, LOG, ROWS, MANIFEST = "run.toml", "log.jsonl", "rows.jsonl", "manifest.json"
STUDY = "study.toml"  # makes a folder that of a study


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Make the folder and hold it: a second process that asks for it is told."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be written ({error.strerror}); choose another.") from error
    with lock:
        try:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"Another process works in {folder}; wait for it, or choose another folder.") from error
        yield


def settle(folder: Path, run: Run, label: str, *, done: int = 0) -> None:
    """Write the recipe of a new run; for one that is there already, refuse what would make it another run.

    The end of a run may move where none of the updates that are `done` would have had another rate.
    """
    refuse_another(folder, run, label, done=done)
    versions = {
        "lookfar": lookfar.__version__,
        "torch": torch.__version__,
        "python": ".".join(map(str, sys.version_info[:3])),
        "data": label,
    }
    files.write(folder / RECIPE, config.write_toml({**run.model_dump(), "versions": versions}).encode())


def refuse_another(folder: Path, run: Run, label: str | None = None, *, done: int = 0) -> None:
    """Raise a `UserError` where the folder holds another run, or a study.

    `label` is that of the text, where it is known.
    """
    if (folder / STUDY).exists():
        raise UserError(f"{folder} holds a study, whose rows a run would remove; choose another folder.")
    if not (folder / RECIPE).exists():
        return
    before, label_before = read(folder)
    if run.model.vocabulary is None:  # the tokenizer's, known once the text is opened
        run = run.model_copy(update={"model": run.model.model_copy(update={"vocabulary": before.model.vocabulary})})
    changed = [key for key in _differences(before.model_dump(), run.model_dump()) if not _is_free(key)]
    of_end = [key for key in changed if _moves_end(key, before.training, run.training)]
    reason = schedules.refusal(before.training, run.training, done) if of_end else None
    if reason is None:
        changed = [key for key in changed if key not in of_end]
    if changed:
        told = ", ".join(f"{key} ({_at(before, key)} -> {_at(run, key)})" for key in changed)
        why = f" {reason}" if reason else ""
        raise UserError(
            f"{folder} holds a run with other settings: {told}.{why} Restore them, or choose another folder."
        )
    if label is not None and label_before != label:
        raise UserError(f"{folder} was trained on {label_before}; the text is now {label}. Choose another folder.")


def read(folder: Path) -> tuple[Run, str]:
    """The recipe of a run, and the label of its data.

    Raises:
        UserError: the folder holds no run.
    """
    if not (folder / RECIPE).exists():
        raise UserError(f"{folder} is not a run's folder: it has no {RECIPE}.")
    content = config.read_toml(folder / RECIPE)
    versions = content.pop("versions", {})
    return config.build(content), str(versions.get("data", ""))


def add_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Put rows into the folder's file; a row of the same measurement is replaced."""
    kept = {_key(row): row for row in files.read_lines(folder / ROWS)}
    kept.update({_key(row): row for row in rows})
    files.write_lines(folder / ROWS, kept.values())


def forget_rows(folder: Path) -> None:
    """Remove what was measured."""
    (folder / ROWS).unlink(missing_ok=True)


def trim_log(folder: Path, update: int) -> None:
    """Forget what was logged after this many updates: it is done again."""
    lines = files.read_lines(folder / LOG)
    files.write_lines(folder / LOG, [line for line in lines if line.get("update", 0) <= update])


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    of_what = ("run", "scheme", "data", "protocol", "numbering", "length", "metric", "count", "of", "to")
    return tuple(row.get(part) for part in (*of_what, "update", "checkpoint"))


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE)


def _moves_end(key: str, before: TrainingConfig, now: TrainingConfig) -> bool:
    """Whether a changed setting only says where the run ends: a schedule of the same name, a warm-up as long."""
    if key == "training.schedule":
        return schedules.name_of(before.schedule) == schedules.name_of(now.schedule)
    if key == "training.warmup":
        return schedules.warmup(before) == schedules.warmup(now)
    return key == "training.updates"


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in before.keys() | now.keys():
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(prefix + key)
    return sorted(found)


def _at(run: Run, key: str) -> Any:
    value: Any = run
    for part in key.split("."):
        value = getattr(value, part)
    return value
