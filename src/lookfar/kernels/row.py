"""Decoding: one query of each sequence, whose row of scores is so small that nothing is fused and nothing is copied."""

import torch
from jaxtyping import Float
from torch import Tensor

from lookfar.attention.reference import absorb, wider
from lookfar.attention.scheme import Scheme
from lookfar.kernels.base import Call, Kernel
from lookfar.methods.base import Heads
from lookfar.sight import Sight


class Row(Kernel):
    """One product with the keys, one softmax and one product with the values, for a single query of each sequence.

    The queries of all score heads that share a key head stand below one another, so that keys and values are read
    where they lie in the cache, once. Bias and sink are a row of numbers.
    """

    def refusal(self, scheme: Scheme, call: Call) -> str | None:
        if call.queries > 1:
            return f"there are {call.queries:,} queries, not one"
        if scheme.maps:
            return f"{type(scheme.maps[0]).__name__} rewrites the scores"
        if call.slots:
            return "a slot is not in the text"
        return None

    def attend(
        self,
        queries: Float[Tensor, "b h q e"],
        keys: Float[Tensor, "b g k e"],
        values: Float[Tensor, "b g2 k v"],
        sight: Sight,
        scheme: Scheme,
    ) -> Float[Tensor, "b h q v"]:
        heads = scheme.heads
        scores = _by_head(_by_group(queries, heads, heads.key_heads) @ keys.mT, heads, heads.key_heads)
        scores = scheme.cap(scores.to(wider(queries.dtype)) * scheme.scale)
        bias, sink = scheme.bias(sight), scheme.sink(sight.query_positions)
        if bias is not None:
            scores = scores + bias
        if not (sight.plain and sight.last):
            scores = scores.masked_fill(~sight.visible(), -torch.inf)
        weights = _by_group(scores.softmax(-1).to(values.dtype), heads, heads.value_heads)
        output = _by_head(weights @ values, heads, heads.value_heads)
        return output if sink is None else absorb(output, scores.logsumexp(-1), sink)


def _by_group(rows: Float[Tensor, "b h 1 w"], heads: Heads, groups: int) -> Float[Tensor, "b g r w"]:
    """The single rows of all heads that share a key or value head, below one another."""
    if groups == heads.score_heads:
        return rows
    apart = rows[:, :, 0].unflatten(1, _split(heads, groups))  # b h w -> b maps-of-keys maps groups heads w
    return apart.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _by_head(rows: Float[Tensor, "b g r w"], heads: Heads, groups: int) -> Float[Tensor, "b h 1 w"]:
    """The way back from `_by_group`."""
    if groups == heads.score_heads:
        return rows
    outer, maps, inner, each = _split(heads, groups)
    apart = rows.unflatten(1, (outer, inner)).unflatten(3, (maps, each))  # b outer groups maps heads w
    return apart.transpose(2, 3).flatten(1, 4)[:, :, None]


def _split(heads: Heads, groups: int) -> tuple[int, int, int, int]:
    """Score heads as [maps with keys of their own, maps that share keys, groups, heads of a group]."""
    outer = groups // heads.value_heads
    return outer, heads.maps // outer, heads.value_heads, heads.heads // heads.value_heads
