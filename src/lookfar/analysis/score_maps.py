"""What rewrites the scores: how much content, map and bias move them, and where."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lookfar.analysis.base import Analysis, Findings, Means, spaced
from lookfar.attention.trace import Trace


class ScoreMaps(Analysis):
    """The spread of scores along each row before any rewriting, of what soft-cap and map change, and of the bias.

        spread(x) = standard deviation of x[t, j] over the keys j that t sees

    A number that a whole row shares has no effect on the softmax, and none on the spread. `map_change` is the mean of
    (after - before) at a distance in tokens: the bias by distance that a map amounts to, on average. What is not there
    has no rows. Scores before and after are separate tensors, taken before and after CoPE, DAPE or another map ran.
    """

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self._means = Means()
        self._edges = torch.tensor(spaced(length - 1, 32))

    def look(self, layer: int, trace: Trace, other: Trace | None = None) -> None:
        visible, asked = trace.rows.visible, trace.asked & (trace.seen > 1)
        self._means.add("score_spread", layer, spread(trace.before, visible), asked)
        if trace.bias is not None:
            self._means.add("bias_spread", layer, spread(trace.bias.expand_as(trace.before), visible), asked)
        if not trace.scheme.maps and trace.scheme.soft_cap is None:
            return
        change = (trace.after - trace.before).double()
        self._means.add("map_spread", layer, spread(change, visible), asked)
        sight = trace.sight
        queries = sight.first_query + torch.arange(sight.queries, device=change.device)
        keys = sight.first_key + torch.arange(sight.keys, device=change.device)
        distances = queries[:, None] - keys  # q k
        counted = (visible & asked[:, None, :, None]).expand(len(change), -1, -1, -1)
        for distance in self._edges.tolist():
            there = counted & (distances == distance)
            sums = change.masked_fill(~there, 0.0).sum((0, 2, 3))
            self._means.add_sums("map_change", layer, sums, int(there.sum()), distance=distance)

    def conclude(self) -> Findings:
        return Findings(self._means.rows())


def spread(values: Float[Tensor, "b h q k"], visible: Bool[Tensor, "#b 1 q k"]) -> Float[Tensor, "b h q"]:
    """The standard deviation of each row over what is visible and finite."""
    kept = visible & values.isfinite()
    count = kept.sum(-1, keepdim=True)
    values = values.double().masked_fill(~kept, 0.0)
    mean = values.sum(-1, keepdim=True) / count
    return ((values - mean).masked_fill(~kept, 0.0).square().sum(-1) / count[..., 0]).sqrt()
