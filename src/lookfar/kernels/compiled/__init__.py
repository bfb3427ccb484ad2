"""Attention in C++ for processors: compiled once by the machine's own compiler, kept in the cache folder.

Nothing is built at installation. Where no compiler is found, or it fails, `library` says why, and the kernels that call
it refuse with that reason.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import threading
from ctypes import c_float, c_int64, c_void_p
from functools import cache
from importlib import resources
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory
from typing import Any

from torch import Tensor

from lookfar import files

COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-ffp-contract=fast", "-fPIC", "-shared", "-pthread")
OWN = "-mcpu=native" if platform.machine().startswith(("arm", "aarch")) else "-march=native"
POINTER, NUMBER, STEPS = c_void_p, c_int64, c_int64 * 3


class Request(ctypes.Structure):
    """What is asked for, field by field as in `request.h`."""

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
            assert name in FIELDS, name
            if isinstance(value, Tensor):
                value = value.data_ptr()
            elif isinstance(value, tuple):
                value = STEPS(*value)
            setattr(self, name, value)


FIELDS = {each[0] for each in Request._fields_}
_LOCK = threading.RLock()  # one thread compiles, the others wait


def run(function: str, request: Request) -> None:
    """Call `lookfar_forward` or `lookfar_backward`.

    Raises:
        MemoryError: what a strip needs is more than there is.
    """
    if getattr(library(), function)(request):
        raise MemoryError("There is not enough memory for strips of scores; make batches smaller.")


@cache
def refusal() -> str | None:
    """Why the compiled functions cannot be had, in words; None: they can. Compiles at the first call of a machine."""
    try:
        library()
    except Unavailable as error:
        return str(error)
    return None


def library() -> ctypes.CDLL:
    """The compiled functions `lookfar_forward` and `lookfar_backward`, each of which takes a pointer to a `Request`.

    Raises:
        Unavailable: there is no compiler, it fails, or the cache folder cannot be written.
    """
    with _LOCK:
        return _library()


@cache
def _library() -> ctypes.CDLL:
    compiler = shlex.split(os.environ.get("CXX", "")) or [*filter(shutil.which, COMPILERS)][:1]
    if not compiler or shutil.which(compiler[0]) is None:
        raise Unavailable("there is no C++ compiler; install one, such as g++, or set $CXX")
    here = resources.files("lookfar.kernels.compiled")
    sources = {each.name: each.read_bytes() for each in here.iterdir() if each.name.endswith((".cpp", ".h"))}
    file = files.cache_folder() / "compiled" / f"{_name(compiler, sources)}.so"
    try:
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            _publish(_compile(compiler, sources), file)
        found = ctypes.CDLL(str(file))
    except OSError as error:
        raise Unavailable(f"{file} cannot be written or loaded ({error.strerror or error})") from error
    for name in ("forward", "backward", "lanes", "request_size"):
        getattr(found, f"lookfar_{name}").restype = c_int64
    for name in ("forward", "backward"):
        getattr(found, f"lookfar_{name}").argtypes = (ctypes.POINTER(Request),)
    assert found.lookfar_request_size() == ctypes.sizeof(Request), "request.h has other fields"
    return found


class Unavailable(Exception):
    """Why there are no compiled functions."""


def _name(compiler: list[str], sources: dict[str, bytes]) -> str:
    """A name for what these sources become with this compiler, C library and processor."""
    made_of = (sorted(sources.items()), FLAGS, compiler, platform.libc_ver(), platform.machine(), _processor())
    return f"strips-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]}"


def _processor() -> str:
    """What tells processors with other instructions apart: a cache folder may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.node())


def _compile(compiler: list[str], sources: dict[str, bytes]) -> bytes:
    """What the compiler makes for this very processor."""
    wide = ["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else []
    with TemporaryDirectory() as folder:
        for name, content in sources.items():
            Path(folder, name).write_bytes(content)
        asked = [*compiler, *FLAGS, OWN, *wide, "strips.cpp", "-o", "strips.so"]
        done = subprocess.run(asked, capture_output=True, text=True, errors="replace", check=False, cwd=folder)
        if done.returncode == 0:
            return Path(folder, "strips.so").read_bytes()
    told = next((line for line in done.stderr.splitlines() if "error" in line.lower()), "no reason given")
    raise Unavailable(f"{' '.join(compiler)} does not compile it: {told[:200]}")


def _publish(content: bytes, file: Path) -> None:
    """Under a name that no other writer has, even in another container with the same process number."""
    with NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}.", delete=False) as aside:
        try:
            aside.write(content)
            aside.flush()
            os.fsync(aside.fileno())
            Path(aside.name).chmod(0o755)
            Path(aside.name).replace(file)
        except BaseException:
            Path(aside.name).unlink(missing_ok=True)
            raise
