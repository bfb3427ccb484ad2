"""How far back each head looks."""

import torch

from lookfar.analysis.base import Analysis, Findings, Means
from lookfar.attention.trace import Trace
from lookfar.methods.base import Count


class AttendedDistance(Analysis):
    """The distance of the key with the largest score, the mean distance by weight, and the window that holds most mass.

        j* = argmax_j score[t, j],   attended distance = (t - j*) / (t + 1),   t from 0

    Distances are counted in keys that the query sees, so that windows, documents and padding are left aside; of equal
    scores the nearest counts. Scores are those that the softmax reads, bias included. `distance_share` is the part of
    rows whose attended distance falls between `distance` and `distance` + 1/bins; a row that sees one key is left out.
    `window_keys` is how many of the nearest keys hold nine tenths of the weight. Kazemnejad et al., 2023, arXiv
    2305.19466.
    """

    def __init__(self, length: int, *, bins: Count = 20) -> None:
        super().__init__(length)
        self.bins, self._means = bins, Means()

    def look(self, layer: int, trace: Trace, other: Trace | None = None) -> None:
        asked, seen = trace.asked & (trace.seen > 1), trace.seen[:, None].double()
        behind = trace.behind.double()
        highest = trace.scores == trace.scores.amax(-1, keepdim=True)
        nearest = behind.expand_as(trace.scores).masked_fill(~highest, torch.inf).amin(-1)  # b h q
        attended = nearest / seen
        self._means.add("attended_distance", layer, attended, asked)
        bins = (nearest * self.bins / seen).long().clamp(max=self.bins - 1)
        for each in range(self.bins):
            self._means.add("distance_share", layer, (bins == each).double(), asked, distance=each / self.bins)
        distance = (trace.weights.double() * behind).sum(-1)
        self._means.add("mean_distance", layer, distance, asked)
        self._means.add("mean_distance_share", layer, distance / seen, asked)
        weights = trace.weights.double()
        nearer = weights.flip(-1).cumsum(-1).flip(-1) - weights  # the weight of all keys after this one
        width = ((nearer < 0.9) & trace.rows.visible).sum(-1)
        self._means.add("window_keys", layer, width, asked)

    def conclude(self) -> Findings:
        return Findings(self._means.rows())
