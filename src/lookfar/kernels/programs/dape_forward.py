"""DAPE's net over strips of scores, and the softmax after it.

A strip holds the scores of some queries, for all heads and the keys that one of them sees, `[b h rows width]`. The keys
that a query sees are neighbours, from `begin` to `end`. A convolution along the keys is a product with the unfolded
row: `[(tap, channel), keys]`, each tap moved by one key, nothing where a key is hidden.
"""

from typing import Any, no_type_check

import triton
import triton.language as tl

from lookfar.kernels.programs.samples import Sample

LEAK: tl.constexpr = tl.constexpr(0.01)  # of LeakyReLU


@triton.jit
@no_type_check
def unfold(base, stride, keys, shift, begin, end, CHANNELS: tl.constexpr, PADDED: tl.constexpr,
           TAPS: tl.constexpr, TAPS_PADDED: tl.constexpr, SIGN: tl.constexpr):  # fmt: skip
    """Row (tap, channel) is the channel at key + SIGN · (tap - ⌊taps / 2⌋), in float32; key `shift` lies at `base`."""
    line = tl.arange(0, TAPS_PADDED * PADDED)
    tap, channel = line // PADDED, line % PADDED
    places = keys[None, :] + (SIGN * (tap - TAPS // 2))[:, None]
    known = ((tap < TAPS) & (channel < CHANNELS))[:, None] & (places >= begin) & (places <= end)
    return tl.load(base + channel[:, None] * stride + (places - shift), known, other=0.0).to(tl.float32)


@triton.jit
@no_type_check
def part(base, count, line, WIDTH: tl.constexpr):
    """Rows `line` of a matrix of `count` columns, from column 0."""
    return tl.load(base + line[:, None] * count + tl.arange(0, WIDTH)[None, :])


@triton.jit
@no_type_check
def hidden_before(scores, stride, table, diagonals, keys, first, shift, begin, end, scale, first_scores, first_table,
                  first_bias, HEADS: tl.constexpr, PADDED: tl.constexpr, TAPS: tl.constexpr,
                  TAPS_PADDED: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The hidden map before its LeakyReLU, `[hidden, keys]`."""
    seen = unfold(scores, stride, keys, first, begin, end, HEADS, PADDED, TAPS, TAPS_PADDED, 1)
    before = tl.dot(first_scores, seen * scale, input_precision=PRECISION) + first_bias[:, None]
    if BIASED:
        bias = unfold(table, diagonals, keys, shift, begin, end, HEADS, PADDED, TAPS, TAPS_PADDED, 1)
        before = tl.dot(first_table, bias, before, input_precision=PRECISION)
    return before


@triton.jit
@no_type_check
def rewrite(scores, table, first_scores, first_table, first_bias, second, second_bias, begins, ends, rewritten, scale,
            rows, width, start, first, queries, offset, high, diagonals, items,
            HEADS: tl.constexpr, PADDED: tl.constexpr, HIDDEN: tl.constexpr, TAPS: tl.constexpr,
            TAPS_PADDED: tl.constexpr, BIASED: tl.constexpr, KEEPS: tl.constexpr, BLOCK: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    """The final scores of a strip; those of hidden keys are left as they are.

    An item is BLOCK keys of one query, all heads together.
    """
    head, line = tl.arange(0, PADDED), tl.arange(0, HIDDEN)
    unfolded: tl.constexpr = TAPS_PADDED * PADDED
    weights = part(first_scores, unfolded, line, unfolded)
    table_weights = weights
    if BIASED:
        table_weights = part(first_table, unfolded, line, unfolded)
    hidden_bias, head_bias = tl.load(first_bias + line), tl.load(second_bias + head)
    tiles, stride = tl.cdiv(width, BLOCK), rows * width
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        tile, row, batch = item % tiles, item // tiles % rows, item // tiles // rows
        query = start + row
        begin, end = tl.load(begins + batch * queries + query), tl.load(ends + batch * queries + query)
        keys = first + tile * BLOCK + tl.arange(0, BLOCK)
        shift = offset + query - high  # the key whose bias is the table's first
        if (first + tile * BLOCK <= end) & (first + tile * BLOCK + BLOCK > begin):
            base = (batch.to(tl.int64) * HEADS * rows + row) * width
            change = tl.zeros([PADDED, BLOCK], tl.float32) + head_bias[:, None]
            for tap in tl.static_range(TAPS):
                at = keys + (tap - TAPS // 2)
                hidden = hidden_before(scores + base, stride, table, diagonals, at, first, shift, begin, end, scale,
                                       weights, table_weights, hidden_bias, HEADS, PADDED, TAPS, TAPS_PADDED, BIASED,
                                       PRECISION)  # fmt: skip
                hidden = tl.where(hidden > 0, hidden, LEAK * hidden)
                hidden = tl.where(((at >= begin) & (at <= end))[None, :], hidden, 0.0)
                change = tl.dot(part(second, HIDDEN, tap * PADDED + head, HIDDEN), hidden, change,
                                input_precision=PRECISION)  # fmt: skip
            known = (head < HEADS)[:, None] & (keys >= begin) & (keys <= end)
            places = base + head[:, None] * stride + (keys - first)
            change += scale * tl.load(scores + places, known, other=0.0).to(tl.float32)
            if KEEPS:
                change += tl.load(table + head[:, None] * diagonals + (keys - shift), known, other=0.0)
            tl.store(rewritten + places, change, known)


@triton.jit
@no_type_check
def average(rewritten, values, sink, begins, ends, outputs, logsumexps, rows, width, start, first, queries, keys_count,
            value_width, HEADS: tl.constexpr, VALUE: tl.constexpr, SUNK: tl.constexpr, ROWS: tl.constexpr,
            BLOCK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Softmax over the final scores of a strip, with the sink as its first entry, and the weighted sum of values."""
    line, head_of = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    batch = head_of // HEADS
    inside, column = line < rows, tl.arange(0, VALUE)
    query = batch * queries + start + line
    begin, end = tl.load(begins + query, inside, other=2**30), tl.load(ends + query, inside, other=-1)
    own = head_of.to(tl.int64) * queries + start + line
    highest, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    if SUNK:
        highest = tl.load(sink + own, inside, other=float("-inf"))
        total = tl.where(highest == float("-inf"), 0.0, 1.0)
    summed = tl.zeros([ROWS, VALUE], tl.float32)
    rewritten += head_of.to(tl.int64) * rows * width
    values += head_of.to(tl.int64) * keys_count * value_width
    lowest = first + (tl.min(begin) - first) // BLOCK * BLOCK
    for base in range(lowest, tl.max(end) + 1, BLOCK):
        keys = base + tl.arange(0, BLOCK)
        known = (keys[None, :] >= begin[:, None]) & (keys[None, :] <= end[:, None])
        scores = tl.load(rewritten + line[:, None] * width + (keys - first)[None, :], known, other=float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        level = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen so far
        weights, fade = tl.exp(scores - level[:, None]), tl.exp(highest - level)
        held = (keys < keys_count)[:, None] & (column < value_width)[None, :]
        given = tl.load(values + keys[:, None] * value_width + column[None, :], held, other=0.0)
        summed = summed * fade[:, None]
        summed = tl.dot(weights.to(given.dtype), given, summed, input_precision=PRECISION)
        total, highest = total * fade + tl.sum(weights, 1), higher
    total = tl.where(inside, total, 1.0)
    tl.store(logsumexps + own, highest + tl.log(total), inside)
    places = own[:, None] * value_width + column[None, :]
    tl.store(outputs + places, summed / total[:, None], inside[:, None] & (column < value_width)[None, :])


INTEGERS = ("rows", "width", "start", "first", "queries", "offset", "high", "diagonals", "items")
NET = ("table", "first_scores", "first_table", "first_bias", "second", "second_bias")
WIDE: dict[str, Any] = {"HEADS": 12, "PADDED": 16, "HIDDEN": 32, "BIASED": True, "BLOCK": 128}


def samples() -> list[Sample]:
    """V1 and V2 of 12 heads in bfloat16 and float32, and the softmax after them."""
    found = []
    for kind, precision in (("bf16", "tf32"), ("fp32", "tf32x3")):
        types = {"scores": f"*{kind}", "rewritten": "*fp32", "scale": "fp32", "begins": "*i32", "ends": "*i32"}
        types |= dict.fromkeys(NET, "*fp32") | dict.fromkeys(INTEGERS, "i32")
        for taps, padded in ((1, 1), (3, 4)):
            constants = WIDE | {"TAPS": taps, "TAPS_PADDED": padded, "KEEPS": True, "PRECISION": precision}
            found.append(Sample(f"dape rewrite, {kind}, {taps} taps", rewrite, types, constants))
        types = {"rewritten": "*fp32", "values": f"*{kind}", "sink": "*fp32", "begins": "*i32", "ends": "*i32"}
        types |= {"outputs": f"*{kind}", "logsumexps": "*fp32"}
        types |= dict.fromkeys(("rows", "width", "start", "first", "queries", "keys_count", "value_width"), "i32")
        sizes = {"HEADS": 12, "VALUE": 64, "SUNK": True, "ROWS": 16, "BLOCK": 128, "PRECISION": precision}
        found.append(Sample(f"dape average, {kind}, width 64", average, types, sizes, stages=3))
    return found
