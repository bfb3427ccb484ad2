"""The examples run as they stand, and the documents say what the code does."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lookfar.kernels import compiled

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(example, tmp_path):
    done = subprocess.run([sys.executable, example, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_short(example):
    assert len(example.read_text(encoding="utf-8").splitlines()) <= 40


@pytest.mark.skipif(compiled.refusal() is not None, reason=f"the documents name all kernels: {compiled.refusal()}")
def test_generated_documents_are_up_to_date():
    done = subprocess.run([sys.executable, ROOT / "docs" / "generate.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_file_that_the_documents_link_to_exists():
    for page in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_method_of_the_guide_works(tmp_path, monkeypatch):
    import lookfar

    code = re.search(r"```python\n(.*?)```", (ROOT / "docs/adding_a_method.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "of_the_guide").mkdir()
    (tmp_path / "of_the_guide" / "root.py").write_text(code[1], encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert lookfar.build_scheme("of_the_guide.root(strength=2)", heads=2, head_width=8).biases
