"""How widely each head spreads its attention."""

from itertools import pairwise

import torch

from lookfar.analysis.base import Analysis, Findings, Means, spaced
from lookfar.attention.trace import Trace


class Entropy(Analysis):
    """Entropy of each row's weights, in nats, as a part of what it can be, and as a number of keys.

        H = - Σ_j a[t, j] · ln a[t, j],   share = H / ln n,   effective keys = e^H,   n the keys that t sees

    The weights are those of the keys among themselves; what a sink takes is told by `sink_mass`. A row that sees one
    key has nothing to spread, and is left out. `entropy_at` is the mean of the rows that see about `keys` keys.
    """

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self._means = Means()
        self._edges = [keys for keys in spaced(length, 16) if keys > 1] + [length + 1]

    def look(self, layer: int, trace: Trace, other: Trace | None = None) -> None:
        entropy = torch.special.entr(trace.weights.double()).sum(-1)  # b h q
        seen, asked = trace.seen[:, None].double(), trace.asked & (trace.seen > 1)
        self._means.add("entropy", layer, entropy, asked)
        self._means.add("entropy_share", layer, entropy / seen.log().clamp(min=1e-9), asked)
        self._means.add("effective_keys", layer, entropy.exp(), asked)
        for low, high in pairwise(self._edges):
            there = asked & (trace.seen >= low) & (trace.seen < high)
            self._means.add("entropy_at", layer, entropy, there, keys=(low + high - 1) / 2)

    def conclude(self) -> Findings:
        return Findings(self._means.rows())
