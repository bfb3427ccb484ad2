"""DAPE V2, forward and backward: chunked beside the full square of the definition, time and peak memory."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.measure import peak_memory, seconds
from lookfar.attention.scheme import build_scheme
from lookfar.kernels.base import Kernel
from lookfar.plugins import find
from lookfar.sight import Sight

HEADS, HEAD_WIDTH, LENGTH = 4, 64, 2048
KERNELS = ("reference", "chunked")


def run(repeats: int) -> list[dict[str, Any]]:
    """Seconds and bytes of each kernel, and their ratios to the full square."""
    rows = []
    for scheme in ("dape_v2", "kerple + dape_v2"):
        times = seconds({name: prepare(name, scheme) for name in KERNELS}, min(repeats, 5))
        bytes_ = {name: peak_memory(prepare, name, scheme) for name in KERNELS}
        rows += [
            {
                "scheme": scheme,
                "kernel": name,
                "seconds": times[name],
                "speed_over_reference": times["reference"] / times[name],
                "peak_megabytes": bytes_[name] / 2**20,
                "memory_over_reference": bytes_[name] / bytes_["reference"],
                "length": LENGTH,
                "batch": 1,
                "heads": HEADS,
            }
            for name in KERNELS
        ]
    return rows


def prepare(kernel: str, expression: str) -> Callable[[], None]:
    """One call, forward and backward, under bfloat16 autocast."""
    torch.manual_seed(0)
    scheme = build_scheme(expression, heads=HEADS, head_width=HEAD_WIDTH)
    shape = (1, HEADS, LENGTH, HEAD_WIDTH)
    queries, keys, values = (torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    sight = Sight.causal(LENGTH)
    chosen: Kernel = find("kernels", kernel)()

    def call() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            output = chosen.attend(queries, keys, values, sight, scheme)
        output.sum().backward()

    return call
