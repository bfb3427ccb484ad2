"""Which kernel of a processor is the fastest, by method, type, pass and length: what `kernels/dispatch.py` is set by.

Kernels of one size take turns. Every call attends over the same number of tokens, in as many lines as fit.
"""

from typing import Any

from benchmarks.attention import Case, compare

SCHEMES = {
    "nope": ("sdpa", "square", "strips"),
    "alibi": ("sdpa", "square", "strips"),
    "stable_mask": ("sdpa", "square", "strips"),
    "kerple": ("square", "strips"),
    "fire": ("square", "strips"),
    "cope": ("chunked", "strips"),
    "kerple + dape_v2": ("chunked", "strips"),
}
LENGTHS, TOKENS = (64, 128, 256, 512, 1024, 2048), 4096
TYPES, STEPS = ("float32", "bfloat16"), ("forward", "forward+backward")


def run(repeats: int) -> list[dict[str, Any]]:
    """Seconds of each kernel, and its time over that of the fastest of its row of rivals."""
    rows = []
    for dtype in TYPES:
        for step in STEPS:
            for length in LENGTHS:
                rows += _rivals(dtype, step, length, repeats)
    return rows


def _rivals(dtype: str, step: str, length: int, repeats: int) -> list[dict[str, Any]]:
    cases = [
        Case(scheme, f"lookfar {kernel}", step, length, dtype, batch=TOKENS // length, heads=4)
        for scheme, kernels in SCHEMES.items()
        for kernel in kernels
    ]
    timed = [row for row in compare(cases, repeats, memory=False, limit=3.0) if row["kernel"]]
    kept = ("scheme", "kernel", "pass", "dtype", "length", "batch", "heads", "width", "seconds", "repeats")
    least = {row["scheme"]: min(each["seconds"] for each in timed if each["scheme"] == row["scheme"]) for row in timed}
    return [
        {**{key: row[key] for key in kept}, "time_over_fastest": row["seconds"] / least[row["scheme"]]} for row in timed
    ]
