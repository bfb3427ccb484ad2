"""One layer of the decoder: attention and a feed-forward net, each normalised before and added after."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lookfar.model.attention import Attention
from lookfar.model.cache import LayerCache
from lookfar.sight import Sight


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, 2020, arXiv 2002.05202), GELU or ReLU, without biases."""

    def __init__(self, width: int, hidden: int, activation: Literal["swiglu", "gelu", "relu"]) -> None:
        super().__init__()
        self.gated = activation == "swiglu"
        self.plain = F.relu if activation == "relu" else F.gelu
        self.up = nn.Linear(width, hidden * (2 if self.gated else 1), bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        if not self.gated:
            return self.down(self.plain(self.up(x)))
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


class Block(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, width: int, attention: Attention, feed_forward: FeedForward, dropout: float) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.RMSNorm(width, eps=1e-6), attention
        self.feed_forward_norm, self.feed_forward = nn.RMSNorm(width, eps=1e-6), feed_forward
        self.dropout = dropout
        self.recompute = False  # in training, keep nothing between input and output, and compute it again backwards

    def forward(
        self, x: Float[Tensor, "b t d"], sight: Sight, cache: LayerCache | None = None, step: int | None = None
    ) -> Float[Tensor, "b q d"]:
        """The stream after the layer, for the tokens that the sight lets ask: all, or the last."""
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(self._compute, x, sight, cache, step, use_reentrant=False)
        return self._compute(x, sight, cache, step)

    def _compute(
        self, x: Float[Tensor, "b t d"], sight: Sight, cache: LayerCache | None, step: int | None
    ) -> Float[Tensor, "b q d"]:
        received = self.attention(self.attention_norm(x), sight=sight, cache=cache, step=step)
        x = x[:, -sight.queries :] + self._drop(received)
        return x + self._drop(self.feed_forward(self.feed_forward_norm(x)))

    def _drop(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x
