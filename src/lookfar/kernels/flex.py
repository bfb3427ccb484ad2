"""FlexAttention: every bias by distance as one look-up, who sees whom as blocks, and a sink by the log-sum-exp."""

import importlib.util
import shutil
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
import torch._dynamo
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from lookfar.attention.reference import absorb, wider
from lookfar.attention.scheme import Scheme
from lookfar.kernels.base import Call, Kernel
from lookfar.methods.base import DistanceBias
from lookfar.sight import Sight

BLOCK = 128  # queries and keys of a block
NARROWEST, WIDEST = 16, 512  # entries and bytes of a head that a compiled kernel takes
VARIANTS = 128  # of compiled code: device, type, width of heads, grouping, kind of sight and of scores

Seen = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Scored = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class Flex(Kernel):
    """Compiles one score function, `table[head, distance]`, for all biases by distance.

    The table, the documents and the place of the first query are captured tensors, so that neither another method nor
    (on a GPU) another length is compiled anew. Blocks of keys that no query of a block sees are never computed. A sink
    is an epilogue on the log-sum-exp. The gradient of the table is summed by atomic additions, in no fixed order. As
    all compiled code, it goes backward once: torch refuses to retain its graph unless it is told to keep all buffers.
    """

    def __init__(self, *, compiled: bool = True) -> None:
        self.compiled = compiled  # without a compiler the full square is computed

    def refusal(self, scheme: Scheme, call: Call) -> str | None:
        width = max(scheme.heads.head_width, scheme.heads.value_width)
        others = [type(bias).__name__ for bias in scheme.biases if not isinstance(bias, DistanceBias)]
        if scheme.maps:
            return f"{type(scheme.maps[0]).__name__} rewrites the scores"
        if others:
            return f"{others[0]} adds a bias that is no table by distance"
        if scheme.biases and not call.whole:
            return "positions between whole numbers have no place in a table"
        if call.slots:
            return "slots are no blocks of keys"
        if call.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"FlexAttention takes no {str(call.dtype).removeprefix('torch.')}"
        if call.device == "cpu":
            return self._refusal_on_cpu(scheme, call)
        if width * call.dtype.itemsize > WIDEST:
            return f"heads are {width} wide, more than {WIDEST // call.dtype.itemsize}"
        if importlib.util.find_spec("triton") is None:
            return "its compiler, triton, is not installed"
        learned = call.gradients and any(each.requires_grad for bias in scheme.biases for each in bias.parameters())
        if learned and torch.are_deterministic_algorithms_enabled():
            return "the gradient of a learned bias is summed in no fixed order"
        return None

    def _refusal_on_cpu(self, scheme: Scheme, call: Call) -> str | None:
        if call.gradients:
            return "FlexAttention has no backward on a CPU"
        if self.compiled and scheme.sinks:
            return "compiled FlexAttention gives no log-sum-exp on a CPU, which a sink needs"
        if self.compiled and shutil.which("g++") is None:
            return "its compiler on a CPU, g++, is not installed"
        return None

    def attend(
        self,
        queries: Float[Tensor, "b h q e"],
        keys: Float[Tensor, "b g k e"],
        values: Float[Tensor, "b g2 k v"],
        sight: Sight,
        scheme: Scheme,
    ) -> Float[Tensor, "b h q v"]:
        value_width = values.shape[-1]
        grouped = scheme.heads.maps == 1 and _power_of_two(queries.shape[1] // keys.shape[1])
        if not grouped:
            keys, values = scheme.heads.keys_for_scores(keys), scheme.heads.values_for_scores(values)
        queries, keys, values = (_filled(each.to(values.dtype)) for each in (queries, keys, values))
        sink = scheme.sink(sight.query_positions)
        given: dict[str, Any] = {
            "score_mod": _score_mod(sight, scheme, queries.shape[0]),
            "block_mask": _block_mask(sight, queries.shape[0]),
            "scale": scheme.scale,
            "enable_gqa": grouped and queries.shape[1] != keys.shape[1],
        }
        if sink is None:
            return self._call(queries, keys, values, given)[..., :value_width]
        output, aux = self._call(queries, keys, values, {**given, "return_aux": AuxRequest(lse=True)})
        return absorb(output[..., :value_width], aux.lse.to(wider(output.dtype)), sink)

    def _call(self, queries: Tensor, keys: Tensor, values: Tensor, given: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling() or not self.compiled:
            return flex_attention(queries, keys, values, **given)
        with torch._dynamo.config.patch(recompile_limit=VARIANTS):
            return _compiled(queries.device.type)(queries, keys, values, **given)


@cache
def _compiled(device: str) -> Callable[..., Any]:
    """One graph or an error, never the full square in silence; for any length, on a CPU for each length anew.

    Torch's code for a CPU names no size of a document's tensor in a graph for any length and does not compile.
    """
    return torch.compile(flex_attention, dynamic=device != "cpu", fullgraph=True)


def _power_of_two(count: int) -> bool:
    return count & (count - 1) == 0


def _filled(rows: Float[Tensor, "b h t w"]) -> Float[Tensor, "b h t p"]:
    """The same with zeros after each row, up to a power of two."""
    wanted = max(NARROWEST, 1 << (rows.shape[-1] - 1).bit_length())
    return rows if wanted == rows.shape[-1] else F.pad(rows, (0, wanted - rows.shape[-1]))


def _score_mod(sight: Sight, scheme: Scheme, batch: int) -> Scored | None:
    """Soft-cap, then the bias from a table that holds every distance there is."""
    capped = _capped(scheme.soft_cap)
    if not scheme.biases:
        return None if scheme.soft_cap is None else lambda score, b, h, q, k: capped(score)
    device, steady = sight.key_positions.device, sight.steady
    first = sight.first_query - sight.first_key
    low, high = (first + 1 - sight.keys, first + sight.queries) if steady else (-sight.longest, sight.longest + 1)
    table = scheme.table(torch.arange(low, high, device=device))
    table = table.clone(memory_format=torch.contiguous_format)  # the compiler drops the gradient of a captured view
    shift = _number((first if steady else 0) - low, device)
    if steady:
        return lambda score, b, h, q, k: capped(score) + table[h, q - k + shift]
    asked, known = (
        each.to(torch.int32).expand(batch, -1).contiguous() for each in (sight.query_positions, sight.key_positions)
    )
    return lambda score, b, h, q, k: capped(score) + table[h, asked[b, q] - known[b, k] + shift]


def _number(value: int, device: torch.device) -> Tensor:
    """A number that compiled code takes as it comes; no device is waited for."""
    return torch.full((), value, dtype=torch.int32, device=device)


def _capped(cap: float | None) -> Callable[[Tensor], Tensor]:
    return (lambda score: score) if cap is None else (lambda score: cap * torch.tanh(score / cap))


def _block_mask(sight: Sight, batch: int) -> BlockMask | None:
    """Who sees whom: the blocks in which something is seen, and what is seen in them."""
    if sight.key_documents is not None and sight.query_documents is not None:
        return _masked(_order(sight), (sight.query_documents, sight.key_documents), sight.key_positions.device, batch)
    if torch.compiler.is_compiling():
        return _masked(_order(sight), None, sight.key_positions.device, batch)
    return _masked_by_order(_order(sight), sight.key_positions.device)


Order = tuple[int, int, int, int, bool]  # queries, keys, place of query 0 among the keys, window (0: none), ahead


def _order(sight: Sight) -> Order:
    return sight.queries, sight.keys, sight.first_query - sight.first_key, sight.window or 0, sight.ahead


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is kept may be needed for a backward pass
def _masked_by_order(order: Order, device: torch.device) -> BlockMask | None:
    return _masked(order, None, device, 1)


def _masked(
    order: Order, documents: tuple[Int[Tensor, "b q"], Int[Tensor, "b k"]] | None, device: torch.device, batch: int
) -> BlockMask | None:
    queries, keys, _, window, ahead = order
    if ahead and not window and documents is None:
        return None
    if documents is not None:
        documents = documents[0].expand(batch, -1).contiguous(), documents[1].expand(batch, -1).contiguous()
    some, every = _blocks(order, documents, device)
    blocks = [each for kind in (some & ~every, every) for each in _listed(kind)]
    return BlockMask.from_kv_blocks(
        *blocks, BLOCK_SIZE=BLOCK, mask_mod=_seen(order, documents, device), seq_lengths=(queries, keys)
    )


def _seen(order: Order, documents: tuple[Tensor, Tensor] | None, device: torch.device) -> Seen:
    """`Sight.visible` for one pair, by the index of query and key. Lambdas: the compiler takes no checked functions."""
    first, window = _number(order[2], device), _number(order[3], device)
    by_order = _seen_by_order(first, window if order[3] else None, order[4])
    if documents is None:
        return by_order
    asked, known = documents
    return lambda b, h, q, k: (
        (by_order(b, h, q, k) & (asked[b, q] == known[b, k]) & (known[b, k] >= 0)) | (q + first == k)
    )


def _seen_by_order(first: Tensor, window: Tensor | None, ahead: bool) -> Seen:
    if window is None:
        return (lambda b, h, q, k: k == k) if ahead else (lambda b, h, q, k: q + first >= k)
    if ahead:
        return lambda b, h, q, k: (q + first - k).abs() < window
    return lambda b, h, q, k: (q + first >= k) & (q + first - k < window)


def _blocks(
    order: Order, documents: tuple[Tensor, Tensor] | None, device: torch.device
) -> tuple[Bool[Tensor, "#b 1 i j"], Bool[Tensor, "#b 1 i j"]]:
    """Blocks of queries against blocks of keys: where something may be seen, and where all is seen."""
    queries, keys, first, window, ahead = order
    starts, begins = (torch.arange(0, count, BLOCK, device=device) for count in (queries, keys))
    stops, ends = (starts + BLOCK).clamp(max=queries) - 1, (begins + BLOCK).clamp(max=keys) - 1
    near = first + starts[:, None] - ends  # the least and the largest distance of a pair in them
    far = first + stops[:, None] - begins
    some, every = torch.ones_like(near, dtype=torch.bool), (near >= 0) | ahead
    if not ahead:
        some = some & (far >= 0)
    if window:
        some = some & (near < window) & (far > -window)
        every = every & (far < window) & (near > -window)
    whole = (stops - starts == BLOCK - 1)[:, None] & (ends - begins == BLOCK - 1)
    some, every = some[None, None], (every & whole)[None, None]
    if documents is not None:
        (low, high), (least, most) = (_bounds(each) for each in documents)
        low, high, least, most = low[..., None], high[..., None], least[..., None, :], most[..., None, :]
        some = some & (low <= most) & (least <= high)
        every = every & (low == most) & (least == high) & (low == high) & (low >= 0)
    return some, every


def _bounds(documents: Int[Tensor, "b t"]) -> tuple[Int[Tensor, "b 1 i"], Int[Tensor, "b 1 i"]]:
    """The least and the largest document in every block."""
    more = -documents.shape[1] % BLOCK
    filled = torch.cat([documents, documents[:, -1:].expand(-1, more)], dim=1).unflatten(1, (-1, BLOCK))
    return filled.amin(-1)[:, None], filled.amax(-1)[:, None]


def _listed(blocks: Bool[Tensor, "#b 1 i j"]) -> tuple[Int[Tensor, "#b 1 i"], Int[Tensor, "#b 1 i j"]]:
    """How many blocks of keys each block of queries has, and which, those first."""
    return (
        blocks.sum(-1, dtype=torch.int32),
        blocks.int().argsort(dim=-1, descending=True, stable=True).to(torch.int32),
    )
