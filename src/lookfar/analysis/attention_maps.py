"""The weights themselves, as pictures: every layer and head on the first input."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lookfar.analysis.base import Analysis, Findings
from lookfar.attention.trace import Trace
from lookfar.methods.base import Count


class AttentionMaps(Analysis):
    """An array `attention_maps` [layer, head, query cell, key cell]: the mass that keys have, sinks taken off.

    A cell is one token where the input has at most `cells`; otherwise several neighbours, whose masses are added over
    keys and averaged over queries: a row still sums to 1, less what a sink takes.
    """

    def __init__(self, length: int, *, cells: Count = 64) -> None:
        super().__init__(length)
        self.tokens = -(-length // cells)  # of a cell
        self.cells = -(-length // self.tokens)
        self._maps: dict[int, Float[Tensor, "h q k"]] = {}
        self._rows: dict[int, int] = {}

    def look(self, layer: int, trace: Trace, other: Trace | None = None) -> None:
        if self._rows.get(layer, 0) < self.length:  # the first input is not complete
            given = trace.given[0].double().cpu()
            total = self._maps.setdefault(layer, torch.zeros(len(given), self.cells, self.cells, dtype=torch.double))
            queries = (trace.sight.first_query + torch.arange(given.shape[1])) // self.tokens
            keys = (trace.sight.first_key + torch.arange(given.shape[2])) // self.tokens
            by_key = torch.zeros(*given.shape[:2], self.cells, dtype=torch.double).index_add_(2, keys, given)
            total.index_add_(1, queries, by_key)
            self._rows[layer] = self._rows.get(layer, 0) + given.shape[1]

    def conclude(self) -> Findings:
        if not self._maps:
            return Findings()
        sizes = torch.bincount(torch.arange(self.length) // self.tokens, minlength=self.cells)
        maps = [(self._maps[layer] / sizes[:, None]).float().numpy() for layer in sorted(self._maps)]
        if len({each.shape for each in maps}) > 1:  # layers of a pattern may differ in heads
            return Findings(arrays={f"attention_maps_layer{layer}": each for layer, each in enumerate(maps)})
        return Findings(arrays={"attention_maps": np.stack(maps)})
