"""Reads UTF-8 text from a file, from a folder, or from the three files train.txt, valid.txt and test.txt."""

import os
from collections.abc import Iterator
from pathlib import Path

from lookfar.data.base import SPLITS, Document, Source, Split, split_of
from lookfar.data.pieces import Piece, divide, whole
from lookfar.errors import UserError

_PROSE = {".txt", ".text", ".md", ".rst", ".tex", ".html", ".xml"}
_CODE = {".py", ".c", ".h", ".cpp", ".cu", ".rs", ".go", ".java", ".js", ".ts", ".css", ".sh", ".sql", ".r", ".jl"}
SUFFIXES = _PROSE | _CODE | {".json", ".toml", ".yaml", ".yml"}


class TextFile(Source):
    """The text at a path, byte for byte: what is N bytes long becomes N tokens of the bytes tokenizer.

    - A folder with `train.txt`, `valid.txt` and `test.txt`: each is one document.
    - A file: its first 90% are train, the next 5% valid, the last 5% test, cut at the end of a line.
    - Any other folder: every file below it whose suffix is in `SUFFIXES`, sorted by path, hidden ones left out. Each
      is a document and falls into a split by the hash of its path. Where that would leave a split empty, because
      there are few files, they are cut like one long file instead.

    A document of more than a megabyte comes in parts, so that memory stays constant.

    Raises:
        UserError: a path that is missing, empty or unreadable, and bytes that are not UTF-8.
    """

    def __init__(self, *, path: str | None = None) -> None:
        if not path:
            raise UserError("text_file needs a path: set data.path to a file or a folder.")
        self.path = Path(path).expanduser()
        try:
            self.pieces = _pieces(self.path)
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror}.") from error

    def documents(self, split: Split) -> Iterator[Document]:
        """The documents of a split, named by their path from the folder."""
        for piece in self.pieces[split]:
            for number, part in enumerate(piece.parts()):
                yield Document(piece.name, part, continues=number > 0)


def read_text(path: str | Path) -> str:
    """The whole text of one file, its line ends untouched; a `UserError` when it is missing, empty or not UTF-8."""
    file = Path(path).expanduser()
    if not file.exists():
        raise UserError(f"There is no file {file}.")
    if file.is_dir():
        raise UserError(f"{file} is a folder; name a file.")
    return _filled(whole(file, file.name)).read()


def read_documents(folder: Path) -> Iterator[Document]:
    """Every file of text below a folder, whole, sorted by path; a `UserError` where there is none, or no UTF-8."""
    for piece in _files(folder):
        yield Document(piece.name, piece.read())


def _pieces(path: Path) -> dict[Split, list[Piece]]:
    if not path.exists():
        raise UserError(f"There is no file or folder {path}; set data.path to one that exists.")
    if path.is_file():
        return divide([_filled(whole(path, path.name))])
    if (path / "train.txt").is_file():
        return {split: [_one_of_three(path / f"{split}.txt")] for split in SPLITS}
    files = _files(path)
    shared: dict[Split, list[Piece]] = {
        split: [each for each in files if split_of(each.name) == split] for split in SPLITS
    }
    return shared if all(shared.values()) else divide(files)


def _filled(piece: Piece) -> Piece:
    if not piece.stop:
        raise UserError(f"{piece.file} is empty; a text is needed.")
    return piece


def _one_of_three(file: Path) -> Piece:
    if not file.is_file():
        raise UserError(f"{file.parent} has a train.txt but no {file.name}; give all three of train, valid and test.")
    return _filled(whole(file, file.name))


def _files(folder: Path) -> list[Piece]:
    """Every file of text below a folder that is not empty, sorted by path."""
    found: list[Path] = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [each for each in folders if not each.startswith(".")]
        found += [Path(parent, each) for each in files if not each.startswith(".")]
    texts = [each for each in found if each.suffix.lower() in SUFFIXES and each.is_file()]
    pieces = [whole(each, each.relative_to(folder).as_posix()) for each in texts]
    filled = sorted((each for each in pieces if each.stop), key=lambda each: each.name)
    if not filled:
        raise UserError(
            f"{folder} holds no text: no file in it that ends in .txt, .md, .py or the like has any content."
        )
    return filled
