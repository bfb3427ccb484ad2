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

    What multiplies is `amplitude`, the other `rate`. They start uniform, p in (0, 2) and a in (0, 1), and stay above
    0.01, the power below 2, by smooth functions of what is learned, where the published code clamps.
    """

    paper = "Chi et al., 2022, arXiv 2205.09921"
    adds = "a learned bias logarithmic in distance"
    quirks = (
        "The power form at distance 0 has a gradient of log 0 in naive code; here it is 0. Public code clamps "
        "parameters outside of autograd."
    )

    def __init__(self, site: Site, *, kernel: Literal["log", "power"] = "log") -> None:
        super().__init__(site)
        self.kernel, heads = kernel, site.heads.score_heads
        double, single = 2 * torch.rand(heads), torch.rand(heads)
        logarithmic = kernel == "log"
        self.amplitude = nn.Parameter(_before_softplus(double if logarithmic else single))
        self.rate = nn.Parameter(_before_softplus(single) if logarithmic else (double / 2).clamp(FLOOR, 0.99).logit())

    def at(self, distances: Num[Tensor, " n"]) -> Float[Tensor, "h n"]:
        distance, amplitude = wide(distances, self.rate).abs(), FLOOR + F.softplus(self.amplitude)[:, None]
        if self.kernel == "log":
            return -amplitude * torch.log1p((FLOOR + F.softplus(self.rate)[:, None]) * distance)
        power = FLOOR + (2 - FLOOR) * torch.sigmoid(self.rate)[:, None]
        apart = distance > 0  # 0 to any power is 0, but its gradient is not finite
        return -amplitude * torch.where(apart, torch.where(apart, distance, 1.0) ** power, 0.0)


def _before_softplus(values: Float[Tensor, " h"]) -> Float[Tensor, " h"]:
    return (values - FLOOR).clamp(min=FLOOR).expm1().log()
