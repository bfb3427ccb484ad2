"""T5's relative bias: a learned number for each bucket of distances."""

import math
from typing import Literal

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor, nn
from torch.nn import functional as F

from lookfar.errors import UserError
from lookfar.methods.base import Count, DistanceBias, Site, whole, wide


class T5(DistanceBias):
    """Adds a learned number that depends on the bucket of the distance; buckets widen with distance.

    Raffel et al., 2020, arXiv 1910.10683.

        bucket(r) = r                                                   for r < buckets/2
                    buckets/2 + ⌊buckets/2 · ln(2r/buckets) / ln(2·farthest/buckets)⌋    beyond, at most buckets - 1

    All distances of `farthest` and more share the last bucket. One table serves all layers unless `shared=false`.
    `scale` names the convention: `scaled` scales scores by head_width^-½, as everywhere here; `original` scales
    nothing, as T5 does; `multiplied` scales scores and multiplies the table by √head_width, as GPT-NeoX does.
    """

    paper = "Raffel et al., 2020, arXiv 1910.10683"
    adds = "a learned bias by bucket of distance"
    quirks = (
        "T5 itself does not scale scores (`scale=original`), GPT-NeoX multiplies the table (`scale=multiplied`): a "
        "checkpoint needs its own convention. Positions must be whole numbers."
    )
    fractional = False
    shared = True

    def __init__(
        self,
        site: Site,
        *,
        buckets: Count = 32,
        farthest: Count = 128,
        shared: bool = True,
        scale: Literal["scaled", "original", "multiplied"] = "scaled",
    ) -> None:
        super().__init__(site)
        if buckets < 2 or farthest <= buckets // 2:
            raise UserError(f"t5 needs buckets ≥ 2 and farthest ({farthest}) beyond half of them ({buckets // 2}).")
        self.buckets, self.farthest = buckets, farthest
        self.table = nn.Parameter(torch.randn(buckets, site.heads.score_heads) * 0.02)
        self.scale = 1.0 if scale == "original" else None
        self.factor = site.heads.head_width**0.5 if scale == "multiplied" else 1.0

    def at(self, distances: Num[Tensor, " n"]) -> Float[Tensor, "h n"]:
        return self.factor * F.embedding(self.bucket(whole(distances, "t5")), self.table).T

    def bucket(self, distances: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """The bucket of each distance; keys that lie ahead share bucket 0."""
        exact = self.buckets // 2
        behind = distances.clamp(min=0)
        growth = (self.buckets - exact) / math.log(self.farthest / exact)
        far = exact + (wide(behind).clamp(min=exact).div(exact).log() * growth).long()
        return torch.where(behind < exact, behind, far.clamp(max=self.buckets - 1))
