"""The compiled functions as operators on tensors, which compilers of models need not look into."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from lookfar.kernels import compiled

SPARE = 64  # numbers after a table that are read and do not count: at least a vector
MOST_PARTS = 8  # threads that add up gradients of keys and values each for itself
LEAK = 0.01  # of the rectifier between the layers of a net


class Asked(NamedTuple):
    """All tensors of a call, in float32; None where there is no such thing."""

    queries: Float[Tensor, "b h q e"]
    keys: Float[Tensor, "b g k e"]
    values: Float[Tensor, "b g2 k v"]
    start: Int32[Tensor, "#b q"]  # the first key that each query sees; it sees all from there to itself
    key_head: Int32[Tensor, " h"]  # of each score head
    value_head: Int32[Tensor, " h"]
    sink: Float[Tensor, "#b #h #q"] | None = None
    table: Float[Tensor, "h n"] | None = None  # of the distances k - 1, …, 0, and SPARE numbers that do not count
    slope: Float[Tensor, "h p"] | None = None  # a bias of p pieces: slope · rise[distance] · rate[query] + offset
    offset: Float[Tensor, "h p"] | None = None
    rise: Float[Tensor, " n"] | None = None  # of distances, as in the table
    rate: Float[Tensor, "#b q"] | None = None
    cuts: Int32[Tensor, "#b q c"] | None = None  # the distances at which each but the first piece begins
    embedding: Float[Tensor, "e w"] | None = None  # of contextual positions, for scaled queries; w whole vectors
    first_weight: Float[Tensor, "u i t"] | None = None  # of a net over heads: i is h or, with biases, 2 h
    first_bias: Float[Tensor, " u"] | None = None
    second_weight: Float[Tensor, "h u t"] | None = None
    second_bias: Float[Tensor, " h"] | None = None


def asked_of(tensors: Sequence[Tensor | None]) -> Asked:
    """The tensors by name, in the order in which `Asked` has them."""
    return Asked(*tensors)  # type: ignore[arg-type]  # the first six are never None


def _no_second(ctx: Any, *gradients: Any) -> None:
    raise NotImplementedError("The second derivative of strips is not implemented; ask for kernel='reference'.")


NUMBERS = "int first, float scale, bool keeps_bias, int places"
FORWARD = torch.library.custom_op(
    "lookfar::strips_forward",
    lambda first, scale, keeps_bias, places, tensors: _forward(first, scale, keeps_bias, places, asked_of(tensors)),
    mutates_args=(),
    schema=f"({NUMBERS}, Tensor?[] tensors) -> (Tensor, Tensor, Tensor)",
)
BACKWARD = torch.library.custom_op(
    "lookfar::strips_backward",
    lambda first, scale, keeps_bias, places, gradient, output, tops, shares, tensors: _backward(
        first, scale, keeps_bias, places, gradient, output, tops, shares, asked_of(tensors)
    ),
    mutates_args=(),
    schema=f"({NUMBERS}, Tensor gradient, Tensor output, Tensor tops, Tensor shares, Tensor?[] tensors) -> Tensor[]",
)


@FORWARD.register_fake
def _(
    first: int, scale: float, keeps_bias: bool, places: int, tensors: list[Tensor | None]
) -> tuple[Tensor, Tensor, Tensor]:
    return _results(asked_of(tensors))


@BACKWARD.register_fake
def _(
    first: int,
    scale: float,
    keeps_bias: bool,
    places: int,
    gradient: Tensor,
    output: Tensor,
    tops: Tensor,
    shares: Tensor,
    tensors: list[Tensor | None],
) -> list[Tensor]:
    return [gradient.new_empty(each.shape if each is not None and each.is_floating_point() else 0) for each in tensors]


BACKWARD.register_autograd(_no_second)


def _results(asked: Asked) -> tuple[Tensor, Tensor, Tensor]:
    shape = asked.queries.shape[:3]
    output = asked.queries.new_empty(*shape, _padded(asked.values.shape[-1]))
    return output, asked.queries.new_empty(shape), asked.queries.new_empty(shape)


def _forward(first: int, scale: float, keeps_bias: bool, places: int, asked: Asked) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs `[b h q v]`, v filled up to whole vectors; `[b h q]`, the largest score and 1 / Σ e^(score - largest)."""
    asked = _laid_out(asked)
    output, tops, shares = _results(asked)
    call = _call(first, scale, keeps_bias, places, asked)
    call.set(output=output, tops=tops, shares=shares)
    compiled.run("lookfar_forward", call)
    return output, tops, shares


def _backward(
    first: int,
    scale: float,
    keeps_bias: bool,
    places: int,
    gradient: Float[Tensor, "b h q v"],
    output: Tensor,
    tops: Tensor,
    shares: Tensor,
    asked: Asked,
) -> list[Tensor]:
    """The gradient of every tensor of `Asked`; of what is None or whole numbers, an empty one."""
    asked = _laid_out(asked)
    gradient, output, tops, shares = (each.contiguous() for each in (gradient, output, tops, shares))
    batch, heads, queries, width = asked.queries.shape
    keys, value_width = asked.values.shape[2:]
    parts = 1 if asked.first_weight is None else min(torch.get_num_threads(), MOST_PARTS)
    maps = (parts, batch, heads)
    zeros = asked.queries.new_zeros
    found = {
        "queries": zeros(batch, heads, queries, _padded(width)),
        "keys": zeros(*maps, keys, _padded(width)),
        "values": zeros(*maps, keys, _padded(value_width)),
    }
    if asked.sink is not None:
        found["sink"] = zeros(batch, heads, queries)
    if asked.table is not None:
        found["table"] = zeros(*maps, asked.table.shape[-1])
    if asked.slope is not None and asked.rise is not None:
        for name in ("slope", "offset", "rise"):
            found[name] = zeros(*maps, getattr(asked, name).shape[-1], dtype=torch.float64)
        found["rate"] = zeros(batch, heads, queries)
    if asked.embedding is not None:
        found["embedding"] = zeros(*maps, *asked.embedding.shape)
    for name in ("first_weight", "first_bias", "second_weight", "second_bias"):
        if (each := getattr(asked, name)) is not None:
            found[name] = zeros(parts, *each.shape)
    call = _call(first, scale, keeps_bias, places, asked)
    call.set(output=output, tops=tops, shares=shares, gradient=gradient, parts=parts)
    plural = {"queries": "query", "keys": "key", "values": "value"}
    call.set(**{f"{plural.get(name, name)}_gradient": each for name, each in found.items()})
    compiled.run("lookfar_backward", call)
    found["queries"] = found["queries"][..., :width].contiguous()
    found["keys"] = _by_group(found["keys"].sum(0)[..., :width], asked.key_head, asked.keys.shape[1])
    found["values"] = _by_group(found["values"].sum(0)[..., :value_width], asked.value_head, asked.values.shape[1])
    if asked.rate is not None:
        found["rate"] = found["rate"].sum(1)
    return [
        zeros(0) if each is None or name not in found else _summed(found[name], each.shape)
        for name, each in zip(Asked._fields, asked, strict=True)
    ]


def _laid_out(asked: Asked) -> Asked:
    """The same tensors; rows of queries, keys and values contiguous, all others as a whole."""
    rows = [each if each.stride(-1) == 1 else each.contiguous() for each in asked[:3]]
    return asked_of([*rows, *(None if each is None else each.contiguous() for each in asked[3:])])


def _call(first: int, scale: float, keeps_bias: bool, places: int, asked: Asked) -> compiled.Request:
    batch, heads, queries, width = asked.queries.shape
    keys, value_width = asked.values.shape[2:]
    call = compiled.Request(batch=batch, heads=heads, queries=queries, keys=keys, first=first, width=width)
    call.set(
        value_width=value_width,
        key_heads=asked.keys.shape[1],
        value_heads=asked.values.shape[1],
        threads=torch.get_num_threads(),
        query=asked.queries,
        key=asked.keys,
        value=asked.values,
        query_steps=asked.queries.stride()[:3],
        key_steps=asked.keys.stride()[:3],
        value_steps=asked.values.stride()[:3],
        key_head=asked.key_head,
        value_head=asked.value_head,
        start=asked.start,
        start_step=queries if len(asked.start) > 1 else 0,
        scale=scale,
        keeps_bias=keeps_bias,
        leak=LEAK,
        inputs=1,
    )
    if asked.sink is not None:
        steps = (0 if size == 1 else step for size, step in zip(asked.sink.shape, asked.sink.stride(), strict=True))
        call.set(sink=asked.sink, sink_steps=tuple(steps))
    if asked.table is not None:
        call.set(table=asked.table, span=asked.table.shape[1])
    if asked.slope is not None and asked.rise is not None and asked.rate is not None:
        call.set(slope=asked.slope, offset=asked.offset, rise=asked.rise, rate=asked.rate, cuts=asked.cuts)
        call.set(span=len(asked.rise), pieces=asked.slope.shape[1])
        call.set(rate_step=queries if len(asked.rate) > 1 else 0)
    if asked.embedding is not None:
        call.set(embedding=asked.embedding, places=places, place_step=asked.embedding.shape[1])
    if asked.first_weight is not None:
        hidden, channels, taps = asked.first_weight.shape
        call.set(hidden=hidden, taps=taps, inputs=channels // heads, first_weight=asked.first_weight)
        call.set(first_bias=asked.first_bias, second_weight=asked.second_weight, second_bias=asked.second_bias)
    return call


def _padded(width: int) -> int:
    lanes = compiled.library().lookfar_lanes()
    return -(-width // lanes) * lanes


def _by_group(gradient: Float[Tensor, "b h k e"], head: Int32[Tensor, " h"], groups: int) -> Float[Tensor, "b g k e"]:
    """Summed over the score heads that share a key or value head."""
    if gradient.shape[1] == groups:
        return gradient.contiguous()
    shape = (gradient.shape[0], groups, *gradient.shape[2:])
    return gradient.new_zeros(shape).index_add_(1, head, gradient)


def _summed(gradient: Tensor, shape: torch.Size) -> Tensor:
    """Summed over the axes in front that the tensor does not have, and those of which it has one."""
    return (gradient.sum_to_size(shape) if gradient.shape != shape else gradient).float()
