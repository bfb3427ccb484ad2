"""How a held-out stream is cut into windows, and which tokens of each window are scored.

A stream x_0 … x_M has M tokens to predict, all but the first. A window reads `inputs` tokens from `start` and scores
the last `scored` of the tokens that follow them. Every protocol scores each predicted token exactly once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from lookfar import plugins
from lookfar.errors import UserError, nearest

Count = Annotated[int, Ge(1)]


@dataclass(frozen=True)
class Window:
    """Reads tokens [start, start + inputs) and scores the last `scored` of tokens [start + 1, start + inputs + 1)."""

    start: int
    inputs: int
    scored: int


@dataclass(frozen=True)
class Protocol:
    """A named way to cut a stream."""

    name: str  # as in the rows
    tokens: int | None  # most tokens scored
    cut: Callable[[int, int], list[Window]]  # predicted tokens, length -> windows

    def windows(self, predicted: int, length: int) -> list[Window]:
        """The windows of this length that score the first `tokens` of `predicted` tokens."""
        return self.cut(predicted if self.tokens is None else min(predicted, self.tokens), length)


def non_overlapping(predicted: int, length: int) -> list[Window]:
    """Consecutive windows, each from scratch; a ragged last one is kept."""
    starts = range(0, predicted, length)
    return [Window(start, min(length, predicted - start), min(length, predicted - start)) for start in starts]


def sliding(predicted: int, length: int, *, stride: Count | None = None) -> list[Window]:
    """Windows that move by `stride`, by default half the length, and score only what none before has scored.

    So every token has at least length - stride tokens of context, but for those of the first window. The last window
    is as long as the others and ends with the stream.
    """
    stride = max(1, length // 2) if stride is None else stride
    if stride > length:
        raise UserError(
            f"A stride of {stride} would skip tokens of windows of {length}; it must be at most the length."
        )
    first = min(length, predicted)
    windows = [Window(0, first, first)]
    for done in range(first, predicted, stride):
        scored = min(stride, predicted - done)
        windows.append(Window(done + scored - length, length, scored))
    return windows


PROTOCOLS: dict[str, Callable[..., list[Window]]] = {each.__name__: each for each in (non_overlapping, sliding)}


def find(expression: str) -> Protocol:
    """The protocol of an expression such as `sliding(stride=64)`; any of them takes `tokens`, the most to score."""
    terms = plugins.parse(expression)
    if len(terms) != 1 or terms[0].name not in PROTOCOLS:
        raise UserError(f"No protocol is named {expression!r}. {nearest(terms[0].name, list(PROTOCOLS))}")
    cut = PROTOCOLS[terms[0].name]
    settings = dict(terms[0].settings)
    tokens = settings.pop("tokens", None)
    if tokens is not None and (type(tokens) is not int or tokens < 1):
        raise UserError(f"{expression!r}: tokens must be a whole number of at least 1.")
    term = plugins.Term(terms[0].name, settings)
    checked = plugins.check(cut, term)
    return Protocol(str(term), tokens, lambda predicted, length: cut(predicted, length, **checked))
