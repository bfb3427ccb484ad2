"""Log-n scaling: sharpens the softmax as the number of visible keys grows."""

import math

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

from lookfar.methods.base import QueryKeyEncoding, Site, wide


class LogN(QueryKeyEncoding):
    """Multiplies each query by the logarithm of how many tokens there are up to it; keys stay as they are.

    Fixed: Chiang and Cholak, 2022, arXiv 2202.12172, with the trained length as base, so that the factor is 1 there:
    factor = log(p + 1) / log(context), never below 1 with `clip=true`. Learned: Nakanishi, 2025, "Scalable-Softmax",
    arXiv 2501.19399, factor = s[h] · log(p + 1) with a learned s for each head, which starts at 1 / log(context).

    The published StableMask code holds such a factor unannounced; here it is a method of its own.
    """

    paper = "Chiang and Cholak, 2022, arXiv 2202.12172; Nakanishi, 2025, arXiv 2501.19399"
    adds = "scores that grow with the logarithm of the position"
    quirks = "The fixed form needs the trained length as its base: another context gives another model."

    def __init__(self, site: Site, *, learned: bool = False, clip: bool = False) -> None:
        super().__init__(site)
        start = torch.full((site.heads.score_heads,), 1 / math.log(max(2, site.context)))
        self.clip = clip
        self.strength: Float[Tensor, " h"]
        if learned:
            self.strength = nn.Parameter(start)
        else:
            self.register_buffer("strength", start, persistent=False)

    def queries(self, queries: Float[Tensor, "b h t e"], positions: Num[Tensor, "#b t"]) -> Float[Tensor, "b h t e"]:
        counts = wide(positions, self.strength).abs()[:, None, :] + 1  # b 1 t
        factor = self.strength[:, None] * counts.log()
        if self.clip:
            factor = factor.clamp(min=1)
        return queries * factor[..., None].to(queries.dtype)

    def keys(self, keys: Float[Tensor, "b g t e"], positions: Num[Tensor, "#b t"]) -> Float[Tensor, "b g t e"]:
        return keys
