"""Which type products are computed in."""

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast(precision: str, dtype: str, device: torch.device, *, keep: bool = True) -> AbstractContextManager[object]:
    """bfloat16 products where they are asked for, or, under `auto`, where the processor is fast at them.

    Without `keep` no narrow copy of a weight outlives its use: all of them are a whole model.
    """
    wanted = precision == "bfloat16" or (precision == "auto" and fast_bfloat16(device))
    if not wanted or dtype != "float32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=keep)


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, probe, bool)() for probe in probes)
    return False
