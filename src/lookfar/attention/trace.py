"""Attention, defined once more, keeping everything on the way: what `reference.attend` gives, and how it came about."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lookfar.attention.reference import absorb, wider
from lookfar.attention.scheme import Scheme
from lookfar.errors import UserError
from lookfar.sight import Rows, Sight


@dataclass(frozen=True)
class Trace:
    """Some rows of one layer, at every stage. No two stages share memory."""

    scheme: Scheme
    sight: Sight
    rows: Rows  # encoded queries and keys, who is visible, and the bias
    before: Float[Tensor, "b h q k"]  # the scaled products of queries and keys
    after: Float[Tensor, "b h q k"]  # the same after soft-cap and map
    scores: Float[Tensor, "b h q k"]  # what the softmax reads: with the bias, -inf where a key is hidden
    weights: Float[Tensor, "b h q k"]  # of the keys among themselves: each row sums to 1
    logsumexp: Float[Tensor, "b h q"]  # of the scores
    sink: Float[Tensor, "#b h q"] | None  # the score of all sinks together
    outputs: Float[Tensor, "b h q v"]  # of each score head, after the sink took its share
    merged: Float[Tensor, "b h2 q v"]  # of each head, its maps merged

    @property
    def bias(self) -> Float[Tensor, "#b h q k"] | None:
        """What is added to the scores; a map may have read it instead."""
        return self.rows.bias

    @property
    def swallowed(self) -> Float[Tensor, "b h q"]:
        """The mass that the sinks take of each row; 0 where there is none."""
        if self.sink is None:
            return torch.zeros_like(self.logsumexp)
        return torch.sigmoid(self.sink - self.logsumexp)

    @property
    def given(self) -> Float[Tensor, "b h q k"]:
        """The mass that each key has: with `swallowed` it sums to 1."""
        return self.weights if self.sink is None else self.weights * (1 - self.swallowed)[..., None]

    @property
    def seen(self) -> Int[Tensor, "#b q"]:
        """How many keys each query sees, itself included."""
        return self.rows.visible[:, 0].sum(-1)

    @property
    def behind(self) -> Int[Tensor, "#b 1 q k"]:
        """How many visible keys lie between a key and the last one that the query sees: 0 for that one itself."""
        return self.seen[:, None, :, None] - self.rows.visible.cumsum(-1)

    @property
    def asked(self) -> Bool[Tensor, "#b q"]:
        """The rows that are no padding."""
        documents = self.sight.query_documents
        return torch.ones_like(self.seen, dtype=torch.bool) if documents is None else documents >= 0


def trace(
    queries: Float[Tensor, "b h q e"],
    keys: Float[Tensor, "b g k e"],
    values: Float[Tensor, "b g2 k v"],
    sight: Sight,
    scheme: Scheme,
    inputs: Float[Tensor, "b q d"] | None = None,
    *,
    whole: Sight | None = None,
) -> Trace:
    """Every stage of attention; queries and keys are already encoded, `inputs` is for merges that read it.

    Of some rows alone, `whole` is the sight that they are rows of: whether a method is exact is asked of it.

    Raises:
        UserError: a method is not exact under this sight, or a merge misses its inputs.
    """
    if reason := scheme.refusal(sight if whole is None else whole):
        raise UserError(reason)
    rows = Rows(
        queries,
        keys,
        sight.query_positions,
        sight.key_positions,
        sight.visible(),
        scheme.bias(sight),
        sight.scattered,
    )
    before = (queries @ scheme.heads.keys_for_scores(keys).mT).to(wider(queries.dtype)) * scheme.scale
    after = scheme.mapped(before.clone(), rows)  # a copy: whoever writes in place leaves `before` as it was
    scores = scheme.biased(after, rows).masked_fill(~rows.visible, -torch.inf)
    weights, logsumexp = scores.softmax(-1), scores.logsumexp(-1)
    outputs = weights.to(values.dtype) @ scheme.heads.values_for_scores(values)
    sink = scheme.sink(sight.query_positions)
    if sink is not None:
        outputs = absorb(outputs, logsumexp, sink)
    merged = scheme.merge(outputs, inputs)
    merged = merged.clone() if merged is outputs else merged
    return Trace(scheme, sight, rows, before, after, scores, weights, logsumexp, sink, outputs, merged)
