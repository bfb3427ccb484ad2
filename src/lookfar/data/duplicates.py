"""Counts held-out documents that the training text has too, word for word or nearly.

Near is a Jaccard similarity of their sets of word 5-grams of 0.8 or more. Candidates are found by MinHash (Broder 1997)
in bands (locality-sensitive hashing) and then compared exactly, so none is counted that is not near.
"""

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby, islice

import numpy as np
from jaxtyping import UInt64
from numpy import ndarray
from numpy.lib.stride_tricks import sliding_window_view

from lookfar.data.base import Document, Source, Split
from lookfar.errors import UserError

HASHES = 128  # of a signature, at most
OVERLOOKED = 0.001  # the chance to overlook a pair that is just near, at most
STRETCH = 2**14  # characters that are shingled at once
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Pair:
    """A held-out document, one of the training documents like it, and their similarity."""

    held_out: str
    train: str
    similarity: float


@dataclass(frozen=True)
class Duplicates:
    """How many held-out documents the training text has too.

    Attributes:
        held_out: held-out documents that have words at all.
        train: such training documents.
        exact: held-out documents whose words are, in order, those of a training document.
        near: held-out documents, besides the exact ones, that are near to a training document.
        examples: some pairs, exact ones first.
    """

    held_out: int
    train: int
    exact: int
    near: int
    examples: tuple[Pair, ...]

    @property
    def share(self) -> float:
        """The share of held-out documents that are exact or near."""
        return (self.exact + self.near) / self.held_out if self.held_out else 0.0


class Documents:
    """The documents of a split, as often as they are asked for."""

    def __init__(self, source: Source, split: Split) -> None:
        self.source = source
        self.split: Split = split

    def __iter__(self) -> Iterator[Document]:
        return self.source.documents(self.split)


class Joined:
    """The documents of several sources, one source after another, each named with its source."""

    def __init__(self, named: Sequence[tuple[str, Iterable[Document]]]) -> None:
        self.named = list(named)

    def __iter__(self) -> Iterator[Document]:
        for source, documents in self.named:
            for each in documents:
                yield replace(each, name=f"{each.name} of {source}")


def single(documents: Iterable[Document]) -> bool:
    """Whether there is one document and no other; reads no further than to the second."""
    return len(list(islice((each for each in documents if not each.continues), 2))) == 1


def duplicates(
    train: Iterable[Document],
    held_out: Iterable[Document],
    *,
    threshold: float = 0.8,
    words: int = 5,
    examples: int = 5,
) -> Duplicates:
    """Count the held-out documents that are word for word or nearly among those trained on.

    Only words count, in lower case; punctuation and spaces do not. A passage that two otherwise different documents
    share is not found, so a split that is one long document tells nothing. Documents are read twice, in parts; what
    stays in memory are a few kilobytes of each held-out one, and the shingles of those that have a candidate.

    Args:
        train, held_out: documents, to be read twice: a list or `Documents`, not an iterator.
        threshold: the Jaccard similarity of two sets of shingles from which on documents are near.
        words: of a shingle. A shorter document is one shingle.
        examples: pairs to tell, at most.

    Raises:
        UserError: a setting makes no sense, or documents can be read only once.
    """
    if not 0 < threshold <= 1 or words < 1:
        raise UserError(f"threshold ({threshold}) must be above 0 and at most 1, and words ({words}) 1 or more.")
    if iter(train) is train or iter(held_out) is held_out:
        raise UserError(
            "Documents are read twice; pass a list of them, or Documents(source, split), instead of an iterator."
        )
    rows = _rows(threshold)
    known = {each.place: each for each in _prints(held_out, words, rows)}
    of_text: dict[bytes, list[int]] = {}
    of_band: dict[tuple[int, bytes], list[int]] = {}
    for place, each in known.items():
        of_text.setdefault(each.text, []).append(place)
        for band in enumerate(each.bands):
            of_band.setdefault(band, []).append(place)

    exact: dict[int, Pair] = {}
    candidates: dict[int, set[int]] = {}  # by training document, the held-out ones that may be near
    count = 0
    for each in _prints(train, words, rows):
        count += 1
        for place in of_text.get(each.text, []):
            exact.setdefault(place, Pair(known[place].name, each.name, 1.0))
        like = {place for band in enumerate(each.bands) for place in of_band.get(band, [])}
        if like:
            candidates[each.place] = like
    candidates = {place: left for place, like in candidates.items() if (left := like - exact.keys())}
    near = _near(train, held_out, candidates, threshold, words)
    pairs = [found[place] for found in (exact, near) for place in sorted(found)]
    return Duplicates(len(known), count, len(exact), len(near), tuple(pairs[:examples]))


@dataclass(frozen=True)
class _Print:
    """What is kept of a document: its place among all, a hash of its words, and its signature in bands."""

    place: int
    name: str
    text: bytes
    bands: tuple[bytes, ...]


def _rows(threshold: float) -> int:
    """Hashes of a band: as many as leave hardly a chance that two near documents have no band in common."""
    fit = [rows for rows in range(1, HASHES) if (1 - threshold**rows) ** (HASHES // rows) <= OVERLOOKED]
    return max(fit, default=1)


def _prints(documents: Iterable[Document], words: int, rows: int) -> Iterator[_Print]:
    """The prints of the documents that have words, in their order."""
    factors, terms = np.random.default_rng(0).integers(2**32, size=(2, HASHES), dtype=np.uint32)
    factors |= np.uint32(1)  # an odd factor makes a permutation of 32 bits
    for place, name, parts in _whole(documents):
        text, least = hashlib.blake2b(digest_size=16), []
        for shingles in _shingles(parts, words, text):
            short = (shingles >> np.uint64(32)).astype(np.uint32)
            least.append((short[:, None] * factors + terms).min(axis=0))
        if least:
            bands = np.min(least, axis=0)[: HASHES // rows * rows].reshape(-1, rows)
            yield _Print(place, name, text.digest(), tuple(_digest(band.tobytes()) for band in bands))


def _near(
    train: Iterable[Document],
    held_out: Iterable[Document],
    candidates: dict[int, set[int]],
    threshold: float,
    words: int,
) -> dict[int, Pair]:
    """Of the held-out documents with candidates, by their place, those that are near, each with the first like it."""
    wanted = {place for like in candidates.values() for place in like}
    known = {place: (name, shingles) for place, name, shingles in _sets(held_out, words, wanted)}
    near: dict[int, Pair] = {}
    for place, name, shingles in _sets(train, words, candidates.keys()):
        for other in candidates[place] - near.keys():
            similarity = _jaccard(shingles, known[other][1])
            if similarity >= threshold:
                near[other] = Pair(known[other][0], name, similarity)
    return near


def _sets(
    documents: Iterable[Document], words: int, wanted: Collection[int]
) -> Iterator[tuple[int, str, UInt64[ndarray, " shingles"]]]:
    """The places, names and sets of shingles of the documents that are wanted; each of them has words."""
    for place, name, parts in _whole(documents):
        if place in wanted:
            yield place, name, np.unique(np.concatenate([np.unique(each) for each in _shingles(parts, words)]))


def _jaccard(one: UInt64[ndarray, " a"], other: UInt64[ndarray, " b"]) -> float:
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)


def _whole(documents: Iterable[Document]) -> Iterator[tuple[int, str, Iterator[str]]]:
    """The place, the name and the parts of every document."""
    place, name = -1, ""

    def belongs(document: Document) -> tuple[int, str]:
        nonlocal place, name
        if not document.continues:
            place, name = place + 1, document.name
        return place, name

    for (number, title), parts in groupby(documents, belongs):
        yield number, title, (each.text for each in parts)


def _shingles(parts: Iterable[str], words: int, text: hashlib.blake2b | None = None) -> Iterator[UInt64[ndarray, " n"]]:
    """A hash of every shingle, stretch by stretch; `text` takes up the words."""
    carried, whole = np.empty(0, dtype=np.uint64), True
    for stretch in _stretches(parts):
        found = _WORD.findall(stretch.lower())
        if text and found:
            text.update(f"{' '.join(found)} ".encode("utf-8", "surrogatepass"))
        hashes = np.concatenate([carried, np.fromiter(map(_hash, found), dtype=np.uint64, count=len(found))])
        if len(hashes) >= words:
            yield _combined(sliding_window_view(hashes, words))
            whole = False
        carried = hashes[max(0, len(hashes) - words + 1) :]
    if whole and len(carried):
        yield _combined(carried[None])


def _stretches(parts: Iterable[str]) -> Iterator[str]:
    """Text in stretches that end where no word is cut."""
    held = ""
    for part in parts:
        held += part
        while len(held) > STRETCH:
            end = next((place for place in range(STRETCH, 0, -1) if not _WORD.match(held[place])), STRETCH)
            yield held[:end]
            held = held[end:]
    yield held


@lru_cache(maxsize=2**17)
def _hash(word: str) -> int:
    return int.from_bytes(_digest(word.encode("utf-8", "surrogatepass")), "big")


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=8).digest()


def _combined(shingles: UInt64[ndarray, "n words"]) -> UInt64[ndarray, " n"]:
    """One hash for each row, which tells the order of its words."""
    combined = np.full(len(shingles), shingles.shape[1], dtype=np.uint64)
    for column in shingles.T:
        combined = _mix(combined + column)
    return combined


def _mix(values: UInt64[ndarray, "*shape"]) -> UInt64[ndarray, "*shape"]:
    """A bijection of 64 bits in which every bit of a value reaches every bit of the result (SplitMix64's last step)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
