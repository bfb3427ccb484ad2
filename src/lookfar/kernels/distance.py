"""Attention with a bias by distance on a GPU: programs in Triton, forward and backward, for training and decoding."""

import math
import os
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from lookfar.attention.scheme import Scheme
from lookfar.kernels.base import Call, Kernel
from lookfar.kernels.programs.distance_blocks import PAD, PROGRAMS, Blocks
from lookfar.sight import Sight

if TYPE_CHECKING:
    from lookfar.kernels.programs.distance_plan import Plan

TYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
WIDEST = 256  # of keys and values
MOST_LINES = (1 << 16) - 1  # of a batch, which is an axis of a grid
ROWS = 64  # queries of heads that share a key head up to which keys are divided among programs
LONGER = 16  # tables are a multiple of this long, so that few lengths occur
LOG2E = math.log2(math.e)


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
        if call.batch > MOST_LINES:
            return f"a batch of {call.batch:,} is more than the {MOST_LINES:,} that a GPU starts at once"
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
        from lookfar.kernels.programs.distance_plan import Plan  # triton is needed only where this kernel is

        table = None
        if scheme.biases:
            count = sight.first_query - sight.first_key + sight.queries
            count = count if sight.window is None else min(count, sight.window)
            count = -(-count // LONGER) * LONGER
            table = scheme.table(torch.arange(-PAD, count + PAD, device=queries.device)).float().contiguous()
        sink = scheme.sink(sight.query_positions)
        sink = None if sink is None else sink.expand(queries.shape[:3])
        plan = Plan.of(sight, scheme, queries, self.blocks, self.programs)
        needing = torch.is_grad_enabled() and any(
            each is not None and each.requires_grad for each in (queries, keys, values, table, sink)
        )
        with _on(queries.device):
            if not needing and sight.queries * (scheme.heads.score_heads // scheme.heads.key_heads) <= ROWS:
                return plan.decode(_dense(queries), _dense(keys), _dense(values), table, sink)
            return _Attend.apply(_dense(queries), _dense(keys), _dense(values), table, sink, plan)


class _Attend(torch.autograd.Function):
    """The programs with their gradients; those of the sink follow from the log-sum-exp, as for every flash kernel."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, table: Tensor | None, sink: Tensor | None, plan: "Plan"
    ) -> Tensor:
        output, logsumexp = plan.forward(queries, keys, values, table, sink)
        ctx.save_for_backward(queries, keys, values, table, sink, output, logsumexp)
        ctx.plan = plan
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # as decorated
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
