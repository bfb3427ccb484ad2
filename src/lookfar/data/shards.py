"""Keeps the tokens of a text in numbered shards, each published whole with its hash; what was interrupted goes on."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from lookfar.data.base import SPLITS, Source, Split
from lookfar.data.cache import writing
from lookfar.data.encoders import Encoded, Encoders
from lookfar.data.portions import Portion, portions
from lookfar.data.stream import Stream
from lookfar.data.tokenizers import Tokenizer
from lookfar.errors import UserError
from lookfar.files import digest, sync, sync_folder, write

try:
    import fcntl
except ImportError:  # not on Windows, where two processes may do the same work at once
    fcntl = None

Progress = Callable[[str, float | None], None]  # what is being done, and the part of it that is done where it is known

_MANIFEST, _LOCK = "manifest.json", ".lock"
_PORTIONS = 16  # of a shard: about 64 million characters


@dataclass(frozen=True)
class Shard:
    """What is known of a shard: its file holds the tokens, zeros up to a multiple of 8 bytes, and the starts."""

    tokens: int
    documents: int  # that begin in it
    sha256: str
    changed: int  # time of the file's last change, in nanoseconds: a file that was touched since is hashed again


@dataclass(frozen=True)
class Shards:
    """The shards of a text under a tokenizer, in a folder of their own."""

    folder: Path
    tokenizer: Tokenizer

    def stream(self, split: Split) -> Stream:
        """All shards of a split as one stream, mapped into memory."""
        tokens, starts = [], []
        for number in range(_read(self.folder / _MANIFEST)["splits"][split]["shards"]):
            shard, file = _known(self._record(split, number)), self._file(split, number)
            tokens.append(np.memmap(file, self.tokenizer.dtype, "r", shape=(shard.tokens,)))
            offset = _aligned(tokens[-1].nbytes)
            empty = np.empty(0, np.int64)
            starts.append(np.memmap(file, np.int64, "r", offset, (shard.documents,)) if shard.documents else empty)
        return Stream(tokens, starts)

    def are_whole(self) -> bool:
        """Whether every shard of a finished preparation is there, with its size, and its hash where it was touched."""
        try:
            manifest = _read(self.folder / _MANIFEST)
            return all(
                self._whole(split, number) for split in SPLITS for number in range(manifest["splits"][split]["shards"])
            )
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def prepare(self, name: str, source: Source, tell: Progress, workers: int | None = None) -> None:
        """Make every shard that is not there whole. The same text gives the same bytes, by any number of workers.

        One process at a time does this; another waits for it and takes what is there.

        Args:
            name: of the text, for errors.
            source: the text; it is read from the beginning, but what lies in whole shards is not tokenized again.
            tell: is told how far it is.
            workers: as of `Encoders`.

        Raises:
            UserError: a text that cannot be read, a split of fewer than two tokens, a folder that cannot be written.
        """
        if self.are_whole():
            return
        with writing(self.folder.parent), _held(self.folder, tell), Encoders(self.tokenizer, workers) as encoders:
            if self.are_whole():
                return
            sizes = {split: self._prepare(split, source, encoders, tell) for split in SPLITS}
            for split, size in sizes.items():
                if size["tokens"] < 2:
                    shutil.rmtree(self.folder)
                    raise UserError(
                        f"The {split} split of {name} has {size['tokens']} tokens; "
                        "it needs two at least: give more text."
                    )
            manifest = {"name": name, "dtype": self.tokenizer.dtype.name, "splits": sizes}
            write(self.folder / _MANIFEST, json.dumps(manifest, indent=2).encode() + b"\n")
            sync_folder(self.folder)

    def _prepare(self, split: Split, source: Source, encoders: Encoders, tell: Progress) -> dict[str, int]:
        there: dict[int, Shard] = {}
        wanted: list[int] = []  # the shard of each portion that is on its way, in order

        def missing() -> Iterator[Portion]:
            for place, portion in enumerate(portions(source.documents(split))):
                number = place // _PORTIONS
                if place % _PORTIONS == 0 and (shard := self._whole(split, number)):
                    there[number] = shard
                    tell(f"tokenizing {split}: shard {number} is there", None)
                if number not in there:
                    wanted.append(number)
                    yield portion

        def told(group: Iterator[Encoded]) -> Iterator[Encoded]:
            nonlocal tokens
            for encoded in group:
                tokens += len(encoded[0])
                tell(f"tokenizing {split}: {tokens:,} tokens", None)
                yield encoded

        made: dict[int, Shard] = {}
        tokens = 0
        for number, group in groupby(encoders.encode_all(missing()), key=lambda encoded: wanted.pop(0)):
            made[number] = self._write(split, number, told(group))
        every = {**there, **made}
        return {
            "shards": len(every),
            "tokens": sum(each.tokens for each in every.values()),
            "documents": sum(each.documents for each in every.values()),
        }

    def _write(self, split: Split, number: int, encoded: Iterator[Encoded]) -> Shard:
        """Write a shard aside and give it its name when it lies on the disk."""
        file, record, starts = self._file(split, number), self._record(split, number), []
        aside = file.with_name(f".{file.name}.{os.getpid()}")
        tokens, hashed = 0, hashlib.sha256()
        try:
            with aside.open("wb") as opened:

                def put(content: bytes | memoryview) -> None:
                    hashed.update(content)
                    opened.write(content)

                for some, begins in encoded:
                    starts.append(begins + tokens)
                    tokens += len(some)
                    put(some.data.cast("B"))
                size = opened.tell()
                put(bytes(_aligned(size) - size))
                put(np.concatenate(starts).data.cast("B") if any(map(len, starts)) else b"")
            sync(aside)
            shard = Shard(tokens, sum(map(len, starts)), hashed.hexdigest(), aside.stat().st_mtime_ns)
            record.unlink(missing_ok=True)
            aside.replace(file)
            write(record, json.dumps(asdict(shard)).encode() + b"\n")
        finally:
            aside.unlink(missing_ok=True)
        return shard

    def _whole(self, split: Split, number: int) -> Shard | None:
        """What is known of a shard that is whole."""
        try:
            shard = _known(self._record(split, number))
            file = self._file(split, number)
            found = file.stat()
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if found.st_size != _aligned(shard.tokens * self.tokenizer.dtype.itemsize) + shard.documents * 8:
            return None
        return shard if found.st_mtime_ns == shard.changed or digest(file) == shard.sha256 else None

    def _file(self, split: Split, number: int) -> Path:
        return self.folder / f"{split}-{number:05}.shard"

    def _record(self, split: Split, number: int) -> Path:
        return self.folder / f"{split}-{number:05}.json"


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _known(record: Path) -> Shard:
    return Shard(**_read(record))


def _aligned(size: int) -> int:
    return -(-size // 8) * 8


@contextmanager
def _held(folder: Path, tell: Progress) -> Iterator[None]:
    """Make a folder and hold it while it is filled; what a killed process was writing in it is swept."""
    if folder.exists() and not folder.is_dir():
        folder.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("w") as lock:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                tell("waiting for another process that tokenizes the same text", None)
                fcntl.flock(lock, fcntl.LOCK_EX)
            folder.mkdir(parents=True, exist_ok=True)  # it may have been removed meanwhile
            for left in folder.glob(".*.shard.*"):
                left.unlink()
        yield
