"""DAPE: a small net over the heads corrects each score from its content and bias."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lookfar.methods.base import Count, ScoreMap, Site
from lookfar.sight import Rows


class DapeV1(ScoreMap):
    """Adds f([scores; bias]) to every score, f being a net over the heads at each pair of query and key.

    Zheng et al., 2024, "DAPE: Data-Adaptive Positional Encoding", arXiv 2405.14722.

        f = Linear(2·heads, hidden) → LeakyReLU → Linear(hidden, heads), one for each layer

    `equation=3` (default, all published code): scores + bias + f. `equation=2`: scores + f, the bias being read only by
    f. Without a bias f reads the scores alone.
    """

    paper = "Zheng et al., 2024, arXiv 2405.14722"
    adds = "a net over the score maps of all heads"
    quirks = (
        "Over `differential` it mixes the scores of both maps, which no paper defines. Public code computes distances "
        "in the type of the activations, where integers above 256 are not exact in bfloat16."
    )

    def __init__(self, site: Site, *, hidden: Count = 32, equation: Literal[2, 3] = 3) -> None:
        super().__init__(site)
        self.keeps_bias = equation == 3
        heads = site.heads.score_heads
        self.first = nn.Linear(heads * (1 + site.biased), hidden)
        self.second = nn.Linear(hidden, heads)

    def rewrite(self, scores: Float[Tensor, "b h q k"], rows: Rows) -> Float[Tensor, "b h q k"]:
        maps = rows.with_bias(scores).movedim(1, -1)  # b c q k -> b q k c
        change = self.second(F.leaky_relu(self.first(maps)))
        return scores + change.movedim(-1, 1).to(scores.dtype)
