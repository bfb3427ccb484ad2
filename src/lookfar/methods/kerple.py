"""Kerple: a bias that falls with the logarithm of distance, learned per head."""

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn
from torch.nn import functional as F

from lookfar.methods.base import DistanceBias, Site, wide

FLOOR = 0.01  # the paper's least amplitude and rate


class Kerple(DistanceBias):
    """Subtracts p · log(1 + a · distance) with learned p, a > 0 for each head and layer.

    Chi et al., 2022, arXiv 2205.09921 (the logarithmic kernel).

        bias[h, i, j] = -p[h] · log(1 + a[h] · |i - j|)

    Both start uniform, p in (0, 2) and a in (0, 1), and stay above 0.01 by a softplus, where the published code clamps.
    """

    paper = "Chi et al., 2022, arXiv 2205.09921"
    adds = "a learned bias logarithmic in distance"

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        heads = site.heads.score_heads
        self.amplitude = nn.Parameter(_before_softplus(2 * torch.rand(heads)))
        self.rate = nn.Parameter(_before_softplus(torch.rand(heads)))

    def at(self, distances: Num[Tensor, " n"]) -> Float[Tensor, "h n"]:
        amplitude, rate = (FLOOR + F.softplus(each)[:, None] for each in (self.amplitude, self.rate))
        return -amplitude * torch.log1p(rate * wide(distances, self.rate).abs())


def _before_softplus(values: Float[Tensor, " h"]) -> Float[Tensor, " h"]:
    return (values - FLOOR).clamp(min=FLOOR).expm1().log()
