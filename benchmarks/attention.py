"""The speed of attention itself under every method, as a ratio to torch's plain causal attention of the same size.

Rivals of one length and pass take turns, plain causal attention among them. `lookfar` is the kernel that it chooses,
`lookfar KERNEL` the one that is named; `eager square` is the full square of scores under autograd, the usual code of a
method. Biases are computed by the method inside of what is timed, and gradients reach all that it learns.

A rival that fails is told and left out; the others are measured.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch._dynamo
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import measure, rivals
from lookfar import kernels
from lookfar.attention.scheme import Scheme, build_scheme
from lookfar.kernels.base import Call
from lookfar.sight import Sight

SCHEMES = (
    "nope",
    "rope",
    "alibi",
    "stable_mask",
    "learned_sink",
    "t5",
    "kerple",
    "alibi(learned=true)",
    "log_n",
    "differential",
    "differential_v2",
    "fire",
    "cope",
    "transformer_xl",
    "dape_v1",
    "kerple + dape_v2",
)
PASSES = ("forward", "forward+backward", "decode")
LENGTHS = {"cpu": (512, 2048, 8192), "cuda": (2048, 4096, 8192, 16384, 32768)}
BASE = "plain causal"  # torch's own, of the heads of the plain transformer
DENSE = ("eager square", "sdpa dense bias", "x-transformers")
MOST = {"cpu": 8 * 2048**2, "cuda": 8 * 8192**2}  # entries of a square that a dense rival is given
LIMIT = {"cpu": 10.0, "cuda": 2.0}  # seconds after which a rival takes no further turn
VARIANTS = 128  # of FlexAttention's compiled code: one for each formula, size and pass
Rows = list[dict[str, Any]]


class LeftOut(Exception):
    """Something could not be measured because of an error, which has been told."""


@dataclass(frozen=True)
class Case:
    """One thing to be timed."""

    scheme: str
    implementation: str
    step: str  # one of PASSES
    length: int
    dtype: str = "float32"
    device: str = "cpu"
    batch: int = 1
    heads: int = 8
    width: int = 64  # of a head

    @property
    def entries(self) -> int:
        """Scores of all heads, hidden ones included."""
        return self.batch * self.heads * self.length * (1 if self.step == "decode" else self.length)

    def build(self) -> Scheme:
        """The scheme, with the same parameters at every call."""
        torch.manual_seed(0)
        scheme = build_scheme(self.scheme, heads=self.heads, head_width=self.width, context=self.length)
        return scheme.to(self.device)

    def operations(self, scheme: Scheme) -> float:
        """Floating-point operations of both products, hidden pairs not counted; backward takes 2.5 times forward."""
        heads, pairs = scheme.heads, self.length * (1 if self.step == "decode" else self.length / 2)
        forward = 2 * self.batch * heads.score_heads * pairs * (heads.head_width + heads.value_width)
        return forward * (3.5 if self.step == "forward+backward" else 1)


def run(
    repeats: int,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    lengths: Sequence[int] | None = None,
    schemes: Sequence[str] = SCHEMES,
) -> Iterator[dict[str, Any]]:
    """Seconds, operations per second and peak memory of every rival, and its time over that of plain causal.

    Raises:
        LeftOut: after the last row, where a rival was left out by an error other than a lack of memory.
    """
    failures = 0
    for length in lengths or LENGTHS[device]:
        for step in PASSES:
            cases = [Case(scheme, "lookfar", step, length, dtype, device) for scheme in schemes]
            rows, left = attempt([each for case in cases for each in _with_rivals(case)], repeats)
            yield from rows
            failures += sum(row["failed"] for row in left)
    if failures:
        raise LeftOut(f"Errors left out {failures} measurements of attention.")


def compare(cases: Sequence[Case], repeats: int, *, memory: bool = True, limit: float | None = None) -> Rows:
    """The rows of `attempt`.

    Raises:
        LeftOut: a rival was left out by an error other than a lack of memory.
    """
    rows, left = attempt(cases, repeats, memory=memory, limit=limit)
    if failures := sum(row["failed"] for row in left):
        raise LeftOut(f"Errors left out {failures} of {len(cases) + 1} measurements.")
    return rows


def attempt(
    cases: Sequence[Case], repeats: int, *, memory: bool = True, limit: float | None = None
) -> tuple[Rows, Rows]:
    """Time cases of one size and pass in turns, together with plain causal attention: a row for each, and what failed.

    A rival that has taken `limit` seconds takes no further turn.
    """
    base = replace(cases[0], scheme="nope", implementation=BASE)
    rows: Rows = []
    left: Rows = []

    def failed(case: Case, error: Exception) -> None:
        left.append(leave_out(case, reason(error), failed=not lacks_memory(error)))

    times = _times((base, *cases), repeats, limit or LIMIT[base.device], failed)
    for case, time in times.items():
        try:
            if base not in times:
                raise RuntimeError(f"there is no time of {BASE} attention to compare with")
            rows.append(_row(case, time, times[base], memory))
        except Exception as error:
            failed(case, error)
    return rows, left


def _times(
    cases: Sequence[Case], repeats: int, limit: float, failed: Callable[[Case, Exception], None]
) -> dict[Case, measure.Time]:
    """The times of all cases that do not fail, at their first call or later."""
    wait = torch.cuda.synchronize if cases[0].device == "cuda" else None
    calls: dict[Case, Callable[[], Any]] = {}
    for case in cases:
        try:
            with around(case):
                calls[case] = prepare(case)
                calls[case]()
                if wait:
                    wait()
        except Exception as error:
            calls.pop(case, None)
            failed(case, error)
    return measure.turns(calls, repeats, limit=limit, wait=wait, around=around, failed=failed)


def leave_out(case: Case, why: str, *, failed: bool = False) -> dict[str, Any]:
    """Tell on stderr what is left out and why; a row that says so. `failed`: by an error."""
    told = f"{case.step} of {case.scheme} by {case.implementation}, {case.length:,} tokens, heads of {case.width}"
    print(f"Left out: {told}: {why}", file=sys.stderr, flush=True)
    return {**_named(case, None), "left_out": why, "failed": failed}


def lacks_memory(error: Exception) -> bool:
    """Whether a device had too little memory, which is a finding and no mistake."""
    return isinstance(error, torch.OutOfMemoryError)


def reason(error: Exception) -> str:
    """An error in one line."""
    if lacks_memory(error):
        return "it needs more memory than there is"
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), 'no reason given')}"


def around(case: Case) -> AbstractContextManager[Any]:
    """What is entered before the clock starts: FlashAttention-2 for plain causal, room for FlexAttention's variants."""
    if case.implementation == BASE and case.device == "cuda" and getattr(torch, case.dtype).itemsize == 2:
        return sdpa_kernel(SDPBackend.FLASH_ATTENTION)
    if case.implementation == "FlexAttention":
        return torch._dynamo.config.patch(recompile_limit=VARIANTS)
    return nullcontext()


def _named(case: Case, kernel: str | None) -> dict[str, Any]:
    return {
        "scheme": case.scheme,
        "implementation": case.implementation,
        "kernel": kernel,
        "pass": case.step,
        "length": case.length,
        "dtype": case.dtype,
        "device": case.device,
        "batch": case.batch,
        "heads": case.heads,
        "width": case.width,
    }


def _row(case: Case, time: measure.Time, base: measure.Time, memory: bool) -> dict[str, Any]:
    scheme = case.build()
    return {
        **_named(case, _kernel(case, scheme)),
        "seconds": time.seconds,
        "ratio_to_causal": time.seconds / base.seconds,
        "tflops": case.operations(scheme) / time.seconds / 1e12,
        "peak_megabytes": _peak(case) if memory else None,
        "repeats": time.repeats,
    }


def prepare(case: Case) -> Callable[[], Any]:
    """A call without arguments that does what a case says, once."""
    scheme, seen = case.build(), sight(case)
    queries, keys, values, inputs = tensors(case, scheme)
    attend, learned = _implementation(case, scheme, seen, inputs)

    def forward() -> Tensor:
        with torch.inference_mode():
            return attend(queries, keys, values)

    def both() -> Any:
        outputs = attend(queries, keys, values)
        return torch.autograd.grad(outputs, [queries, keys, values, *learned], towards, allow_unused=True)

    if case.step != "forward+backward":
        return forward
    towards = torch.randn_like(forward())
    return both


def _with_rivals(case: Case) -> list[Case]:
    """A case of lookfar, and the other ways to do the same that this size and device allow."""
    names = ["eager square", *rivals.names(case.build(), case.device, case.step)]
    fitting = [name for name in names if name not in DENSE or case.entries <= MOST[case.device]]
    return [case, *(replace(case, implementation=name) for name in fitting)]


def _implementation(
    case: Case, scheme: Scheme, seen: Sight, inputs: Tensor
) -> tuple[rivals.Attends, list[torch.nn.Parameter]]:
    """How a case attends, encodings and merge included, and what is learned in it."""
    if case.implementation == BASE:
        return rivals.plain, []
    if case.implementation in rivals.RIVALS:
        return rivals.RIVALS[case.implementation](scheme, seen)
    kernel = "reference" if case.implementation == "eager square" else case.implementation.partition(" ")[2] or None

    def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        queries = scheme.queries(queries, seen.query_positions)
        if case.step != "decode":  # a cache holds encoded keys
            keys = scheme.keys(keys, seen.key_positions)
        return scheme.merge(kernels.attend(queries, keys, values, seen, scheme, kernel), inputs)

    return attend, [*scheme.parameters()]


def _kernel(case: Case, scheme: Scheme) -> str | None:
    """The kernel of lookfar that takes a case."""
    if not case.implementation.startswith("lookfar"):
        return None
    with torch.set_grad_enabled(case.step == "forward+backward"):
        call = Call.of(*tensors(case, scheme)[:3], sight(case), scheme)
    chosen = (name for name, reason in kernels.explain(scheme, call) if reason is None)
    return case.implementation.partition(" ")[2] or next(chosen)


def sight(case: Case) -> Sight:
    """Who sees whom: plain causal sight, by a single query in decoding."""
    return Sight.causal(case.length, queries=1 if case.step == "decode" else None, device=case.device)


def tensors(case: Case, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values and the inputs of the layer, drawn from one seed."""
    heads, asked = scheme.heads, 1 if case.step == "decode" else case.length
    options: dict[str, Any] = {"device": case.device, "dtype": getattr(torch, case.dtype)}
    torch.manual_seed(1)
    sizes = (
        (heads.score_heads, asked, heads.head_width),
        (heads.key_heads, case.length, heads.head_width),
        (heads.value_heads, case.length, heads.value_width),
    )
    needed = case.step == "forward+backward"
    queries, keys, values = (torch.randn(case.batch, *size, **options).requires_grad_(needed) for size in sizes)
    return queries, keys, values, torch.randn(case.batch, asked, case.heads * case.width, **options)


def _peak(case: Case) -> float | None:
    """Megabytes that a call adds at its peak to its inputs; None for single rows, which add next to nothing."""
    if case.step == "decode":
        return None
    if case.device == "cpu":
        compiled = case.implementation == "FlexAttention"  # a compiler's memory would be counted with it
        return None if compiled else measure.peak_memory(_warm, case) / 2**20
    with around(case):
        call = prepare(case)
        call()
        return measure.peak_memory_on_gpu(call) / 2**20


def _warm(case: Case) -> Callable[[], Any]:
    """The call of a case in a process that has made a small one: what libraries load once is no part of it."""
    kernel = _kernel(case, case.build())
    small = f"lookfar {kernel}" if kernel else case.implementation  # a short call alone may have another kernel
    prepare(replace(case, length=64, implementation=small))()
    return prepare(case)
