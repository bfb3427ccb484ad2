"""Transformer-XL's relative positions: queries meet projected sinusoids of the distance."""

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

from lookfar.methods.base import Positive, ScoreMap, Site, wide
from lookfar.sight import Rows


class TransformerXl(ScoreMap):
    """Adds to the scores how each key's content and each distance meet learned vectors and the query.

    Dai et al., 2019, arXiv 1901.02860.

        score[i, j] = ((q[i] + u) · k[j] + (q[i] + v) · W R[i - j]) / √head_width

    R is a sinusoid of the model's width, sines then cosines; u and v are a vector per head, W a matrix per layer. As
    sin(i - j) and cos(i - j) split into products of a query's part and a key's part, no table of distances is made.
    """

    paper = "Dai et al., 2019, arXiv 1901.02860"
    adds = "products with sinusoids of the distance"
    quirks = (
        "Public code computes the sinusoids in the type of the activations, where distances above 256 collapse in "
        "bfloat16."
    )

    def __init__(self, site: Site, *, base: Positive = 10000.0) -> None:
        super().__init__(site)
        self.counts, self.base, self.count = site.heads, base, (site.width + 1) // 2
        heads, width = site.heads.score_heads, site.heads.head_width
        self.content = nn.Parameter(torch.randn(heads, width) * 0.02)  # u
        self.place = nn.Parameter(torch.randn(heads, width) * 0.02)  # v
        self.project = nn.Linear(2 * self.count, heads * width, bias=False)  # W

    def rewrite(self, scores: Float[Tensor, "b h q k"], rows: Rows) -> Float[Tensor, "b h q k"]:
        dtype = torch.promote_types(scores.dtype, self.content.dtype)
        queries = rows.queries.to(dtype) + self.place[:, None].to(dtype)
        keys = self.counts.keys_for_scores(rows.keys).to(dtype)
        weight = self.project.weight.to(dtype).unflatten(0, self.content.shape)  # h e (sines, cosines)
        sines, cosines = (queries @ weight).chunk(2, dim=-1)  # b h q f: how much of each wave a query asks for
        sin_q, cos_q = self._waves(rows.query_positions, dtype)
        sin_k, cos_k = self._waves(rows.key_positions, dtype)
        asked = torch.cat([sines * sin_q + cosines * cos_q, cosines * sin_q - sines * cos_q], dim=-1)
        place = asked @ torch.cat([cos_k, sin_k], dim=-1).mT
        content = (self.content[:, None].to(dtype) * keys).sum(-1)[:, :, None]  # b h 1 k
        return scores + ((place + content) * self.content.shape[1] ** -0.5).to(scores.dtype)

    def _waves(
        self, positions: Num[Tensor, "#b t"], dtype: torch.dtype
    ) -> tuple[Float[Tensor, "#b 1 t f"], Float[Tensor, "#b 1 t f"]]:
        frequencies = self.base ** (-torch.arange(self.count, device=positions.device, dtype=dtype) / self.count)
        angles = wide(positions, self.content).to(dtype)[:, None, :, None] * frequencies
        return angles.sin(), angles.cos()
