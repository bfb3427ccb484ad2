"""Parts of files: how they are read as UTF-8, and how a few files are divided at the ends of their lines."""

import codecs
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

from lookfar.data.base import SPLITS, Split
from lookfar.errors import UserError

_PART = 2**20  # bytes


@dataclass(frozen=True)
class Piece:
    """Some bytes of a file, and the name of the document that they are."""

    file: Path
    name: str
    start: int
    stop: int

    def read(self) -> str:
        """The text, its line ends untouched; a `UserError` for bytes that are not UTF-8, or that cannot be read."""
        return "".join(self.parts())

    def parts(self) -> Iterator[str]:
        """The text in parts of a megabyte or less, cut between any two characters."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            with self.file.open("rb") as opened:
                opened.seek(self.start)
                for place in range(self.start, self.stop, _PART):
                    pending = len(decoder.getstate()[0])
                    content = opened.read(min(_PART, self.stop - place))
                    yield self._decode(decoder, content, place - pending, place + _PART >= self.stop)
        except OSError as error:
            raise UserError(f"{self.file} cannot be read: {error.strerror}.") from error

    def _decode(self, decoder: codecs.IncrementalDecoder, content: bytes, start: int, final: bool) -> str:
        try:
            return decoder.decode(content, final)
        except UnicodeDecodeError as error:
            byte, place = error.object[error.start], start + error.start
            raise UserError(
                f"{self.file} is not UTF-8: byte {place} ({byte:#04x}) does not decode; convert the file to UTF-8."
            ) from error


def whole(file: Path, name: str) -> Piece:
    """All of a file."""
    return Piece(file, name, 0, file.stat().st_size)


def divide(files: list[Piece]) -> dict[Split, list[Piece]]:
    """Cut whole files, taken as one long file, into the first 90% of the bytes, the next 5% and the last 5%.

    Each cut lies at the end of a line, or of a character where no line ends in a whole split.
    """
    offsets = [0, *accumulate(each.stop for each in files)]
    total = offsets[-1]
    cuts = [0]
    for mark in (total * 90 // 100, total * 95 // 100):
        cuts.append(_end_of_line(files, offsets, cuts[-1], mark))
    spans = zip(SPLITS, pairwise([*cuts, total]), strict=True)
    return {split: _between(files, offsets, first, last) for split, (first, last) in spans}


def _between(files: list[Piece], offsets: list[int], first: int, last: int) -> list[Piece]:
    return [
        Piece(each.file, each.name, max(first, start) - start, min(last, stop) - start)
        for each, (start, stop) in zip(files, pairwise(offsets), strict=True)
        if max(first, start) < min(last, stop)
    ]


def _end_of_line(files: list[Piece], offsets: list[int], previous: int, mark: int) -> int:
    """The last end of a line or file after the previous cut and up to a mark; else the first end of a character."""
    place = next(i for i, (start, stop) in enumerate(pairwise(offsets)) if start <= mark < stop)
    start = offsets[place]
    with files[place].file.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        line = content.rfind(b"\n", max(previous - start, 0), mark - start)
        if line >= 0:
            return start + line + 1
        if start > previous:
            return start
        end = mark - start
        while end < len(content) and content[end] & 0b1100_0000 == 0b1000_0000:  # inside a character
            end += 1
        return start + end
