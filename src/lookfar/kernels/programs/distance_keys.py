"""Attention with a bias by distance, backward: gradients of keys and values, summed over the heads that share them."""
# ruff: noqa: N803, N806  # capitals are constants of a program, as Triton's users write them

from typing import no_type_check

import triton
import triton.language as tl

from lookfar.kernels.programs.distance_blocks import BACKWARD_KEYS, of_kind
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
    slope_of,
)
from lookfar.kernels.programs.samples import Sample


@triton.jit
@no_type_check
def _tiles(
    of_keys,
    of_values,
    key,
    value,
    each,
    documents,
    queries,
    gradient,
    logsumexp,
    towards_rows,
    table,
    first_seen,
    query_documents,
    start,
    stop,
    queries_count,
    ahead,
    window,
    inner,
    outer,
    stride_qt,
    stride_gt,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BIASED: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    BOUNDED: tl.constexpr,
    SCATTERED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    PRECISION: tl.constexpr,
    CHECKED: tl.constexpr,
):
    """Adds what the queries from `start` to `stop` give; `CHECKED`: some of the keys are hidden from some of them."""
    for begin in range(start, stop, BLOCK_Q):
        numbers = begin + tl.arange(0, BLOCK_Q)
        real, places = numbers < queries_count, ahead + numbers
        asked = rows_of(queries, numbers, stride_qt, queries_count, WIDTH, BLOCK_E, True)
        given_gradient = rows_of(gradient, numbers, stride_gt, queries_count, VALUE_WIDTH, BLOCK_V, True)
        total = tl.load(logsumexp + numbers, mask=real, other=float("inf"))  # rows that are not there weigh nothing
        towards_row = tl.load(towards_rows + numbers, mask=real, other=0.0)
        scores = scored(product(key, asked.T, None, PRECISION), inner, outer, CAPPED)  # k q
        slope = slope_of(scores, outer, CAPPED)
        if BIASED:
            scores += looked_up(table, places[None, :], each[:, None])
        if CHECKED:
            first = tl.load(first_seen + numbers, mask=real, other=0) if BOUNDED else numbers
            of_queries = tl.load(query_documents + numbers, mask=real, other=-1) if SCATTERED else numbers
            visible = seen(
                places[None, :],
                each[:, None],
                first[None, :],
                of_queries[None, :],
                documents[:, None],
                window,
                WINDOWED,
                BOUNDED,
                SCATTERED,
            )
            scores = tl.where(visible, scores, -float("inf"))
        weights = tl.exp2(scores - total[None, :])
        of_values = product(weights.to(value.dtype), given_gradient, of_values, PRECISION)
        of_weights = product(value, given_gradient.T, None, PRECISION)
        of_scores = (weights * (of_weights - towards_row[None, :]) * slope).to(key.dtype)
        of_keys = product(of_scores, asked, of_keys, PRECISION)
    return of_keys, of_values


@triton.jit(do_not_specialize=["queries_count", "given", "ahead", "window"])
@no_type_check
def backward_keys(
    queries,
    keys,
    values,
    gradient,
    logsumexp,
    towards_rows,
    table,
    of_keys,
    of_values,
    first_seen,
    last_seen,
    query_documents,
    key_documents,
    inner,
    outer,
    scale,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_gb,
    stride_gh,
    stride_gt,
    stride_ob,
    stride_oh,
    stride_ot,
    stride_wb,
    stride_wh,
    stride_wt,
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
    """Writes the gradients of a block of keys and of their values, over all score heads that share the key head.

    `of_values` has a head for every key head: where the maps of a head have keys of their own and share values, the
    parts of the maps are added up afterwards. `last_seen` is the last query that sees a key by its document.
    """
    BIASED: tl.constexpr = table is not None
    BOUNDED: tl.constexpr = first_seen is not None
    key_heads: tl.constexpr = GROUPS * MAPS if OWN_KEYS else GROUPS
    key_head, line = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    begin = tl.program_id(0) * BLOCK_K
    each = begin + tl.arange(0, BLOCK_K)
    real = each < given
    key = rows_of(keys + line * stride_kb + key_head * stride_kh, each, stride_kt, given, WIDTH, BLOCK_E, True)
    at = values + line * stride_vb + (key_head % GROUPS) * stride_vh
    value = rows_of(at, each, stride_vt, given, VALUE_WIDTH, BLOCK_V, True)
    documents = each
    start, end = tl.maximum(begin - ahead, 0), queries_count
    clear = end  # the first query that does not see every key, but for those ahead of it
    if WINDOWED:
        end = tl.minimum(end, begin + BLOCK_K - 1 + window - ahead)
        clear = tl.minimum(clear, begin + window - ahead)
    if BOUNDED:
        last = tl.load(last_seen + line * given + each, mask=real, other=-1)
        end = tl.minimum(end, tl.max(last) + 1)
        clear = tl.minimum(clear, tl.min(tl.where(real, last, queries_count)) + 1)
        first_seen += line * queries_count
    if SCATTERED:
        documents = tl.load(key_documents + line * given + each, mask=real, other=-1)
        query_documents += line * queries_count
    start = start // BLOCK_Q * BLOCK_Q
    end = tl.maximum(end, start)
    open_from = tl.maximum(begin + BLOCK_K - 1 - ahead, 0)
    open_from = start if SCATTERED else tl.minimum((open_from + BLOCK_Q - 1) // BLOCK_Q * BLOCK_Q, end)
    bounded: tl.constexpr = WINDOWED or BOUNDED or SCATTERED
    open_to = end
    if bounded:
        open_to = open_from if SCATTERED else tl.maximum(clear // BLOCK_Q * BLOCK_Q, open_from)
    found_keys = tl.zeros([BLOCK_K, BLOCK_E], tl.float32)
    found_values = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    for turn in range(HEADS * MAPS // key_heads):
        head = score_head_of(key_head, turn, HEADS, GROUPS, OWN_KEYS)
        row = (line * HEADS * MAPS + head) * queries_count
        for part in tl.static_range(3):  # the diagonal; what all see; the edge of the window or document
            if part != 2 or bounded:
                found_keys, found_values = _tiles(
                    found_keys,
                    found_values,
                    key,
                    value,
                    each,
                    documents,
                    queries + line * stride_qb + head * stride_qh,
                    gradient + line * stride_gb + head * stride_gh,
                    logsumexp + row,
                    towards_rows + row,
                    table + head * stride_table + PAD if BIASED else table,
                    first_seen,
                    query_documents,
                    start if part == 0 else (open_from if part == 1 else open_to),
                    open_from if part == 0 else (open_to if part == 1 else end),
                    queries_count,
                    ahead,
                    window,
                    inner,
                    outer,
                    stride_qt,
                    stride_gt,
                    WIDTH,
                    VALUE_WIDTH,
                    BLOCK_E,
                    BLOCK_V,
                    BIASED,
                    CAPPED,
                    WINDOWED,
                    BOUNDED,
                    SCATTERED,
                    BLOCK_Q,
                    PRECISION,
                    part != 1,
                )
    far, columns = each.to(tl.int64), tl.arange(0, BLOCK_E)
    at = of_keys + line * stride_ob + key_head * stride_oh + far[:, None] * stride_ot + columns[None, :]
    kept = real[:, None] & (columns[None, :] < WIDTH)
    tl.store(at, (found_keys * scale).to(of_keys.dtype.element_ty), mask=kept)
    columns = tl.arange(0, BLOCK_V)
    at = of_values + line * stride_wb + key_head * stride_wh + far[:, None] * stride_wt + columns[None, :]
    kept = real[:, None] & (columns[None, :] < VALUE_WIDTH)
    tl.store(at, found_values.to(of_values.dtype.element_ty), mask=kept)


def samples() -> list[Sample]:
    """Every type and width, with a bias, and in a window and documents."""
    found = []
    for words, kind, constants in sampled():
        blocks = of_kind(BACKWARD_KEYS, kind, constants)
        for added in ("biased", "biased, window, documents", "capped, scattered"):
            if "capped" in added and constants["WIDTH"] != 80:
                continue  # one kind of these is enough
            tensors: dict[str, str | None] = {}
            tensors |= dict.fromkeys(("queries", "keys", "values", "gradient", "of_keys", "of_values"), f"*{kind}")
            tensors |= {"logsumexp": "*fp32", "towards_rows": "*fp32", "table": "*fp32"}
            tensors |= dict.fromkeys(("first_seen", "last_seen", "query_documents", "key_documents"))
            if "documents" in added:
                tensors |= {"first_seen": "*i32", "last_seen": "*i32"}
            shape = {"WINDOWED": "window" in added, "BLOCK_Q": blocks.queries, "BLOCK_K": blocks.keys}
            if "capped" in added:
                scattered(tensors, shape)
            name = f"distance backward of keys, {words}, {added}"
            found.append(sample(name, backward_keys, tensors, constants | shape, blocks))
    return found
