"""How differently two heads attend to the same input: of two models, or within one."""

from collections import defaultdict

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lookfar.analysis.assignment import assign
from lookfar.analysis.base import Analysis, Findings, Row
from lookfar.attention.trace import Trace


class Divergence(Analysis):
    """The Jensen-Shannon divergence of every pair of heads of a layer, in nats, a mean over query rows.

        D[i, j] = mean over t of JSD(A_i[t], B_j[t]),   JSD(p, r) = H((p + r)/2) - (H(p) + H(r))/2,   0 ≤ JSD ≤ ln 2

    All pairs are measured; what a sink takes of a row is one more outcome beside its keys. Of two models: the least of
    all pairs (`divergence_min`), as Kazemnejad et al. define it, and the mean over the one-to-one assignment of heads
    with the least total (`divergence_assigned`); a row without a layer is the mean over layers. Within one model only
    the pairs are told, as `divergence_within`.

    Kazemnejad et al., 2023, arXiv 2305.19466, whose published code swaps the arguments of a divergence and so exceeds
    ln 2, and compares less than half of the pairs.
    """

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self._sums: dict[int, Float[np.ndarray, "h h2"]] = {}
        self._counts: dict[int, int] = defaultdict(int)
        self._compared = False

    def look(self, layer: int, trace: Trace, other: Trace | None = None) -> None:
        self._compared = other is not None
        other = trace if other is None else other
        first = min(trace.sight.first_key, other.sight.first_key)
        last = max(each.sight.first_key + each.sight.keys for each in (trace, other))
        asked = (trace.asked & other.asked).expand(len(trace.weights), -1)
        found = divergences(_outcomes(trace, first, last), _outcomes(other, first, last))
        sums = found.masked_fill(~asked[:, None, None], 0.0).sum((0, 3)).detach().cpu().numpy()
        self._sums[layer] = self._sums.get(layer, 0.0) + sums
        self._counts[layer] += int(asked.sum())

    def conclude(self) -> Findings:
        rows: list[Row] = []
        name = "divergence" if self._compared else "divergence_within"
        for layer, sums in self._sums.items():
            count = self._counts[layer]
            pairs = sums / count
            about = {"layer": layer, "count": count}
            rows += [
                {"metric": name, **about, "head": i, "other_head": j, "value": float(pairs[i, j])}
                for i, j in np.ndindex(pairs.shape)
            ]
            if self._compared:
                assigned = float(np.mean([pairs[i, j] for i, j in enumerate(assign(pairs))]))
                rows.append({"metric": "divergence_min", **about, "head": None, "value": float(pairs.min())})
                rows.append({"metric": "divergence_assigned", **about, "head": None, "value": assigned})
        for metric in ("divergence_min", "divergence_assigned"):
            of_layers = [row for row in rows if row["metric"] == metric]
            if of_layers:
                mean, count = float(np.mean([row["value"] for row in of_layers])), of_layers[0]["count"]
                rows.append({"metric": metric, "layer": None, "head": None, "value": mean, "count": count})
        return Findings(rows)


def divergences(ours: Float[Tensor, "b h q o"], theirs: Float[Tensor, "b h2 q o"]) -> Float[Tensor, "b h h2 q"]:
    """The Jensen-Shannon divergence of each pair of heads in each row of outcomes, in nats."""
    ours, theirs = ours.double(), theirs.double()
    halves = (_entropy(ours)[:, :, None] + _entropy(theirs)[:, None]) / 2  # b h h2 q
    between = [_entropy((head[:, None] + theirs) / 2) for head in ours.unbind(1)]
    return (torch.stack(between, 1) - halves).clamp(min=0.0)


def _entropy(outcomes: Float[Tensor, "b h q o"]) -> Float[Tensor, "b h q"]:
    return torch.special.entr(outcomes).sum(-1)


def _outcomes(trace: Trace, first: int, last: int) -> Float[Tensor, "b h q o"]:
    """What each key from `first` to `last` has of a row, and then what the sinks have."""
    start = trace.sight.first_key
    given = F.pad(trace.given, (start - first, last - start - trace.sight.keys))
    return torch.cat([given, trace.swallowed[..., None]], dim=-1)
