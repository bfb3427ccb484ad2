"""Starts the programs of the kernel `distance`: what each is told beside its tensors, and how the work is divided."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lookfar.attention.scheme import Scheme
from lookfar.kernels.programs import distance_decode, distance_forward, distance_keys, distance_queries
from lookfar.kernels.programs.distance_blocks import (
    BACKWARD_KEYS,
    BACKWARD_QUERIES,
    DECODE,
    FORWARD,
    LEARNED,
    PIECE,
    Blocks,
    of_width,
    power,
)
from lookfar.kernels.programs.samples import Sample
from lookfar.methods.base import Heads
from lookfar.sight import Sight

LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Plan:
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
    def of(cls, sight: Sight, scheme: Scheme, queries: Tensor, blocks: Blocks | None, programs: int) -> "Plan":
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
        blocks, (batch, heads, count) = self._blocks(FORWARD), queries.shape[:3]
        output = _like(queries, values.shape[-1])
        logsumexp = torch.empty(batch, heads, count, dtype=torch.float32, device=queries.device)
        _start(
            distance_forward.forward,
            (-(-count // blocks.queries), heads, batch),
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
        batch, heads, count = queries.shape[:3]
        key_heads, known = keys.shape[1], keys.shape[2]
        towards = torch.empty_like(logsumexp)
        width = power(values.shape[-1])
        _start(
            distance_queries.towards,
            (-(-count // 64), heads, batch),
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
            blocks = self._blocks(LEARNED if learned else BACKWARD_QUERIES)
            programs, sums = -(-count // blocks.queries), None
            if learned and table is not None:
                programs = min(programs, -(-self.programs // max(1, batch * heads)))
                shape = (batch, heads, programs * (blocks.queries // blocks.keys), stride)
                sums = torch.zeros(shape, dtype=torch.float32, device=queries.device)
            of_queries = _like(queries, queries.shape[-1])
            _start(
                distance_queries.backward_queries,
                (programs, heads, batch),
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
            _start(
                distance_keys.backward_keys,
                (-(-known // blocks.keys), key_heads, batch),
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
        blocks, (batch, heads, count) = self._blocks(DECODE), queries.shape[:3]
        known, key_heads, width = keys.shape[2], keys.shape[1], values.shape[-1]
        shown = known if self.window is None else min(known, self.window + count + blocks.keys)
        splits = max(1, min(-(-shown // blocks.keys), self.programs // max(1, batch * key_heads)))
        span = -(-shown // (splits * blocks.keys)) * blocks.keys
        splits = -(-shown // span)
        parts = torch.empty(batch, heads, count, splits, width, dtype=torch.float32, device=queries.device)
        tops = torch.empty(batch, heads, count, splits, dtype=torch.float32, device=queries.device)
        totals = torch.empty_like(tops)
        constants = self._constants(blocks)
        del constants["BLOCK_Q"]
        rows = count * (heads // key_heads)
        _start(
            distance_decode.decode,
            (splits, key_heads, batch),
            queries,
            keys,
            values,
            parts,
            tops,
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
            BLOCK_R=power(rows),
            **constants,
        )
        output = _like(queries, width)
        _start(
            distance_decode.merge,
            (batch * heads * count,),
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
            BLOCK_V=power(width),
            BLOCK_S=power(splits),
            PIECE=PIECE,
        )
        return output

    def _blocks(self, table: dict[tuple[int, int], Blocks]) -> Blocks:
        return self.blocks or of_width(table, self.dtype, max(self.heads.head_width, self.heads.value_width))

    def _constants(self, blocks: Blocks) -> dict[str, Any]:
        heads = self.heads
        return {
            "HEADS": heads.heads,
            "MAPS": heads.maps,
            "GROUPS": heads.value_heads,
            "OWN_KEYS": heads.key_heads > heads.value_heads,
            "WIDTH": heads.head_width,
            "VALUE_WIDTH": heads.value_width,
            "BLOCK_E": power(heads.head_width),
            "BLOCK_V": power(heads.value_width),
            "CAPPED": self.capped,
            "WINDOWED": self.window is not None,
            "SCATTERED": self.key_documents is not None,
            "BLOCK_Q": blocks.queries,
            "BLOCK_K": blocks.keys,
            "PRECISION": "ieee" if self.dtype == torch.float32 else "tf32",
            "num_warps": blocks.warps,
            "num_stages": blocks.stages,
            "enable_fp_fusion": True,
        }


def _start(program: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Start so many programs, which may be none: an empty batch has no rows."""
    if all(grid):
        program[grid](*arguments, **constants)


def _strides(*tensors: Tensor) -> list[int]:
    """Of all axes but the last."""
    return [stride for each in tensors for stride in each.stride()[:3]]


def _like(rows: Tensor, width: int, dtype: torch.dtype | None = None) -> Float[Tensor, "b h t w"]:
    """An empty tensor with a row of so many numbers for every row; a token's heads are neighbours."""
    batch, heads, tokens = rows.shape[:3]
    empty = torch.empty(batch, tokens, heads, width, dtype=dtype or rows.dtype, device=rows.device)
    return empty.transpose(1, 2)


def samples() -> list[Sample]:
    """None: the programs have their own."""
    return []
