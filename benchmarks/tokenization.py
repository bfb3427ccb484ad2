"""Byte-level BPE of a text of any size: `lookfar` into token shards beside the `tokenizers` library's own batches.

All use the same tokenizer and the same processors. The library only encodes, and what it finds is dropped; `lookfar`
also cuts documents, turns ids into numbers, hashes and writes shards, and waits until they lie on the disk.

    python -m benchmarks.tokenization --megabytes 1024 --repeats 1
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from random import Random
from statistics import median
from threading import Event, Thread
from typing import Any

from tokenizers import Tokenizer

from lookfar.data.base import Document, Source, Split
from lookfar.data.python_library import PythonLibrary
from lookfar.data.shards import Shards
from lookfar.data.tokenizers import BpeTokenizer, train_bpe

MEGABYTES, VOCABULARY = 32, 8192
TOGETHER = 100  # documents that the library is given at once; at 1000 it is slower


class Shuffled(Source):
    """The standard library's files, shuffled again and again until they are as long as wanted."""

    def __init__(self, megabytes: int) -> None:
        self.size = megabytes * 2**20

    def documents(self, split: Split) -> Iterator[Document]:
        """All of the text as train; one file each for valid and test."""
        size = 0
        for number, text in enumerate(_endless(_texts())):
            if size >= self.size or (split != "train" and number):
                return
            size += len(text.encode())
            yield Document(str(number), text)


def run(repeats: int, megabytes: int = MEGABYTES) -> list[dict[str, Any]]:
    """Megabytes a second and peak memory of each rival, and their ratios to the library's `encode_batch`."""
    _tokenizer()
    times: dict[str, list[float]] = {name: [] for name in RIVALS}
    busy: dict[str, list[float]] = {name: [] for name in RIVALS}
    for _ in range(min(repeats, 3)):  # they take turns
        for name, call in RIVALS.items():
            started, before = time.perf_counter(), sum(os.times()[:4])
            call(megabytes)
            times[name].append(time.perf_counter() - started)
            busy[name].append(sum(os.times()[:4]) - before)
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        peaks = {name: pool.apply(_peak, (name, megabytes)) for name in RIVALS}
    speeds = {name: megabytes / median(each) for name, each in times.items()}
    first = next(iter(RIVALS))
    return [
        {
            "rival": name,
            "megabytes_per_second": speeds[name],
            "speed_over_library": speeds[name] / speeds[first],
            "processor_seconds": median(busy[name]),
            "peak_megabytes": peaks[name] / 2**20,
            "megabytes": megabytes,
            "vocabulary": VOCABULARY,
            "processors": os.cpu_count(),
        }
        for name in RIVALS
    ]


def _library(megabytes: int, *, fast: bool) -> None:
    model = Tokenizer.from_str(_tokenizer().content)
    encode: Callable[..., Any] = model.encode_batch_fast if fast else model.encode_batch
    texts = (document.text for document in Shuffled(megabytes).documents("train"))
    while some := list(islice(texts, TOGETHER)):
        encode(some, add_special_tokens=False)


def _lookfar(megabytes: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Shards(Path(folder, "shards"), _tokenizer()).prepare("text", Shuffled(megabytes), lambda what, part: None)


@cache
def _texts() -> list[str]:
    return [document.text for document in PythonLibrary().documents("train")]


@cache
def _tokenizer() -> BpeTokenizer:
    return train_bpe(_texts(), VOCABULARY)


def _endless(texts: list[str]) -> Iterator[str]:
    random = Random(0)
    while True:
        yield from random.sample(texts, len(texts))


def _peak(rival: str, megabytes: int) -> int:
    """The most bytes that a process and those that it started held at once, less what it held before it began."""
    _tokenizer()
    before, most, done = _resident(), 0, Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.02):
            most = max(most, _resident())

    watching = Thread(target=watch)
    watching.start()
    RIVALS[rival](megabytes)
    done.set()
    watching.join()
    return most - before


def _resident() -> int:
    """The bytes of this process and of its children."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="ascii").split()
    return sum(_bytes(process) for process in ("self", *children))


def _bytes(process: str) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
    except OSError:  # it has ended
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), 0)


RIVALS: dict[str, Callable[[int], None]] = {
    "tokenizers encode_batch": partial(_library, fast=False),
    "tokenizers encode_batch_fast": partial(_library, fast=True),
    "lookfar": _lookfar,
}


def main() -> None:
    """Measure and print rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=MEGABYTES)
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    for row in run(options.repeats, options.megabytes):
        print(
            "  ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
        )


if __name__ == "__main__":
    main()
