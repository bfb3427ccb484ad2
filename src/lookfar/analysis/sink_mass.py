"""How much attention goes where it does no work: to the first token, and to sinks."""

from lookfar.analysis.base import Analysis, Findings, Means
from lookfar.attention.trace import Trace


class SinkMass(Analysis):
    """The mean mass on the first visible token, on the query itself, and on the pseudo-scores of sinks.

    All are parts of the whole row, so that the mass of a sink is missing from the tokens. A head that spreads evenly
    gives its first token 1/n, n being the keys that a query sees; `even_mass` is the mean of that. A row that sees one
    key is left out. Attention sinks: Xiao et al., 2023, arXiv 2309.17453.
    """

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self._means = Means()

    def look(self, layer: int, trace: Trace, other: Trace | None = None) -> None:
        asked, visible = trace.asked & (trace.seen > 1), trace.rows.visible
        first = visible & (visible.cumsum(-1) == 1)
        last = visible & (trace.behind == 0)
        self._means.add("first_token_mass", layer, (trace.given * first).sum(-1), asked)
        self._means.add("own_mass", layer, (trace.given * last).sum(-1), asked)
        self._means.add("even_mass", layer, (1 / trace.seen.double())[:, None].expand_as(trace.logsumexp), asked)
        if trace.sink is not None:
            self._means.add("sink_mass", layer, trace.swallowed, asked)

    def conclude(self) -> Findings:
        return Findings(self._means.rows())
