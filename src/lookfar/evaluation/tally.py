"""Adds up losses by document and by place in the window, and gives means with their intervals as rows."""

import math
from collections.abc import Iterator, Mapping

import numpy as np
from jaxtyping import Float64, Int64

from lookfar.evaluation.base import Row, Text

DRAWS = 1000  # of as many documents as there are, with replacement
LEVEL = 0.95  # of an interval


class Tally:
    """Sums of losses, tokens, bytes and words. What it holds does not grow with the tokens that are scored."""

    def __init__(self, text: Text, length: int, count: int) -> None:
        self.text, self.length, self.count = text, length, count
        self.sums = np.zeros((len(text.starts), 4))  # for each document: loss, tokens, bytes, words
        self.places = np.zeros((1 + (length - 1).bit_length(), 2))  # for each power of two: loss, tokens

    def add(
        self,
        tokens: Int64[np.ndarray, "b t1"],
        places: Int64[np.ndarray, "b n"],
        losses: Float64[np.ndarray, "b n"],
    ) -> None:
        """Add the losses of the last n tokens of windows, which lie at these places of the stream."""
        scored = losses.shape[1]
        sizes, words = self.text.spelling.count(tokens[:, -scored:], tokens[:, -scored - 1 : -1], places)
        documents = np.searchsorted(self.text.starts, places.ravel(), side="right") - 1
        for column, values in enumerate((losses, np.ones_like(losses), sizes, words)):
            self.sums[:, column] += np.bincount(documents, values.ravel(), len(self.sums))
        read = np.arange(tokens.shape[1] - scored, tokens.shape[1])  # how many tokens of the window a token follows
        level = np.ceil(np.log2(read)).astype(int)
        np.add.at(self.places[:, 0], level, losses.sum(0))
        np.add.at(self.places[:, 1], level, len(losses))

    @property
    def done(self) -> float:
        """The part that is added."""
        return self.sums[:, 1].sum() / self.count

    def rows(self) -> Iterator[Row]:
        """The metrics of all tokens together, each with its interval over documents where there are several."""
        scored = self.sums[self.sums[:, 1] > 0]
        means = _metrics(scored.sum(0))
        bounds: Mapping[str, Mapping[str, float]] = {}
        if len(scored) > 1:
            drawn = [_metrics(each) for each in _drawn(scored)]
            bounds = {metric: _interval([each[metric] for each in drawn]) for metric in means}
        for metric, value in means.items():
            about = {"count": self.count, "documents": len(scored)}
            yield {"metric": metric, "value": value, **about, **bounds.get(metric, {})}

    def by_position(self) -> Iterator[Row]:
        """The mean loss of tokens that follow 1, 2, 3 to 4, 5 to 8, … tokens of their window, to its length."""
        for level, (loss, count) in enumerate(self.places):
            if count:
                ends = {"from": (1 << level) // 2 + 1, "to": min(1 << level, self.length)}
                yield {"metric": "loss_at", "value": loss / count, "count": int(count), "of": self.count, **ends}


def _metrics(sums: Float64[np.ndarray, "4"]) -> dict[str, float]:
    loss, tokens, sizes, words = sums.tolist()
    return {
        "loss": loss / tokens,
        "perplexity": _exp(loss / tokens),
        "bits_per_byte": loss / math.log(2) / sizes if sizes else math.nan,
        "word_perplexity": _exp(loss / words) if words else math.nan,
    }


def _drawn(sums: Float64[np.ndarray, "d 4"]) -> Iterator[Float64[np.ndarray, "4"]]:
    """The sums of documents that were drawn with replacement, by a fixed seed."""
    random = np.random.default_rng(0)
    for _ in range(DRAWS):
        yield sums[random.integers(len(sums), size=len(sums))].sum(0)


def _interval(values: list[float]) -> dict[str, float]:
    """Where the middle of the drawn values lies: the percentile bootstrap (Efron, 1979)."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="nearest")
    return {"low": float(low), "high": float(high)}


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
