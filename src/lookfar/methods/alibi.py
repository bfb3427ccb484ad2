"""ALiBi: a bias that falls linearly with distance, steeper in some heads than in others."""

from jaxtyping import Float, Num
from torch import Tensor

from lookfar.methods.base import DistanceBias, Site, slopes, wide


class Alibi(DistanceBias):
    """Subtracts slope × distance from every score; nothing is learned.

    Press et al., 2022, "Train Short, Test Long", arXiv 2108.12409.

        bias[h, i, j] = -slope[h] · |i - j|,   slope = 2^(-8/H), 2^(-16/H), …, 2^(-8)
    """

    paper = "Press et al., 2022, arXiv 2108.12409"
    adds = "a bias linear in distance"

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.register_buffer("slopes", slopes(site.heads.score_heads), persistent=False)
        self.slopes: Float[Tensor, " h"]

    def at(self, distances: Num[Tensor, " n"]) -> Float[Tensor, "h n"]:
        return -self.slopes[:, None] * wide(distances, self.slopes).abs()
