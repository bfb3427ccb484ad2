"""FIRE: a small net reads the distance, as a part of how far the query could look."""

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn
from torch.nn import functional as F

from lookfar.methods.base import Count, Positive, ScoreBias, Site, wide


class Fire(ScoreBias):
    """Adds f(ψ(i - j) / ψ(max(L, i))), a learned function of the distance relative to the query's position.

    Li et al., 2023, "Functional Interpolation for Relative Positions", arXiv 2310.04418.

        ψ(x) = log(c · |x| + 1),   L = |l · threshold|,   f = Linear(1, hidden) → ReLU → Linear(hidden, heads)

    c and l are learned and start at 0.1 and 1; `threshold` is the trained length by default. Positions count from 0.
    Up to L a bias depends on the distance alone; beyond, every query has its own scale.
    """

    paper = "Li et al., 2023, arXiv 2310.04418"
    adds = "a learned function of the relative distance"
    quirks = (
        "Beyond the threshold a bias depends on the query's own position, so left padding must not be counted; here "
        "positions never count it. Under last-256-token protocols plain FIRE degrades with length."
    )

    def __init__(self, site: Site, *, hidden: Count = 32, threshold: Positive | None = None) -> None:
        super().__init__(site)
        self.threshold = float(site.context if threshold is None else threshold)
        self.rate = nn.Parameter(torch.tensor([0.1]))
        self.stretch = nn.Parameter(torch.ones(1))
        self.first = nn.Linear(1, hidden)
        self.second = nn.Linear(hidden, site.heads.score_heads)

    def between(
        self, query_positions: Num[Tensor, "#b q"], key_positions: Num[Tensor, "#b k"]
    ) -> Float[Tensor, "#b h q k"]:
        queries, keys = wide(query_positions, self.rate), wide(key_positions, self.rate)
        part = self.compressed(queries[:, :, None] - keys[:, None, :]) / self.normalizer(queries)[..., None]  # b q k
        with torch.autocast(part.device.type, enabled=False):
            return self.second(F.relu(self.first(part[..., None]))).movedim(-1, 1)  # b q k h -> b h q k

    def compressed(self, distances: Num[Tensor, "..."]) -> Float[Tensor, "..."]:
        """ψ of distances: the logarithm of 1 more than what the rate makes of them."""
        return torch.log1p((self.rate * wide(distances, self.rate)).abs())

    def normalizer(self, query_positions: Num[Tensor, "#b q"]) -> Float[Tensor, "#b q"]:
        """What ψ of a distance is divided by: ψ of the query's position, or of the limit where that is farther."""
        limit = torch.maximum((self.stretch * self.threshold).abs(), wide(query_positions, self.rate).abs())
        return self.compressed(limit) + 1e-6
