"""The kernel `distance`: who may have it, and, in a process of its own, that it is the definition."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lookfar import kernels, plugins
from lookfar.errors import UserError
from lookfar.kernels import distance
from lookfar.kernels.base import Call
from lookfar.kernels.dispatch import preference
from lookfar.sight import Sight
from test_kernels import Shape, scheme_of
from test_laws import tensors
from tolerance import assert_near

ROOT = Path(__file__).parent.parent
GPU = {"device": "cuda", "dtype": torch.bfloat16, "queries": 512, "keys": 512}


def run(*command, **environment):
    """A Python of its own, from the root of the project."""
    source = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    given = {**os.environ, "PYTHONPATH": source, **environment}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=given, capture_output=True, text=True)


# Triton reads TRITON_INTERPRET when it is imported and when a program is defined, and other tests of this process need
# compiled programs, or a triton that was imported before: so all that is interpreted happens in a process of its own.


def interpret(marked):
    found = run("-m", "pytest", "-p", "no:xdist", "-m", marked, "tests/interpreted_distance.py", TRITON_INTERPRET="1")
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="triton is a Linux package")
def test_interpreted_programs_are_the_definition():
    interpret("not long")


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="triton is a Linux package")
def test_interpreted_programs_in_the_blocks_of_a_gpu_are_the_definition():
    interpret("long")


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="triton is a Linux package")
def test_every_program_compiles_for_a_gpu_and_spills_little():
    """Those of DAPE, too, where a net of three taps is allowed more."""
    found = run("-m", "benchmarks.programs")
    assert found.returncode == 0, found.stdout + found.stderr
    rows = [line for line in found.stdout.splitlines() if line.startswith("name ")]
    assert len([row for row in rows if "distance" in row]) > 30 and len([row for row in rows if "dape" in row]) > 10
    for row in rows:
        assert int(row.partition("spilled_bytes ")[2].split()[0]) <= (1024 if "3 taps" in row else 512), row


@pytest.mark.parametrize(
    ("expression", "call", "reason"),
    [
        ("kerple", {"device": "cpu"}, "it runs on a GPU"),
        ("kerple", {"dtype": torch.float64}, "float64 is none of its types"),
        ("kerple + dape_v2", {}, "DapeV2 rewrites the scores"),
        ("kerple + fire", {}, "not by distance alone"),
        ("kerple", {"slots": True}, "a slot is not in the text"),
        ("kerple", {"causal": False}, "keys ahead are seen"),
        ("kerple", {"steady": False}, "not the number of places"),
        ("kerple", {"batch": 65_536}, "a batch of 65,536 is more than the 65,535 that a GPU starts at once"),
    ],
)
def test_a_refusal_says_why(expression, call, reason, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    told = distance.Distance().refusal(scheme_of(expression, Shape(1)), Call(**{**GPU, **call}))
    assert told is not None and reason in told


def test_without_triton_it_says_so(monkeypatch):
    monkeypatch.setattr(distance, "find_spec", lambda name: None)
    assert distance.Distance().refusal(scheme_of("kerple", Shape(1)), Call(**GPU)) == "triton is not installed"


def test_heads_that_are_too_wide_are_refused():
    told = distance.Distance().refusal(scheme_of("kerple", Shape(1, head_width=264)), Call(**GPU))
    assert told == "heads are wider than 256"


@pytest.mark.parametrize(
    ("expression", "call", "first"),
    [
        ("rope", {}, "sdpa"),
        ("nope", {"queries": 1}, "sdpa"),
        ("alibi", {}, "distance"),
        ("kerple", {}, "distance"),
        ("learned_sink", {}, "distance"),
        ("rope", {"plain": False}, "distance"),
        ("rope", {"queries": 100}, "distance"),
        ("differential_v2 + t5", {}, "distance"),
        ("kerple", {"dtype": torch.float64}, "square"),
        ("kerple", {"causal": False, "plain": False}, "flex"),
        ("kerple", {"slots": True, "plain": False}, "slots"),
    ],
)
def test_a_gpu_has_flash_where_that_suffices_and_this_kernel_for_distances(expression, call, first):
    scheme, told = scheme_of(expression, Shape(1)), Call(**{**GPU, **call})
    assert isinstance(kernels.choose(scheme, told), plugins.find("kernels", first))


def test_every_list_has_every_kernel():
    for device in ("cpu", "cuda"):
        for queries in (1, 64, 4096):
            for slots in (False, True):
                call = Call(device=device, queries=queries, keys=4096, slots=slots)
                for expression in ("nope", "kerple"):
                    assert sorted(preference(scheme_of(expression, Shape(1)), call)) == plugins.names("kernels")


def test_naming_it_on_a_cpu_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    scheme = scheme_of("kerple", Shape(13))
    given = tensors(scheme, 13, dtype=torch.float32)
    with pytest.raises(UserError, match="it runs on a GPU"):
        kernels.attend(given.queries, given.keys, given.values, Sight.causal(13), scheme, "distance")


@pytest.mark.parametrize("queries", [None, 9])
@pytest.mark.parametrize("documents", ["packed", "padded"])
def test_stretches_are_who_sees_whom(documents, queries):
    """A query sees a key exactly if it lies between the first that its document shows and itself."""
    whole = Shape(31, batch=3, documents=documents).sight()
    sight = whole if queries is None else whole.rows(31 - queries, 31)
    first, last = sight.stretches
    keys, places = torch.arange(sight.keys), torch.arange(sight.queries) + sight.keys - sight.queries
    seen = (keys >= first[:, :, None]) & (keys <= places[:, None])
    assert torch.equal(seen[:, None], sight.visible())
    numbers = torch.arange(sight.queries)
    also = (numbers[:, None] <= last[:, None, :]) & (keys <= places[:, None])
    assert torch.equal(also[:, None], sight.visible())


def test_there_are_no_stretches_where_documents_interrupt_one_another():
    assert Shape(31, documents="interleaved").sight().stretches is None
    assert Shape(31).sight().stretches is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("expression", ["rope", "kerple", "t5 + learned_sink", "differential + kerple"])
def test_on_a_gpu_it_is_the_definition(expression, dtype):
    """Compiled programs of every width, in several tiles, with gradients and without."""
    for width, tokens, queries, window in ((64, 300, None, None), (128, 257, None, 70), (80, 300, 2, None)):
        shape = Shape(tokens, queries, heads=4, groups=2, head_width=width, batch=2, window=window)
        scheme, sight = scheme_of(expression, shape).to("cuda"), shape.sight("cuda")
        given = tensors(scheme, tokens, 2, queries, dtype=dtype)
        queries_, keys, values = (each.to("cuda") for each in (given.queries, given.keys, given.values))
        found, expected = [], []
        for results, name in ((found, "distance"), (expected, "reference")):
            own = [each.clone().requires_grad_() for each in (queries_, keys, values)]
            output = kernels.attend(*own, sight, scheme, name)
            learned = [each for each in scheme.parameters() if each.requires_grad]
            results += [output, *torch.autograd.grad(output.float().square().sum(), own + learned, allow_unused=True)]
            with torch.no_grad():
                results.append(kernels.attend(*own, sight, scheme, name))
        for one, other in zip(found, expected, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                assert_near(one, other)
