"""On a processor: strips of queries against all keys that they see, in compiled code that never holds the square."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lookfar.attention.scheme import Scheme
from lookfar.kernels import compiled
from lookfar.kernels.base import Call, Kernel
from lookfar.kernels.compiled.calls import BACKWARD, FORWARD, SPARE, Asked
from lookfar.methods.base import DistanceBias, Heads, ScoreMap
from lookfar.methods.cope import Cope
from lookfar.methods.dape_v1 import DapeV1
from lookfar.methods.dape_v2 import DapeV2
from lookfar.methods.fire import Fire
from lookfar.sight import Sight

WIDEST = 13  # taps of a convolution


class Strips(Kernel):
    """Recomputes scores strip by strip, forward and backward, in float32 and in memory proportional to the length.

    A bias by distance is a table whose gradient is summed along diagonals. FIRE's net reads one number through
    rectifiers, so it is straight between a few cuts, and a row is a few pieces. CoPE's places are summed from the
    query backwards until the last one. DAPE's nets take one row of all heads at a time.
    """

    def refusal(self, scheme: Scheme, call: Call) -> str | None:
        if call.device != "cpu":
            return "it is compiled for processors"
        if call.dtype == torch.float64:
            return "it computes in float32"
        if scheme.soft_cap is not None:
            return "the scores are soft-capped"
        if call.slots:
            return "a slot is not in the text"
        if not call.causal:
            return "keys ahead are seen"
        if call.scattered:
            return "the keys that a query sees are scattered"
        if reason := _unknown(scheme):
            return reason
        if scheme.biases and not call.steady:
            return "positions do not count tokens, and biases are laid out along diagonals"
        return compiled.refusal()

    def attend(
        self,
        queries: Float[Tensor, "b h q e"],
        keys: Float[Tensor, "b g k e"],
        values: Float[Tensor, "b g2 k v"],
        sight: Sight,
        scheme: Scheme,
    ) -> Float[Tensor, "b h q v"]:
        with torch.autocast(queries.device.type, enabled=False):
            heads, places = scheme.heads, [each.embedding.shape[1] for each in scheme.maps if isinstance(each, Cope)]
            numbers = (
                sight.first_query - sight.first_key,
                scheme.scale,
                all(each.keeps_bias for each in scheme.maps),
                sum(places),  # of contextual positions; a scheme has one map at most
            )
            asked = Asked(
                *(each.float() for each in (queries, keys, values)),
                start=sight.spans()[0].int(),
                key_head=heads.keys_for_scores(_numbers(heads.key_heads)).flatten().int(),
                value_head=heads.values_for_scores(_numbers(heads.value_heads)).flatten().int(),
                **_parts(sight, scheme),
            )
            output = _Attend.apply(numbers, *asked)[0]
            return output[..., : values.shape[-1]].to(values.dtype)


def _unknown(scheme: Scheme) -> str | None:
    for bias in scheme.biases:
        if not isinstance(bias, DistanceBias) and type(bias) is not Fire:
            return f"{type(bias).__name__} adds a bias that depends on more than distances"
        if bias.hides:
            return f"{type(bias).__name__} hides keys by its bias"
    if sum(type(bias) is Fire for bias in scheme.biases) > 1:
        return "there are two nets of distances"
    for map_ in scheme.maps:
        if type(map_) not in (Cope, DapeV1, DapeV2):
            return f"{type(map_).__name__} rewrites the scores in a way of its own"
        if isinstance(map_, DapeV2) and map_.repair != "hidden":
            return "the published form of DAPE V2 shows columns that nobody sees"
        if isinstance(map_, DapeV2) and map_.first.kernel_size[1] > WIDEST:
            return f"convolutions reach over more than {WIDEST} keys"
    return None


def _numbers(count: int) -> Float[Tensor, "1 h 1 1"]:
    """As heads of one token, in a type that holds them exactly."""
    return torch.arange(count, dtype=torch.float64, device="cpu")[None, :, None, None]


def _parts(sight: Sight, scheme: Scheme) -> dict[str, Tensor]:
    """What `Asked` holds of methods, made from their parameters."""
    found = {}
    if (sink := scheme.sink(sight.query_positions)) is not None:
        found["sink"] = sink.float()
    distances = torch.arange(sight.keys - 1, -1, -1, device=sight.key_positions.device)
    if any(isinstance(bias, DistanceBias) for bias in scheme.biases):
        found["table"] = F.pad(scheme.table(distances), (0, SPARE)).float()
    for bias in scheme.biases:
        if isinstance(bias, Fire):
            found |= _pieces(bias, sight, distances, scheme.heads)
    for map_ in scheme.maps:
        found |= _embedding(map_, scheme.scale) if isinstance(map_, Cope) else _net(map_)
    return found


def _each(rows: Float[Tensor, "m n"], heads: Heads) -> Float[Tensor, "h n"]:
    """A row for each score head where all maps of a head share one."""
    return rows if len(rows) == heads.score_heads else rows.repeat(heads.maps, 1)


def _pieces(fire: Fire, sight: Sight, distances: Tensor, heads: Heads) -> dict[str, Tensor]:
    """FIRE as straight pieces. A hidden unit changes its slope where its input is 0: those places are the cuts."""
    rise = fire.compressed(distances.double())  # gradients by way of distances and of positions nearly cancel
    rate = 1 / fire.normalizer(sight.query_positions.double())  # b q
    weight, shift = (each.double() for each in (fire.first.weight[:, 0], fire.first.bias))
    with torch.no_grad():
        own = torch.where(weight == 0, torch.inf, -shift / weight)  # where the input of each unit is 0
        order = (weight > 0).double().argsort(stable=True)  # at one place, units that end before units that begin
        order = order[own[order].argsort(stable=True)]
        bounds, ends = own[order], weight[order] < 0
        middles = torch.cat([bounds[:1] - 1, (bounds[1:] + bounds[:-1]) / 2, bounds[-1:] + 1])
        middles = torch.where(middles.isfinite(), middles, torch.cat([bounds[:1], bounds]).nan_to_num(posinf=0) + 1)
        begun, not_ended = middles[:, None] > own, middles[:, None] < own  # at its own place a unit is not active
        active = torch.where(weight > 0, begun, torch.where(weight < 0, not_ended, shift > 0)).double()  # n c
        low = (bounds[None] / rate.reshape(-1, 1)).clamp(max=torch.finfo(torch.float32).max)
        after, at = (torch.searchsorted(rise.flip(0).contiguous(), low, right=right).int() for right in (True, False))
        cuts = torch.where(ends, at, after)  # where a unit ends, it is no longer active
    second = fire.second.weight.double()
    slope = second @ (active * weight).T  # h n
    offset = second @ (active * shift).T + fire.second.bias.double()[:, None]
    found = {
        "slope": _each(slope, heads),
        "offset": _each(offset, heads),
        "rise": F.pad(rise, (0, SPARE)),
        "rate": rate,
    }
    return {name: each.float() for name, each in found.items()} | {"cuts": cuts.unflatten(0, rate.shape)}


def _embedding(cope: Cope, scale: float) -> dict[str, Tensor]:
    """CoPE's embedding for scaled queries, filled up to whole vectors."""
    return {"embedding": F.pad(cope.embedding / scale, (0, -cope.embedding.shape[1] % SPARE)).float()}


def _net(net: ScoreMap) -> dict[str, Tensor]:
    """Weights `[out, in, taps]` and biases of both layers."""
    assert isinstance(net, DapeV1 | DapeV2)
    found = {}
    for name, layer in (("first", net.first), ("second", net.second)):
        weight = layer.weight.flatten(2) if layer.weight.dim() == 4 else layer.weight[..., None]
        found |= {f"{name}_weight": weight.float(), f"{name}_bias": _known(layer.bias).float()}
    return found


def _known(bias: Tensor | None) -> Tensor:
    assert bias is not None
    return bias


class _Attend(torch.autograd.Function):
    """The compiled functions; the order of tensors is that of `Asked`."""

    @staticmethod
    def forward(numbers: tuple[int, float, bool, int], *tensors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return FORWARD(*numbers, list(tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.numbers, *tensors = inputs
        ctx.save_for_backward(*output, *tensors)
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        output, tops, shares, *tensors = ctx.saved_tensors
        towards = gradients[0][..., : tensors[2].shape[-1]]
        found = BACKWARD(*ctx.numbers, towards, output, tops, shares, tensors)
        wanted = ctx.needs_input_grad[1:]
        return None, *(each if needed else None for each, needed in zip(found, wanted, strict=True))
