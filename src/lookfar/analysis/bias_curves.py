"""The bias of each head against distance, as the model has learned it."""

import numpy as np
from jaxtyping import Float

from lookfar.analysis.base import Analysis, Findings, Row, spaced
from lookfar.attention.trace import Trace
from lookfar.methods.base import DistanceBias


class BiasCurves(Analysis):
    """The sum of all biases at each distance, for the last query and every head; nothing where a scheme has no bias.

    A bias that depends on more than the distance (FIRE) has a curve for each of several queries, `query` being their
    place. Distances are those of positions, query minus key; between 64 of them, at even ratios, lie straight lines.
    """

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self._curves: dict[tuple[int, int], dict[float, Float[np.ndarray, " h"]]] = {}

    def look(self, layer: int, trace: Trace, other: Trace | None = None) -> None:
        if trace.bias is None:
            return
        for query in self._queries(trace):
            place = query - trace.sight.first_query
            if (layer, query) in self._curves or not 0 <= place < trace.sight.queries:
                continue
            visible = trace.rows.visible[0, 0, place]
            distances = trace.rows.query_positions[0, place] - trace.rows.key_positions[0, visible]
            biases = (
                trace.bias.expand(-1, -1, trace.sight.queries, -1)[0, :, place, visible].detach().double().cpu().numpy()
            )
            order = distances.argsort().tolist()
            kept = [order[each] for each in spaced(len(order) - 1)]
            self._curves[layer, query] = {float(distances[each]): biases[:, each] for each in kept}

    def conclude(self) -> Findings:
        rows: list[Row] = []
        for (layer, query), curve in self._curves.items():
            for distance, values in curve.items():
                rows += [
                    {
                        "metric": "bias",
                        "layer": layer,
                        "head": head,
                        "query": query,
                        "distance": distance,
                        "value": float(value),
                        "count": 1,
                    }
                    for head, value in enumerate(values)
                ]
        return Findings(rows)

    def _queries(self, trace: Trace) -> list[int]:
        if all(isinstance(bias, DistanceBias) for bias in trace.scheme.biases):
            return [self.length - 1]
        return [max(1, round(self.length * part)) - 1 for part in (0.25, 0.5, 1)]
