"""Runs all benchmarks on this machine:  python -m benchmarks --folder results/cpu  (or `make bench`).

Every ratio comes from one run in which the rivals take turns; a figure is the median of its repeats. What attention
itself costs can be measured on a GPU, too, and at other lengths:

    python -m benchmarks --only attention --device cuda --dtype bfloat16 --lengths 2048 8192
"""

import argparse
import inspect
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import (
    attention,
    checkpoints,
    choices,
    decoding,
    machine,
    score_maps,
    sliding,
    tokenization,
    training_steps,
)
from lookfar import files

PARTS = {
    "attention": attention,
    "choices": choices,
    "training_steps": training_steps,
    "score_maps": score_maps,
    "decoding": decoding,
    "checkpoints": checkpoints,
    "sliding": sliding,
    "tokenization": tokenization,
}
CHOICES = ("device", "dtype", "lengths", "schemes")  # options of some parts alone


def main() -> int:
    """Measure, print and write rows, those of attention after each size; 1 where an error left something out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where rows are written, one file for each part")
    parser.add_argument("--only", choices=PARTS, action="append", help="one part; may be repeated")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    some = parser.add_argument_group("parts that have them")
    some.add_argument("--device", choices=("cpu", "cuda"))
    some.add_argument("--dtype", choices=("float32", "bfloat16"))
    some.add_argument("--lengths", type=int, nargs="+", help="tokens")
    some.add_argument("--schemes", nargs="+", help="expressions")
    options = parser.parse_args()
    if options.device == "cuda" and (reason := machine.without_cuda()):
        sys.exit(reason)
    torch.set_num_threads(options.threads)
    given = {key: value for key in CHOICES if (value := getattr(options, key)) is not None}
    names = options.only or list(PARTS)
    for name in names:
        if foreign := [f"--{key}" for key in given if key not in _settings(name)]:
            parser.error(f"{name} has no {' and no '.join(foreign)}; choose the parts that do with --only.")
    facts = machine.facts(options.device or "cpu", f"python -m benchmarks {shlex.join(sys.argv[1:])}")
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    code = 0
    for name in names:
        rows = []
        print(f"\n{name}")
        try:
            for row in PARTS[name].run(options.repeats, **given):
                rows.append({**row, **facts})
                print("  " + "  ".join(f"{key} {_spell(row[key])}" for key in row if key not in facts), flush=True)
                if options.folder:
                    files.write_lines(options.folder / f"{name}.jsonl", rows)
        except attention.LeftOut as error:
            print(f"{name}: {error}", file=sys.stderr)
            code = 1
    return code


def _settings(name: str) -> list[str]:
    """What a part can be told beside its repeats."""
    return list(inspect.signature(PARTS[name].run).parameters)


def _spell(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


sys.exit(main())
