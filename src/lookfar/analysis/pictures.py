"""Squares of queries and keys, shrunk to few cells: the first input of every layer."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lookfar.attention.trace import Trace


class Pictures:
    """Adds up the entries of a square that fall into one cell, layer by layer; pieces of an input come in order."""

    def __init__(self, length: int, cells: int) -> None:
        self.length = length
        self.tokens = -(-length // cells)  # of a cell
        self.cells = -(-length // self.tokens)
        self._sums: dict[int, Float[Tensor, "h c c"]] = {}
        self._rows: dict[int, int] = {}

    def add(self, layer: int, trace: Trace, square: Float[Tensor, "#b #h q k"]) -> None:
        """Take in rows of the first line of the batch, unless the picture of the layer is complete."""
        if self._rows.get(layer, 0) >= self.length:
            return
        entries = square[0].detach().double().cpu()
        queries = (trace.sight.first_query + torch.arange(entries.shape[1])) // self.tokens
        keys = (trace.sight.first_key + torch.arange(entries.shape[2])) // self.tokens
        by_key = entries.new_zeros(*entries.shape[:2], self.cells).index_add_(2, keys, entries)
        sums = self._sums.setdefault(layer, entries.new_zeros(len(entries), self.cells, self.cells))
        sums.index_add_(1, queries, by_key)
        self._rows[layer] = self._rows.get(layer, 0) + entries.shape[1]

    @property
    def layers(self) -> dict[int, Float[np.ndarray, "h c c"]]:
        """The sums, by layer."""
        return {layer: self._sums[layer].numpy() for layer in sorted(self._sums)}

    @property
    def queries(self) -> Float[np.ndarray, " c"]:
        """How many queries each cell has."""
        return np.bincount(np.arange(self.length) // self.tokens, minlength=self.cells).astype(float)
