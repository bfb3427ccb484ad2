"""Differential Transformer V1: the difference of two softmax maps cancels the noise that they share."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lookfar.errors import UserError
from lookfar.methods.base import HeadMerge, Heads, Site


class Differential(HeadMerge):
    """Gives (first map - λ · second map) times values twice as wide, normalised per head.

    Ye et al., 2024, arXiv 2410.05258.

        λ = exp(λq1 · λk1) - exp(λq2 · λk2) + λinit,   λinit = 0.8 - 0.6 · exp(-0.3 · layer)
        head = (1 - λinit) · RMSNorm((softmax(q1 k1) - λ softmax(q2 k2)) v)

    Against the plain transformer, heads and groups are halved and values doubled, so that parameters stay equal; odd
    counts are refused. The two maps of a head share its group, as in the authors' flash form. Biases and sinks act per
    map unless `share_bias=true`.
    """

    paper = "Ye et al., 2024, arXiv 2410.05258"
    adds = "the difference of two softmax maps per head"
    quirks = (
        "In the authors' explicit file grouped key heads are paired wrongly; theirs and ours are the flash form. "
        "transformers' DiffLlama pairs head i with i + heads/2 and has no weight in the norm."
    )
    maps = 2

    def __init__(self, site: Site, *, share_bias: bool = False) -> None:
        super().__init__(site)
        self.share_bias = share_bias
        self.start = 0.8 - 0.6 * math.exp(-0.3 * site.layer)
        self.vectors = nn.Parameter(torch.randn(4, site.heads.head_width) * 0.1)  # λq1, λk1, λq2, λk2
        self.weight = nn.Parameter(torch.ones(site.heads.value_width))

    @classmethod
    def heads(cls, heads: int, groups: int, head_width: int) -> Heads:
        if heads % 2 or groups % 2:
            raise UserError(f"differential halves heads ({heads}) and groups ({groups}): both must be even.")
        return Heads(heads, groups, groups // 2, head_width, 2 * head_width, maps=2)

    def merge(self, outputs: Float[Tensor, "b h m q v"], x: Float[Tensor, "b q d"] | None) -> Float[Tensor, "b h q v"]:
        first, second = outputs.to(self.weight.dtype).unbind(2)
        q1, k1, q2, k2 = self.vectors
        balance = (q1 @ k1).exp() - (q2 @ k2).exp() + self.start
        head = F.rms_norm(first - balance * second, (first.shape[-1],), self.weight, eps=1e-5)
        return ((1 - self.start) * head).to(outputs.dtype)
