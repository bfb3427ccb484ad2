"""torch's own fused attention, for every scheme that adds no bias or one that splits into a query and a key part."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lookfar.attention.reference import absorb
from lookfar.attention.scheme import Scheme
from lookfar.kernels.base import Call, Kernel
from lookfar.methods.alibi import Alibi
from lookfar.sight import Sight

MASKED = 1 << 24  # entries of a dense mask that it accepts
TILE, EVEN = 512, 16  # keys that torch takes at a time on a CPU; a last tile of fewer is added up in another order


class Sdpa(Kernel):
    """Calls `scaled_dot_product_attention`.

    ALiBi rides as extra columns of queries and keys: slope · (j - i) is an inner product. A sink on a CPU is an
    epilogue that needs the log-sum-exp; elsewhere it is one key of zeros in front, with its own query.
    """

    def refusal(self, scheme: Scheme, call: Call) -> str | None:
        if scheme.maps:
            return f"{type(scheme.maps[0]).__name__} rewrites the scores"
        if scheme.soft_cap is not None:
            return "the scores are soft-capped"
        others = [type(bias).__name__ for bias in scheme.biases if type(bias) is not Alibi]  # an heir has its own `at`
        if others:
            return f"{others[0]} adds a bias that does not split into a query and a key part"
        if scheme.biases and not (call.consecutive and call.causal):
            return "ALiBi splits only where positions count up and nothing ahead is seen"
        if any(bias.learned for bias in scheme.biases if isinstance(bias, Alibi)):
            return "learned slopes need a gradient, which their split into exact parts has not"
        if any(bias.form == "split" for bias in scheme.biases if isinstance(bias, Alibi)):
            return "half of the heads see nothing behind"
        if scheme.biases and call.dtype == torch.float16:
            return "ALiBi's columns overflow float16"
        square = call.plain and call.last and call.queries == call.keys
        if not square and call.queries > 1 and call.batch * call.queries * call.keys > MASKED:
            return f"who sees whom would need a dense mask of {call.batch * call.queries * call.keys:,} entries"
        if scheme.sinks and call.device != "cpu" and not square:
            return "a sink in front needs plain causal sight"
        return None

    def attend(
        self,
        queries: Float[Tensor, "b h q e"],
        keys: Float[Tensor, "b g k e"],
        values: Float[Tensor, "b g2 k v"],
        sight: Sight,
        scheme: Scheme,
    ) -> Float[Tensor, "b h q v"]:
        scale, value_width, asked = scheme.scale, values.shape[-1], queries.shape[2]
        keys, values = scheme.heads.keys_for_scores(keys), scheme.heads.values_for_scores(values)
        sink = scheme.sink(sight.query_positions)
        if scheme.biases:
            queries, scale = _even(queries, scale)
            slopes = torch.stack([bias.slopes[0] for bias in scheme.biases if isinstance(bias, Alibi)]).sum(0)
            slopes = slopes.repeat(scheme.heads.score_heads // len(slopes))  # maps of a head may share them
            queries, keys = _lead(queries, keys, _columns(slopes, sight, scale, queries.dtype))
        if sink is not None and queries.device.type != "cpu":
            return _with_key_in_front(queries, keys, values, sink, scale)[..., :value_width]
        queries, keys, values = _equally_wide(queries, keys, values)
        causal = sight.plain and sight.last and sight.queries == sight.keys
        whole = sight.plain and sight.last and sight.queries == 1  # the last token sees all
        mask = None if causal or whole else _mask(sight, queries.dtype)
        if scheme.biases and asked > 1 and 0 < keys.shape[2] % TILE < EVEN:
            queries, keys, values, mask = _longer(queries, keys, values, mask)
            sink = None if sink is None else F.pad(sink, (0, queries.shape[2] - asked))
        if sink is None:
            output = F.scaled_dot_product_attention(queries, keys, values, mask, is_causal=causal, scale=scale)
        else:
            output = _AttendWithSink.apply(queries, keys, values, sink.expand(queries.shape[:3]), mask, causal, scale)
        return output[:, :, :asked, :value_width]


class _AttendWithSink(torch.autograd.Function):
    """Flash attention on a CPU, and a sink after it.

    The stock backward, given the output and log-sum-exp of the softmax *with* the sink, returns exact gradients of
    queries, keys and values; the sink's own is -(1 - kept) · ⟨gradient, output⟩.
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        sink: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float,
    ) -> Tensor:
        output, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries, keys, values, 0.0, causal, attn_mask=mask, scale=scale
        )
        output = absorb(output, logsumexp, sink)
        joined = torch.logaddexp(logsumexp, sink.to(logsumexp.dtype))
        ctx.save_for_backward(queries, keys, values, output, joined, sink, mask)
        ctx.causal, ctx.scale = causal, scale
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, output, joined, sink, mask = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        inner = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient, queries, keys, values, output, joined, 0.0, ctx.causal, attn_mask=mask, scale=ctx.scale
        )
        swallowed = (sink - joined).exp()  # the sink's weight: 1 - kept
        towards = (gradient.to(joined.dtype) * output.to(joined.dtype)).sum(-1)
        of_sink = (-swallowed * towards).to(sink.dtype)
        return (*inner, _Once.apply(of_sink) if torch.is_grad_enabled() else of_sink, None, None, None)


class _Once(torch.autograd.Function):
    """The same values, which cannot be differentiated again: the log-sum-exp in them has lost how it came about."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise NotImplementedError("The fused attention has no second derivative of a sink; ask for kernel='reference'.")


def _with_key_in_front(
    queries: Tensor, keys: Tensor, values: Tensor, sink: Float[Tensor, "#b h q"], scale: float
) -> Float[Tensor, "b h q v"]:
    """One more query and key before all others; a new column holds the sink's score in queries and 1 in that key."""
    least = torch.finfo(queries.dtype).min / 2  # in place of -inf, whose product with the 0 of other keys is NaN
    score = (sink.expand(queries.shape[:3]) / scale).clamp(min=least).to(queries.dtype)[..., None]
    queries = F.pad(torch.cat([queries, score], dim=-1), (0, 0, 1, 0))
    keys = F.pad(keys, (0, 1, 1, 0))
    keys = keys + F.one_hot(torch.tensor(keys.shape[-1] - 1, device=keys.device), keys.shape[-1]).to(keys.dtype) * (
        torch.arange(keys.shape[2], device=keys.device)[:, None] == 0
    )
    queries, keys, values = _equally_wide(queries, keys, F.pad(values, (0, 0, 1, 0)))
    return F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale)[:, :, 1:]


def _mask(sight: Sight, dtype: torch.dtype) -> Float[Tensor, "#b 1 q k"]:
    visible = sight.visible()
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)


def _equally_wide(queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All three as wide as the widest, rounded up to 8, which flash kernels ask for."""
    width = max(queries.shape[-1], values.shape[-1])
    if queries.shape[-1] == values.shape[-1] and queries.device.type == "cpu":
        return queries, keys, values
    width += -width % 8
    return tuple(F.pad(each, (0, width - each.shape[-1])) for each in (queries, keys, values))  # type: ignore[return-value]  # three in, three out


def _longer(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """All of them with rows of zeros that nobody sees after them, so that ALiBi's large columns cancel in one order."""
    more = -keys.shape[2] % EVEN
    keys, values = F.pad(keys, (0, 0, 0, more)), F.pad(values, (0, 0, 0, more))
    if mask is None:  # causal: what is ahead is hidden anyway
        return F.pad(queries, (0, 0, 0, more)), keys, values, None
    return queries, keys, values, F.pad(mask, (0, more), value=-torch.inf)


def _even(queries: Tensor, scale: float) -> tuple[Tensor, float]:
    """Queries and a scale that is a power of two, so that dividing a column by it is exact."""
    power = 2.0 ** round(math.log2(scale))
    return (queries if power == scale else queries * (scale / power)), power


def _lead(queries: Tensor, keys: Tensor, columns: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Columns in front of the features: their large parts cancel before anything small is added to them."""
    asked, given = (each.to(queries.dtype) for each in columns)
    batch = queries.shape[0]
    return (
        torch.cat([asked.expand(batch, -1, -1, -1), queries], dim=-1),
        torch.cat([given.expand(batch, keys.shape[1], -1, -1), keys], dim=-1),
    )


def _columns(
    slopes: Float[Tensor, " h"], sight: Sight, scale: float, dtype: torch.dtype
) -> tuple[Float[Tensor, "#b h q c"], Float[Tensor, "#b 1 k c"]]:
    """slope · (j - i) as an inner product whose every factor is exact in `dtype`.

    Each part s of the slope gives s · (parts of j) - (parts of s · i). Parts of j have as many bits as `dtype`
    keeps; the products are then exact in float32, in which kernels add them up, and the large ones cancel.
    """
    narrow = dtype.itemsize < 4
    exact = torch.float64
    slope_parts = _parts(slopes.to(exact) / scale, torch.bfloat16 if narrow else torch.float16, 2)
    if not narrow:
        slope_parts = [slope_parts[0], slopes.to(exact) / scale - slope_parts[0]]
    queries, keys = sight.query_positions.to(exact), sight.key_positions.to(exact)
    key_parts = _parts(keys, dtype, 3 if narrow else 1)
    ones = torch.ones_like(keys)
    asked, given = [], []
    for slope in slope_parts:
        across = slope[None, :, None]  # 1 h 1
        own = _parts(-across * queries[:, None, :], dtype, 3 if narrow else 1)
        asked += [across.expand_as(own[0])] * len(key_parts) + own
        given += key_parts + [ones] * len(own)
    return torch.stack(asked, dim=-1), torch.stack(given, dim=-1)[:, None]


def _parts(values: Tensor, dtype: torch.dtype, count: int) -> list[Tensor]:
    """Values as a sum of `count` numbers, each exact in `dtype`; the last takes what is left, rounded."""
    parts = []
    for _ in range(count):
        parts.append(values.to(dtype).to(values.dtype))
        values = values - parts[-1]
    return parts
