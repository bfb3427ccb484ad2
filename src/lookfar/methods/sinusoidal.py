"""Sinusoidal positions: sines and cosines of many wavelengths, added to the token embeddings."""

from typing import Literal

import torch
from jaxtyping import Float, Num
from torch import Tensor

from lookfar.methods.base import InputEncoding, Positive, Site, wide


class Sinusoidal(InputEncoding):
    """Adds sines and cosines of the position to the embeddings; nothing is learned.

    Vaswani et al., 2017, arXiv 1706.03762.

        encoding[p] = scale · [sin(p · w_0), …, cos(p · w_0), …],   w_n = base^(-2n/width)

    `layout="halves"` puts all sines first, `layout="interleaved"` each sine before its cosine, as printed in the paper.
    The scale makes it as large as a fresh token embedding; `scaled=false` leaves it at 1.
    """

    paper = "Vaswani et al., 2017, arXiv 1706.03762"
    adds = "sines and cosines of the position to the embeddings"
    quirks = "Libraries differ in order (halves or interleaved) and in scale; both are settings."

    def __init__(
        self,
        site: Site,
        *,
        base: Positive = 10000.0,
        layout: Literal["halves", "interleaved"] = "halves",
        scaled: bool = True,
    ) -> None:
        super().__init__(site)
        self.base, self.layout = base, layout
        self.scale = 2**0.5 * site.embedding_scale if scaled else 1.0  # a sine's root mean square is 2^-½

    def encode(self, x: Float[Tensor, "b t d"], positions: Num[Tensor, "#b t"]) -> Float[Tensor, "b t d"]:
        half = (x.shape[-1] + 1) // 2
        places = wide(positions, x)[..., None]  # b t 1
        angles = places * self.base ** (-torch.arange(half, device=x.device, dtype=places.dtype) / half)
        waves = angles.sin(), angles.cos()
        encoding = torch.cat(waves, dim=-1) if self.layout == "halves" else torch.stack(waves, dim=-1).flatten(-2)
        encoding = encoding[..., : x.shape[-1]]
        return x + (self.scale * encoding).to(x.dtype)
