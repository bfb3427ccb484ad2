"""Counts the bytes and the words of text that tokens stand for, from tables."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64, Integer

SPACES = b" \t\n\r\x0b\x0c"  # what `bytes.split` takes for white space


@dataclass(frozen=True)
class Spelling:
    """How many bytes each token stands for, and how many words begin in it.

    A word is what white space (of ASCII) or a separator leaves together, and belongs to the token in which it begins:
    the words of a whole text are as many as `text.split()` of its bytes gives. The tables are looked up by token, or
    by place in the stream where the text itself was measured.
    """

    bytes: Int64[np.ndarray, "n"]
    within: Int64[np.ndarray, "n"]  # words that begin after the first byte of a token
    opens: Bool[np.ndarray, "n"]  # the first byte is part of a word
    closes: Bool[np.ndarray, "n"]  # what follows begins a word, if it is part of one
    by_place: bool = False

    def count(
        self, tokens: Integer[np.ndarray, "*n"], before: Integer[np.ndarray, "*n"], places: Integer[np.ndarray, "*n"]
    ) -> tuple[Int64[np.ndarray, "*n"], Int64[np.ndarray, "*n"]]:
        """The bytes and the words of tokens, given the token before each and its place in the stream."""
        own, former = (places, places - 1) if self.by_place else (tokens, before)
        begins = self.opens[own] & self.closes[former]
        return self.bytes[own], self.within[own] + begins


def spell(tokens: Sequence[bytes], separator: int | None = None) -> Spelling:
    """The tables of a vocabulary whose tokens are these bytes; a word ends at the separator, and at what has none."""
    words = [b" " if number == separator else token for number, token in enumerate(tokens)]
    return Spelling(
        bytes=np.array([len(token) for token in tokens], np.int64),
        within=np.array([len((b"x" + word).split()) - 1 for word in words], np.int64),
        opens=np.array([bool(word) and word[0] not in SPACES for word in words]),
        closes=np.array([not word or word[-1] in SPACES for word in words]),
    )
