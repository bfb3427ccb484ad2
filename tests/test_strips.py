"""Strips in compiled code: pieces, places and parts of their own making; their compiler; threads and memory."""

import copy
import itertools
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # benchmarks are no part of the package

from benchmarks.measure import peak_memory

from lookfar import files
from lookfar.attention import reference
from lookfar.attention.scheme import build_scheme
from lookfar.kernels import compiled, dispatch, strips
from lookfar.kernels.base import Call
from lookfar.kernels.compiled import calls
from lookfar.kernels.strips import Strips
from lookfar.sight import Sight
from paths import apart
from test_kernels import SHAPES, Shape, leaves, results, scheme_of, wide
from test_laws import randomised, tensors
from tolerance import assert_as_good, error

pytestmark = pytest.mark.skipif(compiled.refusal() is not None, reason=str(compiled.refusal()))

MADE_FOR = [
    "nope",
    "kerple",
    "t5(scale=original)",
    "alibi(learned=true) + stable_mask",
    "fire",
    "fire + alibi + learned_sink",
    "cope(positions=6)",
    "cope + kerple",
    "kerple + dape_v1",
    "fire + dape_v1(equation=2)",
    "dape_v2(kernel=1, hidden=3)",
    "kerple + dape_v2(kernel=7)",
    "t5 + dape_v2 + stable_mask",
    "differential + kerple",
    "differential_v2(share_bias=true) + fire + dape_v2",
]
PLACES = [
    "one token",
    "two tokens",
    "thirteen",
    "a block and one",
    "two blocks and one",
    "long",
    "wide",
    "window",
    "window of one",
    "packed",
    "padded",
    "decode",
    "prefill chunk",
    "prefill chunk in a window",
    "prefill chunk in documents",
]


@pytest.mark.parametrize("expression", MADE_FOR)
def test_strips_are_as_exact_as_the_definition_in_every_shape(expression):
    found, definition, true = [], [], []
    for place, seed in itertools.product(PLACES, range(3)):
        scheme, sight = scheme_of(expression, shape := SHAPES[place]), SHAPES[place].sight()
        given = tensors(scheme, shape.tokens, shape.batch, shape.queries, seed, torch.float32)
        assert Strips().refusal(scheme, Call.of(given.queries, given.keys, given.values, sight, scheme)) is None
        exact = results(reference.attend, wide(given), sight, copy.deepcopy(scheme).double())
        for each, attend, own in (
            (found, Strips().attend, scheme),
            (definition, reference.attend, scheme),
        ):
            each.append(results(attend, given, sight, own))
        true.append(exact)
    for what in true[0]:
        if what.endswith("second.bias") and "stable_mask" not in expression and "learned_sink" not in expression:
            continue  # its true gradient is zero
        of = [[each[what] for each in some] for some in (found, definition, true)]
        assert_as_good(*of, torch.float32, f"{what} of {expression}")


@pytest.mark.parametrize("weights", [[0.0, 0.0, 0.0], [0.0, 2.0, -1.0], [1.0, 1.0, 1.0], [-3.0, 1e-30, 5.0]])
@pytest.mark.parametrize("shift", [0.3, -0.3, 0.0])
def test_pieces_are_the_net_whatever_its_units_do(weights, shift):
    """Units that are constant, that switch at one place or nowhere."""
    scheme, sight = build_scheme("fire(hidden=3)", heads=2, head_width=8, context=8), Sight.causal(40)
    fire = scheme.methods[0]
    with torch.no_grad():
        fire.first.weight.copy_(torch.tensor(weights)[:, None])
        fire.first.bias.copy_(torch.tensor([shift, -shift, shift / 2]))
        fire.second.weight.mul_(5)
    given = tensors(scheme, 40, 1, None, 0, torch.float32)
    expected = results(reference.attend, given, sight, scheme)
    for name, each in results(Strips().attend, given, sight, scheme).items():
        torch.testing.assert_close(
            each, expected[name], rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


EDGES = [(f"kerple + dape_v2(kernel={taps})", keys) for taps in (1, 3, 13) for keys in (512, 513, 525, 1030)]
EDGES += [(expression, keys) for expression in ("kerple", "fire", "cope") for keys in (1023, 1024, 1025, 2049)]


@pytest.mark.parametrize("window", [None, pytest.param(700, marks=pytest.mark.long)])
@pytest.mark.parametrize(("expression", "keys"), EDGES)
def test_rows_longer_than_what_is_held_at_a_time_are_the_definition(expression, keys, window):
    """Nets take 512 keys at a time, the backward pass of biases 1,024; strips of long rows are lower."""
    shape = Shape(keys, queries=40, heads=3, groups=1, window=window)
    scheme, sight = scheme_of(expression, shape), shape.sight()
    given = tensors(scheme, keys, 1, 40, 0, torch.float32)
    expected = results(reference.attend, wide(given), sight, copy.deepcopy(scheme).double())
    for name, each in results(Strips().attend, given, sight, scheme).items():
        if not name.endswith("second.bias"):
            assert error(each, expected[name]) < 3e-5, name


def test_values_may_be_wider_or_narrower_than_keys():
    for value_width in (1, 5, 16, 40, 67):
        scheme, sight = scheme_of("kerple + stable_mask", Shape(50, groups=1)), Sight.causal(50)
        given = tensors(scheme, 50, 2, None, 0, torch.float32)
        given = type(given)(given.queries, given.keys, torch.randn(2, 1, 50, value_width), given.x)
        expected = results(reference.attend, wide(given), sight, copy.deepcopy(scheme).double())
        for name, each in results(Strips().attend, given, sight, scheme).items():
            assert error(each, expected[name]) < 1e-5, (name, value_width)


@pytest.mark.parametrize("expression", ["t5", "fire", "cope", "kerple + dape_v2"])
def test_neither_threads_nor_luck_change_a_bit(expression):
    shape = Shape(200, heads=3, groups=3, batch=2)
    scheme, sight = scheme_of(expression, shape), shape.sight()
    given = tensors(scheme, 200, 2, None, 0, torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2, 5, 5):
            torch.set_num_threads(threads)
            found.append(results(Strips().attend, given, sight, scheme))
    finally:
        torch.set_num_threads(before)
    for name, first in found[0].items():
        assert torch.equal(found[1][name], found[2][name]) and torch.equal(found[3][name], found[4][name]), name
        if name == "outputs" or "dape" not in expression:
            assert all(torch.equal(each[name], first) for each in found), name


def test_what_is_no_number_stays_none():
    scheme, sight = scheme_of("kerple", Shape(70, heads=1, groups=1)), Sight.causal(70)
    given = tensors(scheme, 70, 1, None, 0, torch.float32)
    for value in (float("nan"), float("inf")):
        queries = given.queries.clone()
        queries[0, 0, 40] = value
        rows = Strips().attend(queries, given.keys, given.values, sight, scheme)[0, 0].isnan().any(-1)
        assert rows.nonzero().flatten().tolist() == [40]


def test_what_is_not_written_is_not_read(fresh, monkeypatch):
    """Memory of the compiled code and of torch is filled with what is no number."""
    monkeypatch.setattr(compiled, "FLAGS", (*compiled.FLAGS, "-DLOOKFAR_POISON"))
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *of, **told: empty(*of, **told).fill_(float("nan")))
    shape = Shape(67, documents="packed", groups=1)
    for expression in ("kerple + dape_v2 + stable_mask", "fire", "cope(positions=9)"):
        scheme, sight = scheme_of(expression, shape), shape.sight()
        given = tensors(scheme, 67, 1, None, 0, torch.float32)
        for name, each in results(Strips().attend, given, sight, scheme).items():
            assert each.isfinite().all(), name


def test_strips_have_no_second_derivative_and_say_so():
    scheme = scheme_of("kerple", Shape(8))
    given = tensors(scheme, 8, 1, None, 0, torch.float32)
    queries = given.queries.clone().requires_grad_()
    output = Strips().attend(queries, given.keys, given.values, Sight.causal(8), scheme)
    (first,) = torch.autograd.grad(output.square().sum(), queries, create_graph=True)
    with pytest.raises(NotImplementedError, match="kernel='reference'"):
        first.sum().backward()


def test_gradients_may_come_in_any_layout():
    scheme, sight = scheme_of("kerple", Shape(20)), Sight.causal(20)
    given = tensors(scheme, 20, 2, None, 0, torch.float32)
    expected = results(Strips().attend, given, sight, scheme)

    def turned(tensor):
        return tensor.mT.contiguous().mT if tensor.dim() > 1 and tensor.is_floating_point() else tensor

    with torch.autograd.graph.saved_tensors_hooks(turned, lambda tensor: tensor):
        for name, each in results(Strips().attend, given, sight, scheme).items():
            assert torch.equal(each, expected[name]), name


def test_the_operators_are_what_they_are_said_to_be():
    scheme, sight = scheme_of("fire + cope", Shape(20)), Sight.causal(20)
    given = tensors(scheme, 20, 1, None, 0, torch.float32)
    with torch.no_grad():
        asked = strips.Asked(
            *(given.queries, given.keys, given.values, sight.spans()[0].int()),
            *(torch.arange(2, dtype=torch.int32) for _ in range(2)),
            **strips._parts(sight, scheme),
        )
        numbers = (0, scheme.scale, True, 64)
        torch.library.opcheck(calls.FORWARD, (*numbers, list(asked)), test_utils="test_faketensor")
        output, tops, shares = calls.FORWARD(*numbers, list(asked))
        given = (*numbers, output[..., :8], output, tops, shares, list(asked))
        torch.library.opcheck(calls.BACKWARD, given, test_utils="test_faketensor")


def test_too_little_memory_is_an_error_that_can_be_caught():
    """With room for next to nothing more, in a process of its own."""
    code = """
import resource, torch
from lookfar.attention.scheme import build_scheme
from lookfar.kernels.strips import Strips
from lookfar.sight import Sight
torch.set_num_threads(2)
scheme = build_scheme("kerple + dape_v2", heads=8, head_width=64)
def attend(n):
    given = [torch.zeros(1, 8, n, 64) for _ in range(3)]
    with torch.no_grad():
        Strips().attend(*given, Sight.causal(n), scheme)
attend(64)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 160_000_000, resource.RLIM_INFINITY))
for n in (16384, 32768):
    try:
        attend(n)
    except (MemoryError, RuntimeError) as error:
        print(type(error).__name__, error)
attend(64)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "memory" in done.stdout


def compiled_model(backend):
    """Gradients by strips within what a compiler of models makes of them, and without."""
    scheme, sight = scheme_of("fire + dape_v2", Shape(33)), Sight.causal(33)
    given = tensors(scheme, 33, 1, None, 0, torch.float32)

    def attend(queries, keys, values):
        return Strips().attend(queries * 2, keys, values, sight, scheme).square()

    found = []
    for each in (attend, torch.compile(attend, backend=backend)):
        own = leaves(given)
        each(*own).sum().backward()
        found.append([leaf.grad for leaf in own])
    return found


def test_strips_are_a_part_of_compiled_models():
    for one, other in zip(*apart().submit(compiled_model, "aot_eager").result(), strict=True):
        torch.testing.assert_close(one, other)


CALL = Call(queries=2048, keys=2048)


@pytest.mark.parametrize(
    ("expression", "changes", "reason"),
    [
        ("kerple", {"device": "cuda"}, "compiled for processors"),
        ("kerple", {"dtype": torch.float64}, "float32"),
        ("kerple", {"causal": False}, "ahead"),
        ("kerple", {"slots": True}, "not in the text"),
        ("kerple", {"scattered": True}, "scattered"),
        ("kerple", {"steady": False}, "positions do not count tokens"),
        ("alibi(form=split)", {}, "hides keys"),
        ("dape_v2(repair=paper)", {}, "published form"),
        ("dape_v2(kernel=15)", {}, "more than 13 keys"),
        ("transformer_xl", {}, "TransformerXl"),
    ],
)
def test_a_refusal_says_why(expression, changes, reason):
    scheme = build_scheme(expression, heads=2, head_width=8)
    assert Strips().refusal(scheme, Call(**{**vars(CALL), **changes})) is not None
    assert reason in Strips().refusal(scheme, Call(**{**vars(CALL), **changes}))


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """Nothing is compiled yet."""
    monkeypatch.setenv("LOOKFAR_CACHE", str(tmp_path))
    forgotten = (compiled._library, compiled.refusal)
    for each in forgotten:
        each.cache_clear()
    yield tmp_path
    for each in forgotten:
        each.cache_clear()


def chosen():
    scheme = build_scheme("kerple + dape_v2", heads=2, head_width=8)
    return type(dispatch.choose(scheme, CALL)).__name__, dict(dispatch.explain(scheme, CALL))["strips"]


def test_without_a_compiler_another_kernel_is_chosen(fresh, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(fresh))
    assert chosen() == ("Chunked", "there is no C++ compiler; install one, such as g++, or set $CXX")


def test_a_compiler_that_fails_is_told(fresh, monkeypatch):
    tool = fresh / "compiler"
    tool.write_text("#!/bin/sh\necho 'strips.cpp:1: error: no more ideas' >&2\nexit 1\n")
    tool.chmod(tool.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("CXX", str(tool))
    name, reason = chosen()
    assert name == "Chunked" and reason.endswith("does not compile it: strips.cpp:1: error: no more ideas")
    assert not list((fresh / "compiled").iterdir()), "nothing half-written is left"


def test_a_cache_that_cannot_be_written_is_told(fresh):
    (fresh / "compiled").write_text("in the way")
    name, reason = chosen()
    assert name == "Chunked" and "cannot be written or loaded" in reason


def test_a_damaged_file_is_told_and_named(fresh):
    assert compiled.refusal() is None
    (file,) = (fresh / "compiled").glob("*.so")
    done = subprocess.run(
        [sys.executable, "-c", "from lookfar.kernels import compiled; print(compiled.refusal())"],
        env={**os.environ, "LOOKFAR_CACHE": str(damaged(file))},
        capture_output=True,
        text=True,
        check=True,
    )
    assert file.name in done.stdout and "cannot be written or loaded" in done.stdout


def damaged(file):
    """A cache folder with the same file, cut short."""
    folder = file.parent.parent / "other"
    (folder / "compiled").mkdir(parents=True)
    files.write(folder / "compiled" / file.name, file.read_bytes()[:100])
    return folder


def test_what_is_kept_for_the_backward_pass_is_proportional_to_the_length():
    sizes = []
    for tokens in (512, 1024):
        scheme = randomised(build_scheme("kerple", heads=2, head_width=8))
        given = tensors(scheme, tokens, 1, None, 0, torch.float32)
        kept = []

        def keep(tensor, kept=kept):
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            Strips().attend(given.queries.requires_grad_(), given.keys, given.values, Sight.causal(tokens), scheme)
        sizes.append(sum(kept))
    assert sizes[1] < 2.1 * sizes[0] and sizes[1] < 1024 * 1024 / 4


@pytest.mark.parametrize("expression", ["kerple", "fire", "cope", "kerple + dape_v2"])
def test_memory_stays_far_below_the_square(expression):
    """At its peak, forward and backward, in a process of its own."""
    peak = peak_memory(both_ways, expression, 4096)
    assert peak < 4 * 4096 * 4096 * 4 / 4, f"{peak:,} bytes; four heads of the square are {4 * 4096 * 4096 * 4:,}"


def both_ways(expression, tokens):
    """A call, forward and backward; the first, of few tokens, is made here."""
    scheme = build_scheme(expression, heads=4, head_width=16)

    def call(tokens=tokens):
        given = [torch.randn(1, 4, tokens, 16, requires_grad=True) for _ in range(3)]
        Strips().attend(*given, Sight.causal(tokens), scheme).sum().backward()

    call(64)
    return call


def test_tables_have_numbers_to_spare():
    assert compiled.library().lookfar_lanes() <= calls.SPARE
