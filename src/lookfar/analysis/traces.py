"""Traces every layer of a model on any input, by watching an ordinary call: no layer is changed or computed twice."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from lookfar.attention.trace import Trace
from lookfar.attention.trace import trace as trace_rows
from lookfar.errors import UserError
from lookfar.model.attention import Attention
from lookfar.model.decoder import Decoder
from lookfar.sight import Sight

ENTRIES = 1 << 20  # of one square of scores that is held at once, all heads together


@dataclass
class Seen:
    """What the attention layers of a model were given in one call: `[b t d]` each, far less than the squares."""

    layers: list[tuple[Attention, Float[Tensor, "b t d"], Sight]] = field(default_factory=list)

    def traces(self, *, rows: int | None = None) -> Iterator[tuple[int, Trace]]:
        """Layers in order, each with its number: a whole square, or so many rows at a time that memory is small.

        Args:
            rows: of one trace, at most; by default as many as hold 2^20 scores.
        """
        for layer, (attention, x, sight) in enumerate(self.layers):
            heads = attention.scheme.heads.score_heads * len(x)
            step = rows or max(1, ENTRIES // (sight.keys * heads))
            with torch.no_grad():
                queries, keys, values = attention.encoded(x, sight)
            for start in range(0, sight.queries, step):
                part = sight.rows(start, min(start + step, sight.queries)) if step < sight.queries else sight
                asked = slice(start, start + part.queries)
                shown = slice(part.first_key - sight.first_key, part.first_key - sight.first_key + part.keys)
                with torch.no_grad():  # not around the yield, where the caller's own code runs
                    found = trace_rows(
                        queries[:, :, asked],
                        keys[:, :, shown],
                        values[:, :, shown],
                        part,
                        attention.scheme,
                        x[:, asked],
                        whole=sight,
                    )
                yield layer, found


@contextmanager
def watching(model: Decoder) -> Iterator[Seen]:
    """Note what the attention layers are given by one call inside the block: `model(tokens)`, `model.slot_states(…)`.

    Nothing is left in the model when the block ends.
    """
    seen = Seen()

    def note(attention: Attention, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if keywords.get("cache") is not None:
            raise UserError("What lies in a cache cannot be traced; give the whole sequence in one call without one.")
        seen.layers.append((attention, arguments[0].detach(), keywords["sight"]))

    hooks = [
        each.register_forward_pre_hook(note, with_kwargs=True)
        for each in model.modules()
        if isinstance(each, Attention)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def trace(
    model: Decoder,
    tokens: Int[Tensor, "b t"],
    *,
    positions: Num[Tensor, "#b t"] | None = None,
    documents: Int[Tensor, "b t"] | None = None,
    sight: Sight | None = None,
    rows: int | None = None,
) -> Iterator[tuple[int, Trace]]:
    """Every layer's attention on these tokens: `for layer, found in trace(model, tokens): …`.

    One layer's squares exist at a time. Dropout is as the model has it: call `model.eval()` first. Arguments as in
    `Decoder.forward`; `rows` as in `Seen.traces`.
    """
    with watching(model) as seen, torch.no_grad():
        model.states(tokens, positions=positions, documents=documents, sight=sight)
    yield from seen.traces(rows=rows)
