"""The weights themselves, as pictures: every layer and head on the first input."""

import numpy as np

from lookfar.analysis.base import Analysis, Findings
from lookfar.analysis.pictures import Pictures
from lookfar.attention.trace import Trace
from lookfar.methods.base import Count


class AttentionMaps(Analysis):
    """An array `attention_maps/<layer>` [head, query cell, key cell]: the mass that keys have, sinks taken off.

    A cell is one token where the input has at most `cells`; otherwise several neighbours, whose masses are added over
    keys and averaged over queries: a row still sums to 1, less what a sink takes.
    """

    def __init__(self, length: int, *, cells: Count = 64) -> None:
        super().__init__(length)
        self._pictures = Pictures(length, cells)

    def look(self, layer: int, trace: Trace, other: Trace | None = None) -> None:
        self._pictures.add(layer, trace, trace.given)

    def conclude(self) -> Findings:
        queries = self._pictures.queries[:, None]
        return Findings(
            arrays={
                f"attention_maps/{layer}": (sums / queries).astype(np.float32)
                for layer, sums in self._pictures.layers.items()
            }
        )
