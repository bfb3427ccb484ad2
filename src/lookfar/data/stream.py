"""Reads the tokens of many shards as one stream, without copying them into memory."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64, Integer, UInt


class Stream:
    """Arrays that are read as if they stood one behind the other, with the documents that begin in each.

    It answers `len`, slices without a step, and arrays of places of any shape; what it gives is a copy.

    Args:
        parts: the tokens of each shard, which may be mapped into memory.
        starts: where documents begin in each part, counted from its own first token, ascending.
    """

    def __init__(self, parts: Sequence[UInt[np.ndarray, "_"]], starts: Sequence[Int64[np.ndarray, "_"]]) -> None:
        self._parts, self._starts = list(parts), list(starts)
        self._offsets = np.cumsum([0, *map(len, parts)])  # of each part, and the length of all
        self._before = np.cumsum([0, *map(len, starts)])  # documents that begin before each part
        self.dtype = np.result_type(*parts) if parts else np.dtype(np.uint8)

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def __getitem__(self, places: slice | Integer[np.ndarray, "*any"]) -> UInt[np.ndarray, "*any"]:
        if isinstance(places, slice):
            return self._slice(*places.indices(len(self)))
        found = np.empty(places.shape, self.dtype)
        for part, chosen, within in self._shared(places):
            found[chosen] = self._parts[part][within]
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    def documents(self, places: Integer[np.ndarray, "*any"]) -> Int64[np.ndarray, "*any"]:
        """The number of the document that each place lies in; a separator belongs to the document that it ends."""
        found = np.empty(places.shape, np.int64)
        for part, chosen, within in self._shared(places):
            found[chosen] = self._before[part] + np.searchsorted(self._starts[part], within, side="right") - 1
        return found

    def starts(self) -> Int64[np.ndarray, "documents"]:
        """Where each document begins, ascending, the first at 0."""
        shifted = [each + offset for each, offset in zip(self._starts, self._offsets[:-1], strict=True)]
        return np.concatenate([np.empty(0, np.int64), *shifted])

    def _slice(self, start: int, stop: int, step: int) -> UInt[np.ndarray, "_"]:
        if step != 1:
            raise IndexError("A stream is read without a step.")
        parts = [
            part[max(start - offset, 0) : max(stop - offset, 0)]
            for part, offset in zip(self._parts, self._offsets[:-1], strict=True)
            if offset < stop and start < offset + len(part)
        ]
        return np.concatenate([np.empty(0, self.dtype), *parts])

    def _shared(self, places: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """For each part that is asked: its number, which places lie in it, and where."""
        if places.size and (places.min() < 0 or places.max() >= len(self)):
            raise IndexError(f"Places {places.min()} to {places.max()} are not all among {len(self)} tokens.")
        owner = np.searchsorted(self._offsets, places, side="right") - 1
        shares = []
        for part in np.unique(owner):
            chosen = owner == part
            shares.append((int(part), chosen, places[chosen].astype(np.int64) - self._offsets[part]))
        return shares
