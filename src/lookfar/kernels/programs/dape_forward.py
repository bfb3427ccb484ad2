"""DAPE's net over strips of scores, and the softmax after it.

A strip holds the scores of some queries, for all heads and the keys that one of them sees, `[b h rows width]`. The keys
that a query sees are neighbours, from `begin` to `end`. A convolution along the keys is a product with the unfolded
row: `[keys, (tap, channel)]`, each tap moved by one key, nothing where a key is hidden.
"""

from typing import Any, no_type_check

import triton
import triton.language as tl

from lookfar.kernels.programs.samples import Sample

LEAK: tl.constexpr = tl.constexpr(0.01)  # of LeakyReLU


@triton.jit
@no_type_check
def unfold(base, stride, keys, zero, begin, end, count: tl.constexpr, padded: tl.constexpr, taps: tl.constexpr,
           taps_padded: tl.constexpr, sign: tl.constexpr):  # fmt: skip
    """Column (tap, channel) is the channel at key + sign · (tap - ⌊taps / 2⌋); key `zero` lies at `base`."""
    column = tl.arange(0, taps_padded * padded)
    tap, channel = column // padded, column % padded
    places = keys[:, None] + (sign * (tap - taps // 2))[None, :]
    known = ((tap < taps) & (channel < count))[None, :] & (places >= begin) & (places <= end)
    return tl.load(base + channel[None, :] * stride + (places - zero), known, other=0.0).to(tl.float32)


@triton.jit
@no_type_check
def matrix(base, rows: tl.constexpr, columns: tl.constexpr):
    """A whole matrix that lies in one piece."""
    return tl.load(base + tl.arange(0, rows)[:, None] * columns + tl.arange(0, columns)[None, :])


@triton.jit
@no_type_check
def product(left, right, total, precision: tl.constexpr, widen: tl.constexpr):
    """A product in the type of the operands; with `widen` in float32, as the interpreter cannot multiply bfloat16."""
    if widen:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), total)
    return tl.dot(left, right, total, input_precision=precision)


@triton.jit
@no_type_check
def before_leak(scores, stride, table, lift, diagonals, keys, low, high, first, longest, begin, end, scale, weights,
                first_table, first_bias, heads: tl.constexpr, padded: tl.constexpr, channels: tl.constexpr,
                taps: tl.constexpr, taps_padded: tl.constexpr, biased: tl.constexpr, precision: tl.constexpr,
                fine: tl.constexpr):  # fmt: skip
    """The hidden map before its LeakyReLU, `[keys, channels]`, for the keys from `low` to before `high`.

    What the bias adds to it is known by distance, `lift`, where the row goes on at both sides. `fine` is the precision
    of products with what a bias may have made large.
    """
    if biased:  # Triton 3.6 cannot compile a branch that adds a product to a sum
        if (low - taps // 2 >= begin) & (high + taps // 2 <= end + 1):
            of_bias = tl.load(lift + tl.arange(0, channels)[None, :] * diagonals + (keys - longest)[:, None])
        else:
            bias = unfold(table, diagonals, keys, longest, begin, end, heads, padded, taps, taps_padded, 1)
            of_bias = tl.dot(bias, matrix(first_table, taps_padded * padded, channels), input_precision=fine)
    seen = unfold(scores, stride, keys, first, begin, end, heads, padded, taps, taps_padded, 1)
    before = tl.dot(seen * scale, weights, input_precision=precision) + first_bias[None, :]
    if biased:
        before += of_bias
    return before


@triton.jit
@no_type_check
def rewrite(scores, table, lift, first_scores, first_table, first_bias, second, second_bias, begins, ends, rewritten,
            scale, rows, width, start, first, queries, offset, high, diagonals, items, heads: tl.constexpr,
            padded: tl.constexpr, channels: tl.constexpr, taps: tl.constexpr, taps_padded: tl.constexpr,
            biased: tl.constexpr, keeps: tl.constexpr, block: tl.constexpr, precision: tl.constexpr,
            fine: tl.constexpr):  # fmt: skip
    """The final scores of a strip; those of hidden keys are left as they are.

    An item is a block of keys of one query, all heads together.
    """
    head, channel = tl.arange(0, padded), tl.arange(0, channels)
    weights = matrix(first_scores, taps_padded * padded, channels)
    hidden_bias, head_bias = tl.load(first_bias + channel), tl.load(second_bias + head)
    tiles, stride = tl.cdiv(width, block), rows * width
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        tile, row, batch = item % tiles, item // tiles % rows, item // tiles // rows
        query = start + row
        begin, end = tl.load(begins + batch * queries + query), tl.load(ends + batch * queries + query)
        keys = first + tile * block + tl.arange(0, block)
        longest = offset + query - high  # the key whose bias is the table's first
        if (first + tile * block <= end) & (first + tile * block + block > begin):
            base = (batch.to(tl.int64) * heads * rows + row) * width
            change = tl.zeros([block, padded], tl.float32) + head_bias[None, :]
            for tap in range(taps):
                at, low = keys + (tap - taps // 2), first + tile * block + tap - taps // 2
                hidden = before_leak(scores + base, stride, table, lift, diagonals, at, low, low + block, first,
                                     longest, begin, end, scale, weights, first_table, hidden_bias, heads, padded,
                                     channels, taps, taps_padded, biased, precision, fine)  # fmt: skip
                hidden = tl.where(hidden > 0, hidden, LEAK * hidden)
                hidden = tl.where(((at >= begin) & (at <= end))[:, None], hidden, 0.0)
                onward = tl.load(second + (tap * padded + head)[None, :] * channels + channel[:, None])
                change = tl.dot(hidden, onward, change, input_precision=fine)
            known = (head < heads)[None, :] & ((keys >= begin) & (keys <= end))[:, None]
            places = head[None, :] * stride + (keys - first)[:, None]
            change += scale * tl.load(scores + base + places, known, other=0.0).to(tl.float32)
            if keeps:
                bias = table + head[None, :] * diagonals + (keys - longest)[:, None]
                change += tl.load(bias, known, other=0.0)
            tl.store(rewritten + base + places, change, known)


@triton.jit
@no_type_check
def average(rewritten, values, sink, begins, ends, outputs, logsumexps, rows, width, start, first, queries, total_keys,
            value_width, heads: tl.constexpr, value_padded: tl.constexpr, sunk: tl.constexpr, side: tl.constexpr,
            block: tl.constexpr, precision: tl.constexpr, widen: tl.constexpr):  # fmt: skip
    """Softmax over the final scores of a strip, with the sink as its first entry, and the weighted sum of values."""
    line, batch = tl.program_id(0) * side + tl.arange(0, side), tl.program_id(2)
    map_of = batch * heads + tl.program_id(1)
    inside, column = line < rows, tl.arange(0, value_padded)
    query = batch * queries + start + line
    begin, end = tl.load(begins + query, inside, other=2**30), tl.load(ends + query, inside, other=-1)
    own = map_of.to(tl.int64) * queries + start + line
    highest, total = tl.full([side], float("-inf"), tl.float32), tl.zeros([side], tl.float32)
    if sunk:
        highest = tl.load(sink + own, inside, other=float("-inf"))
        total = tl.where(highest == float("-inf"), 0.0, 1.0)
    summed = tl.zeros([side, value_padded], tl.float32)
    rewritten += map_of.to(tl.int64) * rows * width
    values += map_of.to(tl.int64) * total_keys * value_width
    lowest = first + (tl.min(begin) - first) // block * block
    for base in range(lowest, tl.max(end) + 1, block):
        keys = base + tl.arange(0, block)
        known = (keys[None, :] >= begin[:, None]) & (keys[None, :] <= end[:, None])
        scores = tl.load(rewritten + line[:, None] * width + (keys - first)[None, :], known, other=float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        level = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen so far
        weights, fade = tl.exp(scores - level[:, None]), tl.exp(highest - level)
        held = (keys < total_keys)[:, None] & (column < value_width)[None, :]
        given = tl.load(values + keys[:, None] * value_width + column[None, :], held, other=0.0)
        summed = summed * fade[:, None]
        summed = product(weights.to(given.dtype), given, summed, precision, widen)
        total, highest = total * fade + tl.sum(weights, 1), higher
    total = tl.where(inside, total, 1.0)
    tl.store(logsumexps + own, highest + tl.log(total), inside)
    places = own[:, None] * value_width + column[None, :]
    tl.store(outputs + places, summed / total[:, None], inside[:, None] & (column < value_width)[None, :])


INTEGERS = ("rows", "width", "start", "first", "queries", "offset", "high", "diagonals", "items")
NET = ("table", "lift", "first_scores", "first_table", "first_bias", "second", "second_bias")
PRECISIONS = {"bf16": ("tf32", "tf32x3"), "fp32": ("ieee", "ieee")}  # of products, and of those that must be exact
WIDE: dict[str, Any] = {"heads": 12, "padded": 16, "channels": 32, "biased": True, "block": 64}


def samples() -> list[Sample]:
    """V1 and V2 of 12 heads in bfloat16 and float32, and the softmax after them."""
    found = []
    for kind, (precision, fine) in PRECISIONS.items():
        types = {"scores": f"*{kind}", "rewritten": "*fp32", "scale": "fp32", "begins": "*i32", "ends": "*i32"}
        types |= dict.fromkeys(NET, "*fp32") | dict.fromkeys(INTEGERS, "i32")
        for taps, padded in ((1, 1), (3, 4)):
            constants = WIDE | {"taps": taps, "taps_padded": padded, "keeps": True}
            constants |= {"precision": precision, "fine": fine}
            constants |= {"block": 16} if precision == "ieee" else {}
            found.append(Sample(f"dape rewrite, {kind}, {taps} taps", rewrite, types, constants, stages=1))
        types = {"rewritten": "*fp32", "values": f"*{kind}", "sink": "*fp32", "begins": "*i32", "ends": "*i32"}
        types |= {"outputs": f"*{kind}", "logsumexps": "*fp32"}
        types |= dict.fromkeys(("rows", "width", "start", "first", "queries", "total_keys", "value_width"), "i32")
        sizes = {"heads": 12, "value_padded": 64, "sunk": True, "side": 16, "block": 64, "precision": precision}
        sizes["widen"] = False
        found.append(Sample(f"dape average, {kind}, width 64", average, types, sizes))
    return found
