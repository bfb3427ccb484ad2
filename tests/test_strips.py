"""Strips in compiled code: pieces, places and parts of their own making; their compiler; threads and memory."""

import copy
import itertools
import os
import stat
import subprocess
import sys

import pytest
import torch

from lookfar import files
from lookfar.attention import reference
from lookfar.attention.scheme import build_scheme
from lookfar.batch import consecutive
from lookfar.kernels import compiled, dispatch, strips
from lookfar.kernels.base import Call
from lookfar.kernels.strips import Strips
from lookfar.sight import Sight
from paths import apart
from test_kernels import SHAPES, Shape, leaves, results, scheme_of, wide
from test_laws import randomised, tensors
from tolerance import assert_as_good

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


@pytest.mark.parametrize("queries", [1, 3, 8])
def test_starts_are_the_first_keys_that_are_seen(queries):
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, -1], [-1, -1, 0, 0, 0, 0, 0, 0]])
    for window in (None, 1, 2, 5):
        for told in ({}, {"documents": documents, "positions": consecutive(documents)}):
            sight = Sight.causal(8, queries=queries, window=window, **told)
            seen = sight.visible()[:, 0].int()
            assert torch.equal(sight.starts().expand(len(seen), -1), seen.argmax(-1))
            assert torch.equal(seen.sum(-1), torch.arange(8 - queries, 8) - sight.starts() + 1)
            part = sight.rows(queries // 2, queries)
            assert torch.equal(part.starts() + part.first_key, sight.starts()[:, queries // 2 :])


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
    expected = reference.attend(given.queries, given.keys, given.values, sight, scheme)
    torch.testing.assert_close(Strips().attend(given.queries, given.keys, given.values, sight, scheme), expected)


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


def test_what_is_not_written_is_not_read(monkeypatch):
    scheme, shape = scheme_of("kerple + dape_v2 + stable_mask", Shape(67)), Shape(67)
    given = tensors(scheme, 67, 1, None, 0, torch.float32)
    expected = results(Strips().attend, given, shape.sight(), scheme)
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *of, **told: empty(*of, **told).fill_(float("nan")))
    for name, each in results(Strips().attend, given, shape.sight(), scheme).items():
        assert torch.equal(each, expected[name]), name


def test_strips_have_no_second_derivative_and_say_so():
    scheme = scheme_of("kerple", Shape(8))
    given = tensors(scheme, 8, 1, None, 0, torch.float32)
    queries = given.queries.clone().requires_grad_()
    output = Strips().attend(queries, given.keys, given.values, Sight.causal(8), scheme)
    (first,) = torch.autograd.grad(output.square().sum(), queries, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


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
        ("kerple", {"slots": True}, "ahead"),
        ("kerple", {"neighbours": False}, "scattered"),
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
    forgotten = (compiled.library, compiled.refusal)
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


def test_memory_is_proportional_to_the_length():
    """What torch allocates, and what the compiled code says to need: nothing holds queries × keys."""
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


def test_pieces_and_places_are_what_the_compiled_code_has_room_for():
    assert compiled.library().lookfar_lanes() <= strips.SPARE
