"""Learned positions: a table with a vector for every position, added to the token embeddings."""

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn
from torch.nn import functional as F

from lookfar.errors import UserError
from lookfar.methods.base import InputEncoding, Site, whole


class Learned(InputEncoding):
    """Adds a learned vector for each position to the embeddings. It cannot look beyond its table.

    Gehring et al., 2017, arXiv 1705.03122; used by GPT-2.

        x[p] + table[p],   0 ≤ p < positions

    The table holds the model's `positions`, by default the trained context. Rows that training never reached stay
    random.
    """

    paper = "Gehring et al., 2017, arXiv 1705.03122"
    adds = "a learned vector per position to the embeddings"
    quirks = "A position beyond the table is an error here, where some libraries read another row or repeat the last."
    fractional = False
    bounded = True

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.positions = site.positions
        self.table = nn.Parameter(torch.randn(site.positions, site.width) * site.embedding_scale)

    def encode(self, x: Float[Tensor, "b t d"], positions: Num[Tensor, "#b t"]) -> Float[Tensor, "b t d"]:
        low, high = (int(bound) for bound in whole(positions, "learned").aminmax())
        if low < 0 or high >= self.positions:
            raise UserError(
                f"Position {low if low < 0 else high} lies outside the learned table of {self.positions} positions; "
                f"train with model.positions={high + 1} or stay within it."
            )
        return x + F.embedding(positions, self.table).to(x.dtype)
