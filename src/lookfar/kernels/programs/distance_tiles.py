"""What the programs of the kernel `distance` share: heads that share keys, scores, and who sees whom in a tile."""
# ruff: noqa: N803  # capitals are constants of a program, as Triton's users write them

from collections.abc import Mapping
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from triton import knobs

from lookfar.kernels.programs import distance_blocks
from lookfar.kernels.programs.distance_blocks import Blocks, power
from lookfar.kernels.programs.samples import Sample

TYPICAL = [("bf16", 64, 64), ("bf16", 80, 80), ("bf16", 128, 128), ("bf16", 64, 128), ("bf16", 256, 256)]
TYPICAL += [("fp32", 64, 64), ("fp32", 128, 128), ("fp32", 256, 256)]
INTERPRETED = tl.constexpr(knobs.runtime.interpret)
ASSEMBLED = tl.constexpr(not knobs.runtime.interpret and torch.version.hip is None)
PAD = tl.constexpr(distance_blocks.PAD)


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
    """Some rows of a matrix, zero beyond its width and, where `CHECKED`, beyond its last row.

    The rows of long texts lie further apart than 32 bits can tell.
    """
    columns = tl.arange(0, BLOCK)
    at = base + places.to(tl.int64)[:, None] * stride + columns[None, :]
    if CHECKED:
        return tl.load(at, mask=(places[:, None] < limit) & (columns[None, :] < WIDTH), other=0.0)
    if WIDTH == BLOCK:
        return tl.load(at)
    return tl.load(at, mask=columns[None, :] < WIDTH, other=0.0)


@triton.jit
@no_type_check
def product(left, right, added, PRECISION: tl.constexpr):
    """The product of two tiles, added up in float32; `added` may be None."""
    if INTERPRETED:  # to whom bfloat16 is a whole number
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, added, input_precision=PRECISION)


@triton.jit
@no_type_check
def looked_up(table, places, keys):
    """The bias of every pair; `places` and `keys` broadcast against one another.

    A tile has few distances: what is loaded comes from the nearest cache, and neighbouring threads share it. An
    ordinary load would be staged in shared memory, and moved there to the layout of the scores. In 64 bits the
    compiler finds that a thread's addresses are one register and constants.
    """
    at = table + (places.to(tl.int64) - keys.to(tl.int64))
    if not ASSEMBLED:
        return tl.load(at)
    return tl.inline_asm_elementwise("ld.global.nc.f32 $0, [$1];", "=f,l", [at], tl.float32, is_pure=True, pack=1)


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
    slope = tl.full(scores.shape, 1.0, tl.float32)
    if CAPPED:
        kept = scores / outer  # the tanh
        slope -= kept * kept
    return slope


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


def sample(
    name: str, program: Any, tensors: Mapping[str, str | None], constants: dict[str, Any], blocks: Blocks
) -> Sample:
    """A program with the types of its tensors, None where one is not given; numbers are float32 or int32 by name."""
    numbers = {"inner": "fp32", "outer": "fp32", "scale": "fp32"}
    types = {
        name: tensors.get(name) or numbers.get(name, "i32")
        for name in program.arg_names
        if name not in constants and tensors.get(name, "") is not None
    }
    absent = {name: None for name, kind in tensors.items() if kind is None}
    return Sample(name, program, types, {**absent, **constants}, blocks.warps, blocks.stages)


def sampled() -> list[tuple[str, str, dict[str, Any]]]:
    """What programs are compiled with: words, the type of numbers, and the constants that all of them have."""
    cases = []
    for kind, width, value_width in TYPICAL:
        constants = {
            "HEADS": 8,
            "MAPS": 1,
            "GROUPS": 2,
            "OWN_KEYS": False,
            "WIDTH": width,
            "VALUE_WIDTH": value_width,
            "BLOCK_E": power(width),
            "BLOCK_V": power(value_width),
            "CAPPED": False,
            "WINDOWED": False,
            "SCATTERED": False,
            "PRECISION": "ieee" if kind == "fp32" else "tf32",
        }
        cases.append((f"{kind}, width {width} and {value_width}", kind, constants))
    return cases


def scattered(tensors: dict[str, str | None], constants: dict[str, Any]) -> None:
    """Change a sample to soft-capped scores and documents that lie in between one another."""
    tensors |= {"query_documents": "*i32", "key_documents": "*i32"}
    constants |= {"CAPPED": True, "SCATTERED": True}


def samples() -> list[Sample]:
    """None: these are parts of programs."""
    return []
