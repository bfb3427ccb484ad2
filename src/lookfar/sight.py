"""Who sees whom, kept as structure, and the rows of the score matrix that a method is shown.

The letters of all shapes:

    b batch   t tokens   q queries asked for   k keys   n distances   d model width
    h score heads   g key heads   m maps to a head   e width of query and key   v width of value

A leading `#` marks an axis that may be 1 where all rows of the batch are alike.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor
from torch.nn import functional as F

from lookfar.errors import UserError


@dataclass(frozen=True)
class Sight:
    """Which keys each query sees, and the positions of both.

    Visibility follows from the order of tokens, their documents and the window, never from positions: positions only
    feed methods. A query sees the keys of its own document up to itself, at most `window` of them; a token of document
    -1 is padding and sees itself alone, so no row is ever empty.

    Keys from `text` on are slots: places whose token is not known yet. A slot sees the first `ends` keys of the text,
    as if it followed them, and itself; no other slot, and no text sees a slot.
    """

    query_positions: Num[Tensor, "#b q"]
    key_positions: Num[Tensor, "#b k"]
    first_query: int = 0  # place of the first query in the sequence of tokens
    first_key: int = 0
    query_documents: Int[Tensor, "b q"] | None = None
    key_documents: Int[Tensor, "b k"] | None = None
    window: int | None = None
    longest: int = 1  # no distance is longer; a power of two, so that tables and compiled kernels are reused
    consecutive: bool = False  # positions of the text are its places: every distance follows from two indices
    scattered: bool = False  # the keys that a query sees need not be neighbours in the sequence
    ahead: bool = False  # a query of the text sees the keys after it, too
    text: int | None = None  # how many of the first places are text; those after it are slots; None: all
    ends: Int[Tensor, "#b s"] | None = None  # for each slot among the queries, how many places of the text it follows

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

    @classmethod
    def slots(
        cls,
        text: int,
        slots: int,
        *,
        queries: int | None = None,
        ends: Int[Tensor, "#b s"] | None = None,
        offsets: Int[Tensor, "#b s"] | None = None,
        positions: Num[Tensor, "#b k"] | None = None,
        documents: Int[Tensor, "b k"] | None = None,
        window: int | None = None,
        ahead: bool = False,
        device: torch.device | str | None = None,
    ) -> "Sight":
        """Slots to be predicted at once: each sees a part of the text and itself, never another slot.

        Args:
            text: how many tokens are known; the slots come after them.
            slots: how many tokens are asked for.
            queries: how many of the last tokens ask, slots included; by default all.
            ends: how many tokens of the text each slot follows, `[b s]`; by default all of them.
            offsets: how far a slot lies beyond the first place after the text that it follows, `[b s]`: its position is
                the last one it follows + 1 + offset. By default slots with the same end count 0, 1, 2, …; zeros give
                all of them one position, so that only their embeddings tell them apart.
            positions: numbers of the text, `[b k]`; by default 0, 1, 2, …
            documents: the document of each token of the text, `[b k]`, -1 for padding; a slot belongs to that of the
                last token it follows.
            window: how many tokens a query sees, itself included; for a slot, counted back from where it follows.
            ahead: the text sees all of itself, not only what came before.
            device: of the default positions.

        Source: the layout is that of masked prediction on a fixed prefix; every slot is a row of its own.
        """
        if text < 0 or slots < 1:
            raise UserError(f"{slots} slots after {text} tokens are not possible; ask for at least one slot.")
        queries = text + slots if queries is None else queries
        if not slots <= queries <= text + slots:
            raise UserError(f"{queries} queries must be at least the {slots} slots, and at most {text + slots} tokens.")
        if window is not None and window < 1:
            raise UserError(f"A window of {window} tokens shows nothing; it must be at least 1.")
        if documents is not None and positions is None:
            raise UserError("Documents need positions: number the tokens with lookfar.batch.consecutive(documents).")
        consecutive = positions is None
        positions = torch.arange(text, device=device)[None] if positions is None else positions
        device = positions.device
        if ends is None:
            offsets = torch.arange(slots, device=device)[None] if offsets is None else offsets
            ends = torch.full((1, slots), text, device=device)
        if (
            ends.dim() != 2
            or ends.shape[1] != slots
            or (ends.numel() and not 0 <= int(ends.min()) <= int(ends.max()) <= text)
        ):
            raise UserError(
                f"`ends` must hold {slots} numbers between 0 and {text}, how many tokens each slot follows."
            )
        places = _follow(positions, ends, _rank(ends) if offsets is None else offsets)
        numbers = torch.cat([positions.expand(places.shape[0], -1), places], dim=1)
        if documents is not None:
            documents = torch.cat([documents, _last(documents, ends, missing=-1)], dim=1)
        longest = int((numbers.max() - numbers.min()).ceil())
        first = text + slots - queries
        return cls(
            query_positions=numbers[:, first:],
            key_positions=numbers,
            first_query=first,
            query_documents=None if documents is None else documents[:, first:],
            key_documents=documents,
            window=None if window is None or window > text else window,
            longest=1 << longest.bit_length(),
            consecutive=consecutive,
            scattered=True,
            ahead=ahead,
            text=text,
            ends=ends,
        )

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
        return self.window is None and self.key_documents is None and not self.ahead and self.text is None

    @cached_property
    def steady(self) -> bool:
        """Whether the distance of two tokens that see each other is the number of places between them."""
        if self.consecutive:
            return self.text is None
        if self.scattered or self.text is not None or self.key_positions.is_floating_point():
            return False
        even = self.key_positions.diff(dim=1) == 1
        if self.key_documents is not None:
            even = even | (self.key_documents.diff(dim=1) != 0) | (self.key_documents[:, 1:] < 0)
        return bool(even.all())

    @cached_property
    def stretches(self) -> tuple[Int[Tensor, "b q"], Int[Tensor, "b k"]] | None:
        """The first key that each query sees by its document, and the last query that sees each key, both counted here.

        A padding token stands alone. None where there are no documents, or where they lie in between one another. A key
        that no query sees has a last query before the first.
        """
        documents = self.key_documents
        if documents is None or self.scattered:
            return None
        breaks = (documents[:, 1:] != documents[:, :-1]) | (documents[:, 1:] < 0)
        places = torch.arange(self.keys, device=documents.device)
        first = torch.where(F.pad(breaks, (1, 0), value=True), places, 0).cummax(1).values
        ends = torch.where(F.pad(breaks, (0, 1), value=True), places, self.keys)
        last = ends.flip(1).cummin(1).values.flip(1)
        ahead = self.first_query - self.first_key
        return first[:, ahead : ahead + self.queries], last - ahead

    @property
    def last(self) -> bool:
        """Whether the queries are the last of the keys, so that none of these lies ahead of the last query."""
        return self.first_query + self.queries == self.first_key + self.keys

    @property
    def asking(self) -> int:
        """How many of the queries are slots: the last ones."""
        return 0 if self.ends is None else self.ends.shape[1]

    def visible(self) -> Bool[Tensor, "#b 1 q k"]:
        """The dense mask: which keys (last axis) each query sees."""
        device = self.key_positions.device
        queries = torch.arange(self.first_query, self.first_query + self.queries, device=device)
        keys = torch.arange(self.first_key, self.first_key + self.keys, device=device)
        itself = queries[:, None] == keys  # q k
        places = queries[None]
        if self.ends is not None:
            asked = queries[None, : self.queries - self.asking].expand(self.ends.shape[0], -1)
            places = torch.cat([asked, self.ends], dim=1)  # a slot lies where it follows the text
        behind = places[:, :, None] - keys  # b q k
        seen = (behind >= 0) | self.ahead
        if self.text is not None:
            slots = queries >= self.text
            seen = seen & (keys < self.text) & ((behind > 0) | ~slots[:, None])
        if self.window is not None:
            seen = seen & (behind.abs() < self.window)
        if self.query_documents is not None and self.key_documents is not None:
            keys_of = self.key_documents[:, None, :]
            seen = seen & (self.query_documents[:, :, None] == keys_of) & (keys_of >= 0)
        if self.text is not None or self.key_documents is not None:
            seen = seen | itself
        return seen[:, None]

    def spans(self) -> tuple[Int[Tensor, "#b q"], Int[Tensor, "#b q"]]:
        """The first and the last key that each query sees, counted among these keys; it sees all in between.

        Holds for sights that are neither scattered nor have slots.
        """
        before = self.first_query - self.first_key
        own = torch.arange(before, before + self.queries, device=self.key_positions.device)[None]
        first, last = torch.zeros_like(own), torch.full_like(own, self.keys - 1) if self.ahead else own
        if self.window is not None:
            first, last = torch.maximum(first, own - self.window + 1), torch.minimum(last, own + self.window - 1)
        if self.stretches is not None:
            begins, ends = self.stretches
            first, last = torch.maximum(first, begins), torch.minimum(last, (ends + before)[:, own[0]])
        return first, last

    def rows(self, start: int, stop: int, *, step: int = 1) -> "Sight":
        """The queries from `start` to `stop`, against only the keys that one of them can see by order and window.

        The count of keys is rounded up to a multiple of `step` where there are so many, so that few sizes occur.
        """
        last = self.first_key + self.keys
        if not self.ahead:
            last = min(last, -(-(self.first_query + stop) // step) * step)
        elif self.window is not None and self.text is None:
            last = min(last, self.first_query + stop + self.window - 1)
        first = self.first_key
        if self.window is not None and self.text is None:
            first = max(first, self.first_query + start - self.window + 1)
        kept = slice(first - self.first_key, last - self.first_key)
        ends, before = self.ends, self.queries - self.asking  # before: queries of the text
        if ends is not None:
            ends = ends[:, max(0, start - before) : max(0, stop - before)]
        return replace(
            self,
            query_positions=self.query_positions[:, start:stop],
            key_positions=self.key_positions[:, kept],
            first_query=self.first_query + start,
            first_key=first,
            query_documents=None if self.query_documents is None else self.query_documents[:, start:stop],
            key_documents=None if self.key_documents is None else self.key_documents[:, kept],
            ends=ends,
        )

    def known(self) -> "Sight | None":
        """The queries of the text, as if no slot were there; None where none of them asks."""
        count, text = self.queries - self.asking, self.text
        if count == 0 or text is None:
            return None if text is not None else self
        return replace(
            self,
            query_positions=self.query_positions[:, :count],
            key_positions=self.key_positions[:, :text],
            query_documents=None if self.query_documents is None else self.query_documents[:, :count],
            key_documents=None if self.key_documents is None else self.key_documents[:, :text],
            scattered=self.key_documents is not None,
            text=None,
            ends=None,
        )

    def asked(self, start: int, stop: int) -> "Sight":
        """The slots from `start` to `stop`, against the text and themselves: keys `[text, start … stop]`."""
        assert self.text is not None and self.ends is not None
        first = self.queries - self.asking  # the first slot among the queries
        queries, text = slice(first + start, first + stop), self.text
        own = slice(text + start, text + stop)
        keys = torch.cat([self.key_positions[:, :text], self.key_positions[:, own]], dim=1)
        documents = self.key_documents
        return replace(
            self,
            query_positions=self.query_positions[:, queries],
            key_positions=keys,
            first_query=text,
            query_documents=None if self.query_documents is None else self.query_documents[:, queries],
            key_documents=None if documents is None else torch.cat([documents[:, :text], documents[:, own]], dim=1),
            ends=self.ends[:, start:stop],
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


def _rank(ends: Int[Tensor, "#b s"]) -> Int[Tensor, "#b s"]:
    """0, 1, 2, … among the slots that follow the same place."""
    same = ends[:, :, None] == ends[:, None, :]
    return same.tril(-1).sum(-1)


def _last(numbers: Num[Tensor, "#b k"], ends: Int[Tensor, "#b s"], missing: int) -> Num[Tensor, "#b s"]:
    """The number of the last token that each slot follows."""
    batch = max(numbers.shape[0], ends.shape[0])
    front = torch.full((batch, 1), missing, dtype=numbers.dtype, device=numbers.device)
    return torch.cat([front, numbers.expand(batch, -1)], dim=1).gather(1, ends.expand(batch, -1))


def _follow(
    positions: Num[Tensor, "#b k"], ends: Int[Tensor, "#b s"], offsets: Int[Tensor, "#b s"]
) -> Num[Tensor, "#b s"]:
    """The positions of slots: one after the last that they follow, and the offset more."""
    return _last(positions, ends, missing=-1) + 1 + offsets


def _scattered(documents: Int[Tensor, "b t"]) -> bool:
    """Whether some document is interrupted by another or by padding."""
    changes = documents[:, 1:] != documents[:, :-1]
    runs = changes.sum(1) + 1
    ordered = documents.sort(dim=1).values
    return bool((runs != (ordered[:, 1:] != ordered[:, :-1]).sum(1) + 1).any())
