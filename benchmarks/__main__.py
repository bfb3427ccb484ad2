"""Runs all benchmarks on this machine:  python -m benchmarks --folder results/cpu  (or `make bench`).

Every ratio comes from one run in which the rivals take turns; a figure is the median of its repeats.
"""

import argparse
import platform
import shlex
import sys
from pathlib import Path

import torch

import lookfar
from benchmarks import checkpoints, decoding, score_maps, sliding, tokenization, training_steps
from lookfar import files

PARTS = {
    "training_steps": training_steps,
    "score_maps": score_maps,
    "decoding": decoding,
    "checkpoints": checkpoints,
    "sliding": sliding,
    "tokenization": tokenization,
}


def main() -> None:
    """Measure, print and write rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where rows are written, one file for each part")
    parser.add_argument("--only", choices=PARTS, action="append", help="one part; may be repeated")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = {
        "processor": _processor(),
        "threads": options.threads,
        "torch": torch.__version__,
        "lookfar": lookfar.__version__,
        "command": f"python -m benchmarks {shlex.join(sys.argv[1:])}".strip(),
    }
    for name in options.only or PARTS:
        rows = [{**row, **machine} for row in PARTS[name].run(options.repeats)]
        print(f"\n{name}")
        for row in rows:
            print("  " + "  ".join(f"{key} {_spell(row[key])}" for key in row if key not in machine))
        if options.folder:
            options.folder.mkdir(parents=True, exist_ok=True)
            files.write_lines(options.folder / f"{name}.jsonl", rows)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _spell(value: object) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


main()
