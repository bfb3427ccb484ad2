"""Sinusoidal positions: sines and cosines of many wavelengths, added to the token embeddings."""

import torch
from jaxtyping import Float, Num
from torch import Tensor

from lookfar.methods.base import InputEncoding, Positive, Site, wide


class Sinusoidal(InputEncoding):
    """Adds sines (first half) and cosines (second half) of the position to the embeddings; nothing is learned.

    Vaswani et al., 2017, arXiv 1706.03762.

        encoding[p] = scale · [sin(p · w_0), …, cos(p · w_0), …],   w_n = base^(-2n/width)

    The scale makes it as large as a fresh token embedding.
    """

    paper = "Vaswani et al., 2017, arXiv 1706.03762"
    adds = "sines and cosines of the position to the embeddings"

    def __init__(self, site: Site, *, base: Positive = 10000.0) -> None:
        super().__init__(site)
        self.base = base
        self.scale = 2**0.5 * site.embedding_scale  # a sine's root mean square is 2^-½

    def encode(self, x: Float[Tensor, "b t d"], positions: Num[Tensor, "#b t"]) -> Float[Tensor, "b t d"]:
        half = (x.shape[-1] + 1) // 2
        places = wide(positions, x)[..., None]  # b t 1
        angles = places * self.base ** (-torch.arange(half, device=x.device, dtype=places.dtype) / half)
        encoding = torch.cat([angles.sin(), angles.cos()], dim=-1)[..., : x.shape[-1]]
        return x + (self.scale * encoding).to(x.dtype)
