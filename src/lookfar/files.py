"""Writes files whole or not at all, and reads JSON lines whose last one may be half-written."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lookfar.errors import UserError


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Another name to write a file under; it is renamed once all is written, or removed."""
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        yield aside
        sync(aside)
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)


def write(file: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    with replacing(file) as aside:
        aside.write_bytes(content)


def sweep(folder: Path) -> None:
    """Remove what killed writers have left half-written in a folder; nobody else may write in it."""
    for aside in folder.glob(".*.*"):
        if aside.suffix[1:].isdigit() and aside.is_file():
            aside.unlink(missing_ok=True)


def sync(file: Path) -> None:
    """Wait until a file lies on the disk."""
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder lie on the disk."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def digest(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file, none where it is missing; a half-written last line is passed over.

    Raises:
        UserError: another line is not a JSON object.
    """
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(f"{file}, line {number}, is not JSON ({error}); remove the line.") from error
        if not isinstance(row, dict):
            raise UserError(f"{file}, line {number}, is not a JSON object; remove the line.")
        rows.append(row)
    return rows


def write_lines(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write objects as JSON lines, whole or not at all."""
    write(file, "".join(json.dumps(row) + "\n" for row in rows).encode())


def cache_folder(setting: str | None = None) -> Path:
    """The setting, else $LOOKFAR_CACHE, else lookfar in $XDG_CACHE_HOME, else ~/.cache/lookfar."""
    if chosen := setting or os.environ.get("LOOKFAR_CACHE"):
        return Path(chosen).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "lookfar"
