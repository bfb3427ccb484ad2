"""Anything at all in memory proportional to chunk × length: the reference, asked for a few rows at a time."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lookfar.attention import reference
from lookfar.attention.scheme import Scheme
from lookfar.kernels.base import Call, Kernel
from lookfar.sight import Sight

ENTRIES = 1 << 19  # of the score square, over batch and heads, that a chunk holds: what a processor's caches do
ON_GPU = 1 << 25  # the same on a GPU, which is idle with less
SIZES, ALIGNED = 15, 16  # how many numbers of keys occur: libraries prepare for each, and keep what they prepared
WHOLE = 1 << 22  # entries up to which the square is held at once, and nothing is computed twice


class Chunked(Kernel):
    """Asks the reference for a chunk of queries at a time, against only the keys that they can see.

    With gradients each chunk is computed again in the backward pass, so that nothing of a chunk is kept.
    """

    def __init__(self, *, entries: int | None = None, whole: int = WHOLE) -> None:
        self.entries, self.whole = entries, whole

    def refusal(self, scheme: Scheme, call: Call) -> str | None:
        return None

    def attend(
        self,
        queries: Float[Tensor, "b h q e"],
        keys: Float[Tensor, "b g k e"],
        values: Float[Tensor, "b g2 k v"],
        sight: Sight,
        scheme: Scheme,
    ) -> Float[Tensor, "b h q v"]:
        maps = queries.shape[0] * queries.shape[1]
        chunk = self.rows(maps, sight)
        if chunk >= sight.queries or maps * sight.queries * sight.keys <= self.whole:
            return reference.attend(queries, keys, values, sight, scheme)
        gradients, step = torch.is_grad_enabled(), -(-sight.keys // (SIZES * ALIGNED)) * ALIGNED
        outputs = []
        for start in reversed(range(0, sight.queries, chunk)):  # what the largest leaves free, the others fit in
            part = sight.rows(start, min(start + chunk, sight.queries), step=step)
            seen = slice(part.first_key - sight.first_key, part.first_key - sight.first_key + part.keys)
            given = queries[:, :, start : start + chunk], keys[:, :, seen], values[:, :, seen], part, scheme
            outputs.append(
                checkpoint(reference.attend, *given, use_reentrant=False, preserve_rng_state=False)
                if gradients
                else reference.attend(*given)
            )
        return torch.cat(outputs[::-1], dim=2)

    def rows(self, maps: int, sight: Sight) -> int:
        """How many queries make a chunk: a power of two, at least 16."""
        entries = self.entries or (ENTRIES if sight.key_positions.device.type == "cpu" else ON_GPU)
        keys = sight.keys if sight.window is None else min(sight.keys, 2 * sight.window)
        fitting = max(16, entries // max(1, maps * keys))
        return 1 << (fitting.bit_length() - 1)
