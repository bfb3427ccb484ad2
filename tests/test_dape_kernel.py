"""DAPE's kernel: who is taken, what a strip holds, and the comparison with the definition in Triton's interpreter.

Whether programs are compiled or interpreted is settled when Triton is imported, and other tests must not feel it, so
`interpreted_dape.py` runs in a process of its own.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lookfar.attention.scheme import build_scheme
from lookfar.kernels import dape
from lookfar.kernels.base import Call
from lookfar.kernels.dape import Dape
from test_kernels import SHAPES, call_of, scheme_of
from test_laws import tensors

ON_GPU = Call(device="cuda", dtype=torch.bfloat16)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton runs on Linux")
@pytest.mark.parametrize("which", ["not long", pytest.param("long", marks=pytest.mark.long)])
def test_dape_is_the_definition_in_the_interpreter(which):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", which, "interpreted_dape.py"]
    settings = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    done = subprocess.run(
        command, cwd=Path(__file__).parent, env={**settings, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.parametrize(
    "expression", ["dape_v1", "kerple + dape_v1(equation=2)", "t5 + dape_v2(kernel=7) + stable_mask"]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dape_is_taken_on_a_gpu(expression, dtype):
    pytest.importorskip("triton", reason="Triton runs on Linux")
    assert Dape().refusal(build_scheme(expression, heads=12), replace(ON_GPU, dtype=dtype)) is None


@pytest.mark.parametrize(
    ("expression", "changes", "reason"),
    [
        ("kerple", {}, "made for dape_v1 and dape_v2 alone"),
        ("cope", {}, "made for dape_v1 and dape_v2 alone"),
        ("fire + dape_v2", {}, "fire + dape_v2 adds a bias that does not depend on the distance alone"),
        ("alibi + dape_v2(repair=paper)", {}, "repair=paper"),
        ("dape_v2(kernel=9)", {}, "a kernel of 9 is wider than 7"),
        ("dape_v1(hidden=65)", {}, "65 hidden channels are more than 64"),
        ("dape_v2", {"dtype": torch.float64}, "the input is torch.float64"),
        ("dape_v2", {"slots": True}, "a slot is not in the text"),
        ("dape_v2", {"scattered": True}, "need not be neighbours"),
        ("kerple + dape_v1", {"steady": False}, "not always the number of places"),
        ("kerple + dape_v1", {"batch": 65_536}, "a batch of 65,536 is more than the 65,535 that a GPU starts at once"),
        ("kerple + dape_v1", {"device": "cpu"}, "no programs for the device cpu"),
        ("kerple + dape_v1", {"device": "mps"}, "no programs for the device mps"),
    ],
)
def test_a_refusal_names_its_cause(expression, changes, reason, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dape.importlib.util, "find_spec", lambda name: name)
    assert reason in str(Dape().refusal(build_scheme(expression, heads=12), replace(ON_GPU, **changes)))


def test_nets_that_do_not_fit_are_refused():
    assert "33 score heads" in str(Dape().refusal(build_scheme("dape_v1", heads=33), ON_GPU))
    assert "shared memory" in str(Dape().refusal(build_scheme("dape_v2(kernel=7, hidden=64)", heads=32), ON_GPU))
    assert "values 512 wide" in str(Dape().refusal(build_scheme("dape_v1", heads=2, head_width=512), ON_GPU))
    assert "soft-capped" in str(Dape().refusal(build_scheme("dape_v1", heads=2, soft_cap=5.0), ON_GPU))


def test_without_triton_it_is_refused(monkeypatch):
    monkeypatch.setattr(dape.importlib.util, "find_spec", lambda name: None)
    assert Dape().refusal(build_scheme("dape_v1", heads=2), ON_GPU) == "Triton is not installed"


@pytest.mark.parametrize("place", SHAPES)
def test_a_strip_holds_all_keys_that_its_queries_see(place):
    sight, batch = SHAPES[place].sight(), SHAPES[place].batch
    strips = Dape(pairs=256)._strips(sight, batch)
    assert [query for each in strips for query in range(each.start, each.stop)] == list(range(sight.queries))
    for each in strips:
        seen = sight.visible()[:, 0, each.start : each.stop]
        assert seen[..., each.first : each.last].sum() == seen.sum()
        assert each.rows <= dape.ROWS or batch * each.rows * each.width <= 256


def test_whether_keys_are_scattered_is_a_fact_of_a_call():
    for place in ("packed", "interleaved"):
        shape = SHAPES[place]
        scheme, sight = scheme_of("dape_v2", shape), shape.sight()
        assert call_of(tensors(scheme, shape.tokens, shape.batch), sight, scheme).scattered == (place == "interleaved")
