"""How a held-out stream is cut into windows, and which tokens of each window are scored.

A stream x_0 … x_M has M tokens to predict, all but the first, which is only read. A window reads `inputs` tokens from
`start` and scores the last `scored` of the tokens that follow them. No protocol scores a token twice;
`non_overlapping` and `sliding` score every predicted token once, `last` chosen ones. Pictures: docs/protocols.md.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from annotated_types import Ge

from lookfar import plugins
from lookfar.errors import UserError, nearest

Count = Annotated[int, Ge(1)]


@dataclass(frozen=True, slots=True)
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
    cut: Callable[[int, int, Sequence[int]], list[Window]]  # predicted tokens, length, documents' starts -> windows
    whole: bool = False  # whether all predicted tokens are scored, each once
    bos: bool = False  # whether every window reads the token that begins a text before its own tokens

    def windows(self, predicted: int, length: int, starts: Sequence[int] = (0,)) -> list[Window]:
        """The windows of this length that score the first `tokens` of what the protocol scores.

        Args:
            predicted: how many tokens of the stream follow another.
            length: how many tokens a window reads, where there are so many.
            starts: where documents begin in the stream, ascending; they matter to `last(of="documents")` alone.
        """
        if self.tokens is None:
            return self.cut(predicted, length, starts)
        if self.whole:  # what is not scored need not be cut
            return self.cut(min(predicted, self.tokens), length, starts)
        windows = self.cut(predicted, length, starts)
        return windows if sum(window.scored for window in windows) <= self.tokens else _first(windows, self.tokens)


def non_overlapping(predicted: int, length: int, starts: Sequence[int]) -> list[Window]:
    """Consecutive windows, each from scratch; a ragged last one is kept."""
    return [
        Window(start, min(length, predicted - start), min(length, predicted - start))
        for start in range(0, predicted, length)
    ]


def sliding(predicted: int, length: int, starts: Sequence[int], *, stride: Count | None = None) -> list[Window]:
    """Windows that move by `stride`, by default half the length, and score only what none before has scored.

    So every token has at least length - stride tokens of context, but for those of the first window. A ragged last
    window begins where a whole one would; with a stride of the length these are the windows of `non_overlapping`.
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
        windows.append(Window(done + stride - length, length - stride + scored, scored))
    return windows


def last(
    predicted: int,
    length: int,
    starts: Sequence[int],
    *,
    k: Count = 256,
    of: Literal["windows", "documents"] = "windows",
    stride: Count | None = None,
    shortest: Count | None = None,
) -> list[Window]:
    """Scores only `k` tokens at the end: of each window, or of each document.

    - `of="windows"` (the DAPE experiments: k=256): windows of the length, of which the last k targets are scored. A
      window ends at every multiple of `stride` (by default the length) at which a whole one fits, so that targets
      e - k + 1 … e are scored for every such e. Under a common `stride` of at least the longest length, all lengths
      score the same tokens. A shorter window than the others is never read, unless the whole stream is shorter.
    - `of="documents"` (the code models of Kazemnejad et al., 2023: k=200): each of the last k tokens of a document is
      scored by a window of its own, the `length` tokens before it, all of that document. Documents of fewer than
      `shortest` tokens (by default and at least length + k) are left out; a common `shortest` gives all lengths the
      same tokens. The separator after a document is its last token.

    Sources: Zheng et al., 2024, arXiv 2405.14722; Kazemnejad et al., 2023, arXiv 2305.19466.
    """
    if of == "documents":
        if stride is not None:
            raise UserError("last(of=documents) moves by one token; a stride is of last(of=windows).")
        shortest = max(shortest or 0, length + k)
        ends = [*starts[1:], predicted + 1]
        long = [int(end) for start, end in zip(starts, ends, strict=True) if end - start >= shortest]
        return [Window(place - length, length, 1) for end in long for place in range(end - k, end)]
    if shortest is not None:
        raise UserError("last(shortest=…) is of documents; write last(of=documents).")
    stride, scored = stride or length, min(k, length)
    if stride < scored:
        raise UserError(f"A stride of {stride} would score tokens twice; it must be at least the {scored} scored ones.")
    if predicted < length:
        return [Window(0, predicted, min(k, predicted))]
    ends = range(-(-length // stride) * stride, predicted + 1, stride)
    return [Window(end - length, length, scored) for end in ends]


PROTOCOLS: dict[str, Callable[..., list[Window]]] = {each.__name__: each for each in (non_overlapping, sliding, last)}


def find(expression: str) -> Protocol:
    """The protocol of an expression such as `sliding(stride=64)`.

    Any of them takes `tokens`, the most to score, and `bos=true`: every window then reads the token that begins a text
    before its own tokens.
    """
    terms = plugins.parse(expression)
    if len(terms) != 1 or terms[0].name not in PROTOCOLS:
        raise UserError(f"No protocol is named {expression!r}. {nearest(terms[0].name, list(PROTOCOLS))}")
    cut = PROTOCOLS[terms[0].name]
    settings = dict(terms[0].settings)
    tokens, bos = settings.pop("tokens", None), settings.pop("bos", False)
    if tokens is not None and (type(tokens) is not int or tokens < 1):
        raise UserError(f"{expression!r}: tokens must be a whole number of at least 1.")
    if type(bos) is not bool:
        raise UserError(f"{expression!r}: bos must be true or false.")
    checked = plugins.check(cut, plugins.Term(terms[0].name, settings))
    named: dict[str, Any] = {**settings, "bos": True} if bos else settings
    name = str(plugins.Term(terms[0].name, named))
    return Protocol(
        name,
        tokens,
        lambda predicted, length, starts: cut(predicted, length, starts, **checked),
        whole=cut is not last,
        bos=bos,
    )


def _first(windows: list[Window], tokens: int) -> list[Window]:
    """The first windows, which score no more than so many tokens together; the first of all is cut to that."""
    if windows[0].scored > tokens:
        return [replace(windows[0], scored=tokens)]
    kept, total = [], 0
    for window in windows:
        total += window.scored
        if total > tokens:
            break
        kept.append(window)
    return kept
