"""RoPE: turns queries and keys by angles that grow with position, so that scores know the distance."""

from typing import Literal

import torch
from jaxtyping import Float, Num
from torch import Tensor

from lookfar.errors import UserError
from lookfar.methods.base import Positive, QueryKeyEncoding, Site, wide


class Rope(QueryKeyEncoding):
    """Turns each pair of query and key features by position × frequency.

    Su et al., 2021, arXiv 2104.09864.

        (x, y) → (x cos θ - y sin θ, y cos θ + x sin θ),   θ = position · base^(-2n/head_width)

    `layout="halves"` pairs feature n with n + head_width/2 (GPT-NeoX, Llama in transformers); `layout="interleaved"`
    pairs neighbours (the paper, GPT-J). The two are the same up to a fixed permutation of features.
    """

    paper = "Su et al., 2021, arXiv 2104.09864"
    adds = "a rotation of queries and keys"
    rotation = True

    def __init__(
        self, site: Site, *, base: Positive = 10000.0, layout: Literal["halves", "interleaved"] = "halves"
    ) -> None:
        super().__init__(site)
        self.base, self.layout = base, layout
        if site.heads.head_width % 2:
            raise UserError(f"rope turns pairs of features: head_width ({site.heads.head_width}) must be even.")

    def queries(self, queries: Float[Tensor, "b h t e"], positions: Num[Tensor, "#b t"]) -> Float[Tensor, "b h t e"]:
        return self._turn(queries, positions)

    def keys(self, keys: Float[Tensor, "b g t e"], positions: Num[Tensor, "#b t"]) -> Float[Tensor, "b g t e"]:
        return self._turn(keys, positions)

    def _turn(self, x: Float[Tensor, "b c t e"], positions: Num[Tensor, "#b t"]) -> Float[Tensor, "b c t e"]:
        half = x.shape[-1] // 2
        places = wide(positions, x)[:, None, :, None]  # b 1 t 1
        angles = places * self.base ** (-torch.arange(half, device=x.device, dtype=places.dtype) / half)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        if self.layout == "halves":
            first, second = x.chunk(2, dim=-1)
            return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)
