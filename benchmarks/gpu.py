"""Measures everything that needs a GPU:  python -m benchmarks.gpu --folder results/gpu  (or a part of `make gpu`).

Writes a file of rows for each part, after each size that is measured:

    ceilings    what the device reaches at best: products in bfloat16, and copies in memory
    attention   every kernel that is willing, by name, and its rivals, over FlashAttention-2's plain causal attention
    score_maps  maps of scores at 8,192 tokens beside the full square, and trained at 32,768
    training    steps of a model of 125 million parameters over those of the same model without positions

What is left out, for time, for memory or by an error, is told on stderr and in PART_left_out.jsonl. The exit code is 1
where an error left something out.
"""

import argparse
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import attention, machine, measure, rivals
from benchmarks.attention import PASSES, Case, Rows, leave_out
from lookfar import files, kernels
from lookfar.config import ModelConfig
from lookfar.kernels.base import Call
from lookfar.model.decoder import Decoder

WANTED = tuple((width, length) for length in (2048, 32768, 8192) for width in (64, 128))  # first, while there is time
SIZES = (*WANTED, (64, 4096), (64, 16384))  # widths of heads, and lengths
HEADS, TOGETHER = 16, 16384  # tokens of a batch, of which at most 8 lines are made
SCHEMES = attention.SCHEMES
LONGEST = {  # tokens that slow and dense ways are given in forward and backward
    "eager square": 2048,
    "lookfar chunked": 2048,
    "lookfar square": 2048,
    "sdpa dense bias": 4096,
    "x-transformers": 4096,
}
CHOSEN = {"chunked": 8192, "square": 8192}  # the same where lookfar has nothing faster
FORMULAS = ("alibi", "t5", "kerple")  # schemes for which FlexAttention compiles a formula, for every size anew
REPEATS, LIMIT = 5, 1.0
ALL = "every scheme"  # in a row of what is left out
MAP_HEADS = 12  # of the part score_maps
LAYERS, WIDTH, VOCABULARY, TOKENS = 12, 768, 50_304, 16384  # of the model, and tokens of a step
TRAINED = ("nope", "rope", "alibi", "kerple", "t5", "stable_mask")


def main() -> int:
    """Measure, print and write rows; 1 where there is no GPU, or an error left something out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where rows are written, one file for each part")
    parser.add_argument("--only", choices=PARTS, action="append", help="one part; may be repeated")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which attention takes no further size")
    options = parser.parse_args()
    if reason := machine.without_cuda():
        print(reason)
        return 1
    facts = machine.facts("cuda", f"python -m benchmarks.gpu {shlex.join(sys.argv[1:])}")
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    whole = [report(name, 60 * options.minutes, facts, options.folder) for name in options.only or PARTS]
    return 0 if all(whole) else 1


def report(name: str, seconds: float, facts: dict[str, Any], folder: Path | None) -> bool:
    """Measure, print and write one part; whether no error left something out."""
    print(f"\n{name}, {facts['processor']}")
    rows: Rows = []
    left: Rows = []
    for found in _survived(PARTS[name](time.monotonic() + seconds)):
        measured = [row for row in found if "left_out" not in row]
        rows += [{**row, **facts} for row in measured]
        left += [{**row, **facts} for row in found if "left_out" in row]
        for row in measured:
            print("  " + "  ".join(f"{key} {_spell(row[key])}" for key in row), flush=True)
        if folder:
            _write(folder / f"{name}.jsonl", rows)
            _write(folder / f"{name}_left_out.jsonl", left)
    return not any(row["failed"] for row in left)


def _write(file: Path, rows: Rows) -> None:
    """No rows, no file: one of an earlier run goes."""
    if rows:
        files.write_lines(file, rows)
    else:
        file.unlink(missing_ok=True)


def _survived(part: Iterator[Rows]) -> Iterator[Rows]:
    """The rows of a part up to its end, or up to an error and then the row that tells it."""
    try:
        yield from part
    except Exception as error:
        traceback.print_exc()
        yield [{"left_out": f"the rest of this part: {attention.reason(error)}", "failed": True}]


def ceilings(deadline: float) -> Iterator[Rows]:
    """TFLOP/s of a large product in bfloat16, and GB/s of a copy, read and written bytes together."""
    one, other = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    block = torch.empty(1 << 30, device="cuda", dtype=torch.uint8)
    into = torch.empty_like(block)
    calls: dict[str, Callable[[], Any]] = {"product": lambda: one @ other, "copy": lambda: into.copy_(block)}
    for call in calls.values():
        call()
    times = measure.turns(calls, 20, limit=5.0, wait=torch.cuda.synchronize)
    yield [
        {"what": "bfloat16 product of 8192", "tflops": 2 * 8192**3 / times["product"].seconds / 1e12},
        {"what": "copy of 1 GiB", "gigabytes_per_second": 2 * len(block) / times["copy"].seconds / 1e9},
    ]


def every_kernel(deadline: float) -> Iterator[Rows]:
    """The attention benchmark of every willing kernel, the one that lookfar chooses first, and of other ways."""
    for width, length in SIZES:
        for step in PASSES:
            batch = max(1, min(8, TOGETHER // length))
            plain = Case("nope", "lookfar", step, length, "bfloat16", "cuda", batch, HEADS, width)
            if time.monotonic() > deadline:
                yield [leave_out(replace(plain, scheme=ALL, implementation="every way"), "no time is left")]
                continue
            found = [ways(replace(plain, scheme=scheme)) for scheme in SCHEMES]
            rows, left = attention.attempt([case for cases, _ in found for case in cases], REPEATS, limit=LIMIT)
            slow = dict.fromkeys(_once(each) for _, cases in found for each in cases)
            yield [*rows, *left, *(leave_out(each, f"too slow or too large at {length:,} tokens") for each in slow)]


def _once(case: Case) -> Case:
    """A slow way, the same for all schemes; what lookfar chooses is told for each."""
    return case if case.implementation == "lookfar" else replace(case, scheme=ALL)


def ways(case: Case) -> tuple[list[Case], list[Case]]:
    """A case by the kernel that lookfar chooses, by each other one that takes it, and by rivals; and the slow ones."""
    scheme = case.build()
    with torch.set_grad_enabled(case.step == "forward+backward"):
        call = Call.of(*attention.tensors(case, scheme)[:3], attention.sight(case), scheme)
    chosen, *others = (name for name, reason in kernels.explain(scheme, call) if reason is None)
    names = [f"lookfar {name}" for name in others if name != "reference"]  # which is the eager square
    names += ["eager square", *rivals.names(scheme, case.device, case.step)]
    if case.scheme not in FORMULAS:
        names = [name for name in names if name != "FlexAttention"]
    longest = {"lookfar": CHOSEN.get(chosen, case.length), **LONGEST}
    every = [case, *(replace(case, implementation=name) for name in names)]
    fast = [
        each for each in every if case.step == "decode" or case.length <= longest.get(each.implementation, case.length)
    ]
    return fast, [each for each in every if each not in fast]


def score_maps(deadline: float) -> Iterator[Rows]:
    """Maps of scores beside the full square at 8,192 tokens; at 32,768 by what lookfar chooses."""
    for scheme in ("kerple + dape_v2", "kerple + dape_v1"):
        case = Case(scheme, "lookfar", "forward+backward", 8192, "bfloat16", "cuda", 1, MAP_HEADS, 64)
        beside = [replace(case, implementation=each) for each in ("lookfar", "lookfar chunked", "eager square")]
        for cases, repeats in ((beside, 3), ([replace(case, length=32768)], 2)):
            rows, left = attention.attempt(cases, repeats)
            yield [*rows, *left]


def training(deadline: float) -> Iterator[Rows]:
    """Tokens per second of whole training steps in bfloat16, and the ratios to plain causal attention in that loop."""
    for length in (1024, 2048):
        yield _trained(length)


def _trained(length: int) -> Rows:
    models: dict[str, Decoder] = {}
    steps: dict[str, Callable[[], None]] = {}
    rows: Rows = []

    def failed(scheme: str, error: Exception) -> None:
        why = attention.reason(error)
        print(f"Left out: training under {scheme}, {length:,} tokens: {why}", file=sys.stderr, flush=True)
        mistake = not attention.lacks_memory(error)
        rows.append({"scheme": scheme, "length": length, "left_out": why, "failed": mistake})

    for scheme in TRAINED:
        try:
            models[scheme] = _model(scheme, length)
            steps[scheme] = _step(models[scheme], length)
            steps[scheme]()
        except Exception as error:
            steps.pop(scheme, None)
            failed(scheme, error)
    times = measure.turns(steps, 10, limit=10.0, wait=torch.cuda.synchronize, failed=failed)
    speed = {scheme: TOKENS / each.seconds for scheme, each in times.items()}
    for scheme in speed:
        rows.append(
            {
                "scheme": scheme,
                "parameters": sum(each.numel() for each in models[scheme].parameters()),
                "tokens_per_second": speed[scheme],
                "speed_over_nope": speed[scheme] / speed["nope"] if "nope" in speed else None,
                "speed_over_rope": speed[scheme] / speed["rope"] if "rope" in speed else None,
                "length": length,
                "batch": TOKENS // length,
                "layers": LAYERS,
                "width": WIDTH,
                "repeats": times[scheme].repeats,
            }
        )
    return rows


def _model(scheme: str, length: int) -> Decoder:
    torch.manual_seed(0)
    config = ModelConfig(
        vocabulary=VOCABULARY,
        width=WIDTH,
        layers=LAYERS,
        heads=WIDTH // 64,
        context=length,
        scheme=scheme,
        device="cuda",
    )
    return Decoder(config).cuda()


def _step(model: Decoder, length: int) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(0)
    tokens: Tensor = torch.randint(0, VOCABULARY, (TOKENS // length, length + 1), generator=generator).cuda()

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(tokens[:, :-1])
        F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _spell(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


PARTS: dict[str, Callable[[float], Iterator[Rows]]] = {
    "ceilings": ceilings,
    "attention": every_kernel,
    "score_maps": score_maps,
    "training": training,
}

if __name__ == "__main__":
    sys.exit(main())
