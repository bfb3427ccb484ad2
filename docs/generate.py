"""Writes what is generated: the catalogue in README.md, a page for each method, and benchmarks.md (`make docs`).

With `--check` nothing is written, and the exit code says whether everything is up to date.
"""

import sys
from pathlib import Path

import benchmarks  # the script beside this one

from lookfar import plugins
from lookfar.cli.methods import page
from lookfar.model import catalogue

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- catalogue: written by `make docs` -->", "<!-- end of catalogue -->"


def main() -> int:
    """Write or check every generated file; the number of those that were out of date."""
    stale = 0
    for file, text in _pages():
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            stale += 1
            if "--check" in sys.argv:
                print(f"{file.relative_to(ROOT)} is out of date; run `make docs`.")
            else:
                file.write_text(text, encoding="utf-8")
                print(f"wrote {file.relative_to(ROOT)}")
    return stale if "--check" in sys.argv else 0


def _pages() -> list[tuple[Path, str]]:
    readme = ROOT / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    pages = [(readme, f"{before}{BEGIN}\n\n{catalogue.markdown('docs/methods/')}\n\n{END}{after}")]
    for name in ["nope", *plugins.names("methods")]:
        pages.append((ROOT / "docs" / "methods" / f"{name}.md", f"# {name}\n\n```text\n{page(name)}\n```\n"))
    if benchmarks.measured():
        pages.append((benchmarks.PAGE, benchmarks.page()))
    return pages


if __name__ == "__main__":
    sys.exit(main())
