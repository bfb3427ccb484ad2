"""Kerple: a bias that falls with the logarithm or a power of distance, learned per head."""

from typing import Literal

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn
from torch.nn import functional as F

from lookfar.methods.base import DistanceBias, Site, wide

FLOOR = 0.01  # the paper's least amplitude, rate and power


class Kerple(DistanceBias):
    """Subtracts a kernel of the distance with two learned numbers for each head and layer.

    Chi et al., 2022, arXiv 2205.09921.

        kernel="log":    bias[h, i, j] = -p[h] · log(1 + a[h] · |i - j|)     p, a > 0
        kernel="power":  bias[h, i, j] = -a[h] · |i - j|^p[h]                a > 0, 0 < p ≤ 2

    Both start uniform, p in (0, 2) and a in (0, 1). They stay above 0.01, and the power below 2, by smooth functions of
    what is learned, where the published code clamps.
    """

    paper = "Chi et al., 2022, arXiv 2205.09921"
    adds = "a learned bias logarithmic in distance"

    def __init__(self, site: Site, *, kernel: Literal["log", "power"] = "log") -> None:
        super().__init__(site)
        self.kernel, heads = kernel, site.heads.score_heads
        first, second = 2 * torch.rand(heads), torch.rand(heads)
        self.p = nn.Parameter(
            _before_softplus(first) if kernel == "log" else torch.logit((first / 2).clamp(FLOOR, 0.99))
        )
        self.a = nn.Parameter(_before_softplus(second))

    def at(self, distances: Num[Tensor, " n"]) -> Float[Tensor, "h n"]:
        distance, a = wide(distances, self.a).abs(), FLOOR + F.softplus(self.a)[:, None]
        if self.kernel == "log":
            return -(FLOOR + F.softplus(self.p)[:, None]) * torch.log1p(a * distance)
        power = FLOOR + (2 - FLOOR) * torch.sigmoid(self.p)[:, None]
        apart = distance > 0  # 0 to any power is 0, but its gradient is not finite
        return -a * torch.where(apart, torch.where(apart, distance, 1.0) ** power, 0.0)


def _before_softplus(values: Float[Tensor, " h"]) -> Float[Tensor, " h"]:
    return (values - FLOOR).clamp(min=FLOOR).expm1().log()
