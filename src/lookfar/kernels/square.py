"""Short sequences: one product, one softmax and one product a chunk, all in the type of the input."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lookfar.attention.reference import wider
from lookfar.attention.scheme import Scheme
from lookfar.kernels.base import Call, Kernel
from lookfar.sight import Sight

CHUNK = 256  # queries at a time: later chunks see more keys, none sees the keys ahead
KEPT = 1 << 26  # weights that may wait for the backward pass
ALIGNED = 16  # rows of this many entries suit half-precision products


class Square(Kernel):
    """Adds mask, bias and sink as one tensor to the scores and keeps the softmax weights for the backward pass.

    On a CPU it is several times as fast as a flash kernel at 128 tokens in bfloat16, and equal to it at about 1,000.
    A sink is a key of zeros whose bias is the sink's score and whose value is zero.
    """

    def refusal(self, scheme: Scheme, call: Call) -> str | None:
        if scheme.maps:
            return f"{scheme.expression} rewrites the scores"
        if scheme.soft_cap is not None:
            return "the scores are soft-capped"
        entries = call.batch * scheme.heads.score_heads * call.queries * call.keys
        if entries > KEPT:
            return f"it would keep {entries:,} weights, more than {KEPT:,}"
        return None

    def attend(
        self,
        queries: Float[Tensor, "b h q e"],
        keys: Float[Tensor, "b g k e"],
        values: Float[Tensor, "b g2 k v"],
        sight: Sight,
        scheme: Scheme,
    ) -> Float[Tensor, "b h q v"]:
        keys = scheme.heads.keys_for_scores(keys)
        values = scheme.heads.values_for_scores(values)
        queries = queries * scheme.scale
        outputs = []
        with torch.autocast(queries.device.type, enabled=False):
            for start in range(0, sight.queries, CHUNK):
                part = sight.rows(start, min(start + CHUNK, sight.queries))
                seen = slice(part.first_key - sight.first_key, part.first_key - sight.first_key + part.keys)
                added, more = _added(part, scheme, wider(queries.dtype))
                scores = queries[:, :, start : start + CHUNK] @ _longer(keys[:, :, seen], more).mT
                weights = scores.add_(added.to(scores.dtype)).softmax(-1)
                outputs.append(weights @ _longer(values[:, :, seen], more))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _added(sight: Sight, scheme: Scheme, dtype: torch.dtype) -> tuple[Float[Tensor, "#b c q l"], int]:
    """What is added to the products: the bias, -inf where a key is hidden, the sink's score; and the extra columns."""
    hidden = ~sight.visible()  # b 1 q k
    bias, sink = scheme.bias(sight), scheme.sink(sight.query_positions)
    mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
    added = mask if bias is None else mask + bias
    if sink is None:
        return added, 0
    more = -sight.keys % ALIGNED or ALIGNED
    column = sink.to(added.dtype)[..., None]
    shape = torch.broadcast_shapes(added.shape[:3], column.shape[:3])
    columns = F.pad(column, (0, more - 1), value=-torch.inf)
    return torch.cat([added.expand(*shape, -1), columns.expand(*shape, -1)], dim=-1), more


def _longer(rows: Float[Tensor, "b h k e"], more: int) -> Float[Tensor, "b h l e"]:
    """Keys or values with `more` rows of zeros after them."""
    return F.pad(rows, (0, 0, 0, more)) if more else rows
