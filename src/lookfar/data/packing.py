"""Cuts a stream of tokens into training lines, and serves them in an order that any update can be looked up in."""

import numpy as np
from jaxtyping import Int64, Integer

from lookfar.data.stream import Stream
from lookfar.errors import UserError

_ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Lines:
    """The training lines of a token stream: line i is tokens i·L to i·L + L, both included.

    A line holds L + 1 tokens: the first L are inputs, the last L are targets, and it shares one token with the next
    line. The order in which lines are served is a pure function of the seed and the count of lines served before: to
    go on after an interruption needs that count and nothing else. Every epoch serves each line once, in a new order.

    Args:
        tokens: the stream, `[t]`, of any integer type; it may be memory-mapped.
        context: L, in tokens.
        seed: decides the order.
        isolated: whether lines tell the documents of their tokens; only a `Stream` knows them.

    Raises:
        UserError: the stream is shorter than one line.
    """

    def __init__(
        self, tokens: Stream | Integer[np.ndarray, "t"], *, context: int, seed: int = 0, isolated: bool = False
    ) -> None:
        if len(tokens) < context + 1:
            raise UserError(
                f"The text has {len(tokens)} tokens, fewer than the {context + 1} of one training line; "
                f"give more text, or a context of at most {max(len(tokens) - 1, 0)}."
            )
        self.tokens = tokens
        self.context = context
        self.seed = seed
        self.isolated = isolated

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.context

    def place(self, served: Integer[np.ndarray, "n"]) -> Int64[np.ndarray, "n"]:
        """Which line is served when that many were served before: the counts 0, 1, 2, … run on over the epochs."""
        epochs, within = np.divmod(served.astype(np.uint64), np.uint64(len(self)))
        key = _scramble(_scramble(np.full_like(epochs, self.seed % 2**64)) + epochs)
        return _permute(within, len(self), key).astype(np.int64)

    def batch(self, first: int, count: int) -> Int64[np.ndarray, "count l"]:
        """The lines number first to first + count in the order served, each of L + 1 tokens."""
        return self.at(np.arange(first, first + count))

    def documents(self, first: int, count: int) -> Int64[np.ndarray, "count l"] | None:
        """The document of each token of those lines, numbered from 0 in each line; None where they are joined.

        A separator belongs to the document that it ends.
        """
        return self.documents_at(np.arange(first, first + count))

    def scored(self, first: int, count: int) -> None:
        """Which tokens count as targets: all but the first of a line."""

    def at(self, served: Integer[np.ndarray, "n"]) -> Int64[np.ndarray, "n l"]:
        """The lines that are served when that many were served before."""
        return self.tokens[self._places(served)].astype(np.int64)

    def documents_at(self, served: Integer[np.ndarray, "n"]) -> Int64[np.ndarray, "n l"] | None:
        """The documents of those lines."""
        if not self.isolated:
            return None
        assert isinstance(self.tokens, Stream)
        found = self.tokens.documents(self._places(served))
        return found - found[:, :1]

    def _places(self, served: Integer[np.ndarray, "n"]) -> Int64[np.ndarray, "n l"]:
        return self.place(served)[:, None] * self.context + np.arange(self.context + 1)


def _permute(places: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """A pseudo-random permutation of 0 … size − 1 for every key: a Feistel network over the next power of four.

    Where it leads out of the range it is applied again, until it leads back (Black and Rogaway 2002).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    result = _feistel(places, half, key)
    while (outside := result >= size).any():
        result[outside] = _feistel(result[outside], half, key[outside])
    return result


def _feistel(places: np.ndarray, half: int, key: np.ndarray) -> np.ndarray:
    bits, mask = np.uint64(half), np.uint64(2**half - 1)
    left, right = places >> bits, places & mask
    for turn in range(_ROUNDS):
        left, right = right, left ^ (_scramble(key + right + (np.uint64(turn) << np.uint64(32))) & mask)
    return left << bits | right


def _scramble(values: np.ndarray) -> np.ndarray:
    """Mix all bits of 64-bit numbers (splitmix64, Steele et al. 2014)."""
    values = values + _GOLDEN
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)
