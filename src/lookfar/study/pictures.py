"""Draws squares of numbers as PNG, for charts that would drown in a rectangle a cell."""

import base64
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8

PIXELS = 256  # of a picture's side, at least


def picture(cells: Float[np.ndarray, "r c"], colours: Sequence[str]) -> str:
    """Cells between 0 and 1 as the address of an image, coloured along the ramp; NaN is transparent."""
    ramp = np.array([[int(each[at : at + 2], 16) for at in (1, 3, 5)] for each in colours], float)
    place = np.nan_to_num(cells).clip(0, 1) * (len(ramp) - 1)
    below = np.minimum(place.astype(int), len(ramp) - 2)
    part = (place - below)[..., None]
    shades = ramp[below] * (1 - part) + ramp[below + 1] * part
    alpha = np.where(np.isnan(cells), 0.0, 255.0)[..., None]
    pixels = np.concatenate([shades, alpha], axis=-1).round().astype(np.uint8)
    factor = -(-PIXELS // max(cells.shape))  # repeated, so that no viewer blurs the cells
    return "data:image/png;base64," + base64.b64encode(_png(pixels.repeat(factor, 0).repeat(factor, 1))).decode()


def _png(pixels: UInt8[np.ndarray, "r c 4"]) -> bytes:
    height, width, _ = pixels.shape
    lines = b"".join(b"\x00" + line.tobytes() for line in pixels)
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*part) for part in parts)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
