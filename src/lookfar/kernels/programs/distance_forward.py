"""Attention with a bias by distance, forward: one program for a block of queries of one head."""
# ruff: noqa: N803, N806  # capitals are constants of a program, as Triton's users write them

from typing import no_type_check

import triton
import triton.language as tl

from lookfar.kernels.programs.distance_blocks import FORWARD, of_kind
from lookfar.kernels.programs.distance_tiles import (
    PAD,
    key_head_of,
    looked_up,
    product,
    rows_of,
    sample,
    sampled,
    scattered,
    scored,
    seen,
)
from lookfar.kernels.programs.samples import Sample


@triton.jit
@no_type_check
def _tiles(
    gathered,
    top,
    total,
    asked,
    places,
    first,
    documents,
    keys,
    values,
    table,
    key_documents,
    start,
    stop,
    given,
    window,
    inner,
    outer,
    stride_kt,
    stride_vt,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BIASED: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    BOUNDED: tl.constexpr,
    SCATTERED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    CHECKED: tl.constexpr,
):
    """Takes the keys from `start` to `stop` into the softmax; `CHECKED`: some of them are hidden."""
    for begin in range(start, stop, BLOCK_K):
        each = begin + tl.arange(0, BLOCK_K)
        key = rows_of(keys, each, stride_kt, given, WIDTH, BLOCK_E, CHECKED)
        scores = scored(product(asked, key.T, None, PRECISION), inner, outer, CAPPED)
        if BIASED:
            scores += looked_up(table, places[:, None], each[None, :])
        if CHECKED:
            of_keys = tl.load(key_documents + each, mask=each < given, other=-1) if SCATTERED else each
            visible = seen(
                places[:, None],
                each[None, :],
                first[:, None],
                documents[:, None],
                of_keys[None, :],
                window,
                WINDOWED,
                BOUNDED,
                SCATTERED,
            )
            scores = tl.where(visible, scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        finite = tl.where(higher == -float("inf"), 0.0, higher)  # a row that has seen nothing so far
        kept = tl.exp2(top - finite)
        weights = tl.exp2(scores - finite[:, None])
        total = total * kept + tl.sum(weights, 1)
        value = rows_of(values, each, stride_vt, given, VALUE_WIDTH, BLOCK_V, CHECKED)
        gathered = product(weights.to(value.dtype), value, gathered * kept[:, None], PRECISION)
        top = higher
    return gathered, top, total


@triton.jit(do_not_specialize=["queries_count", "given", "ahead", "window"])
@no_type_check
def forward(
    queries,
    keys,
    values,
    output,
    logsumexp,
    table,
    sink,
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
    stride_ob,
    stride_oh,
    stride_ot,
    stride_sb,
    stride_sh,
    stride_st,
    stride_table,
    queries_count,
    given,
    ahead,
    window,
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
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes what a block of queries receives, and the log-sum-exp of its rows, sink included, in base 2.

    Query i stands at place `ahead` + i among the keys; `first_seen` is the first key that it sees by its document.
    """
    BIASED: tl.constexpr = table is not None
    BOUNDED: tl.constexpr = first_seen is not None
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows first
    head, line = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    key_head = key_head_of(head, HEADS, GROUPS, OWN_KEYS)
    keys += line * stride_kb + key_head * stride_kh
    values += line * stride_vb + (key_head % GROUPS) * stride_vh
    numbers = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    real, far = numbers < queries_count, numbers.to(tl.int64)
    places = ahead + numbers
    asked = rows_of(
        queries + line * stride_qb + head * stride_qh, numbers, stride_qt, queries_count, WIDTH, BLOCK_E, True
    )
    first, documents = places, places
    start, clear = 0, 0  # the first key that is seen; the first that every query sees, but for those ahead
    lowest = ahead + block * BLOCK_Q
    if WINDOWED:
        start, clear = tl.maximum(lowest - window + 1, 0), tl.maximum(lowest + BLOCK_Q - window, 0)
    if BOUNDED:
        first = tl.load(first_seen + line * queries_count + numbers, mask=real, other=0)
        start = tl.maximum(start, tl.min(tl.where(real, first, given)))
        clear = tl.maximum(clear, tl.max(first))
    if SCATTERED:
        documents = tl.load(query_documents + line * queries_count + numbers, mask=real, other=-1)
        key_documents += line * given
    end = tl.minimum(ahead + tl.minimum((block + 1) * BLOCK_Q, queries_count), given)
    start = start // BLOCK_K * BLOCK_K
    open_to = end if SCATTERED else tl.maximum((lowest + 1) // BLOCK_K * BLOCK_K, start)
    open_from = open_to if SCATTERED else tl.minimum((clear + BLOCK_K - 1) // BLOCK_K * BLOCK_K, open_to)
    if BIASED:
        table += head * stride_table + PAD
    if sink is None:
        top = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    else:
        at = sink + line * stride_sb + head * stride_sh + far * stride_st
        top = tl.load(at, mask=real, other=0.0).to(tl.float32) * 1.4426950408889634
    total = tl.full([BLOCK_Q], 1.0, tl.float32)  # the sink's weight; without one, forgotten at the first key
    gathered = tl.zeros([BLOCK_Q, BLOCK_V], tl.float32)
    for part in tl.static_range(3):  # the edge of the window or document; what all see; the diagonal
        if part != 0 or WINDOWED or BOUNDED or SCATTERED:
            gathered, top, total = _tiles(
                gathered,
                top,
                total,
                asked,
                places,
                first,
                documents,
                keys,
                values,
                table,
                key_documents,
                start if part == 0 else (open_from if part == 1 else open_to),
                open_from if part == 0 else (open_to if part == 1 else end),
                given,
                window,
                inner,
                outer,
                stride_kt,
                stride_vt,
                WIDTH,
                VALUE_WIDTH,
                BLOCK_E,
                BLOCK_V,
                BIASED,
                CAPPED,
                WINDOWED,
                BOUNDED,
                SCATTERED,
                BLOCK_K,
                PRECISION,
                part != 1,
            )
    total = tl.where(real, total, 1.0)
    columns = tl.arange(0, BLOCK_V)
    at = output + line * stride_ob + head * stride_oh + far[:, None] * stride_ot + columns[None, :]
    kept = real[:, None] & (columns[None, :] < VALUE_WIDTH)
    tl.store(at, (gathered / total[:, None]).to(output.dtype.element_ty), mask=kept)
    row = (line * HEADS * MAPS + head) * queries_count
    tl.store(logsumexp + row + numbers, top + tl.log2(total), mask=real)


def samples() -> list[Sample]:
    """Every type and width, with a bias, and with a sink, a window and documents, too."""
    found = []
    for words, kind, constants in sampled():
        blocks = of_kind(FORWARD, kind, constants)
        for added in ("biased", "biased, sink, window, documents", "capped, scattered"):
            if "capped" in added and constants["WIDTH"] != 80:
                continue  # one kind of these is enough
            tensors: dict[str, str | None] = {}
            tensors |= dict.fromkeys(("queries", "keys", "values", "output"), f"*{kind}")
            tensors |= {"logsumexp": "*fp32", "table": "*fp32", "sink": None}
            tensors |= dict.fromkeys(("first_seen", "query_documents", "key_documents"))
            if "sink" in added:
                tensors |= {"sink": "*fp32", "first_seen": "*i32"}
            shape = {"WINDOWED": "window" in added, "BLOCK_Q": blocks.queries, "BLOCK_K": blocks.keys}
            if "capped" in added:
                scattered(tensors, shape)
            found.append(sample(f"distance forward, {words}, {added}", forward, tensors, constants | shape, blocks))
    return found
