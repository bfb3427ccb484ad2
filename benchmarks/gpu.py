"""Measures everything that needs a GPU:  python -m benchmarks.gpu --folder results/gpu  (or a part of `make gpu`).

Writes a file of rows for each part as soon as it is measured:

    ceilings    what the device reaches at best: products in bfloat16, and copies in memory
    attention   every kernel that is willing, by name, over FlashAttention-2's plain causal attention
    score_maps  maps of scores at 8,192 tokens beside the full square, and trained at 32,768
    training    steps of a model of 125 million parameters over those of the same model without positions
"""

import argparse
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import attention, machine, measure
from benchmarks.attention import PASSES, Case
from lookfar import files, kernels
from lookfar.config import ModelConfig
from lookfar.kernels.base import Call
from lookfar.model.decoder import Decoder

SIZES = {64: (2048, 4096, 8192, 16384, 32768), 128: (2048, 8192, 32768)}  # widths of heads, and the lengths of each
HEADS, TOGETHER = 16, 16384  # tokens of a batch, of which at most 8 lines are made
SCHEMES = attention.SCHEMES
SLOW = {"chunked": 8192, "reference": 4096, "square": 4096}  # the longest that these are given
REPEATS, LIMIT = 5, 1.0
LAYERS, WIDTH, VOCABULARY, TOKENS = 12, 768, 50_304, 16384  # of the model, and tokens of a step
TRAINED = ("nope", "rope", "alibi", "kerple", "t5", "stable_mask")
Rows = list[dict[str, Any]]


def main() -> int:
    """Measure, print and write rows; 1 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where rows are written, one file for each part")
    parser.add_argument("--only", choices=PARTS, action="append", help="one part; may be repeated")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which attention takes no further size")
    options = parser.parse_args()
    if reason := machine.without_cuda():
        print(reason)
        return 1
    facts = machine.facts("cuda", f"python -m benchmarks.gpu {shlex.join(sys.argv[1:])}")
    for name in options.only or PARTS:
        rows = [{**row, **facts} for row in PARTS[name](time.monotonic() + 60 * options.minutes)]
        print(f"\n{name}, {facts['processor']}")
        for row in rows:
            print("  " + "  ".join(f"{key} {_spell(row[key])}" for key in row if key not in facts), flush=True)
        if options.folder:
            options.folder.mkdir(parents=True, exist_ok=True)
            files.write_lines(options.folder / f"{name}.jsonl", rows)
    return 0


def ceilings(deadline: float) -> Rows:
    """TFLOP/s of a large product in bfloat16, and GB/s of a copy, read and written bytes together."""
    one, other = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    block = torch.empty(1 << 30, device="cuda", dtype=torch.uint8)
    into = torch.empty_like(block)
    calls: dict[str, Callable[[], Any]] = {"product": lambda: one @ other, "copy": lambda: into.copy_(block)}
    for call in calls.values():
        call()
    times = measure.turns(calls, 20, limit=5.0, wait=torch.cuda.synchronize)
    return [
        {"what": "bfloat16 product of 8192", "tflops": 2 * 8192**3 / times["product"].seconds / 1e12},
        {"what": "copy of 1 GiB", "gigabytes_per_second": 2 * len(block) / times["copy"].seconds / 1e9},
    ]


def every_kernel(deadline: float) -> Rows:
    """The attention benchmark of every willing kernel, the one that lookfar chooses first."""
    rows: Rows = []
    for width, lengths in SIZES.items():
        for length in lengths:
            for step in PASSES:
                if time.monotonic() > deadline:
                    print(f"{step} at {length:,} tokens, heads of {width}: left out, no time is left", file=sys.stderr)
                    continue
                batch = max(1, min(8, TOGETHER // length))
                plain = Case("nope", "lookfar", step, length, "bfloat16", "cuda", batch, HEADS, width)
                cases = [each for scheme in SCHEMES for each in willing(replace(plain, scheme=scheme))]
                rows += attention.compare(cases, REPEATS, limit=LIMIT)
    return rows


def willing(case: Case) -> list[Case]:
    """A case by the kernel that lookfar chooses, then by each other one that takes it, where that is not too slow."""
    scheme = case.build()
    with torch.set_grad_enabled(case.step == "forward+backward"):
        call = Call.of(*attention.tensors(case, scheme)[:3], attention.sight(case), scheme)
    chosen, *others = (name for name, reason in kernels.explain(scheme, call) if reason is None)
    found = [] if case.length > SLOW.get(chosen, case.length) else [case]
    fitting = [name for name in others if case.step == "decode" or case.length <= SLOW.get(name, case.length)]
    return [*found, *(replace(case, implementation=f"lookfar {name}") for name in fitting)]


def score_maps(deadline: float) -> Rows:
    """Maps of scores beside the full square at 8,192 tokens; at 32,768 by what lookfar chooses."""
    rows: Rows = []
    for scheme in ("kerple + dape_v2", "kerple + dape_v1"):
        case = Case(scheme, "lookfar", "forward+backward", 8192, "bfloat16", "cuda", 1, 8, 64)
        names = [each.implementation for each in willing(case)]
        rows += attention.compare([replace(case, implementation=each) for each in (*names, "eager square")], 3)
        rows += attention.compare([replace(case, length=32768)], 2)
    return rows


def training(deadline: float) -> Rows:
    """Tokens per second of whole training steps in bfloat16, and the ratios to plain causal attention in that loop."""
    rows: Rows = []
    for length in (1024, 2048):
        models = {scheme: _model(scheme, length) for scheme in TRAINED}
        steps = {scheme: _step(model, length) for scheme, model in models.items()}
        for step in steps.values():
            step()
        times = measure.turns(steps, 10, limit=10.0, wait=torch.cuda.synchronize)
        for scheme, model in models.items():
            speed = {name: TOKENS / times[name].seconds for name in (scheme, "nope", "rope")}
            rows.append(
                {
                    "scheme": scheme,
                    "parameters": sum(each.numel() for each in model.parameters()),
                    "tokens_per_second": speed[scheme],
                    "speed_over_nope": speed[scheme] / speed["nope"],
                    "speed_over_rope": speed[scheme] / speed["rope"],
                    "length": length,
                    "batch": TOKENS // length,
                    "layers": LAYERS,
                    "width": WIDTH,
                    "repeats": times[scheme].repeats,
                }
            )
        del models, steps
    return rows


def _model(scheme: str, length: int) -> Decoder:
    torch.manual_seed(0)
    sizes = {"vocabulary": VOCABULARY, "width": WIDTH, "layers": LAYERS, "heads": WIDTH // 64, "context": length}
    return Decoder(ModelConfig(**sizes, scheme=scheme, device="cuda")).cuda()


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


PARTS: dict[str, Callable[[float], Rows]] = {
    "ceilings": ceilings,
    "attention": every_kernel,
    "score_maps": score_maps,
    "training": training,
}

if __name__ == "__main__":
    sys.exit(main())
