"""Writes `docs/paths.md`: every method on every path, each cell *exact* or *refuses, because …*.

    python docs/paths.py

takes every method, and every setting that is refused where its method is not, through `tests/paths.py`: minutes, most
of them for compilers. A cell that is neither ends it with an error, and nothing is written.

    python docs/paths.py strips row

makes the cells of these paths alone, and leaves the others as they are.
"""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "paths.md"
sys.path.insert(0, str(ROOT / "tests"))  # the paths are the tests' own

from paths import GROUPS, KERNELS, PATHS, SIGHTS  # noqa: E402
from test_laws import CHOICES, METHODS  # noqa: E402

INTRODUCTION = f"""# Every method on every path

A method gives the same answer on every path, or refuses with a reason. Each cell below is the outcome of a comparison
with the definition, the [reference](architecture.md) run on nothing but the tokens that a row sees: logits and the
gradients of all parameters of a small decoder. *Exact* means within 1e-10 in float64; in float32 and bfloat16 it means
no further from float64 than twice the reference itself and one rounding unit, in the mean of some draws.

`python docs/paths.py` makes this page, with torch {torch.__version__.partition("+")[0]} on a CPU. `tests/test_paths.py`
holds the page to its word, and every pair of methods to the same comparisons. Below the methods stand the settings that
are refused where their method is not. A kernel's refusal is not the method's: another kernel takes the call.
"""
ABOUT = {
    SIGHTS: "By the kernel that is chosen. Where a cache can serve, what is decoded through it is compared, too.",
    KERNELS: "By the kernel that is named, going through the text in pieces as small as it allows.",
    "Types and compilers": "By every kernel that takes the call, and through the cache; compiled code in float64.",
    "Backward passes": "The same gradients twice, and the gradient of a length of the gradient.",
}


def main() -> None:
    """Make every cell, or those of the paths that are named, then write the page."""
    some, known = sys.argv[1:] or [*PATHS], read()
    rows = [*known["reference"]] if sys.argv[1:] else [*methods(), *refusing()]
    told = {row: {path: cell(PATHS[path](row)) if path in some else known[path][row] for path in PATHS} for row in rows}
    parts = [INTRODUCTION]
    for group, names in GROUPS.items():
        lines = ["| method | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        lines += [f"| `{row}` | " + " | ".join(cells[name] for name in names) + " |" for row, cells in told.items()]
        documented = [f"- *{name}*: {PATHS[name].__doc__}" for name in names]
        parts.append("\n".join([f"## {group}", "", ABOUT[group], "", *documented, "", *lines, ""]))
    PAGE.write_text("\n".join(parts), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")


def methods() -> list[str]:
    """The rows that must be there."""
    return ["nope", *METHODS]


def refusing() -> list[str]:
    """Settings that are refused somewhere where their method is not."""

    def refusals(expression: str) -> list[bool]:
        return [PATHS[name](expression) is not None for group in (SIGHTS, KERNELS) for name in GROUPS[group]]

    return [choice for choice in CHOICES if refusals(choice) != refusals(choice.partition("(")[0])]


def cell(reason: str | None) -> str:
    """What the page says of an answer."""
    return "exact" if reason is None else f"refuses, because {reason}"


def read() -> dict[str, dict[str, str]]:
    """The cells of the written page, by path and method."""
    found: dict[str, dict[str, str]] = {}
    names: list[str] = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [each.strip() for each in line.strip("|").split("|")]
        if line.startswith("| method |"):
            names = cells[1:]
            found |= {name: {} for name in names}
        elif line.startswith("| `"):
            for name, each in zip(names, cells[1:], strict=True):
                found[name][cells[0].strip("`")] = each
    return found


if __name__ == "__main__":
    main()
