"""Attention in C++ for processors: compiled once by the machine's own compiler, kept in the cache folder.

Nothing is built at installation. Where no compiler is found, or it fails, `library` says why, and the kernels that call
it refuse with that reason.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from ctypes import c_float, c_int64, c_void_p
from functools import cache
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from lookfar import files

COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-ffp-contract=fast", "-fPIC", "-shared", "-pthread")
OWN = ("-march=native", "-mcpu=native")  # the first that the compiler knows
POINTER, NUMBER, STEPS = c_void_p, c_int64, c_int64 * 3


class Call(ctypes.Structure):
    """What is asked for, field by field as in `call.h`."""

    _fields_ = (
        *((name, NUMBER) for name in ("batch", "heads", "queries", "keys", "first", "width", "value_width")),
        *((name, NUMBER) for name in ("key_heads", "value_heads", "threads")),
        *((name, POINTER) for name in ("query", "key", "value")),
        *((name, STEPS) for name in ("query_steps", "key_steps", "value_steps")),
        *((name, POINTER) for name in ("key_head", "value_head", "start")),
        ("start_step", NUMBER),
        ("scale", c_float),
        ("sink", POINTER),
        ("sink_steps", STEPS),
        ("table", POINTER),
        ("span", NUMBER),
        *((name, POINTER) for name in ("slope", "offset", "rise", "rate", "cuts")),
        *((name, NUMBER) for name in ("pieces", "rate_step")),
        ("embedding", POINTER),
        *((name, NUMBER) for name in ("places", "place_step")),
        *((name, POINTER) for name in ("first_weight", "first_bias", "second_weight", "second_bias")),
        *((name, NUMBER) for name in ("hidden", "taps", "inputs", "keeps_bias")),
        ("leak", c_float),
        *((name, POINTER) for name in ("output", "tops", "shares", "gradient")),
        *((f"{name}_gradient", POINTER) for name in ("query", "key", "value", "sink", "table", "slope", "offset")),
        *((f"{name}_gradient", POINTER) for name in ("rise", "rate", "embedding", "first_weight", "first_bias")),
        *((f"{name}_gradient", POINTER) for name in ("second_weight", "second_bias")),
        ("parts", NUMBER),
    )

    def set(self, **fields: Any) -> None:
        """Fill fields; of a tensor, its address. The tensors must outlive the call."""
        for name, value in fields.items():
            if isinstance(value, Tensor):
                value = value.data_ptr()
            elif isinstance(value, tuple):
                value = STEPS(*value)
            setattr(self, name, value)


@cache
def refusal() -> str | None:
    """Why the compiled functions cannot be had, in words; None: they can. Compiles at the first call of a machine."""
    try:
        library()
    except Unavailable as error:
        return str(error)
    return None


@cache
def library() -> ctypes.CDLL:
    """The compiled functions `lookfar_forward` and `lookfar_backward`, each of which takes a pointer to a `Call`.

    Raises:
        Unavailable: there is no compiler, it fails, or the cache folder cannot be written.
    """
    compiler = os.environ.get("CXX") or next(filter(shutil.which, COMPILERS), None)
    if compiler is None or shutil.which(compiler.split()[0]) is None:
        raise Unavailable("there is no C++ compiler; install one, such as g++, or set $CXX")
    here = resources.files("lookfar.kernels.compiled")
    sources = {each.name: each.read_bytes() for each in here.iterdir() if each.name.endswith((".cpp", ".h"))}
    file = files.cache_folder() / "compiled" / f"{_name(compiler, sources)}.so"
    try:
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory() as folder, files.replacing(file) as aside:
                for name, content in sources.items():
                    Path(folder, name).write_bytes(content)
                _compile(compiler, Path(folder, "strips.cpp"), aside)
        found = ctypes.CDLL(str(file))
    except OSError as error:
        raise Unavailable(f"{file} cannot be written or loaded ({error.strerror or error})") from error
    for function in (found.lookfar_forward, found.lookfar_backward):
        function.argtypes, function.restype = (ctypes.POINTER(Call),), None
    found.lookfar_lanes.argtypes, found.lookfar_lanes.restype = (), c_int64
    return found


class Unavailable(Exception):
    """Why there are no compiled functions."""


def _name(compiler: str, sources: dict[str, bytes]) -> str:
    """A name for what these sources become with this compiler on this processor."""
    hashed = hashlib.sha256(repr((sorted(sources.items()), FLAGS, compiler, platform.machine(), _processor())).encode())
    return f"strips-{hashed.hexdigest()[:16]}"


def _processor() -> str:
    """What tells processors with other instructions apart: a cache folder may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _compile(compiler: str, source: Path, to: Path) -> None:
    told = ""
    for own in OWN:
        wide = ["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else []
        asked = [*compiler.split(), *FLAGS, own, *wide, str(source), "-o", str(to)]
        done = subprocess.run(asked, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode == 0:
            return
        told = next((line for line in done.stderr.splitlines() if "error" in line), "no reason given")
    raise Unavailable(f"{compiler} does not compile it: {told[:200]}")
