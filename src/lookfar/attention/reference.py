"""Attention, defined: every kernel must agree with it in outputs and gradients."""

import torch
from jaxtyping import Float
from torch import Tensor

from lookfar.attention.scheme import Scheme
from lookfar.sight import Rows, Sight


def attend(
    queries: Float[Tensor, "b h q e"],
    keys: Float[Tensor, "b g k e"],
    values: Float[Tensor, "b g2 k v"],
    sight: Sight,
    scheme: Scheme,
) -> Float[Tensor, "b h q v"]:
    """What each query receives in every score head. Queries and keys are already encoded; merging comes after."""
    rows = Rows(
        queries,
        keys,
        sight.query_positions,
        sight.key_positions,
        sight.visible(),
        scheme.bias(sight),
        sight.scattered,
    )
    scores = (queries @ scheme.heads.keys_for_scores(keys).mT).to(wider(queries.dtype)) * scheme.scale
    scores = scheme.rewrite(scores, rows)
    scores = scores.masked_fill(~rows.visible, -torch.inf)
    output = scores.softmax(-1).to(values.dtype) @ scheme.heads.values_for_scores(values)
    sink = scheme.sink(sight.query_positions)
    return output if sink is None else absorb(output, scores.logsumexp(-1), sink)


def absorb(
    output: Float[Tensor, "b h q v"], logsumexp: Float[Tensor, "b h q"], sink: Float[Tensor, "#b h q"]
) -> Float[Tensor, "b h q v"]:
    """Let a sink take its share: an epilogue for any kernel that knows the log-sum-exp of its rows."""
    return output * torch.sigmoid(logsumexp - sink)[..., None].to(output.dtype)


def wider(dtype: torch.dtype) -> torch.dtype:
    """The type of scores: float32, or float64 where the input is."""
    return torch.promote_types(dtype, torch.float32)
