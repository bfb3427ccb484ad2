"""Gradients of DAPE's net over strips of scores; the scores and the hidden map are computed again.

No two instances write to one place: gradients of weights are sums of one instance each, added up afterwards in order.
"""

from typing import no_type_check

import triton
import triton.language as tl

from lookfar.kernels.programs.dape_forward import INTEGERS, LEAK, NET, WIDE, hidden_before, part, unfold
from lookfar.kernels.programs.samples import Sample


@triton.jit
@no_type_check
def weigh(rewritten, values, towards, products, logsumexps, begins, ends, weights, rows, width, start, first, queries,
          keys_count, value_width, HEADS: tl.constexpr, VALUE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
          PRECISION: tl.constexpr):  # fmt: skip
    """Softmax weights of a strip, 0 for hidden keys, and the gradient of the final scores in the place of these."""
    tile, line = tl.program_id(0), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    head_of = tl.program_id(2)
    inside, column = line < rows, tl.arange(0, VALUE)
    query = head_of // HEADS * queries + start + line
    begin, end = tl.load(begins + query, inside, other=2**30), tl.load(ends + query, inside, other=-1)
    own = head_of.to(tl.int64) * queries + start + line
    keys = first + tile * BLOCK + tl.arange(0, BLOCK)
    known = (keys[None, :] >= begin[:, None]) & (keys[None, :] <= end[:, None])
    places = (head_of.to(tl.int64) * rows + line)[:, None] * width + (keys - first)[None, :]
    held = inside[:, None] & (keys < first + width)[None, :]
    weight = tl.zeros([ROWS, BLOCK], tl.float32)
    if (first + tile * BLOCK <= tl.max(end)) & (first + tile * BLOCK + BLOCK > tl.min(begin)):
        gradient = tl.load(towards + own[:, None] * value_width + column[None, :],
                           inside[:, None] & (column < value_width)[None, :], other=0.0)  # fmt: skip
        given = values + (head_of.to(tl.int64) * keys_count + keys)[None, :] * value_width + column[:, None]
        given = tl.load(given, (keys < keys_count)[None, :] & (column < value_width)[:, None], other=0.0)
        scores = tl.load(rewritten + places, known, other=float("-inf"))
        weight = tl.exp(scores - tl.load(logsumexps + own, inside, other=0.0)[:, None])
        product = tl.load(products + own, inside, other=0.0)
        change = weight * (tl.dot(gradient, given, input_precision=PRECISION) - product[:, None])
        tl.store(rewritten + places, change, known)
    tl.store(weights + places, weight, held)


@triton.jit
@no_type_check
def hidden_gradient(scores, table, first_scores, first_table, first_bias, second, begins, ends, towards, of_hidden,
                    of_scores_weights, of_table_weights, of_first_bias, of_second, of_second_bias, scale, rows, width,
                    start, first, queries, offset, high, diagonals, items, HEADS: tl.constexpr, PADDED: tl.constexpr,
                    HIDDEN: tl.constexpr, TAPS: tl.constexpr, TAPS_PADDED: tl.constexpr, BIASED: tl.constexpr,
                    BLOCK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The gradient of the hidden map before its LeakyReLU, and those of all weights, added to what each instance has.

    The second convolution turned round: hidden key j has fed key j - (tap - ⌊taps / 2⌋).
    """
    UNFOLDED: tl.constexpr = TAPS_PADDED * PADDED
    line, wide = tl.arange(0, HIDDEN), tl.arange(0, UNFOLDED)
    weights, back = part(first_scores, UNFOLDED, line, UNFOLDED), tl.trans(part(second, HIDDEN, wide, HIDDEN))
    table_weights = weights
    if BIASED:
        table_weights = part(first_table, UNFOLDED, line, UNFOLDED)
    hidden_bias = tl.load(first_bias + line)
    own = tl.program_id(0) * HIDDEN * UNFOLDED + line[:, None] * UNFOLDED + wide[None, :]
    own_second = tl.program_id(0) * HIDDEN * UNFOLDED + wide[:, None] * HIDDEN + line[None, :]
    own_bias, own_second_bias = tl.program_id(0) * HIDDEN + line, tl.program_id(0) * UNFOLDED + wide
    sum_scores, sum_second = tl.load(of_scores_weights + own), tl.load(of_second + own_second)
    sum_table = tl.zeros([HIDDEN, UNFOLDED], tl.float32)
    if BIASED:
        sum_table = tl.load(of_table_weights + own)
    sum_bias, sum_second_bias = tl.load(of_first_bias + own_bias), tl.load(of_second_bias + own_second_bias)
    tiles, stride = tl.cdiv(width, BLOCK), rows * width
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        tile, row, batch = item % tiles, item // tiles % rows, item // tiles // rows
        query = start + row
        begin, end = tl.load(begins + batch * queries + query), tl.load(ends + batch * queries + query)
        keys = first + tile * BLOCK + tl.arange(0, BLOCK)
        shift = offset + query - high
        if (first + tile * BLOCK <= end) & (first + tile * BLOCK + BLOCK > begin):
            base = (batch.to(tl.int64) * HEADS * rows + row) * width
            before = hidden_before(scores + base, stride, table, diagonals, keys, first, shift, begin, end, scale,
                                   weights, table_weights, hidden_bias, HEADS, PADDED, TAPS, TAPS_PADDED, BIASED,
                                   PRECISION)  # fmt: skip
            known = ((keys >= begin) & (keys <= end))[None, :]
            hidden = tl.where(known, tl.where(before > 0, before, LEAK * before), 0.0)
            given = unfold(towards + base, stride, keys, first, begin, end, HEADS, PADDED, TAPS, TAPS_PADDED, -1)
            sum_second = tl.dot(given, tl.trans(hidden), sum_second, input_precision=PRECISION)
            middle = (wide // PADDED == TAPS // 2)[:, None]
            sum_second_bias += tl.sum(tl.where(middle, given, 0.0), 1)
            change = tl.dot(back, given, input_precision=PRECISION) * tl.where(before > 0, 1.0, LEAK)
            change = tl.where(known, change, 0.0)
            sum_bias += tl.sum(change, 1)
            seen = unfold(scores + base, stride, keys, first, begin, end, HEADS, PADDED, TAPS, TAPS_PADDED, 1)
            sum_scores = tl.dot(change, tl.trans(seen * scale), sum_scores, input_precision=PRECISION)
            if BIASED:
                bias = unfold(table, diagonals, keys, shift, begin, end, HEADS, PADDED, TAPS, TAPS_PADDED, 1)
                sum_table = tl.dot(change, tl.trans(bias), sum_table, input_precision=PRECISION)
            hidden_base = (batch.to(tl.int64) * HIDDEN * rows + row) * width
            tl.store(of_hidden + hidden_base + line[:, None] * stride + (keys - first)[None, :], change, known)
    tl.store(of_scores_weights + own, sum_scores)
    tl.store(of_second + own_second, sum_second)
    if BIASED:
        tl.store(of_table_weights + own, sum_table)
    tl.store(of_first_bias + own_bias, sum_bias)
    tl.store(of_second_bias + own_second_bias, sum_second_bias)


@triton.jit
@no_type_check
def score_gradient(of_hidden, towards, first_scores, first_table, begins, ends, of_scores, scale, rows, width, start,
                   first, queries, items, HEADS: tl.constexpr, PADDED: tl.constexpr, HIDDEN: tl.constexpr,
                   TAPS: tl.constexpr, TAPS_PADDED: tl.constexpr, BIASED: tl.constexpr, KEEPS: tl.constexpr,
                   BLOCK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The gradient of the products of queries and keys, 0 where hidden, and that of the bias in place of `towards`.

    The first convolution turned round.
    """
    head, wide = tl.arange(0, PADDED), tl.arange(0, TAPS_PADDED * HIDDEN)
    tap, line = wide // HIDDEN, wide % HIDDEN
    turned = head[:, None] + (line * TAPS_PADDED * PADDED + tap * PADDED)[None, :]
    weights = tl.load(first_scores + turned)
    table_weights = weights
    if BIASED:
        table_weights = tl.load(first_table + turned)
    tiles, stride = tl.cdiv(width, BLOCK), rows * width
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        tile, row, batch = item % tiles, item // tiles % rows, item // tiles // rows
        query = start + row
        begin, end = tl.load(begins + batch * queries + query), tl.load(ends + batch * queries + query)
        keys = first + tile * BLOCK + tl.arange(0, BLOCK)
        places = (batch.to(tl.int64) * HEADS * rows + row) * width + head[:, None] * stride + (keys - first)[None, :]
        of_products = tl.zeros([PADDED, BLOCK], tl.float32)
        if (first + tile * BLOCK <= end) & (first + tile * BLOCK + BLOCK > begin):
            known = ((keys >= begin) & (keys <= end))[None, :]
            base = of_hidden + (batch.to(tl.int64) * HIDDEN * rows + row) * width
            change = unfold(base, stride, keys, first, begin, end, HIDDEN, HIDDEN, TAPS, TAPS_PADDED, -1)
            own = tl.load(towards + places, (head < HEADS)[:, None] & known, other=0.0)
            of_products = own + tl.dot(weights, change, input_precision=PRECISION)
            of_products = tl.where(known, scale * of_products, 0.0)
            if BIASED:
                of_bias = tl.dot(table_weights, change, input_precision=PRECISION)
                if KEEPS:
                    of_bias += own
                tl.store(towards + places, of_bias, (head < HEADS)[:, None] & known)
        tl.store(of_scores + places, of_products, (head < HEADS)[:, None] & (keys < first + width)[None, :])


@triton.jit
@no_type_check
def add_diagonals(of_bias, begins, ends, of_table, batches, rows, width, start, first, queries, offset, high, diagonals,
                  lowest, HEADS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Adds the gradient of the bias of a strip to that of the table: one sum for each distance."""
    head = tl.program_id(1)
    diagonal = lowest + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = (diagonal >= 0) & (diagonal < diagonals)
    own = of_table + head * diagonals + diagonal
    total = tl.load(own, inside, other=0.0)
    for batch in range(batches):
        base = of_bias + (batch * HEADS + head).to(tl.int64) * rows * width
        for top in range(0, rows, ROWS):
            line = top + tl.arange(0, ROWS)
            query = batch * queries + start + line
            begin, end = tl.load(begins + query, line < rows, other=2**30), tl.load(ends + query, line < rows, other=-1)
            keys = diagonal[None, :] + (offset + start + line - high)[:, None]
            known = inside[None, :] & (keys >= begin[:, None]) & (keys <= end[:, None])
            total += tl.sum(tl.load(base + line[:, None] * width + (keys - first), known, other=0.0), 0)
    tl.store(own, total, inside)


def samples() -> list[Sample]:
    """V1 and V2 of 12 heads in bfloat16 and float32, values 64 wide."""
    found = []
    for kind, precision in (("bf16", "tf32"), ("fp32", "tf32x3")):
        strip = dict.fromkeys(("begins", "ends"), "*i32") | dict.fromkeys((*INTEGERS, "batches", "lowest"), "i32")
        strip |= dict.fromkeys(("keys_count", "value_width"), "i32") | {"scale": "fp32"}
        strip |= dict.fromkeys(("rewritten", "products", "logsumexps", "of_bias", "of_table", "of_hidden"), "*fp32")
        strip |= dict.fromkeys(("of_scores_weights", "of_table_weights", "of_second", "of_first_bias"), "*fp32")
        strip |= dict.fromkeys((*NET, "of_second_bias", "towards"), "*fp32")
        strip |= dict.fromkeys(("scores", "of_scores", "values", "weights"), f"*{kind}")
        sizes = {"HEADS": 12, "VALUE": 64, "ROWS": 64, "BLOCK": 64, "PRECISION": precision}
        found.append(Sample(f"dape weigh, {kind}", weigh, strip | {"towards": f"*{kind}"}, sizes))
        for taps, padded in ((1, 1), (3, 4)):
            constants = WIDE | {"TAPS": taps, "TAPS_PADDED": padded, "PRECISION": precision}
            found.append(Sample(f"dape hidden gradient, {kind}, {taps} taps", hidden_gradient, strip, constants))
            constants = constants | {"KEEPS": True}
            found.append(Sample(f"dape score gradient, {kind}, {taps} taps", score_gradient, strip, constants))
    sizes = {"HEADS": 12, "ROWS": 16, "BLOCK": 128}
    found.append(Sample("dape add diagonals", add_diagonals, strip, sizes))
    return found
