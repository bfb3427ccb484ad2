"""Attention with a bias by distance on a GPU: programs in Triton, forward and backward, for training and decoding."""

import math
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from lookfar.attention.scheme import Scheme
from lookfar.kernels.base import Call, Kernel
from lookfar.methods.base import Heads
from lookfar.sight import Sight

TYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
WIDEST = 256  # of keys and values
ROWS = 64  # queries of heads that share a key head up to which keys are divided among programs
PROGRAMS = 512  # programs that keep a large GPU busy: where a program adds to sums of its own, no more are started
LONGER = 16  # tables are a multiple of this long, so that few lengths occur
PAD = 256  # as in the programs
LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Blocks:
    """How a program lays out its work: the queries and keys of a tile, warps, and tiles that are loaded ahead."""

    queries: int
    keys: int
    warps: int = 4
    stages: int = 2


# By the bytes of a number and the width of a head, rounded up; chosen so that an sm_90 holds everything in registers.
FORWARD = {
    (2, 64): Blocks(128, 64, 4, 3),
    (2, 128): Blocks(128, 64, 8, 3),
    (2, 256): Blocks(128, 64, 8, 2),
    (4, 64): Blocks(64, 32, 4, 2),
    (4, 128): Blocks(32, 32, 4, 2),
    (4, 256): Blocks(16, 32, 4, 2),
}
BACKWARD_QUERIES = {
    (2, 64): Blocks(64, 64, 4, 2),
    (2, 128): Blocks(64, 64, 4, 2),
    (2, 256): Blocks(64, 64, 8, 1),
    (4, 64): Blocks(32, 32, 4, 1),
    (4, 128): Blocks(32, 32, 4, 1),
    (4, 256): Blocks(16, 16, 4, 1),
}
BACKWARD_KEYS = {
    (2, 64): Blocks(64, 64, 4, 2),
    (2, 128): Blocks(64, 64, 4, 2),
    (2, 256): Blocks(64, 64, 8, 1),
    (4, 64): Blocks(32, 32, 4, 1),
    (4, 128): Blocks(32, 32, 4, 1),
    (4, 256): Blocks(16, 16, 4, 1),
}
DECODE = {
    (2, 64): Blocks(16, 64, 4, 3),
    (2, 128): Blocks(16, 64, 4, 3),
    (2, 256): Blocks(16, 32, 4, 3),
    (4, 64): Blocks(16, 32, 4, 2),
    (4, 128): Blocks(16, 32, 4, 2),
    (4, 256): Blocks(16, 16, 4, 2),
}


class Distance(Kernel):
    """Looks up the bias of every pair in a table by distance while it computes attention tile by tile.

    Nothing as large as queries × keys is ever held, keys and values are read where they lie, and tiles that nobody
    sees are not visited. All sums have one order, that of the table's gradient along the diagonals, too.
    """

    def __init__(self, *, blocks: Blocks | None = None, programs: int = PROGRAMS) -> None:
        self.blocks, self.programs = blocks, programs

    def refusal(self, scheme: Scheme, call: Call) -> str | None:
        heads = scheme.heads
        if find_spec("triton") is None:
            return "triton is not installed"
        if call.device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return "it runs on a GPU"
        if call.dtype not in TYPES:
            return f"{call.dtype} is none of its types: {', '.join(TYPES.values())}"
        if scheme.maps:
            return f"{type(scheme.maps[0]).__name__} rewrites the scores"
        if not scheme.by_distance:
            return f"{scheme.expression} adds a bias that is not by distance alone"
        if call.slots:
            return "a slot is not in the text"
        if not call.causal:
            return "keys ahead are seen"
        if not call.steady:
            return "the distance of two tokens is not the number of places between them"
        if max(heads.head_width, heads.value_width) > WIDEST:
            return f"heads are wider than {WIDEST}"
        if heads.key_heads not in (heads.value_heads, heads.value_heads * heads.maps):
            return f"{heads.key_heads} key heads are neither one nor one of each map for every value head"
        return None

    def attend(
        self,
        queries: Float[Tensor, "b h q e"],
        keys: Float[Tensor, "b g k e"],
        values: Float[Tensor, "b g2 k v"],
        sight: Sight,
        scheme: Scheme,
    ) -> Float[Tensor, "b h q v"]:
        table = sink = None
        if scheme.biases:
            count = sight.first_query - sight.first_key + sight.queries
            count = count if sight.window is None else min(count, sight.window)
            count = -(-count // LONGER) * LONGER
            table = scheme.table(torch.arange(-PAD, count + PAD, device=queries.device)).float().contiguous()
        if scheme.sinks:
            sink = scheme.sink(sight.query_positions)
            sink = None if sink is None else sink.expand(queries.shape[:3])
        plan = _Plan.of(sight, scheme, queries, self.blocks, self.programs)
        needing = torch.is_grad_enabled() and any(
            each is not None and each.requires_grad for each in (queries, keys, values, table, sink)
        )
        with _on(queries.device):
            if not needing and sight.queries * (scheme.heads.score_heads // scheme.heads.key_heads) <= ROWS:
                return plan.decode(*map(_dense, (queries, keys, values)), table, sink)
            return _Attend.apply(*map(_dense, (queries, keys, values)), table, sink, plan)


@dataclass(frozen=True)
class _Plan:
    """What a call's programs are told beside its tensors, and how they are started."""

    heads: Heads
    dtype: torch.dtype
    inner: float  # products are multiplied by it before the cap
    outer: float  # and by this, which makes scores in base 2 of them
    scale: float
    capped: bool
    ahead: int  # the place of the first query among the keys
    window: int | None
    first_seen: Tensor | None  # b q
    last_seen: Tensor | None  # b k
    query_documents: Tensor | None  # b q, where documents lie in between one another
    key_documents: Tensor | None  # b k
    blocks: Blocks | None
    programs: int

    @classmethod
    def of(cls, sight: Sight, scheme: Scheme, queries: Tensor, blocks: Blocks | None, programs: int) -> "_Plan":
        """The plan of a call."""
        batch, stretches, cap = queries.shape[0], sight.stretches, scheme.soft_cap

        def plain(numbers: Tensor | None) -> Tensor | None:
            return None if numbers is None else numbers.expand(batch, -1).to(torch.int32).contiguous()

        return cls(
            heads=scheme.heads,
            dtype=queries.dtype,
            inner=1.0 if cap is None else scheme.scale / cap,
            outer=(scheme.scale if cap is None else cap) * LOG2E,
            scale=scheme.scale,
            capped=cap is not None,
            ahead=sight.first_query - sight.first_key,
            window=sight.window,
            first_seen=plain(stretches[0] if stretches else None),
            last_seen=plain(stretches[1] if stretches else None),
            query_documents=plain(sight.query_documents if sight.scattered else None),
            key_documents=plain(sight.key_documents if sight.scattered else None),
            blocks=blocks,
            programs=programs,
        )

    def forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, table: Tensor | None, sink: Tensor | None
    ) -> tuple[Float[Tensor, "b h q v"], Float[Tensor, "b h q"]]:
        """What queries receive, and the log-sum-exp of their rows in base 2."""
        from lookfar.kernels.programs.distance_forward import forward

        blocks, (batch, heads, count) = self._blocks(FORWARD), queries.shape[:3]
        output = _like(queries, values.shape[-1])
        logsumexp = torch.empty(batch, heads, count, dtype=torch.float32, device=queries.device)
        forward[(-(-count // blocks.queries), batch * heads)](
            queries,
            keys,
            values,
            output,
            logsumexp,
            table if table is None else table * LOG2E,
            sink,
            self.first_seen,
            self.query_documents,
            self.key_documents,
            self.inner,
            self.outer,
            *_strides(queries, keys, values, output),
            *((0, 0, 0) if sink is None else sink.stride()),
            0 if table is None else table.shape[1],
            count,
            keys.shape[2],
            self.ahead,
            self.window or 0,
            **self._constants(blocks),
        )
        return output, logsumexp

    def backward(
        self,
        gradient: Tensor,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        table: Tensor | None,
        output: Tensor,
        logsumexp: Tensor,
        *,
        learned: bool,
        asked: bool,
        given: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor]:
        """Gradients of queries, keys, values and table, and ⟨gradient, output⟩ of every row; None where not needed."""
        from lookfar.kernels.programs import distance_keys, distance_queries

        batch, heads, count = queries.shape[:3]
        key_heads, known = keys.shape[1], keys.shape[2]
        towards = torch.empty_like(logsumexp)
        width = _power(values.shape[-1])
        distance_queries.towards[(-(-count // 64), batch * heads)](
            gradient,
            output,
            towards,
            *_strides(gradient, output),
            count,
            HEADS=heads,
            VALUE_WIDTH=values.shape[-1],
            BLOCK_V=width,
            BLOCK_Q=64,
        )
        scaled = None if table is None else table * LOG2E
        stride = 0 if table is None else table.shape[1]
        of_queries = of_keys = of_values = of_table = None
        numbers = count, known, self.ahead, self.window or 0
        if asked or learned:
            blocks = self._blocks(BACKWARD_QUERIES)
            programs, sums = -(-count // blocks.queries), None
            if learned and table is not None:
                programs = min(programs, -(-self.programs // (batch * heads)))
                shape = (batch, heads, programs * (blocks.queries // blocks.keys), stride)
                sums = torch.zeros(shape, dtype=torch.float32, device=queries.device)
            of_queries = _like(queries, queries.shape[-1])
            distance_queries.backward_queries[(programs, batch * heads)](
                queries,
                keys,
                values,
                gradient,
                logsumexp,
                towards,
                scaled,
                of_queries,
                sums,
                self.first_seen,
                self.query_documents,
                self.key_documents,
                self.inner,
                self.outer,
                self.scale,
                *_strides(queries, keys, values, gradient, of_queries),
                stride,
                *numbers,
                **self._constants(blocks),
            )
            of_table = None if sums is None else sums.sum((0, 2))
        if given:
            blocks, parted = self._blocks(BACKWARD_KEYS), key_heads != values.shape[1]
            of_keys = _like(keys, keys.shape[-1])
            of_values = _like(keys, values.shape[-1], torch.float32 if parted else None)
            distance_keys.backward_keys[(-(-known // blocks.keys), batch * key_heads)](
                queries,
                keys,
                values,
                gradient,
                logsumexp,
                towards,
                scaled,
                of_keys,
                of_values,
                self.first_seen,
                self.last_seen,
                self.query_documents,
                self.key_documents,
                self.inner,
                self.outer,
                self.scale,
                *_strides(queries, keys, values, gradient, of_keys, of_values),
                stride,
                *numbers,
                **self._constants(blocks),
            )
            if parted:  # b (maps groups) k v -> b groups k v
                of_values = of_values.unflatten(1, (-1, values.shape[1])).sum(1).to(values.dtype)
        return of_queries, of_keys, of_values, of_table, towards

    def decode(
        self, queries: Tensor, keys: Tensor, values: Tensor, table: Tensor | None, sink: Tensor | None
    ) -> Float[Tensor, "b h q v"]:
        """What a few queries receive, each from parts of the keys that are then merged."""
        from lookfar.kernels.programs import distance_decode

        blocks, (batch, heads, count) = self._blocks(DECODE), queries.shape[:3]
        known, key_heads, width = keys.shape[2], keys.shape[1], values.shape[-1]
        shown = known if self.window is None else min(known, self.window + count + blocks.keys)
        splits = max(1, min(-(-shown // blocks.keys), self.programs // (batch * key_heads)))
        span = -(-shown // (splits * blocks.keys)) * blocks.keys
        splits = -(-shown // span)
        parts = torch.empty(batch, heads, count, splits, width, dtype=torch.float32, device=queries.device)
        tops, totals = torch.empty_like(parts[..., 0]), torch.empty_like(parts[..., 0])
        constants = self._constants(blocks)
        del constants["BLOCK_Q"]
        rows = count * (heads // key_heads)
        distance_decode.decode[(splits, batch * key_heads)](
            queries,
            keys,
            values,
            parts,
            tops.contiguous(),
            totals,
            table if table is None else table * LOG2E,
            self.first_seen,
            self.query_documents,
            self.key_documents,
            self.inner,
            self.outer,
            *_strides(queries, keys, values),
            0 if table is None else table.shape[1],
            count,
            known,
            self.ahead,
            self.window or 0,
            span,
            BLOCK_R=_power(rows),
            **constants,
        )
        output = _like(queries, width)
        distance_decode.merge[(batch * heads * count,)](
            parts,
            tops,
            totals,
            sink,
            output,
            *((0, 0, 0) if sink is None else sink.stride()),
            *_strides(output),
            count,
            splits,
            HEADS=heads,
            VALUE_WIDTH=width,
            BLOCK_V=_power(width),
            BLOCK_S=_power(splits),
        )
        return output

    def _blocks(self, table: dict[tuple[int, int], Blocks]) -> Blocks:
        widest = _power(max(self.heads.head_width, self.heads.value_width))
        return self.blocks or table[self.dtype.itemsize, max(64, widest)]

    def _constants(self, blocks: Blocks) -> dict[str, Any]:
        heads = self.heads
        return {
            "HEADS": heads.heads,
            "MAPS": heads.maps,
            "GROUPS": heads.value_heads,
            "OWN_KEYS": heads.key_heads > heads.value_heads,
            "WIDTH": heads.head_width,
            "VALUE_WIDTH": heads.value_width,
            "BLOCK_E": _power(heads.head_width),
            "BLOCK_V": _power(heads.value_width),
            "CAPPED": self.capped,
            "WINDOWED": self.window is not None,
            "SCATTERED": self.key_documents is not None,
            "BLOCK_Q": blocks.queries,
            "BLOCK_K": blocks.keys,
            "PRECISION": "ieee" if self.dtype == torch.float32 else "tf32",
            "num_warps": blocks.warps,
            "num_stages": blocks.stages,
        }


class _Attend(torch.autograd.Function):
    """The programs with their gradients; those of the sink follow from the log-sum-exp, as for every flash kernel."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, table: Tensor | None, sink: Tensor | None, plan: _Plan
    ) -> Tensor:
        output, logsumexp = plan.forward(queries, keys, values, table, sink)
        ctx.save_for_backward(queries, keys, values, table, sink, output, logsumexp)
        ctx.plan = plan
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, table, sink, output, logsumexp = ctx.saved_tensors
        asked, known, given, learned, sunk, _ = ctx.needs_input_grad
        with _on(queries.device):
            *inner, towards = ctx.plan.backward(
                _dense(gradients[0]),
                queries,
                keys,
                values,
                table,
                output,
                logsumexp,
                learned=learned,
                asked=asked,
                given=known or given,
            )
        of_sink = -(sink.float() * LOG2E - logsumexp).exp2() * towards if sunk else None
        return *inner, None if of_sink is None else of_sink.to(sink.dtype), None


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Programs are started on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _dense(tensor: Tensor) -> Tensor:
    """The tensor itself where the numbers of a row are neighbours."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    """Of all axes but the last."""
    return [stride for each in tensors for stride in each.stride()[:3]]


def _like(rows: Tensor, width: int, dtype: torch.dtype | None = None) -> Float[Tensor, "b h t w"]:
    """An empty tensor with a row of so many numbers for every row; a token's heads are neighbours."""
    batch, heads, tokens = rows.shape[:3]
    empty = torch.empty(batch, tokens, heads, width, dtype=dtype or rows.dtype, device=rows.device)
    return empty.transpose(1, 2)


def _power(number: int) -> int:
    """The next power of two, at least 16, which products of tiles ask for."""
    return max(16, 1 << (number - 1).bit_length())
