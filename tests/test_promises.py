"""The table of promises names tests that are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINES = [line for line in (ROOT / "docs" / "promises.md").read_text(encoding="utf-8").splitlines() if "`test_" in line]
ROWS = [line for line in LINES if line.startswith("|")]


@pytest.mark.parametrize("row", ROWS, ids=[row.split("|")[1].strip()[:40] for row in ROWS])
def test_a_promise_is_held_by_tests_that_are_there(row):
    held = re.findall(r"`(test_\w+\.py)`: ((?:`test_\w+`(?:, )?)+)", row)
    names = [(file, name) for file, several in held for name in re.findall(r"`(test_\w+)`", several)]
    assert len(names) == len(re.findall(r"`test_\w+`", row)) > 0
    for file, name in names:
        assert re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(encoding="utf-8"), re.MULTILINE), name
