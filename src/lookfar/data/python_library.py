"""Reads the standard library's source of the running Python: about 30 MB, on every machine, without a download."""

import hashlib
import os
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from lookfar.data.base import SPLITS, Document, Source, Split, split_of
from lookfar.errors import UserError

_FOREIGN_FOLDERS = ("site-packages", "dist-packages", "__pycache__")  # what was installed, and what was compiled
_FOREIGN_STARTS = (".", "config-", "_sysconfigdata", "sitecustomize")  # what differs between builds of one Python
_LONG = 64 * 1024  # bytes


class PythonLibrary(Source):
    """The standard library's `*.py` files, divided by a hash of their path, so that a file stays where it is.

    Each file is a document, read in the coding that it declares, with `\\n` at the end of lines. Files that do not
    decode (Python tests itself with some) are left out. Within a split the order is that of the hash, a mix of all
    packages; files longer than 64 KiB come last, so that the first 64k tokens of a split are several files, never one.
    """

    def __init__(self, *, path: str | None = None) -> None:
        if path is not None:
            raise UserError(
                f"python_library reads the running Python's own library and takes no path ({path!r} given); "
                "leave data.path out, or read that path with data.source = 'text_file'."
            )
        self.folder = Path(sysconfig.get_path("stdlib"))
        self.files = _files(self.folder)
        if not any(self.files.values()):
            raise UserError(f"The running Python has no source of its library in {self.folder}; use text_file instead.")

    def documents(self, split: Split) -> Iterator[Document]:
        """The files of a split that decode, named by their path from the library's folder."""
        for name in self.files[split]:
            text = _read(self.folder / name)
            if text is not None:
                yield Document(name, text)


def _files(folder: Path) -> dict[Split, list[str]]:
    found: dict[Split, list[tuple[bool, str, str]]] = {split: [] for split in SPLITS}
    for file in _walk(folder):
        name = file.relative_to(folder).as_posix()
        order = file.stat().st_size > _LONG, hashlib.sha256(name.encode()).hexdigest(), name
        found[split_of(name)].append(order)
    return {split: [name for *_, name in sorted(each)] for split, each in found.items()}


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = [each for each in folders if each not in _FOREIGN_FOLDERS and not each.startswith(_FOREIGN_STARTS)]
        for each in files:
            if each.endswith(".py") and not each.startswith(_FOREIGN_STARTS) and (file := Path(parent, each)).is_file():
                yield file


def _read(file: Path) -> str | None:
    try:
        with tokenize.open(file) as lines:
            return lines.read()
    except (SyntaxError, UnicodeDecodeError):  # an unknown coding, or bytes that are not in the declared one
        return None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error
