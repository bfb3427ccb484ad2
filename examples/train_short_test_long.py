"""Trains two small models at 32 tokens and measures them at 32 and 256: which of them looks further?"""

import sys
from pathlib import Path

from lookfar.config import build
from lookfar.training.run import run_whole

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/example")
recipe = {
    "model": {"width": 32, "layers": 2, "heads": 4, "context": 32},
    "training": {"updates": 100, "batch": 32, "rate": 0.01},
    "evaluation": {"lengths": [32, 256], "protocols": ["non_overlapping(tokens=8192)"]},
}
for scheme in ("sinusoidal", "alibi"):
    rows = run_whole(build(recipe, [f"model.scheme={scheme}"]), folder / scheme)
    short, long = (row["value"] for row in rows if row["metric"] == "perplexity")
    print(f"{scheme}: byte perplexity {short:.1f} at 32 tokens, {long:.1f} at 256")
