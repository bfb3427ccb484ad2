"""Slots predicted at once: each attends to the text and to itself, so the cost is slots × text, not (text + slots)²."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lookfar.attention.reference import absorb, attend, wider
from lookfar.attention.scheme import Scheme
from lookfar.kernels import dispatch
from lookfar.kernels.base import Call, Kernel
from lookfar.kernels.chunked import ENTRIES
from lookfar.sight import Sight

LEAST = 16  # slots that are computed together, however long the text
TOGETHER = 64  # slots that a score map, which is defined on a whole row of keys, is asked for at a time


class Slots(Kernel):
    """Gives the text to the kernel that it would have without slots, and computes every slot as a row of its own.

    The row of a slot is the text that it sees and itself, `[text, self]`: scores against the text are one product
    for all slots, the score against itself is one number each. A score map gets the rows of some slots at a time.
    With gradients a chunk of slots is computed again in the backward pass, so that nothing of it is kept.
    """

    def refusal(self, scheme: Scheme, call: Call) -> str | None:
        return None if call.slots else "there are no slots"

    def attend(
        self,
        queries: Float[Tensor, "b h q e"],
        keys: Float[Tensor, "b g k e"],
        values: Float[Tensor, "b g2 k v"],
        sight: Sight,
        scheme: Scheme,
    ) -> Float[Tensor, "b h q v"]:
        text, known, count = sight.text or 0, sight.known(), sight.queries - sight.asking
        outputs = []
        if known is not None:
            given = queries[:, :, :count], keys[:, :, :text], values[:, :, :text]
            outputs.append(dispatch.attend(*given, known, scheme))
        rows = _rows_of_maps if scheme.maps else _rows
        chunk = max(LEAST, ENTRIES // max(1, queries.shape[0] * queries.shape[1] * (text + 1)))
        chunk = min(chunk, TOGETHER) if scheme.maps else chunk
        for start in range(0, sight.asking, chunk):
            stop = min(start + chunk, sight.asking)
            own = slice(text + start, text + stop)
            given = (
                queries[:, :, count + start : count + stop],
                keys[:, :, :text],
                keys[:, :, own],
                values[:, :, :text],
                values[:, :, own],
                sight.asked(start, stop),
                scheme,
            )
            if torch.is_grad_enabled() and chunk < sight.asking:
                outputs.append(checkpoint(rows, *given, use_reentrant=False, preserve_rng_state=False))
            else:
                outputs.append(rows(*given))
        return torch.cat(outputs, dim=2)


def _rows(
    queries: Float[Tensor, "b h q e"],
    keys: Float[Tensor, "b g k e"],
    own_keys: Float[Tensor, "b g q e"],
    values: Float[Tensor, "b g2 k v"],
    own_values: Float[Tensor, "b g2 q v"],
    sight: Sight,
    scheme: Scheme,
) -> Float[Tensor, "b h q v"]:
    """Rows `[text, self]` of k + 1 scores."""
    keys, own_keys = scheme.heads.keys_for_scores(keys), scheme.heads.keys_for_scores(own_keys)
    text = keys.shape[2]
    towards = (queries @ keys.mT).to(wider(queries.dtype))
    itself = (queries * own_keys).sum(-1, keepdim=True).to(towards.dtype)
    scores = scheme.cap(torch.cat([towards, itself], dim=-1) * scheme.scale)
    if scheme.biases:
        scores = scores + _bias(scheme, sight)
    scores = scores.masked_fill(F.pad(~sight.visible()[..., :text], (0, 1)), -torch.inf)
    weights = scores.softmax(-1).to(values.dtype)
    output = weights[..., :text] @ scheme.heads.values_for_scores(values)
    output = output + weights[..., text:] * scheme.heads.values_for_scores(own_values)
    sink = scheme.sink(sight.query_positions)
    return output if sink is None else absorb(output, scores.logsumexp(-1), sink)


def _rows_of_maps(
    queries: Float[Tensor, "b h q e"],
    keys: Float[Tensor, "b g k e"],
    own_keys: Float[Tensor, "b g q e"],
    values: Float[Tensor, "b g2 k v"],
    own_values: Float[Tensor, "b g2 q v"],
    sight: Sight,
    scheme: Scheme,
) -> Float[Tensor, "b h q v"]:
    """The definition, for some slots and the text."""
    return attend(queries, torch.cat([keys, own_keys], 2), torch.cat([values, own_values], 2), sight, scheme)


def _bias(scheme: Scheme, sight: Sight) -> Float[Tensor, "#b h q l"]:
    """The bias of every slot against the text, and in the last column against itself."""
    text = sight.text or 0
    places = sight.query_positions
    own = places.reshape(-1, 1)
    itself = scheme.bias_between(own, own)  # each slot alone: (b q) h 1 1
    itself = itself.expand(len(own), -1, 1, 1).unflatten(0, places.shape).flatten(2).mT[..., None]  # b h q 1
    if text == 0:
        return itself
    towards = scheme.bias_between(places, sight.key_positions[:, :text])
    return torch.cat([towards.expand(itself.shape[0], -1, -1, -1), itself], dim=-1)
