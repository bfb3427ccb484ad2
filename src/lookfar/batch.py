"""A batch of tokens, and the ways to number them."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from lookfar.errors import UserError


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


def randomized(batch: int, tokens: int, *, largest: int, generator: torch.Generator) -> Int[Tensor, "b t"]:
    """Number the tokens of each line by an ordered sample of 0 … largest - 1, without repetition.

    A model that is trained so has met every position that a text of `largest` tokens has. Source: Ruoss et al., 2023,
    "Randomized Positional Encodings Boost Length Generalization", arXiv 2305.16843.
    """
    if largest < tokens:
        raise UserError(f"{tokens} tokens cannot be numbered below {largest} without repetition; raise `largest`.")
    keys = torch.rand(batch, largest, generator=generator)
    return keys.topk(tokens, dim=1, sorted=False).indices.sort(dim=1).values


def within(
    numbers: Num[Tensor, "b c"], chances: Float[Tensor, "b c"], documents: Int[Tensor, "b t"]
) -> Num[Tensor, "b t"]:
    """Number each document of a line by some of the numbers of the line, in their order; padding gets 0.

    A document of n tokens gets the n of them whose chances are lowest. Its first n alone would leave out the largest,
    which a short document then never met.
    """
    order = chances.argsort(dim=1)
    found = torch.zeros_like(documents, dtype=numbers.dtype)
    for line, own in enumerate(documents):
        for document in own[own >= 0].unique():
            place = own == document
            found[line, place] = numbers[line, order[line, : int(place.sum())].sort().values]
    return found


def interpolated(tokens: int, *, context: int) -> Num[Tensor, "1 t"]:
    """Number tokens 0, c, 2c, … with c = context / tokens where they are more than the trained context, else 0, 1, 2, …

    Source: Chen et al., 2023, arXiv 2306.15595, there for RoPE; here for every method that takes fractional positions.
    """
    places = torch.arange(tokens)[None]
    return places if tokens <= context else places * (context / tokens)
