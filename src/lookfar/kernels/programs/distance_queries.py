"""Attention with a bias by distance, backward: gradients of queries and of the table, tile by tile along the keys."""
# ruff: noqa: N803, N806  # capitals are constants of a program, as Triton's users write them

from typing import no_type_check

import triton
import triton.language as tl

from lookfar.kernels.programs.distance_blocks import BACKWARD_QUERIES, LEARNED, Blocks, of_kind
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
    slope_of,
)
from lookfar.kernels.programs.samples import Sample


@triton.jit(do_not_specialize=["queries_count"])
@no_type_check
def towards(
    gradient,
    output,
    result,
    stride_gb,
    stride_gh,
    stride_gt,
    stride_ob,
    stride_oh,
    stride_ot,
    queries_count,
    HEADS: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Writes ⟨gradient, output⟩ of every row, which the backward pass subtracts from each score's gradient."""
    head, line = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    numbers = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    at = gradient + line * stride_gb + head * stride_gh
    given = rows_of(at, numbers, stride_gt, queries_count, VALUE_WIDTH, BLOCK_V, True).to(tl.float32)
    at = output + line * stride_ob + head * stride_oh
    gave = rows_of(at, numbers, stride_ot, queries_count, VALUE_WIDTH, BLOCK_V, True).to(tl.float32)
    row = (line * HEADS + head) * queries_count
    tl.store(result + row + numbers, tl.sum(given * gave, 1), mask=numbers < queries_count)


@triton.jit
@no_type_check
def _along_diagonals(tile, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Sums of a tile along its diagonals, for each square of BLOCK_K rows: those from the diagonal on, those before.

    Every row is turned until its own diagonal stands in column 0; column c then holds the distances c, and c - BLOCK_K
    where a row was turned around its end.
    """
    rows, columns = tl.arange(0, BLOCK_Q)[:, None] % BLOCK_K, tl.arange(0, BLOCK_K)[None, :]
    turned = tl.gather(tile, (rows - columns) & (BLOCK_K - 1), 1)
    behind = tl.where(columns <= rows, turned, 0.0)
    ahead = turned - behind
    squares: tl.constexpr = BLOCK_Q // BLOCK_K
    behind = tl.reshape(behind, [squares, BLOCK_K, BLOCK_K])
    return tl.sum(behind, 1), tl.sum(tl.reshape(ahead, [squares, BLOCK_K, BLOCK_K]), 1)


@triton.jit
@no_type_check
def _tiles(
    of_queries,
    carried,
    asked,
    given_gradient,
    logsumexp,
    towards_row,
    places,
    first,
    documents,
    keys,
    values,
    table,
    sums,
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
    SUMMED: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    BOUNDED: tl.constexpr,
    SCATTERED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    CHECKED: tl.constexpr,
):
    """Adds what the keys from `start` to `stop` give; `CHECKED`: some of them are hidden."""
    for begin in range(start, stop, BLOCK_K):
        each = begin + tl.arange(0, BLOCK_K)
        key = rows_of(keys, each, stride_kt, given, WIDTH, BLOCK_E, CHECKED)
        value = rows_of(values, each, stride_vt, given, VALUE_WIDTH, BLOCK_V, CHECKED)
        scores = scored(product(asked, key.T, None, PRECISION), inner, outer, CAPPED)
        slope = slope_of(scores, outer, CAPPED)
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
        weights = tl.exp2(scores - logsumexp[:, None])
        of_weights = product(given_gradient, value.T, None, PRECISION)
        of_scores = weights * (of_weights - towards_row[:, None])
        if SUMMED:
            behind, ahead = _along_diagonals(of_scores, BLOCK_Q, BLOCK_K)
            tl.store(sums - begin, tl.load(sums - begin) + behind + carried)
            carried = ahead
        of_scores = (of_scores * slope).to(key.dtype)
        of_queries = product(of_scores, key, of_queries, PRECISION)
    return of_queries, carried


@triton.jit
@no_type_check
def _block(
    block,
    line,
    head,
    queries,
    keys,
    values,
    gradient,
    logsumexp,
    towards_rows,
    table,
    of_queries,
    sums,
    first_seen,
    query_documents,
    key_documents,
    inner,
    outer,
    scale,
    stride_qt,
    stride_kt,
    stride_vt,
    stride_gt,
    stride_ot,
    stride_table,
    queries_count,
    given,
    ahead,
    window,
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
    """One block of queries of one head, whose tensors begin where they are given."""
    BIASED: tl.constexpr = table is not None
    BOUNDED: tl.constexpr = first_seen is not None
    SUMMED: tl.constexpr = sums is not None
    numbers = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    real = numbers < queries_count
    places = ahead + numbers
    asked = rows_of(queries, numbers, stride_qt, queries_count, WIDTH, BLOCK_E, True)
    given_gradient = rows_of(gradient, numbers, stride_gt, queries_count, VALUE_WIDTH, BLOCK_V, True)
    total = tl.load(logsumexp + numbers, mask=real, other=float("inf"))  # so that rows that are not there weigh nothing
    towards_row = tl.load(towards_rows + numbers, mask=real, other=0.0)
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
    squares: tl.constexpr = BLOCK_Q // BLOCK_K
    carried = tl.zeros([squares, BLOCK_K], tl.float32)
    if SUMMED:
        square = tl.arange(0, squares)[:, None]
        sums += square * stride_table + PAD + lowest + square * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    found = tl.zeros([BLOCK_Q, BLOCK_E], tl.float32)
    for part in tl.static_range(3):  # the edge of the window or document; what all see; the diagonal
        if part != 0 or WINDOWED or BOUNDED or SCATTERED:
            found, carried = _tiles(
                found,
                carried,
                asked,
                given_gradient,
                total,
                towards_row,
                places,
                first,
                documents,
                keys,
                values,
                table,
                sums,
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
                SUMMED,
                CAPPED,
                WINDOWED,
                BOUNDED,
                SCATTERED,
                BLOCK_Q,
                BLOCK_K,
                PRECISION,
                part != 1,
            )
    if SUMMED:  # what the last tile carried on: something, where the first query is not at the beginning of a tile
        after = (end + BLOCK_K - 1) // BLOCK_K * BLOCK_K
        tl.store(sums - after, tl.load(sums - after) + carried)
    columns = tl.arange(0, BLOCK_E)
    at = of_queries + numbers.to(tl.int64)[:, None] * stride_ot + columns[None, :]
    tl.store(at, (found * scale).to(of_queries.dtype.element_ty), mask=real[:, None] & (columns[None, :] < WIDTH))


@triton.jit(do_not_specialize=["queries_count", "given", "ahead", "window"])
@no_type_check
def backward_queries(
    queries,
    keys,
    values,
    gradient,
    logsumexp,
    towards_rows,
    table,
    of_queries,
    sums,
    first_seen,
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
    """Writes the gradient of the queries; where `sums` is given, adds that of the table to it, in natural units.

    Then there are fewer programs than blocks: program p of c takes the blocks p, 2c - 1 - p, 2c + p, … from the last
    on, which costs each about the same, and adds to sums of its own, `[b h c squares n]`, without atomics.
    """
    head, line = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    key_head = key_head_of(head, HEADS, GROUPS, OWN_KEYS)
    row = (line * HEADS * MAPS + head) * queries_count
    queries += line * stride_qb + head * stride_qh
    keys += line * stride_kb + key_head * stride_kh
    values += line * stride_vb + (key_head % GROUPS) * stride_vh
    gradient += line * stride_gb + head * stride_gh
    of_queries += line * stride_ob + head * stride_oh
    if table is not None:
        table += head * stride_table + PAD
    program, programs = tl.program_id(0), tl.num_programs(0)
    blocks = tl.cdiv(queries_count, BLOCK_Q)
    if sums is not None:
        own = ((line * HEADS * MAPS + head) * programs + program) * (BLOCK_Q // BLOCK_K)
        sums += own * stride_table
    for turn in range(tl.cdiv(blocks, programs)):
        block = blocks - 1 - (turn * programs + (program if turn % 2 == 0 else programs - 1 - program))
        if block >= 0:
            _block(
                block,
                line,
                head,
                queries,
                keys,
                values,
                gradient,
                logsumexp + row,
                towards_rows + row,
                table,
                of_queries,
                sums,
                first_seen,
                query_documents,
                key_documents,
                inner,
                outer,
                scale,
                stride_qt,
                stride_kt,
                stride_vt,
                stride_gt,
                stride_ot,
                stride_table,
                queries_count,
                given,
                ahead,
                window,
                WIDTH,
                VALUE_WIDTH,
                BLOCK_E,
                BLOCK_V,
                CAPPED,
                WINDOWED,
                SCATTERED,
                BLOCK_Q,
                BLOCK_K,
                PRECISION,
            )
            tl.debug_barrier()  # what was added is seen by all threads before they add the next


def samples() -> list[Sample]:
    """Every type and width, with a bias; with the table's gradient; and in a window and documents."""
    found = []
    for words, kind, constants in sampled():
        for added in ("biased", "learned", "learned, window, documents", "capped, scattered"):
            if "capped" in added and constants["WIDTH"] != 80:
                continue  # one kind of these is enough
            blocks = of_kind(LEARNED if "learned" in added else BACKWARD_QUERIES, kind, constants)
            tensors: dict[str, str | None] = {}
            tensors |= dict.fromkeys(("queries", "keys", "values", "gradient", "of_queries"), f"*{kind}")
            tensors |= {"logsumexp": "*fp32", "towards_rows": "*fp32", "table": "*fp32"}
            tensors |= dict.fromkeys(("first_seen", "query_documents", "key_documents"))
            tensors |= {"sums": "*fp32" if "learned" in added else None}
            if "documents" in added:
                tensors |= {"first_seen": "*i32"}
            shape = {"WINDOWED": "window" in added, "BLOCK_Q": blocks.queries, "BLOCK_K": blocks.keys}
            if "capped" in added:
                scattered(tensors, shape)
            name = f"distance backward of queries, {words}, {added}"
            found.append(sample(name, backward_queries, tensors, constants | shape, blocks))
    kinds = dict.fromkeys(("gradient", "output"), "*bf16") | {"result": "*fp32"}
    constants = {"HEADS": 8, "VALUE_WIDTH": 128, "BLOCK_V": 128, "BLOCK_Q": 64}
    return [*found, sample("distance backward, towards", towards, kinds, constants, Blocks(0, 0))]
