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
    rows: int = 16  # queries of one instance of the softmax
    block: int = 128  # keys of one step of the softmax
    instances: int = 2048  # of the net
    partial: int = 256  # instances of its gradient, each with sums of its own


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

    def fill(self, weights: Float[Tensor, "hidden taps heads"]) -> Float[Tensor, "hidden2 taps2 heads2"]:
        """The weights with zeros up to the padded sizes."""
        more = (self.heads_padded - self.heads, self.taps_padded - self.taps, self.hidden_padded - self.hidden)
        return F.pad(weights, (0, more[0], 0, more[1], 0, more[2]))

    @property
    def constants(self) -> dict[str, Any]:
        """What programs are compiled for."""
        return {
            "HEADS": self.heads,
            "PADDED": self.heads_padded,
            "HIDDEN": self.hidden_padded,
            "TAPS": self.taps,
            "TAPS_PADDED": self.taps_padded,
            "BIASED": self.biased,
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
    """The definition, a strip at a time; nothing of a strip is kept. Saved are the inputs, outputs and log-sum-exps."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        *tensors, plan = given
        work = _Work([None if each is None else each.detach().contiguous() for each in tensors], plan)
        outputs = torch.empty_like(work.queries[..., :1].expand(*work.queries.shape[:3], work.values.shape[-1]),
                                   dtype=work.values.dtype, memory_format=torch.contiguous_format)  # fmt: skip
        logsumexps = work.queries.new_empty(work.queries.shape[:3], dtype=torch.float32)
        with torch.cuda.device_of(outputs):
            for strip in reversed(plan.strips):  # what the largest leaves free, the others fit in
                work.average(strip, work.rewritten(strip, work.scores(strip)), outputs, logsumexps)
        ctx.save_for_backward(*tensors, outputs, logsumexps)
        ctx.plan = plan
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, towards: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, outputs, logsumexps = ctx.saved_tensors
        work = _Work([None if each is None else each.contiguous() for each in tensors], ctx.plan)
        with torch.cuda.device_of(outputs), torch.autocast(outputs.device.type, enabled=False):
            return (*_gradients(work, towards.contiguous(), outputs, logsumexps), None, None, None)


def _gradients(work: "_Work", towards: Tensor, outputs: Tensor, logsumexps: Tensor) -> tuple[Tensor | None, ...]:
    """Of queries, keys, values, table, sink, and the five tensors of weights."""
    products = (towards.float() * outputs.float()).sum(-1)  # b h q
    of_queries = torch.empty_like(work.queries)
    of_keys, of_values = (torch.zeros_like(each, dtype=torch.float32) for each in (work.keys, work.values))
    of_table = None if work.table is None else torch.zeros_like(work.table)
    sums = work.sums()
    for strip in reversed(work.plan.strips):
        asked, seen = slice(strip.start, strip.stop), slice(strip.first, strip.last)
        scores = work.scores(strip)
        rewritten = work.rewritten(strip, scores)
        weights = work.weigh(strip, rewritten, towards, products, logsumexps)
        of_values[:, :, seen] += weights.mT @ towards[:, :, asked]
        del weights
        of_hidden = work.hidden_gradient(strip, scores, rewritten, sums)
        del scores
        of_scores = work.score_gradient(strip, of_hidden, rewritten)
        of_queries[:, :, asked] = of_scores @ work.keys[:, :, seen]
        of_keys[:, :, seen] += of_scores.mT @ work.queries[:, :, asked]
        if of_table is not None:
            work.add_diagonals(strip, rewritten, of_table)
    of_sink = None if work.sink is None else -(work.sink - logsumexps).exp() * products
    first_scores, first_table, first_bias, second, second_bias = (each.sum(0) for each in sums)
    middle = work.plan.net.taps // 2
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
        second_bias.unflatten(0, (work.plan.net.taps_padded, -1))[middle],
    )


class _Work:
    """The tensors of a call, and one method for each program that is launched on a strip of it."""

    def __init__(self, tensors: list[Any], plan: Plan) -> None:
        self.queries, self.keys, self.values, self.table, self.sink, *rest = tensors
        self.first_scores, self.first_table, self.first_bias, self.second, self.second_bias, *rest = rest
        self.begins, self.ends = rest
        self.plan = plan
        self.precision = "tf32x3" if self.queries.dtype == torch.float32 else "tf32"

    def scores(self, strip: Strip) -> Float[Tensor, "b h r w"]:
        """The products of queries and keys, in the type of the input and not yet scaled, as in the definition."""
        return self.queries[:, :, strip.start : strip.stop] @ self.keys[:, :, strip.first : strip.last].mT

    def rewritten(self, strip: Strip, scores: Float[Tensor, "b h r w"]) -> Float[Tensor, "b h r w"]:
        """The final scores where keys are seen."""
        from lookfar.kernels.programs.dape_forward import rewrite

        rewritten, items = torch.empty_like(scores, dtype=torch.float32), self._items(strip)
        rewrite[(min(items, self.plan.tiles.instances),)](
            scores, self.table, self.first_scores, self.first_table, self.first_bias, self.second, self.second_bias,
            self.begins, self.ends, rewritten, *self._sizes(strip, items), **self._constants(), KEEPS=self.plan.net.keeps,
        )  # fmt: skip
        return rewritten

    def average(self, strip: Strip, rewritten: Tensor, outputs: Tensor, logsumexps: Tensor) -> None:
        """Writes the rows of outputs and log-sum-exps that belong to the strip."""
        from lookfar.kernels.programs.dape_forward import average

        rows, tiles = strip.rows, self.plan.tiles
        average[(-(-rows // tiles.rows), self.queries.shape[0] * self.plan.net.heads)](
            rewritten, self.values, self.sink, self.begins, self.ends, outputs, logsumexps, *self._softmax_sizes(strip),
            SUNK=self.sink is not None, ROWS=tiles.rows, BLOCK=tiles.block, **self._softmax_constants(),
            num_stages=3,
        )  # fmt: skip

    def weigh(
        self, strip: Strip, rewritten: Tensor, towards: Tensor, products: Tensor, logsumexps: Tensor
    ) -> Float[Tensor, "b h r w"]:
        """The softmax weights; the gradient of the final scores takes their place."""
        from lookfar.kernels.programs.dape_backward import weigh

        weights, side = torch.empty_like(rewritten, dtype=self.values.dtype), self.plan.tiles.keys
        grid = (-(-strip.width // side), -(-strip.rows // side), self.queries.shape[0] * self.plan.net.heads)
        weigh[grid](
            rewritten, self.values, towards, products, logsumexps, self.begins, self.ends, weights,
            *self._softmax_sizes(strip), ROWS=side, BLOCK=side, **self._softmax_constants(),
        )  # fmt: skip
        return weights

    def sums(self) -> list[Tensor]:
        """Zeros for the gradients of the weights: one set for each instance that adds to them."""
        net, count = self.plan.net, self.plan.tiles.partial
        unfolded, like = net.taps_padded * net.heads_padded, {"dtype": torch.float32, "device": self.queries.device}
        shapes = [(net.hidden_padded, unfolded)] * 2 + [
            (net.hidden_padded,),
            (unfolded, net.hidden_padded),
            (unfolded,),
        ]
        return [torch.zeros(count, *shape, **like) for shape in shapes]

    def hidden_gradient(self, strip: Strip, scores: Tensor, towards: Tensor, sums: list[Tensor]) -> Tensor:
        """The gradient of the hidden map before its LeakyReLU, `[b hidden r w]`; those of weights are added to `sums`."""
        from lookfar.kernels.programs.dape_backward import hidden_gradient

        items, shape = self._items(strip), (scores.shape[0], self.plan.net.hidden_padded, *scores.shape[2:])
        of_hidden = scores.new_empty(shape, dtype=torch.float32)
        hidden_gradient[(min(items, self.plan.tiles.partial),)](
            scores, self.table, self.first_scores, self.first_table, self.first_bias, self.second,
            self.begins, self.ends, towards, of_hidden, *sums, *self._sizes(strip, items), **self._constants(),
        )  # fmt: skip
        return of_hidden

    def score_gradient(self, strip: Strip, of_hidden: Tensor, towards: Tensor) -> Float[Tensor, "b h r w"]:
        """The gradient of the products of queries and keys; that of the bias takes the place of `towards`."""
        from lookfar.kernels.programs.dape_backward import score_gradient

        of_scores, items = torch.empty_like(towards, dtype=self.queries.dtype), self._items(strip)
        sizes = (self.plan.scale, strip.rows, strip.width, strip.start, strip.first, self.queries.shape[2], items)
        score_gradient[(min(items, self.plan.tiles.instances),)](
            of_hidden, towards, self.first_scores, self.first_table, self.begins, self.ends, of_scores,
            *sizes, **self._constants(), KEEPS=self.plan.net.keeps,
        )  # fmt: skip
        return of_scores

    def add_diagonals(self, strip: Strip, of_bias: Tensor, of_table: Tensor) -> None:
        """Adds the sums along diagonals to the gradient of the table."""
        from lookfar.kernels.programs.dape_backward import add_diagonals

        plan, block = self.plan, self.plan.tiles.block
        lowest = plan.high + strip.first - (plan.offset + strip.stop - 1)
        grid = (-(-(strip.width + strip.rows - 1) // block), plan.net.heads)
        add_diagonals[grid](
            of_bias, self.begins, self.ends, of_table, of_bias.shape[0], strip.rows, strip.width, strip.start,
            strip.first, self.queries.shape[2], plan.offset, plan.high, of_table.shape[1], lowest,
            HEADS=plan.net.heads, ROWS=plan.tiles.rows, BLOCK=block,
        )  # fmt: skip

    def _items(self, strip: Strip) -> int:
        return self.queries.shape[0] * strip.rows * -(-strip.width // self.plan.tiles.keys)

    def _sizes(self, strip: Strip, items: int) -> tuple[float | int, ...]:
        plan, diagonals = self.plan, 1 if self.table is None else self.table.shape[1]
        sizes = (strip.rows, strip.width, strip.start, strip.first, self.queries.shape[2])
        return (plan.scale, *sizes, plan.offset, plan.high, diagonals, items)

    def _constants(self) -> dict[str, Any]:
        return {**self.plan.net.constants, "BLOCK": self.plan.tiles.keys, "PRECISION": self.precision, "num_stages": 1}

    def _softmax_sizes(self, strip: Strip) -> tuple[int, ...]:
        sizes = (strip.rows, strip.width, strip.start, strip.first)
        return (*sizes, self.queries.shape[2], self.keys.shape[2], self.values.shape[-1])

    def _softmax_constants(self) -> dict[str, Any]:
        value = max(LEAST, 1 << (self.values.shape[-1] - 1).bit_length())
        return {"HEADS": self.plan.net.heads, "VALUE": value, "PRECISION": self.precision}
