"""Looks at this computer before a run does: what is there, what is missing, and what to do about it."""

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lookfar import kernels, plugins
from lookfar.attention.scheme import Scheme, build_scheme
from lookfar.errors import UserError
from lookfar.files import cache_folder
from lookfar.model.decoder import device_of
from lookfar.sight import Sight
from lookfar.training.precision import fast_bfloat16

GIB = 1 << 30
LITTLE = GIB  # bytes of free disk below which checkpoints may not fit
PROBE = 16 << 20  # bytes that are written to measure the disk
NEAR = 1e-3  # how far a kernel may be from the definition in the type of a CPU or a GPU
PATIENCE, HUB_PATIENCE = 180, 4  # seconds that the compiler and the hub are given
COMPILED = (
    "import torch; f = torch.compile(lambda x: (x.sin() + 1).sum()); print(float(f(torch.zeros(8, device={!r}))))"
)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: what was found, and what to do where it is not well.

    Attributes:
        subject: what was looked at.
        state: `well`; `lacking`, where training can start without it; `wrong`, where it cannot.
        found: what is there.
        advice: what to do; empty where nothing is.
    """

    subject: str
    state: Literal["well", "lacking", "wrong"]
    found: str
    advice: str = ""

    def row(self) -> dict[str, Any]:
        """The finding as plain content."""
        return asdict(self)


def examine(folder: Path, device: str = "auto") -> Iterator[Finding]:
    """Every finding as it is made, for runs in this folder on this device. Nothing is left behind.

    What raises is a finding too: the examination itself never fails.
    """
    yield from _guarded("python", _python)
    yield from _guarded("torch", _torch)
    on_device = _guarded("device", lambda: _device(device))
    yield from on_device
    if can_start(on_device):
        yield from _guarded("bfloat16", lambda: _bfloat16(device_of(device)))
        yield from _guarded("kernels", lambda: _kernels(device_of(device)))
    yield from _guarded("disk", lambda: _disk(folder))
    yield from _guarded("cache", _cache)
    yield from _guarded("hub", _hub)
    yield from _guarded("extras", _extras)
    if can_start(on_device):
        yield from _guarded("compile", lambda: _compile(device_of(device)))


def can_start(findings: list[Finding]) -> bool:
    """Whether nothing that was found keeps training from starting."""
    return all(each.state != "wrong" for each in findings)


def _guarded(subject: str, check: Callable[[], Finding | list[Finding]]) -> list[Finding]:
    try:
        found = check()
    except Exception as error:  # whatever it is, it is what the user has to know
        return [Finding(subject, "wrong", _words(error), "mend this first")]
    return [found] if isinstance(found, Finding) else found


def _python() -> Finding:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Finding("python", "well", found)


def _torch() -> Finding:
    wanted = next((each for each in metadata.requires("lookfar") or [] if each.startswith("torch>=")), "torch>=2.9")
    if _version(torch.__version__) < _version(wanted.removeprefix("torch>=")):
        return Finding("torch", "wrong", torch.__version__, f'pip install "{wanted}"')
    return Finding("torch", "well", torch.__version__)


def _device(name: str) -> Finding:
    device = device_of(name)
    float(torch.ones(2, 2, device=device).sum())
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return Finding("device", "well", f"{properties.name}, {properties.total_memory / GIB:.0f} GiB")
    found = f"{device.type}, threads: {torch.get_num_threads()}"
    if device.type == "cpu" and shutil.which("nvidia-smi"):
        return Finding("device", "lacking", f"{found}; there is a GPU", "install a build of torch with CUDA")
    return Finding("device", "well", found)


def _bfloat16(device: torch.device) -> Finding:
    ratio = _seconds(torch.float32, device) / _seconds(torch.bfloat16, device)
    taken = "bfloat16" if fast_bfloat16(device) else "float32"
    found = f"products {ratio:.2g} times as fast as float32; training.precision='auto' takes {taken}"
    if taken == "bfloat16" and ratio < 1:
        return Finding("bfloat16", "lacking", found, "training.precision='float32' may be faster")
    return Finding("bfloat16", "well", found)


def _seconds(dtype: torch.dtype, device: torch.device, size: int = 512) -> float:
    matrix, times = torch.ones(size, size, dtype=dtype, device=device), []
    for _ in range(4):  # the first one prepares
        started = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # waits for the device
        times.append(time.perf_counter() - started)
    return min(times[1:])


def _kernels(device: torch.device) -> list[Finding]:
    findings = [_kernel(name, device) for name in plugins.names("kernels")]
    if any(each.state == "well" for each in findings):
        return findings
    return [*findings, Finding("kernels", "wrong", "none works", "try --device cpu, or install another build of torch")]


def _kernel(name: str, device: torch.device) -> Finding:
    """A tiny call, forward and backward, of plain text or else with slots, compared with the definition."""
    subject, scheme, refusals = f"kernel {name}", build_scheme("nope", heads=2, head_width=16).to(device), []
    for sight in (Sight.causal(24, device=device), Sight.slots(20, 4, device=device)):
        try:
            found, expected = _call(name, sight, scheme, device), _call("reference", sight, scheme, device)
        except UserError as refusal:
            refusals.append(str(refusal).partition(": ")[2].rstrip("."))
            continue
        except Exception as error:
            return Finding(subject, "lacking", _words(error), "it is of no use here: name another kernel")
        off = max(float((one - other).abs().max()) for one, other in zip(found, expected, strict=True))
        if not off < NEAR:
            return Finding(subject, "wrong", f"off by {off:.2g}", "report it with the version of torch")
        return Finding(subject, "well", "works")
    return Finding(subject, "lacking", f"refuses: {refusals[0]}", "another kernel takes its place")


def _call(name: str, sight: Sight, scheme: Scheme, device: torch.device) -> list[Tensor]:
    random, shape = torch.Generator().manual_seed(0), (1, 2, sight.keys, 16)
    queries, keys, values = (torch.randn(shape, generator=random).to(device).requires_grad_() for _ in range(3))
    output = kernels.attend(queries, keys, values, sight, scheme, name)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), (queries, keys, values))]


def _disk(folder: Path) -> Finding:
    place = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.is_dir())
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            started = time.perf_counter()
            file.write(os.urandom(PROBE))
            file.flush()
            os.fsync(file.fileno())
            seconds = time.perf_counter() - started
    except OSError as error:
        return Finding("disk", "wrong", f"{place}: {error.strerror}", "make room, or choose another --folder")
    free = shutil.disk_usage(place).free
    found = f"{free / GIB:,.1f} GiB free, {PROBE / seconds / 2**20:,.0f} MiB/s at {place}"
    if free < LITTLE:
        return Finding("disk", "lacking", found, "make room: checkpoints may not fit")
    return Finding("disk", "well", found)


def _cache() -> Finding:
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return Finding("cache", "well", f"{folder} can be written")
    except OSError as error:
        return Finding("cache", "wrong", f"{folder}: {error.strerror}", "set $LOOKFAR_CACHE to a folder of yours")


def _hub() -> Finding:
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return Finding("hub", "well", "not asked: HF_HUB_OFFLINE is set")
    answers: list[str] = []
    asking = threading.Thread(target=lambda: answers.append(_ask(endpoint)), daemon=True)
    asking.start()
    asking.join(HUB_PATIENCE)  # a name server that does not answer heeds no timeout of its own
    found = answers[0] if answers else f"no answer within {HUB_PATIENCE} s"
    if not found:
        return Finding("hub", "well", f"{endpoint} answers")
    advice = "only hugging_face needs it: check the network or set HF_ENDPOINT, or use text_file"
    return Finding("hub", "lacking", f"{endpoint}: {found}", advice)


def _ask(endpoint: str) -> str:
    """Why the hub cannot be reached; empty: it can."""
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=HUB_PATIENCE).close()
    except urllib.error.HTTPError:  # that is an answer too
        return ""
    except (OSError, ValueError) as error:
        return _words(getattr(error, "reason", error))
    return ""


def _extras() -> list[Finding]:
    """What each extra lacks, as the installed package declares them."""
    wanted: dict[str, list[str]] = {}
    for requirement in metadata.requires("lookfar") or []:
        if found := re.match(r"([\w.-]+).*extra == ['\"](\w+)['\"]", requirement):
            wanted.setdefault(found[2], []).append(found[1])
    return [_extra(extra, packages) for extra, packages in sorted(wanted.items())]


def _extra(extra: str, packages: list[str]) -> Finding:
    missing = [each for each in packages if not _installed(each)]
    if not missing:
        return Finding(f"extra {extra}", "well", "installed")
    return Finding(f"extra {extra}", "lacking", f"without {', '.join(missing)}", f'pip install "lookfar[{extra}]"')


def _installed(package: str) -> bool:
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


def _compile(device: torch.device) -> Finding:
    """Compile a tiny function in a process of its own, which may crash or hang."""
    compiler = os.environ.get("CXX") or next((each for each in ("g++", "clang++", "cl") if shutil.which(each)), None)
    if compiler is None:
        return Finding("compile", "lacking", "no C++ compiler", "install g++ or clang, or set CXX")
    command = [sys.executable, "-c", COMPILED.format(device.type)]
    started = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return Finding("compile", "lacking", f"not done within {PATIENCE} s", "what compiles will be slow to start")
    if done.returncode or done.stdout.strip() != "8.0":
        reason = (done.stderr.strip().splitlines() or [f"the process ended with {done.returncode}"])[-1]
        return Finding("compile", "lacking", reason, f"see that {compiler} works, with the headers of Python")
    return Finding("compile", "well", f"works with {compiler}, {time.perf_counter() - started:.0f} s")


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0])[:2])


def _words(error: BaseException | str) -> str:
    """The first line of what an error says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
