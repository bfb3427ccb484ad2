"""CoPE: positions are counted by content, as the sum of gates between key and query."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lookfar.methods.base import Count, ScoreMap, Site
from lookfar.sight import Rows


class Cope(ScoreMap):
    """Adds the query's product with an embedding of the contextual position, interpolated between whole positions.

    Golovneva et al., 2024, "Contextual Position Encoding", arXiv 2405.18719.

        gate[i, j] = sigmoid(score[i, j]),   p[i, j] = Σ_{t=j..i} gate[i, t], at most positions - 1
        score[i, j] + q[i] · e[p[i, j]],     e between two positions: the straight line between their embeddings

    Gates read the scaled scores, q · e the unscaled query. Keys that cannot be seen have gate 0 before the sum, so a
    position depends on what is seen alone. Embeddings start at zero and are shared by the heads of a layer.
    """

    paper = "Golovneva et al., 2024, arXiv 2405.18719"
    adds = "embeddings of positions that the content counts"
    quirks = (
        "With keys ahead in sight the gates of all keys seen are summed, which the paper does not define. Some public "
        "code sums the gates of padding, too."
    )

    def __init__(self, site: Site, *, positions: Count = 64) -> None:
        super().__init__(site)
        self.embedding = nn.Parameter(torch.zeros(site.heads.head_width, positions))

    def rewrite(self, scores: Float[Tensor, "b h q k"], rows: Rows) -> Float[Tensor, "b h q k"]:
        gates = rows.hide(torch.sigmoid(scores))
        places = gates.flip(-1).cumsum(-1).flip(-1).clamp(max=self.embedding.shape[1] - 1)
        products = (rows.queries.to(self.embedding.dtype) @ self.embedding).to(scores.dtype)  # b h q n
        below = places.floor()
        low = products.gather(-1, below.long())
        high = products.gather(-1, places.ceil().long())
        return scores + low + (places - below) * (high - low)
