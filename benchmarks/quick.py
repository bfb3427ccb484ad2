"""Whether attention became slower, in less than two minutes:  python -m benchmarks.quick  (or `make bench-quick`).

Forward and backward at 1,024 tokens, as a ratio to plain causal attention in the same run, least time over least time.
A ratio more than 1.35 times the committed one is measured twice again, and its least counts; if that is still too
much, the exit code is 1. `--update` writes the ratios of this run in place of the committed ones.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import attention, machine, measure
from benchmarks.attention import BASE, Case
from lookfar import files

COMMITTED = Path(__file__).parent.parent / "results" / "cpu" / "quick.jsonl"
SCHEMES = (
    "alibi",
    "stable_mask",
    "t5",
    "kerple",
    "alibi(learned=true)",
    "differential_v2",
    "fire",
    "cope",
    "kerple + dape_v2",
)
LENGTH, REPEATS, MARGIN, AGAIN = 1024, 5, 1.35, 2


def main() -> int:
    """Measure, print, and compare or write; 1 where something became slower."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help=f"write {COMMITTED.name} instead of comparing with it")
    options = parser.parse_args()
    if not options.update and not COMMITTED.exists():
        print(f"{COMMITTED} is missing; write it with --update.")
        return 1
    found = ratios(SCHEMES)
    facts = machine.facts("cpu", f"python -m benchmarks.quick {shlex.join(sys.argv[1:])}")
    if options.update:
        files.write_lines(COMMITTED, [_row(scheme, ratio, facts) for scheme, ratio in found.items()])
        print(f"wrote {COMMITTED}")
        return 0
    rows = [json.loads(line) for line in COMMITTED.read_text(encoding="utf-8").splitlines()]
    committed = {row["scheme"]: row["ratio_to_causal"] for row in rows}
    for _ in range(AGAIN):
        doubtful = [scheme for scheme in found if scheme in committed and found[scheme] > MARGIN * committed[scheme]]
        if doubtful:
            found |= {scheme: min(found[scheme], ratio) for scheme, ratio in ratios(doubtful).items()}
    for scheme, ratio in found.items():
        before = f"{committed[scheme]:.2f}" if scheme in committed else "not measured"
        print(f"{scheme:24}{ratio:8.2f} times plain causal, committed {before}")
    if others := {row["processor"] for row in rows} - {facts["processor"]}:
        print(f"The committed ratios are of another processor ({', '.join(sorted(others))}).")
    told = slower(found, committed)
    print(told or f"Nothing became slower by more than {MARGIN} times.")
    return 1 if told else 0


def ratios(schemes: Sequence[str]) -> dict[str, float]:
    """The time of forward and backward under each scheme over that of plain causal attention."""
    cases = {scheme: Case(scheme, "lookfar", "forward+backward", LENGTH) for scheme in schemes}
    calls = {scheme: attention.prepare(case) for scheme, case in cases.items()}
    calls[BASE] = attention.prepare(Case("nope", BASE, "forward+backward", LENGTH))
    times = measure.turns(calls, REPEATS, limit=10.0)
    return {scheme: times[scheme].least / times[BASE].least for scheme in schemes}


def slower(found: Mapping[str, float], committed: Mapping[str, float], margin: float = MARGIN) -> str | None:
    """A sentence that names what became slower than the margin allows, or what cannot be compared; None: nothing."""
    missing = [scheme for scheme in found if scheme not in committed]
    late = [
        f"{scheme} from {committed[scheme]:.2f} to {ratio:.2f}"
        for scheme, ratio in found.items()
        if scheme in committed and not ratio <= margin * committed[scheme]
    ]
    told = []
    if late:
        told.append(f"Slower by more than {margin} times, as a ratio to plain causal attention: {', '.join(late)}.")
    if missing:
        told.append(f"Not in the committed ratios: {', '.join(missing)}; add them with --update.")
    return " ".join(told) or None


def _row(scheme: str, ratio: float, facts: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {"pass": "forward+backward", "length": LENGTH, "dtype": "float32", "batch": 1, "heads": 8, "width": 64}
    return {"scheme": scheme, "ratio_to_causal": ratio, "margin": MARGIN, **sizes, **facts}


if __name__ == "__main__":
    sys.exit(main())
