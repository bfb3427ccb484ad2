"""A learned sink: a score for each head that joins the softmax and gives nothing."""

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

from lookfar.methods.base import Sink, Site


class LearnedSink(Sink):
    """Lets each head attend to nothing, by a score of its own that takes part in every softmax.

    Xiao et al., 2023, arXiv 2309.17453 (attention sinks); learned per head as in gpt-oss, arXiv 2508.10925.

        weights = exp(scores) / (exp(sink[h]) + Σ exp(scores))

    `learned_sink(value=0, learned=false)` is the softmax-off-by-one, with 1 in the denominator.
    """

    paper = "Xiao et al., 2023, arXiv 2309.17453"
    adds = "a score per head that swallows attention"
    quirks = "A sink shrinks what a head gives in short contexts most; it adds no position."

    def __init__(self, site: Site, *, value: float = 0.0, learned: bool = True) -> None:
        super().__init__(site)
        start = torch.full((site.heads.score_heads,), float(value))
        self.value: Float[Tensor, " h"]
        if learned:
            self.value = nn.Parameter(start)
        else:
            self.register_buffer("value", start, persistent=False)

    def score(self, query_positions: Num[Tensor, "#b q"]) -> Float[Tensor, "#b h q"]:
        return self.value[None, :, None].expand(1, -1, query_positions.shape[1])
