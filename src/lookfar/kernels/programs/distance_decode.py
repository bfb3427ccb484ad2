"""Attention with a bias by distance for a few queries: keys are divided among programs, whose parts are then merged."""
# ruff: noqa: N803  # capitals are constants of a program, as Triton's users write them

from typing import no_type_check

import triton
import triton.language as tl

from lookfar.kernels.programs.distance_blocks import DECODE, PIECE, PROGRAMS, Blocks, of_kind
from lookfar.kernels.programs.distance_tiles import (
    PAD,
    looked_up,
    product,
    rows_of,
    sample,
    sampled,
    scattered,
    score_head_of,
    scored,
    seen,
)
from lookfar.kernels.programs.samples import Sample


@triton.jit(do_not_specialize=["queries_count", "given", "ahead", "window", "span"])
@no_type_check
def decode(
    queries,
    keys,
    values,
    parts,
    tops,
    totals,
    table,
    first_seen,
    query_documents,
    key_documents,
    inner,
    outer,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_table,
    queries_count,
    given,
    ahead,
    window,
    span,
    HEADS: tl.constexpr,
    MAPS: tl.constexpr,
    GROUPS: tl.constexpr,
    OWN_KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    SCATTERED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes what `span` keys give to all queries of the score heads that share a key head: one row each.

    `parts` `[b h q splits v]` are not yet divided by `totals` `[b h q splits]`, the sums of weights below `tops`.
    """
    key_heads: tl.constexpr = GROUPS * MAPS if OWN_KEYS else GROUPS
    split, splits = tl.program_id(0), tl.num_programs(0)
    key_head, line = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    keys += line * stride_kb + key_head * stride_kh
    values += line * stride_vb + (key_head % GROUPS) * stride_vh
    rows = tl.arange(0, BLOCK_R)
    real = rows < queries_count * (HEADS * MAPS // key_heads)
    numbers = rows % queries_count
    heads = score_head_of(key_head, tl.where(real, rows // queries_count, 0), HEADS, GROUPS, OWN_KEYS)
    places = ahead + numbers
    columns = tl.arange(0, BLOCK_E)
    at = queries + line * stride_qb + (heads * stride_qh + numbers.to(tl.int64) * stride_qt)[:, None]
    asked = tl.load(at + columns[None, :], mask=real[:, None] & (columns[None, :] < WIDTH), other=0.0)
    first, documents = places, places
    start = 0
    if WINDOWED:
        start = tl.maximum(ahead - window + 1, 0) // BLOCK_K * BLOCK_K
    start += split * span
    end = tl.minimum(start + span, tl.minimum(ahead + queries_count, given))
    if first_seen is not None:
        first = tl.load(first_seen + line * queries_count + numbers)
        start = tl.maximum(start, tl.min(first) // BLOCK_K * BLOCK_K)
    if SCATTERED:
        documents = tl.load(query_documents + line * queries_count + numbers)
        key_documents += line * given
    if table is not None:
        table += heads[:, None] * stride_table + PAD
    top = tl.full([BLOCK_R], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    gathered = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
    for begin in range(start, end, BLOCK_K):
        each = begin + tl.arange(0, BLOCK_K)
        key = rows_of(keys, each, stride_kt, given, WIDTH, BLOCK_E, True)
        scores = scored(product(asked, key.T, None, PRECISION), inner, outer, CAPPED)
        if table is not None:
            scores += looked_up(table, places[:, None], each[None, :])
        of_keys = tl.load(key_documents + each, mask=each < given, other=-1) if SCATTERED else each
        visible = seen(
            places[:, None],
            each[None, :],
            first[:, None],
            documents[:, None],
            of_keys[None, :],
            window,
            WINDOWED,
            first_seen is not None,
            SCATTERED,
        )
        scores = tl.where(visible, scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        finite = tl.where(higher == -float("inf"), 0.0, higher)  # a row that has seen nothing so far
        kept = tl.exp2(top - finite)
        weights = tl.exp2(scores - finite[:, None])
        total = total * kept + tl.sum(weights, 1)
        value = rows_of(values, each, stride_vt, given, VALUE_WIDTH, BLOCK_V, True)
        gathered = product(weights.to(value.dtype), value, gathered * kept[:, None], PRECISION)
        top = higher
    row = ((line * HEADS * MAPS + heads) * queries_count + numbers) * splits + split
    tl.store(tops + row, top, mask=real)
    tl.store(totals + row, total, mask=real)
    columns = tl.arange(0, BLOCK_V)
    at = parts + row[:, None] * VALUE_WIDTH + columns[None, :]
    tl.store(at, gathered, mask=real[:, None] & (columns[None, :] < VALUE_WIDTH))


@triton.jit(do_not_specialize=["queries_count", "splits"])
@no_type_check
def merge(
    parts,
    tops,
    totals,
    sink,
    output,
    stride_sb,
    stride_sh,
    stride_st,
    stride_ob,
    stride_oh,
    stride_ot,
    queries_count,
    splits,
    HEADS: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Joins the parts of one row by their log-sum-exps, and the sink's; `PIECE` of them are held at once."""
    row = tl.program_id(0).to(tl.int64)
    number, head, line = row % queries_count, row // queries_count % HEADS, row // queries_count // HEADS
    each, columns = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_V)
    some = each < splits
    top = tl.load(tops + row * splits + each, mask=some, other=-float("inf"))
    total = tl.load(totals + row * splits + each, mask=some, other=0.0)
    highest = tl.max(top, 0)
    score = highest
    if sink is not None:
        at = sink + line * stride_sb + head * stride_sh + number * stride_st
        score = tl.load(at).to(tl.float32) * 1.4426950408889634
        highest = tl.maximum(highest, score)
    whole = tl.sum(tl.exp2(top - highest) * total, 0)
    if sink is not None:
        whole += tl.exp2(score - highest)
    gathered = tl.zeros([BLOCK_V], tl.float32)
    for begin in range(0, splits, PIECE):
        turn = begin + tl.arange(0, PIECE)
        real = turn < splits
        weights = tl.exp2(tl.load(tops + row * splits + turn, mask=real, other=-float("inf")) - highest)
        place = parts + (row * splits + turn[:, None]) * VALUE_WIDTH + columns[None, :]
        part = tl.load(place, mask=real[:, None] & (columns[None, :] < VALUE_WIDTH), other=0.0)
        gathered += tl.sum(weights[:, None] * part, 0)
    at = output + line * stride_ob + head * stride_oh + number * stride_ot + columns
    tl.store(at, (gathered / whole).to(output.dtype.element_ty), mask=columns < VALUE_WIDTH)


def samples() -> list[Sample]:
    """Every type and width, plain and with all that can be added; and merges of the most parts that there are."""
    found = []
    for words, kind, constants in sampled():
        blocks = of_kind(DECODE, kind, constants)
        for added in ("plain", "biased, window, documents", "capped, scattered"):
            if "capped" in added and constants["WIDTH"] != 80:
                continue  # one kind of these is enough
            tensors: dict[str, str | None] = {}
            tensors |= dict.fromkeys(("queries", "keys", "values"), f"*{kind}")
            tensors |= dict.fromkeys(("parts", "tops", "totals"), "*fp32")
            tensors |= dict.fromkeys(("table", "first_seen", "query_documents", "key_documents"))
            if "documents" in added:
                tensors |= {"table": "*fp32", "first_seen": "*i32"}
            shape = {"WINDOWED": "window" in added, "BLOCK_R": 16, "BLOCK_K": blocks.keys}
            if "capped" in added:
                scattered(tensors, shape)
            found.append(sample(f"distance decode, {words}, {added}", decode, tensors, constants | shape, blocks))
    kinds = dict.fromkeys(("parts", "tops", "totals", "sink"), "*fp32") | {"output": "*bf16"}
    for width in (128, 256):
        constants = {"HEADS": 8, "VALUE_WIDTH": width, "BLOCK_V": width, "BLOCK_S": PROGRAMS, "PIECE": PIECE}
        found.append(sample(f"distance decode, merge, width {width}", merge, kinds, constants, Blocks(0, 0)))
    return found
