"""ALiBi: a bias that falls linearly with distance, steeper in some heads than in others."""

from typing import Annotated, Literal

import torch
from annotated_types import Ge
from jaxtyping import Float, Num
from torch import Tensor, nn

from lookfar.errors import UserError
from lookfar.methods.base import DistanceBias, Site, slopes, wide

Form = Literal["symmetric", "offset", "separate", "split"]


class Alibi(DistanceBias):
    """Subtracts slope × distance from every score.

    Press et al., 2022, "Train Short, Test Long", arXiv 2108.12409.

        bias[h, i, j] = -slope[h] · |i - j|,   slope = 2^(-8/H), 2^(-16/H), …, 2^(-8)

    `learned=true` starts from these slopes and learns their logarithms. `factor` divides all slopes: static
    interpolation to a length `factor` times the trained one (arXiv 2310.13017).

    `form` says what keys ahead get, which only a sight that is not causal shows: `symmetric` the same as behind;
    `offset` half a token less; `separate` slopes of their own, half a step on in the series; `split`
    hides what lies ahead from the first
    half of the heads and what lies behind from the other half, each half with the slopes of H/2 heads; it hides keys by
    -inf and is refused beside a score map.
    """

    paper = "Press et al., 2022, arXiv 2108.12409"
    adds = "a bias linear in distance"
    quirks = (
        "Beyond the trained length non-overlapping windows improve because fewer tokens stand early in a window; in "
        "windows of stride 1 the perplexity stays flat. Slopes follow the query heads; below 12 heads many public "
        "tables for counts that are no power of two differ from the paper's."
    )

    def __init__(
        self, site: Site, *, learned: bool = False, factor: Annotated[float, Ge(1)] = 1.0, form: Form = "symmetric"
    ) -> None:
        super().__init__(site)
        self.form, self.learned, self.factor, heads = form, learned, factor, site.heads.score_heads
        if form == "split" and heads % 2:
            raise UserError(f"alibi(form=split) halves the heads; {heads} is odd.")
        self.hides = form == "split"
        start = slopes(heads // 2).repeat(2) if form == "split" else slopes(heads)
        between = start * 2 ** (-4 / heads)  # half a step on in the series
        start = torch.stack([start, between] if form == "separate" else [start])  # behind and ahead, or one for both
        self.start: Float[Tensor, "s h"]
        if learned:
            self.start = nn.Parameter(start.log())
        else:
            self.register_buffer("start", start / factor, persistent=False)

    @property
    def slopes(self) -> Float[Tensor, "s h"]:
        """The slope of each head, behind and ahead where these differ."""
        return self.start.exp() / self.factor if self.learned else self.start

    def at(self, distances: Num[Tensor, " n"]) -> Float[Tensor, "h n"]:
        slopes, distance = self.slopes, wide(distances, self.start)
        ahead = distance < 0
        slope = torch.where(ahead, slopes[-1][:, None], slopes[0][:, None])
        bias = -slope * (distance.abs() - 0.5 * ahead if self.form == "offset" else distance.abs())
        if self.form == "split":
            first = torch.arange(len(bias), device=bias.device)[:, None] < len(bias) // 2
            bias = bias.masked_fill(torch.where(first, ahead, distance > 0), -torch.inf)
        return bias
