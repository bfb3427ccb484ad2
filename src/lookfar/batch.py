"""A batch of tokens, and the ways to number them."""

from dataclasses import dataclass

import torch
from jaxtyping import Int, Num
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Tokens and what goes with each of them. A target of -100 is not scored; document -1 is padding."""

    tokens: Int[Tensor, "b t"]
    targets: Int[Tensor, "b t"]
    positions: Num[Tensor, "#b t"] | None = None  # None: 0, 1, 2, …
    documents: Int[Tensor, "b t"] | None = None  # None: each line is one document


def consecutive(documents: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """Number the tokens of each document 0, 1, 2, … in their order; padding gets 0."""
    order = documents.argsort(dim=1, stable=True)
    ordered = documents.gather(1, order)
    place = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    rank = place - torch.where(starts, place, 0).cummax(dim=1).values
    return torch.empty_like(documents).scatter(1, order, rank).masked_fill(documents < 0, 0)
