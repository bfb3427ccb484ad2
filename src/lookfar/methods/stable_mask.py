"""StableMask: pseudo scores of the columns ahead take part in the softmax and give nothing."""

import math
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from jaxtyping import Float, Num
from torch import Tensor

from lookfar.errors import UserError
from lookfar.methods.base import Count, Sink, Site, slopes, wide


class StableMask(Sink):
    """Adds to the softmax the mass of the masked columns, whose scores decay with the column; nothing is learned.

    Yin et al., 2024, arXiv 2402.04779. Position p counts from 0, columns N from 1:

        D(p) = Σ_{c=p+1}^{N-1} e^(-c·gamma) = e^(-(p+1)·gamma) · (1 - e^(-(N-1-p)·gamma)) / (1 - e^(-gamma))
        weights = softmax of the visible scores and log D(p), without the last

    The published training form takes N as the current length, so that every row changes when the sequence grows.
    `columns="infinite"` (default) lets N go to infinity: one function for training, decoding and any length. A number
    is the paper's inference form, with N the trained length; positions from N - 1 on get no pseudo score.
    `gamma="slopes"` gives each head its ALiBi slope, as the published code does; a number serves all heads.
    """

    paper = "Yin et al., 2024, arXiv 2402.04779"
    adds = "pseudo scores of the masked columns to the softmax"
    quirks = (
        "The published training form depends on the length of the batch, and the published code at its last state "
        "trains only with the logarithmic scale that is `log_n` here. With keys ahead in sight the sink still counts "
        "the columns after the query."
    )

    def __init__(
        self,
        site: Site,
        *,
        gamma: Annotated[float, Ge(0)] | Literal["slopes"] = "slopes",
        columns: Count | Literal["infinite"] = "infinite",
    ) -> None:
        super().__init__(site)
        if gamma == 0 and columns == "infinite":
            raise UserError(
                "stable_mask(gamma=0) has infinite mass; give columns a number, such as the trained length."
            )
        self.columns = math.inf if columns == "infinite" else columns
        heads = site.heads.score_heads
        decay = slopes(heads) if gamma == "slopes" else torch.full((heads,), float(gamma))
        self.register_buffer("decay", decay, persistent=False)
        self.decay: Float[Tensor, " h"]

    def score(self, query_positions: Num[Tensor, "#b q"]) -> Float[Tensor, "#b h q"]:
        decay = self.decay[:, None]
        place = wide(query_positions, decay)[:, None, :]  # b 1 q
        least = torch.where(decay > 0, -torch.expm1(-decay), 1.0)
        infinite = -decay * (place + 1) - least.log()
        if math.isinf(self.columns):
            return infinite
        ahead = (self.columns - 1 - place).clamp(min=0)
        return infinite + torch.where(decay > 0, -torch.expm1(-decay * ahead), ahead).log()  # -inf: no column is ahead
