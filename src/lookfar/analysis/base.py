"""What an analysis is: it looks at the traces of all layers and inputs, and concludes in flat rows and arrays."""

from abc import ABC, abstractmethod
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor

from lookfar.attention.trace import Trace

Row = dict[str, Any]


@dataclass(frozen=True)
class Findings:
    """What an analysis found."""

    rows: list[Row] = field(default_factory=list)  # {metric, layer, head, value, count, …}
    arrays: dict[str, np.ndarray] = field(default_factory=dict)  # what is too large for rows, by name


class Analysis(ABC):
    """Answers one question about how a model attends. Settings are the keyword parameters of the constructor."""

    def __init__(self, length: int) -> None:
        self.length = length  # tokens of every input

    @abstractmethod
    def look(self, layer: int, trace: Trace, other: Trace | None = None) -> None:
        """Take in some rows of a layer, and of the same layer of another model where two are compared.

        It is called for every layer of every input; the rows of an input may come in several pieces, in order.
        """

    @abstractmethod
    def conclude(self) -> Findings:
        """What was found in all that was seen."""


class Means:
    """Means over query rows, kept apart by metric, layer, head and whatever else is named."""

    def __init__(self) -> None:
        self._sums: dict[tuple[Any, ...], Float[np.ndarray, " h"]] = {}
        self._counts: dict[tuple[Any, ...], int] = defaultdict(int)

    def add(
        self,
        metric: str,
        layer: int,
        values: Num[Tensor, "b h q"],
        asked: Bool[Tensor, "#b q"] | None = None,
        **place: Any,
    ) -> None:
        """Take in a value of every head and row; only rows that are `asked` count."""
        asked = torch.ones_like(values[:, 0], dtype=torch.bool) if asked is None else asked.expand(len(values), -1)
        kept = values.double().masked_fill(~asked[:, None], 0.0)
        self.add_sums(metric, layer, kept.sum((0, 2)), int(asked.sum()), **place)

    def add_sums(self, metric: str, layer: int, sums: Num[Tensor, " h"], count: int, **place: Any) -> None:
        """Take in sums of every head over `count` rows."""
        if count:
            key = (metric, layer, *place.items())
            found = sums.detach().double().cpu().numpy()
            self._sums[key] = self._sums[key] + found if key in self._sums else found
            self._counts[key] += count

    def rows(self) -> list[Row]:
        """A row for each mean."""
        return [
            {
                "metric": metric,
                "layer": layer,
                "head": head,
                **dict(place),
                "value": float(total) / count,
                "count": count,
            }
            for (metric, layer, *place), sums in self._sums.items()
            for count in [self._counts[(metric, layer, *place)]]
            for head, total in enumerate(sums)
        ]


def spaced(largest: int, most: int = 64) -> list[int]:
    """0, and at most so many whole numbers up to `largest` whose ratios are even."""
    if largest < 1:
        return [0]
    return [0, *sorted({round(each) for each in np.geomspace(1, largest, most)})]
