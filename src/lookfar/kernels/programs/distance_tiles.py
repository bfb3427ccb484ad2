"""What the programs of the kernel `distance` share: heads that share keys, scores of a tile, and who sees whom in it."""

from typing import no_type_check

import triton
import triton.language as tl

from lookfar.kernels.programs.samples import Sample

PAD = tl.constexpr(256)  # entries of a table before distance 0 and after the longest, so that no lookup in a tile is checked


@triton.jit
@no_type_check
def key_head_of(head, HEADS: tl.constexpr, GROUPS: tl.constexpr, OWN_KEYS: tl.constexpr):
    """The key head of a score head [map, head]; `OWN_KEYS`: every map has key heads of its own."""
    group = (head % HEADS) // (HEADS // GROUPS)
    return (head // HEADS) * GROUPS + group if OWN_KEYS else group


@triton.jit
@no_type_check
def score_head_of(key_head, turn, HEADS: tl.constexpr, GROUPS: tl.constexpr, OWN_KEYS: tl.constexpr):
    """The score head that is number `turn` among those that share a key head."""
    per: tl.constexpr = HEADS // GROUPS
    maps = key_head // GROUPS if OWN_KEYS else turn // per
    return maps * HEADS + (key_head % GROUPS) * per + turn % per


@triton.jit
@no_type_check
def rows_of(base, places, stride, limit, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHECKED: tl.constexpr):
    """Some rows of a matrix, zero beyond its width and, where `CHECKED`, beyond its last row."""
    columns = tl.arange(0, BLOCK)
    at = base + places[:, None] * stride + columns[None, :]
    if CHECKED:
        return tl.load(at, mask=(places[:, None] < limit) & (columns[None, :] < WIDTH), other=0.0)
    if WIDTH == BLOCK:
        return tl.load(at)
    return tl.load(at, mask=columns[None, :] < WIDTH, other=0.0)


@triton.jit
@no_type_check
def scored(products, inner, outer, CAPPED: tl.constexpr):
    """Scores in base 2 from products of queries and keys: outer · products, or outer · tanh(inner · products)."""
    if CAPPED:
        products = 1 - 2 / (1 + tl.exp2(products * (inner * 2.885390081777927)))  # tanh x = 1 - 2 / (1 + 4^(x / ln 2))
    return products * outer


@triton.jit
@no_type_check
def slope_of(scores, outer, CAPPED: tl.constexpr):
    """What the cap leaves of a gradient: 1 - tanh²."""
    if CAPPED:
        kept = scores / outer  # the tanh
        return 1 - kept * kept
    return 1.0


@triton.jit
@no_type_check
def seen(
    places,
    keys,
    first,
    query_documents,
    key_documents,
    window,
    WINDOWED: tl.constexpr,
    BOUNDED: tl.constexpr,
    SCATTERED: tl.constexpr,
):
    """Which keys the queries at some places see; all are given so that they broadcast against one another."""
    visible = keys <= places
    if WINDOWED:
        visible = visible & (keys > places - window)
    if BOUNDED:
        visible = visible & (keys >= first)
    if SCATTERED:
        same = (query_documents == key_documents) & (key_documents >= 0)
        visible = visible & (same | (keys == places))
    return visible


def samples() -> list[Sample]:
    """None: these are parts of programs."""
    return []
