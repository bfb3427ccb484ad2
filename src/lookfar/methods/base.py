"""The six kinds of method, one verb each, and the site where a method is built.

A scheme is a list of methods; the kind says where a method acts:

    embed → InputEncoding → project → QueryKeyEncoding → (cache) → scores → ScoreMap → + ScoreBias → hide
    → softmax with Sink → values → HeadMerge → project

Three laws hold for all of them. Row law: what a query receives depends only on that query, its position and what it can
see. Once law: a key is encoded once, from itself and its own position. Hidden law: a key that cannot be seen has no
effect, whether it is masked or absent.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, final

import torch
from annotated_types import Ge, Gt
from jaxtyping import Float, Num
from torch import Tensor, nn
from torch.nn import functional as F

from lookfar.errors import UserError
from lookfar.sight import Rows, Sight

Positive = Annotated[float, Gt(0)]
Count = Annotated[int, Ge(1)]


@dataclass(frozen=True)
class Heads:
    """How many heads there are of each sort, and how wide they are.

    Maps lie outermost: score head = map · heads + head. Key heads are [map, group] or, where both maps share them,
    [group]; value heads are [group]. Consecutive heads share a group.
    """

    score_heads: int
    key_heads: int
    value_heads: int
    head_width: int
    value_width: int
    maps: int = 1

    @property
    def heads(self) -> int:
        """Heads after their maps are merged."""
        return self.score_heads // self.maps

    def keys_for_scores(self, keys: Float[Tensor, "b g k e"]) -> Float[Tensor, "b h k e"]:
        """The key head of every score head."""
        if self.key_heads == self.score_heads:
            return keys
        own = keys.unflatten(1, (-1, self.value_heads))  # b (1 or maps) groups k e
        own = own.repeat_interleave(self.heads // self.value_heads, dim=2)
        return own.expand(-1, self.maps, -1, -1, -1).flatten(1, 2)

    def values_for_scores(self, values: Float[Tensor, "b g k v"]) -> Float[Tensor, "b h k v"]:
        """The value head of every score head."""
        if self.value_heads == self.score_heads:
            return values
        own = values.repeat_interleave(self.heads // self.value_heads, dim=1)
        return own[:, None].expand(-1, self.maps, -1, -1, -1).flatten(1, 2)


@dataclass(frozen=True)
class Site:
    """The place in a model where a method is built."""

    heads: Heads
    width: int  # of the model
    layer: int = 0
    layers: int = 1
    context: int = 512  # the longest sequence trained on
    positions: int = 512  # the largest position + 1 that a table must hold
    biased: bool = False  # whether a bias is added to the scores here
    embedding_scale: float = 0.02  # standard deviation of a fresh token embedding

    def sharing_bias(self) -> "Site":
        """The same site for a bias or sink that all maps of a head share."""
        return replace(self, heads=replace(self.heads, score_heads=self.heads.heads, maps=1))


class Method(nn.Module, ABC):
    """A position encoding or a way of treating scores. Settings are the keyword parameters of the constructor."""

    shared: ClassVar[bool] = False  # built once and used by all layers
    paper: ClassVar[str] = ""  # authors, year and arXiv number
    adds: ClassVar[str] = ""  # a few words: what it adds to plain attention
    quirks: ClassVar[str] = ""  # what surprises its users: where public code disagrees, where it fails
    bounded: ClassVar[bool] = False  # cannot number positions beyond the site's
    fractional: ClassVar[bool] = True  # takes positions between whole numbers
    once: bool = True  # encodes a key once, whatever comes after it

    def __init__(self, site: Site) -> None:
        super().__init__()

    def refusal(self, sight: Sight) -> str | None:
        """Why the method is not exact under this sight, in words; None: it is."""
        return None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Method":
        """Follow every move and cast, but never below float32: what feeds scores is small and must stay exact."""

        def cast(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrowed = moved.is_floating_point() and moved.dtype.itemsize < tensor.dtype.itemsize == 4
            return tensor.to(moved.device) if narrowed else moved

        return super()._apply(cast, recurse)


class InputEncoding(Method):
    """Adds positions to the token embeddings."""

    shared = True

    @abstractmethod
    def encode(self, x: Float[Tensor, "b t d"], positions: Num[Tensor, "#b t"]) -> Float[Tensor, "b t d"]:
        """The embeddings with their positions in them."""


class QueryKeyEncoding(Method):
    """Encodes each query and each key by its own position."""

    rotation: ClassVar[bool] = False  # turns queries and keys; a scheme has at most one

    @abstractmethod
    def queries(self, queries: Float[Tensor, "b h t e"], positions: Num[Tensor, "#b t"]) -> Float[Tensor, "b h t e"]:
        """The queries, encoded."""

    @abstractmethod
    def keys(self, keys: Float[Tensor, "b g t e"], positions: Num[Tensor, "#b t"]) -> Float[Tensor, "b g t e"]:
        """The keys, encoded."""


class ScoreBias(Method):
    """Adds a number to the score of every pair of positions."""

    scale: float | None = None  # of the scores, where the method sets its own
    hides: bool = False  # it is -inf somewhere

    @abstractmethod
    def between(
        self, query_positions: Num[Tensor, "#b q"], key_positions: Num[Tensor, "#b k"]
    ) -> Float[Tensor, "#b h q k"]:
        """The bias of every pair; finite for any distance."""


class DistanceBias(ScoreBias):
    """A bias that depends on the distance alone: query position minus key position."""

    @abstractmethod
    def at(self, distances: Num[Tensor, " n"]) -> Float[Tensor, "h n"]:
        """The bias of each head at these distances, which may be negative or fractional."""

    @final
    def between(
        self, query_positions: Num[Tensor, "#b q"], key_positions: Num[Tensor, "#b k"]
    ) -> Float[Tensor, "#b h q k"]:
        """One table by distance, looked up for every pair."""
        distances = query_positions[:, :, None] - key_positions[:, None, :]  # b q k
        if distances.is_floating_point():
            return self.at(distances.flatten()).unflatten(1, distances.shape).movedim(0, 1)
        low, high = (int(bound) for bound in distances.aminmax())
        table = self.at(torch.arange(low, high + 1, device=distances.device))
        return F.embedding(distances - low, table.T).movedim(-1, 1)  # its backward has one order on a CPU

    @final
    def band(self, first: int, queries: int, keys: int) -> Float[Tensor, "1 h q k"]:
        """What `between` gives for consecutive positions, `first` being the distance from query 0 to key 0.

        All distances are the n = q + k - 1 diagonals of one band, so the table is laid out without an index.
        """
        diagonals = torch.arange(first + queries - 1, first - keys, -1, device=self._device())
        return self.at(diagonals).unfold(-1, keys, 1).flip(1)[None]

    def _device(self) -> torch.device | None:
        return next((each.device for each in (*self.parameters(), *self.buffers())), None)


class ScoreMap(Method):
    """Rewrites a row of scores from its content; the bias is added afterwards."""

    keeps_bias: bool = True  # False: the map has taken the bias in, and it is not added again

    @abstractmethod
    def rewrite(self, scores: Float[Tensor, "b h q k"], rows: Rows) -> Float[Tensor, "b h q k"]:
        """The new scores. Nothing may come from a key that `rows` does not show."""


class Sink(Method):
    """A score that joins the softmax of every row and gives nothing."""

    @abstractmethod
    def score(self, query_positions: Num[Tensor, "#b q"]) -> Float[Tensor, "#b h q"]:
        """The sink's score; -inf where there is none."""


class HeadMerge(Method):
    """Makes one head of several softmax maps, or changes what a head gives."""

    maps: ClassVar[int] = 1
    needs_inputs: ClassVar[bool] = False  # `merge` reads x, the input of the attention layer
    share_bias: bool = False  # one bias and sink for all maps of a head

    @classmethod
    @abstractmethod
    def heads(cls, heads: int, groups: int, head_width: int) -> Heads:
        """How the heads of the plain transformer are divided."""

    @abstractmethod
    def merge(self, outputs: Float[Tensor, "b h m q v"], x: Float[Tensor, "b q d"] | None) -> Float[Tensor, "b h q v"]:
        """One output for every head."""


def slopes(heads: int) -> Float[Tensor, " h"]:
    """ALiBi's slopes: a geometric series from 2^(-8/heads).

    Where heads is no power of two, the series of the power of two below it, then every other slope of the one above.
    Source: Press et al., 2022, arXiv 2108.12409.
    """
    whole_power = 1 << (heads.bit_length() - 1)
    exponents = [8 * (n + 1) / whole_power for n in range(whole_power)]
    exponents += [4 * (2 * n + 1) / whole_power for n in range(heads - whole_power)]
    return torch.tensor([2.0**-exponent for exponent in exponents])


def wide(positions: Num[Tensor, "..."], like: Tensor | None = None) -> Float[Tensor, "..."]:
    """Positions or distances as float32, or wider where `like` is: bfloat16 cannot tell 257 from 256."""
    known = torch.float32 if like is None else torch.promote_types(like.dtype, torch.float32)
    return positions.to(torch.promote_types(positions.dtype, known))


def whole(positions: Num[Tensor, "..."], name: str) -> Num[Tensor, "..."]:
    """The positions, refused where they are fractional."""
    if positions.is_floating_point():
        raise UserError(f"{name} needs whole positions; these are fractional ({positions.dtype}).")
    return positions
