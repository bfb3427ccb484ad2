"""What rewrites the scores: how much content, map and bias move them, and where."""

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from lookfar.analysis.base import Analysis, Findings, Means, spaced
from lookfar.analysis.pictures import Pictures
from lookfar.attention.trace import Trace
from lookfar.methods.base import Count


class ScoreMaps(Analysis):
    """The spread of scores along each row before any rewriting, of what soft-cap and map change, and of the bias.

        spread(x) = standard deviation of x[t, j] over the keys j that t sees

    A number that a whole row shares has no effect on the softmax, and none on the spread. `map_change` is the mean of
    (after - before) at a distance in tokens: the bias by distance that a map amounts to, on average. Beyond three
    quarters of the length few pairs are left, all at the first tokens, and nothing is told. What is not there has no
    rows. Scores before and after are separate tensors, taken before and after CoPE, DAPE or another map ran.

    Where there is a map, arrays `scores_before/<layer>` and `scores_after/<layer>` [head, query cell, key cell] are the
    means over the visible pairs of a cell on the first input, NaN where none is; cells are those of `attention_maps`.
    """

    def __init__(self, length: int, *, cells: Count = 64) -> None:
        super().__init__(length)
        self._before, self._after, self._seen = (Pictures(length, cells) for _ in range(3))
        self._means = Means()
        self._distances = spaced(length * 3 // 4, 32)

    def look(self, layer: int, trace: Trace, other: Trace | None = None) -> None:
        visible, asked = trace.rows.visible, trace.asked & (trace.seen > 1)
        self._means.add("score_spread", layer, spread(trace.before, visible), asked)
        if trace.bias is not None:
            self._means.add("bias_spread", layer, spread(trace.bias.expand_as(trace.before), visible), asked)
        if not trace.scheme.maps and trace.scheme.soft_cap is None:
            return
        self._before.add(layer, trace, trace.before.masked_fill(~visible, 0.0))
        self._after.add(layer, trace, trace.after.masked_fill(~visible, 0.0))
        self._seen.add(layer, trace, visible.double())
        change = (trace.after - trace.before).double()
        self._means.add("map_spread", layer, spread(change, visible), asked)
        counted = trace.rows.visible & trace.asked[:, None, :, None]
        change = change.masked_fill(~counted, 0.0)
        for distance in self._distances:
            diagonal = trace.sight.first_query - trace.sight.first_key - distance
            if -trace.sight.queries < diagonal < trace.sight.keys:
                sums = change.diagonal(diagonal, -2, -1).sum((0, 2))
                pairs = counted.diagonal(diagonal, -2, -1).expand(len(change), -1, -1)
                self._means.add_sums("map_change", layer, sums, int(pairs.sum()), distance=distance)

    def conclude(self) -> Findings:
        arrays = {}
        for layer, count in self._seen.layers.items():
            count = np.where(count > 0, count, np.nan)
            arrays[f"scores_before/{layer}"] = (self._before.layers[layer] / count).astype(np.float32)
            arrays[f"scores_after/{layer}"] = (self._after.layers[layer] / count).astype(np.float32)
        return Findings(self._means.rows(), arrays)


def spread(values: Float[Tensor, "b h q k"], visible: Bool[Tensor, "#b 1 q k"]) -> Float[Tensor, "b h q"]:
    """The standard deviation of each row over what is visible and finite."""
    kept = visible & values.isfinite()
    count = kept.sum(-1, keepdim=True)
    values = values.double().masked_fill(~kept, 0.0)
    mean = values.sum(-1, keepdim=True) / count
    return ((values - mean).masked_fill(~kept, 0.0).square().sum(-1) / count[..., 0]).sqrt()
