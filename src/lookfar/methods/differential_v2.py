"""Differential Transformer V2: twice the queries, and a difference weighed by each token."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lookfar.methods.base import HeadMerge, Heads, Site


class DifferentialV2(HeadMerge):
    """Gives first map - sigmoid(λ) · second map, with λ read from each token's input.

    Ye et al., January 2026, the second version of arXiv 2410.05258, in the authors' public code.

        head = softmax(q1 k) v - sigmoid(x w[h]) · softmax(q2 k) v

    Queries are doubled, keys and values stay those of the plain transformer, and there is no norm of the heads. The two
    maps of a head share its group, as the authors demand. Biases and sinks act per map unless `share_bias=true`.
    """

    paper = "Ye et al., 2026, code beside arXiv 2410.05258"
    adds = "twice the queries, and a weighed difference of two maps"
    quirks = (
        "Twice the queries: attention costs twice the products, while the cache stays that of the plain transformer."
    )
    maps = 2
    needs_inputs = True

    def __init__(self, site: Site, *, share_bias: bool = False) -> None:
        super().__init__(site)
        self.share_bias = share_bias
        self.balance = nn.Linear(site.width, site.heads.heads, bias=False)

    @classmethod
    def heads(cls, heads: int, groups: int, head_width: int) -> Heads:
        return Heads(2 * heads, groups, groups, head_width, head_width, maps=2)

    def merge(self, outputs: Float[Tensor, "b h m q v"], x: Float[Tensor, "b q d"] | None) -> Float[Tensor, "b h q v"]:
        assert x is not None, "the scheme has asked for the inputs"
        first, second = outputs.unbind(2)
        balance = torch.sigmoid(self.balance(x.to(self.balance.weight.dtype)))  # b q h
        return first - balance.transpose(1, 2)[..., None].to(outputs.dtype) * second
