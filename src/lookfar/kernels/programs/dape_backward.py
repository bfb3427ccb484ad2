"""Gradients of DAPE's net over strips of scores; the scores and the hidden map are computed again.

No two instances write to one place: gradients of weights are sums of one instance each, added up afterwards in order.
"""

from typing import no_type_check

import triton
import triton.language as tl

from lookfar.kernels.programs.dape_forward import (
    INTEGERS,
    LEAK,
    NET,
    PRECISIONS,
    WIDE,
    before_leak,
    matrix,
    product,
    unfold,
)
from lookfar.kernels.programs.samples import Sample


@triton.jit
@no_type_check
def row_products(rewritten, values, towards, logsumexps, begins, ends, products, rows, width, start, first, queries,
                 total_keys, value_width, heads: tl.constexpr, value_padded: tl.constexpr, side: tl.constexpr,
                 block: tl.constexpr, precision: tl.constexpr, widen: tl.constexpr):  # fmt: skip
    """The products of softmax weights and their gradients, added up over each row.

    The rounded outputs would give them, too, but then the gradients of a row's scores would not add up to nothing.
    """
    line, batch = tl.program_id(0) * side + tl.arange(0, side), tl.program_id(2)
    map_of = batch * heads + tl.program_id(1)
    inside, column = line < rows, tl.arange(0, value_padded)
    query = batch * queries + start + line
    begin, end = tl.load(begins + query, inside, other=2**30), tl.load(ends + query, inside, other=-1)
    own = map_of.to(tl.int64) * queries + start + line
    asked = inside[:, None] & (column < value_width)[None, :]
    gradient = tl.load(towards + own[:, None] * value_width + column[None, :], asked, other=0.0)
    logsumexp, total = tl.load(logsumexps + own, inside, other=0.0), tl.zeros([side], tl.float32)
    rewritten += map_of.to(tl.int64) * rows * width
    values += map_of.to(tl.int64) * total_keys * value_width
    for base in range(first + (tl.min(begin) - first) // block * block, tl.max(end) + 1, block):
        keys = base + tl.arange(0, block)
        known = (keys[None, :] >= begin[:, None]) & (keys[None, :] <= end[:, None])
        scores = tl.load(rewritten + line[:, None] * width + (keys - first)[None, :], known, other=float("-inf"))
        held = (keys < total_keys)[None, :] & (column < value_width)[:, None]
        given = tl.load(values + keys[None, :] * value_width + column[:, None], held, other=0.0)
        change = product(gradient, given, tl.zeros([side, block], tl.float32), precision, widen)
        total += tl.sum(tl.exp(scores - logsumexp[:, None]) * change, 1)
    tl.store(products + own, total, inside)


@triton.jit
@no_type_check
def weigh(rewritten, values, towards, products, logsumexps, begins, ends, weights, rows, width, start, first, queries,
          total_keys, value_width, heads: tl.constexpr, value_padded: tl.constexpr, side: tl.constexpr,
          precision: tl.constexpr, widen: tl.constexpr):  # fmt: skip
    """Softmax weights of a strip, 0 for hidden keys, and the gradient of the final scores in the place of these."""
    tiles, batch = tl.cdiv(width, side), tl.program_id(2)
    tile, line = tl.program_id(0) % tiles, tl.program_id(0) // tiles * side + tl.arange(0, side)
    map_of = batch * heads + tl.program_id(1)
    inside, column = line < rows, tl.arange(0, value_padded)
    query = batch * queries + start + line
    begin, end = tl.load(begins + query, inside, other=2**30), tl.load(ends + query, inside, other=-1)
    own = map_of.to(tl.int64) * queries + start + line
    keys = first + tile * side + tl.arange(0, side)
    known = (keys[None, :] >= begin[:, None]) & (keys[None, :] <= end[:, None])
    base, places = map_of.to(tl.int64) * rows * width, line[:, None] * width + (keys - first)[None, :]
    weight = tl.zeros([side, side], tl.float32)
    if (first + tile * side <= tl.max(end)) & (first + tile * side + side > tl.min(begin)):
        asked = inside[:, None] & (column < value_width)[None, :]
        gradient = tl.load(towards + own[:, None] * value_width + column[None, :], asked, other=0.0)
        values += map_of.to(tl.int64) * total_keys * value_width
        held = (keys < total_keys)[None, :] & (column < value_width)[:, None]
        given = tl.load(values + keys[None, :] * value_width + column[:, None], held, other=0.0)
        scores = tl.load(rewritten + base + places, known, other=float("-inf"))
        weight = tl.exp(scores - tl.load(logsumexps + own, inside, other=0.0)[:, None])
        change = product(gradient, given, tl.zeros([side, side], tl.float32), precision, widen)
        change = weight * (change - tl.load(products + own, inside, other=0.0)[:, None])
        tl.store(rewritten + base + places, change, known)
    tl.store(weights + base + places, weight, inside[:, None] & (keys < first + width)[None, :])


@triton.jit
@no_type_check
def hidden_gradient(scores, table, lift, first_scores, first_table, first_bias, second, begins, ends, towards,
                    of_hidden, of_first_scores, of_first_table, of_first_bias, of_second, of_second_bias, scale, rows,
                    width, start, first, queries, offset, high, diagonals, items, heads: tl.constexpr,
                    padded: tl.constexpr, channels: tl.constexpr, taps: tl.constexpr, taps_padded: tl.constexpr,
                    biased: tl.constexpr, block: tl.constexpr, precision: tl.constexpr,
                    fine: tl.constexpr):  # fmt: skip
    """The gradient of the hidden map before its LeakyReLU, and those of all weights, added to what each instance has.

    The second convolution turned round: hidden key j has fed key j - (tap - ⌊taps / 2⌋).
    """
    wide: tl.constexpr = taps_padded * padded
    channel, column, instance = tl.arange(0, channels), tl.arange(0, wide), tl.program_id(0)
    weights, back = matrix(first_scores, wide, channels), matrix(second, wide, channels)
    hidden_bias = tl.load(first_bias + channel)
    own = instance * wide * channels + column[:, None] * channels + channel[None, :]
    own_channel, own_column = instance * channels + channel, instance * wide + column
    sum_scores, sum_second = tl.load(of_first_scores + own), tl.load(of_second + own)
    sum_table = tl.load(of_first_table + own) if biased else sum_scores
    sum_bias, sum_second_bias = tl.load(of_first_bias + own_channel), tl.load(of_second_bias + own_column)
    tiles, stride = tl.cdiv(width, block), rows * width
    for item in range(instance, items, tl.num_programs(0)):
        tile, row, batch = item % tiles, item // tiles % rows, item // tiles // rows
        query = start + row
        begin, end = tl.load(begins + batch * queries + query), tl.load(ends + batch * queries + query)
        low, longest = first + tile * block, offset + query - high
        keys = low + tl.arange(0, block)
        if (low <= end) & (low + block > begin):
            base = (batch.to(tl.int64) * heads * rows + row) * width
            before = before_leak(scores + base, stride, table, lift, diagonals, keys, low, low + block, first, longest,
                                 begin, end, scale, weights, first_table, hidden_bias, heads, padded, channels, taps,
                                 taps_padded, biased, precision, fine)  # fmt: skip
            known = ((keys >= begin) & (keys <= end))[:, None]
            hidden = tl.where(known, tl.where(before > 0, before, LEAK * before), 0.0)
            given = unfold(towards + base, stride, keys, first, begin, end, heads, padded, taps, taps_padded, -1)
            sum_second = tl.dot(tl.trans(given), hidden, sum_second, input_precision=precision)
            sum_second_bias += tl.sum(given, 0)
            change = tl.dot(given, back, input_precision=precision) * tl.where(before > 0, 1.0, LEAK)
            change = tl.where(known, change, 0.0)
            sum_bias += tl.sum(change, 0)
            hidden_base = of_hidden + (batch.to(tl.int64) * channels * rows + row) * width
            tl.store(hidden_base + channel[None, :] * stride + (keys - first)[:, None], change, known)
            seen = unfold(scores + base, stride, keys, first, begin, end, heads, padded, taps, taps_padded, 1)
            sum_scores = tl.dot(tl.trans(seen * scale), change, sum_scores, input_precision=precision)
            if biased:
                bias = unfold(table, diagonals, keys, longest, begin, end, heads, padded, taps, taps_padded, 1)
                sum_table = tl.dot(tl.trans(bias), change, sum_table, input_precision=precision)
    tl.store(of_first_scores + own, sum_scores)
    tl.store(of_second + own, sum_second)
    if biased:
        tl.store(of_first_table + own, sum_table)
    tl.store(of_first_bias + own_channel, sum_bias)
    tl.store(of_second_bias + own_column, sum_second_bias)


@triton.jit
@no_type_check
def score_gradient(of_hidden, towards, first_scores, first_table, begins, ends, of_scores, scale, rows, width, start,
                   first, queries, items, heads: tl.constexpr, padded: tl.constexpr, channels: tl.constexpr,
                   taps: tl.constexpr, taps_padded: tl.constexpr, biased: tl.constexpr, keeps: tl.constexpr,
                   block: tl.constexpr, precision: tl.constexpr):  # fmt: skip
    """The gradient of the products of queries and keys, 0 where hidden, and that of the bias in place of `towards`.

    The first convolution turned round.
    """
    head, column = tl.arange(0, padded), tl.arange(0, taps_padded * channels)
    turned = (column // channels * padded * channels + column % channels)[:, None] + head[None, :] * channels
    weights = tl.load(first_scores + turned)
    table_weights = tl.load(first_table + turned) if biased else weights
    tiles, stride = tl.cdiv(width, block), rows * width
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        tile, row, batch = item % tiles, item // tiles % rows, item // tiles // rows
        query = start + row
        begin, end = tl.load(begins + batch * queries + query), tl.load(ends + batch * queries + query)
        keys = first + tile * block + tl.arange(0, block)
        base = (batch.to(tl.int64) * heads * rows + row) * width
        places = head[None, :] * stride + (keys - first)[:, None]
        of_products = tl.zeros([block, padded], tl.float32)
        if (first + tile * block <= end) & (first + tile * block + block > begin):
            seen = ((keys >= begin) & (keys <= end))[:, None]
            known = (head < heads)[None, :] & seen
            hidden_base = of_hidden + (batch.to(tl.int64) * channels * rows + row) * width
            change = unfold(hidden_base, stride, keys, first, begin, end, channels, channels, taps, taps_padded, -1)
            own = tl.load(towards + base + places, known, other=0.0)
            of_products = own + tl.dot(change, weights, input_precision=precision)
            of_products = tl.where(seen, scale * of_products, 0.0)
            if biased:
                of_bias = tl.dot(change, table_weights, input_precision=precision)
                if keeps:
                    of_bias += own
                tl.store(towards + base + places, of_bias, known)
        tl.store(of_scores + base + places, of_products, (head < heads)[None, :] & (keys < first + width)[:, None])


@triton.jit
@no_type_check
def add_diagonals(of_bias, begins, ends, of_table, batches, rows, width, start, first, queries, offset, high, diagonals,
                  lowest, heads: tl.constexpr, side: tl.constexpr, block: tl.constexpr):  # fmt: skip
    """Adds the gradient of the bias of a strip to that of the table: one sum for each distance."""
    head, diagonal = tl.program_id(1), lowest + tl.program_id(0) * block + tl.arange(0, block)
    inside = (diagonal >= 0) & (diagonal < diagonals)
    own = of_table + head * diagonals + diagonal
    total = tl.load(own, inside, other=0.0)
    for batch in range(batches):
        base = of_bias + (batch * heads + head).to(tl.int64) * rows * width
        for top in range(0, rows, side):
            line = top + tl.arange(0, side)
            query = batch * queries + start + line
            begin, end = tl.load(begins + query, line < rows, other=2**30), tl.load(ends + query, line < rows, other=-1)
            keys = diagonal[None, :] + (offset + start + line - high)[:, None]
            known = inside[None, :] & (keys >= begin[:, None]) & (keys <= end[:, None])
            total += tl.sum(tl.load(base + line[:, None] * width + (keys - first), known, other=0.0), 0)
    tl.store(own, total, inside)


def samples() -> list[Sample]:
    """V1 and V2 of 12 heads in bfloat16 and float32, values 64 wide."""
    found = []
    numbers = dict.fromkeys((*INTEGERS, "batches", "lowest", "total_keys", "value_width"), "i32") | {"scale": "fp32"}
    sums = ("of_first_scores", "of_first_table", "of_first_bias", "of_second", "of_second_bias", "of_table")
    exact = ("rewritten", "products", "logsumexps", "of_bias", "of_hidden", "towards", *NET, *sums)
    types = numbers | dict.fromkeys(exact, "*fp32") | dict.fromkeys(("begins", "ends"), "*i32")
    for kind, (precision, fine) in PRECISIONS.items():
        strip = types | dict.fromkeys(("scores", "of_scores", "values", "weights"), f"*{kind}")
        sizes = {"heads": 12, "value_padded": 64, "side": 64, "precision": precision, "widen": False}
        found.append(Sample(f"dape weigh, {kind}", weigh, strip | {"towards": f"*{kind}"}, sizes, warps=8))
        sizes = sizes | {"side": 16, "block": 64}
        found.append(Sample(f"dape row products, {kind}", row_products, strip | {"towards": f"*{kind}"}, sizes))
        for taps, padded in ((1, 1), (3, 4)):
            constants = WIDE | {"taps": taps, "taps_padded": padded, "precision": precision}
            constants |= {"block": 16} if precision == "ieee" else {}
            name = f"{kind}, {taps} taps"
            hidden, score = constants | {"fine": fine}, constants | {"keeps": True}
            found.append(Sample(f"dape hidden gradient, {name}", hidden_gradient, strip, hidden, warps=8, stages=1))
            found.append(Sample(f"dape score gradient, {name}", score_gradient, strip, score, warps=8, stages=1))
    found.append(Sample("dape add diagonals", add_diagonals, types, {"heads": 12, "side": 16, "block": 64}))
    return found
