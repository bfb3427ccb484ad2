"""An output gate: each head is multiplied by a sigmoid of the layer's input."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lookfar.methods.base import HeadMerge, Heads, Site


class Gate(HeadMerge):
    """Multiplies what a head gives by sigmoid(x W), so that it can give nothing without a sink.

    Qiu et al., 2025, "Gated Attention for Large Language Models", arXiv 2505.06708.

        head = sigmoid(x W[h]) · attention,   W[h] of width value_width (`per="feature"`) or 1 (`per="head"`)
    """

    paper = "Qiu et al., 2025, arXiv 2505.06708"
    adds = "a sigmoid gate on what each head gives"
    quirks = "Without any position method it knows no more of order than nope."
    needs_inputs = True

    def __init__(self, site: Site, *, per: Literal["feature", "head"] = "feature") -> None:
        super().__init__(site)
        self.count, self.wide = site.heads.heads, site.heads.value_width if per == "feature" else 1
        self.project = nn.Linear(site.width, self.count * self.wide, bias=False)

    @classmethod
    def heads(cls, heads: int, groups: int, head_width: int) -> Heads:
        return Heads(heads, groups, groups, head_width, head_width)

    def merge(self, outputs: Float[Tensor, "b h m q v"], x: Float[Tensor, "b q d"] | None) -> Float[Tensor, "b h q v"]:
        assert x is not None, "the scheme has asked for the inputs"
        gate = torch.sigmoid(self.project(x.to(self.project.weight.dtype)))
        gate = gate.unflatten(-1, (self.count, self.wide)).transpose(1, 2)  # b q (h v) -> b h q v
        return outputs[:, :, 0] * gate.to(outputs.dtype)
