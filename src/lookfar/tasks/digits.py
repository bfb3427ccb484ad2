"""Numbers the tokens of arithmetic by the place of each digit in its number."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64


def abacus(pieces: Sequence[str], *, offset: int = 0) -> Int64[np.ndarray, "t"]:
    """Number each digit by its place in its number, counted as it is written from `offset` + 1 on; all else gets 0.

    A number is what stands between other pieces: in ` 3 5 + 9` the positions are 1, 2, 0, 1. The first digit that is
    written must be the least significant, as under `addition(order="reversed")`, for one position to be one
    significance. Train with an offset that is drawn for each example from 0 to 99, and test with 0. Source: McLeish et
    al., 2024, "Transformers Can Do Arithmetic with the Right Embeddings", arXiv 2405.17399.
    """
    positions, place = np.zeros(len(pieces), np.int64), 0
    for token, piece in enumerate(pieces):
        place = place + 1 if _is_digit(piece) else 0
        positions[token] = offset + place if place else 0
    return positions


def coupled(
    pieces: Sequence[str], *, operands: int = 2, start: int = 1, reversed_operands: bool = False
) -> Int64[np.ndarray, "t"]:
    """Give the digits of the same significance the same position, in operands and answer; the answer must be reversed.

    The digits of an operand ascend to the position of the units, `start` + the digits of the longest operand; the
    answer begins there and descends: in `6 5 3 + 0 4 9 = 2 0 7` the positions are 2, 3, 4, 5, 2, 3, 4, 5, 4, 3, 2. What
    stands between two numbers gets the position after the units, as `+` and `=` do there; all before the first operand
    and after the answer gets 0, and an answer that is too long descends no further than to 0. Once the operands are
    complete, what is written later never changes the position of what stands before. Train with a `start` that is drawn
    for each example, and test with 1. Source: Cho et al., 2024, "Position Coupling", arXiv 2405.20671.

    Args:
        operands: how many numbers are added; the one after them is the answer.
        reversed_operands: whether operands too begin with their least significant digit.
    """
    numbers = _numbers(pieces)
    units = start + max((end - first for first, end in numbers[:operands]), default=0)
    positions = np.zeros(len(pieces), np.int64)
    ends = numbers[operands][0] if len(numbers) > operands else len(pieces)
    positions[numbers[0][0] if numbers else ends : ends] = units + 1
    for number, (first, end) in enumerate(numbers[: operands + 1]):
        significance = np.arange(end - first)
        if number < operands and not reversed_operands:
            significance = significance[::-1]
        positions[first:end] = np.maximum(units - significance, 0)
    return positions


def _numbers(pieces: Sequence[str]) -> list[tuple[int, int]]:
    """Where each number begins and ends."""
    digits = np.array([False, *(_is_digit(each) for each in pieces), False])
    borders = np.flatnonzero(digits[1:] != digits[:-1])
    return [(int(first), int(end)) for first, end in borders.reshape(-1, 2)]


def _is_digit(piece: str) -> bool:
    return piece.strip() in tuple("0123456789")
