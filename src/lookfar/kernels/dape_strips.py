"""Attention with DAPE's net, strip by strip, forward and backward: what is launched, in which order."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

LEAST = 16  # of each axis of a product on tensor cores


@dataclass(frozen=True)
class Tiles:
    """How the work on a strip is divided."""

    keys: int = 64  # of one query, all heads together, in one step of the net
    exact: int = 16  # the same in float32, whose products are not those of tensor cores
    side: int = 64  # queries and keys of one instance of the softmax's gradient
    rows: int = 16  # queries of one instance of the softmax
    block: int = 64  # keys of one step of the softmax
    instances: int = 2112  # of the net; 16 for each multiprocessor of an H100
    partial: int = 264  # instances of its gradient, each with sums of its own


@dataclass(frozen=True)
class Net:
    """The sizes of the net, and how it treats the bias."""

    heads: int
    hidden: int
    taps: int
    biased: bool  # it reads a bias
    keeps: bool  # which is added to the scores, too

    @property
    def heads_padded(self) -> int:
        """A power of two."""
        return max(LEAST, 1 << (self.heads - 1).bit_length())

    @property
    def hidden_padded(self) -> int:
        """A power of two."""
        return max(LEAST, 1 << (self.hidden - 1).bit_length())

    @property
    def taps_padded(self) -> int:
        """A power of two."""
        return 1 << (self.taps - 1).bit_length()

    @property
    def columns(self) -> int:
        """Of the unfolded row, which are (tap, head)."""
        return self.taps_padded * self.heads_padded

    def unfolded(self, weights: Float[Tensor, "taps heads hidden"]) -> Float[Tensor, "columns channels"]:
        """The weights as a matrix over the unfolded row, with zeros up to the padded sizes."""
        more = (self.hidden_padded - self.hidden, self.heads_padded - self.heads, self.taps_padded - self.taps)
        return F.pad(weights, (0, more[0], 0, more[1], 0, more[2])).flatten(0, 1)

    @property
    def constants(self) -> dict[str, Any]:
        """What programs are compiled for."""
        return {
            "heads": self.heads,
            "padded": self.heads_padded,
            "channels": self.hidden_padded,
            "taps": self.taps,
            "taps_padded": self.taps_padded,
            "biased": self.biased,
        }


@dataclass(frozen=True)
class Strip:
    """The queries from `start` to `stop` and the keys from `first` to `last`, which hold all that they see."""

    start: int
    stop: int
    first: int
    last: int

    @property
    def rows(self) -> int:
        """How many queries."""
        return self.stop - self.start

    @property
    def width(self) -> int:
        """How many keys."""
        return self.last - self.first


@dataclass(frozen=True)
class Plan:
    """What is known of a call before any tensor is looked at."""

    tiles: Tiles
    strips: list[Strip]
    net: Net
    offset: int  # the index of the key that is the first query's own
    high: int  # the distance of the table's first column; the next is one shorter
    scale: float


class Attend(torch.autograd.Function):
    """The definition, a strip at a time. Nothing of a strip is kept; inputs and log-sum-exps are.

    Takes queries, keys, values, the table of the bias and the sink or None, five tensors of weights, the first and the
    last key that each query sees, and the plan.
    """

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        *tensors, plan = given
        work = _Work(tensors, plan)
        outputs = work.values.new_empty(*work.queries.shape[:3], work.values.shape[-1])
        logsumexps = work.queries.new_empty(work.queries.shape[:3], dtype=torch.float32)
        with torch.cuda.device_of(outputs):
            for strip in reversed(plan.strips):  # what the largest leaves free, the others fit in
                work.average(strip, work.rewritten(strip, work.scores(strip)), outputs, logsumexps)
        ctx.save_for_backward(*tensors, logsumexps)
        ctx.plan = plan
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[reportIncompatibleMethodOverride]  # the decorator loses names
        *tensors, logsumexps = ctx.saved_tensors
        with torch.cuda.device_of(logsumexps), torch.autocast(logsumexps.device.type, enabled=False):
            found = _gradients(_Work(tensors, ctx.plan), gradients[0].contiguous(), logsumexps)
        return (*found, None, None, None)


def _gradients(work: "_Work", towards: Tensor, logsumexps: Tensor) -> tuple[Tensor | None, ...]:
    """Of queries, keys, values, table, sink, and the five tensors of weights."""
    products = torch.empty_like(logsumexps)
    of_queries = torch.empty_like(work.queries)
    of_keys, of_values = (torch.zeros_like(each, dtype=torch.float32) for each in (work.keys, work.values))
    of_table = None if work.table is None else torch.zeros_like(work.table)
    sums = work.sums()
    for strip in reversed(work.plan.strips):
        asked, seen = slice(strip.start, strip.stop), slice(strip.first, strip.last)
        scores = work.scores(strip)
        of_rewritten = work.rewritten(strip, scores)
        work.row_products(strip, of_rewritten, towards, products, logsumexps)
        weights = work.weigh(strip, of_rewritten, towards, products, logsumexps)
        of_values[:, :, seen] += weights.mT @ towards[:, :, asked]
        del weights
        of_hidden = work.hidden_gradient(strip, scores, of_rewritten, sums)
        del scores
        of_scores = work.score_gradient(strip, of_hidden, of_rewritten)
        del of_hidden
        of_queries[:, :, asked] = of_scores @ work.keys[:, :, seen]
        of_keys[:, :, seen] += of_scores.mT @ work.queries[:, :, asked]
        if of_table is not None:
            work.add_diagonals(strip, of_rewritten, of_table)
    of_sink = None if work.sink is None else -(work.sink - logsumexps).exp() * products
    first_scores, first_table, first_bias, second, second_bias = (each.sum(0) for each in sums)
    return (
        of_queries,
        of_keys.to(work.keys.dtype),
        of_values.to(work.values.dtype),
        of_table,
        of_sink,
        first_scores,
        first_table if work.plan.net.biased else None,
        first_bias,
        second,
        second_bias.unflatten(0, (work.plan.net.taps_padded, -1))[work.plan.net.taps // 2],
    )


class _Work:
    """The tensors of a call, and one method for each program that is launched on a strip of it."""

    def __init__(self, tensors: list[Any], plan: Plan) -> None:
        from lookfar.kernels.programs import dape_backward, dape_forward  # Triton, which need not be there

        whole: list[Any] = [None if each is None else each.contiguous() for each in tensors]
        self.queries, self.keys, self.values, self.table, self.sink = whole[:5]
        self.first_scores, self.first_table, self.first_bias, self.second, self.second_bias = whole[5:10]
        self.begins, self.ends = whole[10:]
        self.plan = plan
        self.lift = None if self.table is None else self._lift()
        self.forward: Any = dape_forward
        self.backward: Any = dape_backward
        self.precision, self.fine = ("ieee", "ieee") if self.queries.dtype == torch.float32 else ("tf32", "tf32x3")
        self.block = min(plan.tiles.keys, plan.tiles.exact) if self.precision == "ieee" else plan.tiles.keys

    def scores(self, strip: Strip) -> Float[Tensor, "b h r w"]:
        """The products of queries and keys, in the type of the input and not yet scaled, as in the definition."""
        return self.queries[:, :, strip.start : strip.stop] @ self.keys[:, :, strip.first : strip.last].mT

    def rewritten(self, strip: Strip, scores: Float[Tensor, "b h r w"]) -> Float[Tensor, "b h r w"]:
        """The final scores where keys are seen."""
        rewritten, items = torch.empty_like(scores, dtype=torch.float32), self._items(strip, self.block)
        self.forward.rewrite[(min(items, self.plan.tiles.instances),)](
            *(scores, self.table, self.lift, self.first_scores, self.first_table, self.first_bias),
            *(self.second, self.second_bias, self.begins, self.ends, rewritten),
            *self._sizes(strip, items),
            **self._constants(self.block),
            keeps=self.plan.net.keeps,
            fine=self.fine,
        )
        return rewritten

    def average(self, strip: Strip, rewritten: Tensor, outputs: Tensor, logsumexps: Tensor) -> None:
        """Writes the rows of outputs and log-sum-exps that belong to the strip."""
        tiles = self.plan.tiles
        self.forward.average[-(-strip.rows // tiles.rows), *self._maps()](
            *(rewritten, self.values, self.sink, self.begins, self.ends, outputs, logsumexps),
            *self._softmax_sizes(strip),
            **self._softmax_constants(),
            sunk=self.sink is not None,
            side=tiles.rows,
            block=tiles.block,
            num_stages=2,
        )

    def row_products(
        self, strip: Strip, rewritten: Tensor, towards: Tensor, products: Tensor, logsumexps: Tensor
    ) -> None:
        """Writes the products of the rows of weights and of their gradients."""
        tiles = self.plan.tiles
        self.backward.row_products[-(-strip.rows // tiles.rows), *self._maps()](
            *(rewritten, self.values, towards, logsumexps, self.begins, self.ends, products),
            *self._softmax_sizes(strip),
            **self._softmax_constants(),
            side=tiles.rows,
            block=tiles.block,
            num_stages=2,
        )

    def weigh(
        self, strip: Strip, rewritten: Tensor, towards: Tensor, products: Tensor, logsumexps: Tensor
    ) -> Float[Tensor, "b h r w"]:
        """The softmax weights; the gradient of the final scores takes the place of these."""
        weights, side = torch.empty_like(rewritten, dtype=self.values.dtype), self.plan.tiles.side
        self.backward.weigh[-(-strip.width // side) * -(-strip.rows // side), *self._maps()](
            *(rewritten, self.values, towards, products, logsumexps, self.begins, self.ends, weights),
            *self._softmax_sizes(strip),
            **self._softmax_constants(),
            side=side,
            num_warps=8,
        )
        return weights

    def sums(self) -> list[Tensor]:
        """Zeros for the gradients of the weights: one set for each instance that adds to them."""
        net, count = self.plan.net, self.plan.tiles.partial
        matrix = (net.columns, net.hidden_padded)
        shapes = [matrix, matrix, (net.hidden_padded,), matrix, (net.columns,)]
        return [self.first_bias.new_zeros(count, *shape) for shape in shapes]

    def hidden_gradient(self, strip: Strip, scores: Tensor, towards: Tensor, sums: list[Tensor]) -> Tensor:
        """Of the hidden map before its LeakyReLU, `[b hidden r w]`; gradients of weights are added to `sums`."""
        items, shape = self._items(strip, self.block), (scores.shape[0], self.plan.net.hidden_padded, *scores.shape[2:])
        of_hidden = scores.new_empty(shape, dtype=torch.float32)
        self.backward.hidden_gradient[(min(items, self.plan.tiles.partial),)](
            *(scores, self.table, self.lift, self.first_scores, self.first_table, self.first_bias),
            *(self.second, self.begins, self.ends, towards, of_hidden, *sums),
            *self._sizes(strip, items),
            **self._constants(self.block),
            fine=self.fine,
            num_warps=8,
        )
        return of_hidden

    def score_gradient(self, strip: Strip, of_hidden: Tensor, towards: Tensor) -> Float[Tensor, "b h r w"]:
        """Of the products of queries and keys; that of the bias takes the place of `towards`."""
        of_scores, items = torch.empty_like(towards, dtype=self.queries.dtype), self._items(strip, self.block)
        self.backward.score_gradient[(min(items, self.plan.tiles.instances),)](
            *(of_hidden, towards, self.first_scores, self.first_table, self.begins, self.ends, of_scores),
            *(self.plan.scale, *self._place(strip), items),
            **self._constants(self.block),
            keeps=self.plan.net.keeps,
            num_warps=8,
        )
        return of_scores

    def add_diagonals(self, strip: Strip, of_bias: Tensor, of_table: Tensor) -> None:
        """Adds the sums along diagonals to the gradient of the table."""
        plan, tiles = self.plan, self.plan.tiles
        lowest = plan.high + strip.first - (plan.offset + strip.stop - 1)
        self.backward.add_diagonals[(-(-(strip.width + strip.rows - 1) // tiles.block), plan.net.heads)](
            *(of_bias, self.begins, self.ends, of_table, of_bias.shape[0], *self._place(strip)),
            *(plan.offset, plan.high, of_table.shape[1], lowest),
            heads=plan.net.heads,
            side=tiles.rows,
            block=tiles.block,
        )

    def _lift(self) -> Float[Tensor, "channels n"]:
        """What the bias adds to the hidden map at every distance, where the row goes on at both sides."""
        net, table = self.plan.net, F.pad(self.table, (self.plan.net.taps // 2, self.plan.net.taps // 2))  # h n
        weights = self.first_table.unflatten(0, (net.taps_padded, -1))[:, : net.heads]  # tap h channels
        moved = table.unfold(1, self.table.shape[1], 1)  # h tap n
        return sum((weights[tap].mT @ moved[:, tap] for tap in range(net.taps)), torch.zeros(()).to(table)).contiguous()

    def _items(self, strip: Strip, block: int) -> int:
        return self.queries.shape[0] * strip.rows * -(-strip.width // block)

    def _maps(self) -> tuple[int, int]:
        return self.plan.net.heads, self.queries.shape[0]

    def _place(self, strip: Strip) -> tuple[int, ...]:
        return strip.rows, strip.width, strip.start, strip.first, self.queries.shape[2]

    def _sizes(self, strip: Strip, items: int) -> tuple[float | int, ...]:
        plan, diagonals = self.plan, 1 if self.table is None else self.table.shape[1]
        return (plan.scale, *self._place(strip), plan.offset, plan.high, diagonals, items)

    def _constants(self, block: int) -> dict[str, Any]:
        return {**self.plan.net.constants, "block": block, "precision": self.precision, "num_stages": 1}

    def _softmax_sizes(self, strip: Strip) -> tuple[int, ...]:
        return (*self._place(strip), self.keys.shape[2], self.values.shape[-1])

    def _softmax_constants(self) -> dict[str, Any]:
        value = max(LEAST, 1 << (self.values.shape[-1] - 1).bit_length())
        widen = not self.queries.is_cuda  # in the interpreter
        return {"heads": self.plan.net.heads, "value_padded": value, "precision": self.precision, "widen": widen}
