"""What a row says of the machine that it was measured on."""

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import torch

import lookfar


def facts(device: str, command: str) -> dict[str, Any]:
    """Processor, versions and command; on a GPU also its name and the versions of CUDA and Triton."""
    shared = {"torch": torch.__version__, "lookfar": lookfar.__version__, "command": command.strip()}
    if device == "cuda":
        versions = {"cuda": torch.version.cuda, "triton": importlib.metadata.version("triton")}
        return {"processor": torch.cuda.get_device_name(), **versions, **shared}
    return {"processor": _processor(), "threads": torch.get_num_threads(), **shared}


def without_cuda() -> str | None:
    """Why nothing can be measured on a GPU here; None: it can."""
    if torch.cuda.is_available():
        return None
    build = "is built without CUDA" if torch.version.cuda is None else "finds no CUDA device"
    return f"This needs a CUDA device, and torch {torch.__version__} {build}."


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
