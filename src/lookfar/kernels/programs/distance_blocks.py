"""How the programs of the kernel `distance` lay out their work, by the type and width of what they are given."""

from dataclasses import dataclass
from typing import Any

import torch

from lookfar.kernels.programs.samples import Sample

PROGRAMS = 512  # programs that keep a large GPU busy: where a program adds to sums of its own, no more are started
PIECE = 32  # parts of a row that are merged at once
PAD = 256  # entries of a table before distance 0 and after the longest, so that no lookup in a tile is checked


@dataclass(frozen=True)
class Blocks:
    """How a program lays out its work: the queries and keys of a tile, warps, and tiles that are loaded ahead."""

    queries: int
    keys: int
    warps: int = 4
    stages: int = 2


# By the bytes of a number and the width of a head, rounded up; chosen so that an sm_90 holds everything in registers.
FORWARD = {
    (2, 64): Blocks(128, 64, 8, 3),
    (2, 128): Blocks(128, 64, 8, 2),
    (2, 256): Blocks(128, 32, 8, 2),
    (4, 64): Blocks(32, 32, 4, 2),
    (4, 128): Blocks(32, 16, 8, 2),
    (4, 256): Blocks(16, 16, 8, 2),
}
BACKWARD_QUERIES = {
    (2, 64): Blocks(64, 64, 4, 2),
    (2, 128): Blocks(64, 64, 8, 2),
    (2, 256): Blocks(64, 32, 8, 2),
    (4, 64): Blocks(32, 32, 4, 1),
    (4, 128): Blocks(16, 16, 4, 1),
    (4, 256): Blocks(16, 16, 8, 1),
}
LEARNED = {  # queries and the table: a warp turns a row of 32 numbers by one shuffle
    (2, 64): Blocks(64, 32, 4, 2),
    (2, 128): Blocks(64, 32, 4, 2),
    (2, 256): Blocks(64, 32, 8, 2),
    (4, 64): Blocks(32, 32, 4, 1),
    (4, 128): Blocks(16, 16, 4, 1),
    (4, 256): Blocks(16, 16, 8, 1),
}
BACKWARD_KEYS = {
    (2, 64): Blocks(32, 128, 8, 2),
    (2, 128): Blocks(32, 128, 8, 2),
    (2, 256): Blocks(32, 32, 8, 2),
    (4, 64): Blocks(32, 32, 8, 1),
    (4, 128): Blocks(16, 16, 4, 1),
    (4, 256): Blocks(16, 16, 8, 1),
}
DECODE = {
    (2, 64): Blocks(0, 64, 4, 3),
    (2, 128): Blocks(0, 64, 4, 3),
    (2, 256): Blocks(0, 32, 4, 3),
    (4, 64): Blocks(0, 32, 4, 2),
    (4, 128): Blocks(0, 16, 4, 2),
    (4, 256): Blocks(0, 16, 8, 2),
}


def power(number: int) -> int:
    """The next power of two, at least 16, which products of tiles ask for."""
    return max(16, 1 << (number - 1).bit_length())


def of_width(blocks: dict[tuple[int, int], Blocks], dtype: torch.dtype, width: int) -> Blocks:
    """The blocks for numbers of this type in heads of this width."""
    return blocks[dtype.itemsize, max(64, power(width))]


def of_kind(blocks: dict[tuple[int, int], Blocks], kind: str, constants: dict[str, Any]) -> Blocks:
    """The blocks for a sample: `kind` is Triton's name of a type, `constants` those of the program."""
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[kind]
    return of_width(blocks, dtype, max(constants["WIDTH"], constants["VALUE_WIDTH"]))


def samples() -> list[Sample]:
    """None: nothing is compiled here."""
    return []
