"""Who sees whom, kept as structure, and the rows of the score matrix that a method is shown.

The letters of all shapes:

    b batch   t tokens   q queries asked for   k keys   n distances   d model width
    h score heads   g key heads   m maps to a head   e width of query and key   v width of value

A leading `#` marks an axis that may be 1 where all rows of the batch are alike.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from lookfar.errors import UserError


@dataclass(frozen=True)
class Sight:
    """Which keys each query sees, and the positions of both.

    Visibility follows from the order of tokens, their documents and the window, never from positions: positions only
    feed methods. A query sees the keys of its own document up to itself, at most `window` of them; a token of document
    -1 is padding and sees itself alone, so no row is ever empty.
    """

    query_positions: Num[Tensor, "#b q"]
    key_positions: Num[Tensor, "#b k"]
    first_query: int = 0  # place of the first query in the sequence of tokens
    first_key: int = 0
    query_documents: Int[Tensor, "b q"] | None = None
    key_documents: Int[Tensor, "b k"] | None = None
    window: int | None = None
    longest: int = 1  # no distance is longer; a power of two, so that tables and compiled kernels are reused
    consecutive: bool = False  # positions are the places in the sequence: every distance follows from two indices
    scattered: bool = False  # the keys that a query sees need not be neighbours in the sequence
    ahead: bool = False  # a query sees the keys after it, too

    @classmethod
    def causal(
        cls,
        tokens: int,
        *,
        queries: int | None = None,
        positions: Num[Tensor, "#b k"] | None = None,
        documents: Int[Tensor, "b k"] | None = None,
        window: int | None = None,
        device: torch.device | str | None = None,
    ) -> "Sight":
        """The last `queries` (by default all) of a sequence of `tokens`, each seeing what came before and itself.

        Args:
            tokens: length of the whole sequence, cached keys included.
            queries: how many of the last tokens ask.
            positions: numbers of all tokens, `[b k]`; by default 0, 1, 2, …
            documents: the document of each token, `[b k]`, -1 for padding; positions must then be given too.
            window: how many tokens a query sees, itself included.
            device: of the default positions.
        """
        queries = tokens if queries is None else queries
        if not 0 < queries <= tokens:
            raise UserError(f"{queries} queries cannot be the last of {tokens} tokens.")
        if window is not None and window < 1:
            raise UserError(f"A window of {window} tokens shows nothing; it must be at least 1.")
        if documents is not None and positions is None:
            raise UserError("Documents need positions: number the tokens with lookfar.batch.consecutive(documents).")
        longest, consecutive = tokens - 1, positions is None
        if positions is None:
            positions = torch.arange(tokens, device=device)[None]
        else:
            longest = int((positions.max() - positions.min()).ceil())
        first = tokens - queries
        return cls(
            query_positions=positions[:, first:],
            key_positions=positions,
            first_query=first,
            query_documents=None if documents is None else documents[:, first:],
            key_documents=documents,
            window=None if window is None or window >= tokens else window,
            longest=1 << longest.bit_length(),
            consecutive=consecutive,
            scattered=documents is not None and _scattered(documents),
        )

    @classmethod
    def bidirectional(
        cls,
        tokens: int,
        *,
        positions: Num[Tensor, "#b k"] | None = None,
        documents: Int[Tensor, "b k"] | None = None,
        window: int | None = None,
        device: torch.device | str | None = None,
    ) -> "Sight":
        """Every token sees before and after it, at most `window` - 1 tokens away. For arguments see `causal`."""
        sight = cls.causal(tokens, positions=positions, documents=documents, window=window, device=device)
        return replace(sight, ahead=True)

    @property
    def queries(self) -> int:
        """How many queries ask."""
        return self.query_positions.shape[1]

    @property
    def keys(self) -> int:
        """How many keys there are."""
        return self.key_positions.shape[1]

    @property
    def plain(self) -> bool:
        """Whether the order of tokens alone decides who sees whom: what is not ahead is seen."""
        return self.window is None and self.key_documents is None and not self.ahead

    def visible(self) -> Bool[Tensor, "#b 1 q k"]:
        """The dense mask: which keys (last axis) each query sees."""
        device = self.key_positions.device
        queries = torch.arange(self.first_query, self.first_query + self.queries, device=device)
        keys = torch.arange(self.first_key, self.first_key + self.keys, device=device)
        behind = queries[:, None] - keys  # q k
        seen = ((behind >= 0) | self.ahead)[None]
        if self.window is not None:
            seen = seen & (behind.abs() < self.window)
        if self.query_documents is not None and self.key_documents is not None:
            keys_of = self.key_documents[:, None, :]
            seen = seen & (self.query_documents[:, :, None] == keys_of) & (keys_of >= 0) | (behind == 0)
        return seen[:, None]

    def rows(self, start: int, stop: int) -> "Sight":
        """The queries from `start` to `stop`, against only the keys that one of them can see by order and window."""
        last = self.first_key + self.keys
        if not self.ahead:
            last = min(last, self.first_query + stop)
        elif self.window is not None:
            last = min(last, self.first_query + stop + self.window - 1)
        first = self.first_key
        if self.window is not None:
            first = max(first, self.first_query + start - self.window + 1)
        kept = slice(first - self.first_key, last - self.first_key)
        return replace(
            self,
            query_positions=self.query_positions[:, start:stop],
            key_positions=self.key_positions[:, kept],
            first_query=self.first_query + start,
            first_key=first,
            query_documents=None if self.query_documents is None else self.query_documents[:, start:stop],
            key_documents=None if self.key_documents is None else self.key_documents[:, kept],
        )


@dataclass(frozen=True)
class Rows:
    """Some rows of the score matrix, and all that a method may know of them."""

    queries: Float[Tensor, "b h q e"]
    keys: Float[Tensor, "b g k e"]
    query_positions: Num[Tensor, "#b q"]
    key_positions: Num[Tensor, "#b k"]
    visible: Bool[Tensor, "#b 1 q k"]
    bias: Float[Tensor, "#b h q k"] | None = None
    scattered: bool = False  # as in Sight

    def hide(self, scores: Float[Tensor, "b c q k"]) -> Float[Tensor, "b c q k"]:
        """Zero what belongs to keys that a query cannot see, in maps `c` of any number."""
        return scores.masked_fill(~self.visible, 0.0)

    def with_bias(self, scores: Float[Tensor, "b h q k"]) -> Float[Tensor, "b c q k"]:
        """The scores, and the bias under them where there is one: `c` is h or 2h."""
        if self.bias is None:
            return scores
        return torch.cat([scores, self.bias.to(scores.dtype).expand_as(scores)], dim=1)

    def compact(self) -> "Rows":
        """The same rows with keys in compact order: those that a query sees, by token, itself last; then the rest.

        A map across neighbouring keys works on this order. Where the visible keys are neighbours anyway, nothing moves.
        Only `visible` is meaningful in the answer; move scores with `gather` and back with `scatter`.
        """
        if not self.scattered:
            return self
        return replace(self, visible=self.visible.gather(-1, self._order()), scattered=False)

    def gather(self, scores: Float[Tensor, "b c q k"]) -> Float[Tensor, "b c q k"]:
        """Scores from the order of keys to compact order."""
        return scores.gather(-1, self._order().expand_as(scores)) if self.scattered else scores

    def scatter(self, scores: Float[Tensor, "b c q k"]) -> Float[Tensor, "b c q k"]:
        """Scores from compact order back to the order of keys."""
        return scores.gather(-1, self._order().argsort(-1).expand_as(scores)) if self.scattered else scores

    def _order(self) -> Int[Tensor, "#b 1 q k"]:
        return self.visible.int().argsort(dim=-1, descending=True, stable=True)


def _scattered(documents: Int[Tensor, "b t"]) -> bool:
    """Whether some document is interrupted by another or by padding."""
    changes = documents[:, 1:] != documents[:, :-1]
    runs = changes.sum(1) + 1
    ordered = documents.sort(dim=1).values
    return bool((runs != (ordered[:, 1:] != ordered[:, :-1]).sum(1) + 1).any())
