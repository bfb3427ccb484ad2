"""DAPE's kernel against the definition in Triton's interpreter; `test_dape_kernel.py` runs it in its own process.

All memory that is not initialised holds NaN.
"""

import copy
from dataclasses import replace

import pytest
import torch
from triton.runtime.interpreter import interpreter_builder

from lookfar.attention import reference
from lookfar.kernels import dape
from lookfar.kernels.base import Call
from lookfar.kernels.dape import Dape
from lookfar.kernels.dape_strips import Tiles
from lookfar.sight import Sight
from test_kernels import Largest, Shape, call_of, leaves, results, scheme_of, wide, without_effect
from test_laws import tensors
from tolerance import assert_as_good, assert_near

SMALL = Tiles(keys=16, side=16, rows=16, block=16, instances=3, partial=2)
LARGE = replace(SMALL, keys=64, exact=64, side=64, block=64)
QUICK = replace(interpreter_builder.options, sanitize_overflow=False)  # takes half of the time
MANY, FEW = Dape(pairs=256, tiles=SMALL), Dape(pairs=1024, tiles=LARGE)  # strips and tiles of a call


@pytest.fixture(autouse=True)
def nothing_is_zero_by_chance(monkeypatch):
    def poisoned(make):
        def made(*args, **kwargs):
            found = make(*args, **kwargs)
            return found.fill_(torch.nan) if found.is_floating_point() else found

        return made

    monkeypatch.setattr(interpreter_builder, "options", QUICK)
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


CASES = [
    ("dape_v1", Shape(13), MANY),
    ("dape_v1", Shape(1), FEW),
    ("kerple + dape_v1(equation=2)", Shape(13, heads=3, groups=3), FEW),
    ("kerple + dape_v1(hidden=40)", Shape(13, heads=12, groups=4), FEW),
    ("alibi + dape_v2", Shape(19, heads=3, groups=3), MANY),
    ("alibi + dape_v2", Shape(1), FEW),
    ("dape_v2(kernel=1, hidden=3)", Shape(5), FEW),
    ("kerple + dape_v2(kernel=5)", Shape(37, window=6, heads=4), FEW),
    ("kerple + dape_v2(kernel=7)", Shape(7, heads=12, groups=3), FEW),
    ("t5 + dape_v2 + stable_mask", Shape(13, batch=2, documents="packed"), FEW),
    ("alibi + dape_v1 + learned_sink", Shape(13, batch=2, documents="padded"), FEW),
    ("alibi + dape_v2", Shape(19, documents="packed", window=4), MANY),
    ("kerple + dape_v2 + learned_sink", Shape(37, queries=7, heads=6, groups=2), FEW),
    ("kerple + dape_v2", Shape(37, queries=1), FEW),
    ("kerple + dape_v2", Shape(13, ahead=True), FEW),
    ("rope + dape_v2 + stable_mask", Shape(13, ahead=True, window=4, numbered=True), FEW),
    ("alibi + dape_v2 + differential", Shape(13, heads=4, groups=2), FEW),
    ("kerple(kernel=power) + alibi + dape_v2", Shape(13, head_width=5), FEW),
]


@pytest.mark.parametrize(
    ("expression", "shape", "kernel"), CASES, ids=[f"{each[0]}, {i}" for i, each in enumerate(CASES)]
)
def test_dape_is_the_definition(expression, shape, kernel):
    compare(kernel, scheme_of(expression, shape).float(), shape.sight(), shape)


def test_queries_that_are_not_the_last_keys_see_nothing_ahead():
    shape = Shape(13)
    compare(FEW, scheme_of("kerple + dape_v2", shape).float(), Sight.causal(13).rows(3, 7, step=8), shape)


def compare(kernel, scheme, sight, shape):
    given = tensors(scheme, sight.keys, shape.batch, sight.queries, dtype=torch.float32)
    assert kernel.refusal(scheme, call_of(given, sight, scheme)) is None
    expected = results(reference.attend, given, sight, scheme)
    for what, value in results(kernel.attend, given, sight, scheme).items():
        assert_near(value, expected[what], what)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.long)], ids=str)
@pytest.mark.parametrize("expression", ["kerple + dape_v1", "alibi + dape_v2 + stable_mask"])
def test_dape_is_as_exact_as_the_definition(expression, dtype):
    as_exact(FEW, expression, Shape(13, heads=4), dtype)


def as_exact(kernel, expression, shape, dtype):
    scheme, sight, found, definition, true = scheme_of(expression, shape), shape.sight(), {}, {}, {}
    for seed in range(2):
        given = tensors(scheme, shape.tokens, 1, seed=seed, dtype=dtype)
        assert kernel.refusal(scheme, call_of(given, sight, scheme)) is None
        exact = results(reference.attend, wide(given), sight, copy.deepcopy(scheme).double())
        defined = results(reference.attend, given, sight, scheme)
        for what, value in results(kernel.attend, given, sight, scheme).items():
            assert value.dtype == defined[what].dtype
            for kind, each in ((found, value), (definition, defined[what]), (true, exact[what])):
                kind.setdefault(what, []).append(each)
    for what in found:
        if not without_effect(what, scheme):
            assert_as_good(found[what], definition[what], true[what], dtype, what)


def test_values_may_be_wider_than_keys():
    shape = Shape(13, heads=4, groups=4, head_width=8)
    scheme, sight = scheme_of("kerple + dape_v1 + differential", shape).float(), shape.sight()
    assert scheme.heads.value_width > scheme.heads.head_width
    compare(FEW, scheme, sight, shape)


def test_an_empty_batch_gives_nothing():
    shape = Shape(13, batch=0)
    scheme, sight = scheme_of("kerple + dape_v2 + learned_sink", shape).float(), shape.sight()
    given = tensors(scheme, shape.tokens, 0, dtype=torch.float32)
    found, expected = (results(attend, given, sight, scheme) for attend in (FEW.attend, reference.attend))
    assert all(torch.equal(found[what], expected[what]) for what in expected)


def test_the_same_call_gives_the_same_bits():
    shape = Shape(19)
    scheme, sight = scheme_of("kerple + dape_v2 + learned_sink", shape).float(), shape.sight()
    given = tensors(scheme, 19, 1, dtype=torch.float32)
    once, twice = (results(MANY.attend, given, sight, scheme) for _ in range(2))
    assert all(torch.equal(once[what], twice[what]) for what in once)


def test_a_second_backward_gives_the_same_gradients_and_changes_nothing():
    scheme, sight = scheme_of("kerple + dape_v1 + learned_sink", Shape(13)).float(), Sight.causal(13)
    given = tensors(scheme, 13, 1, dtype=torch.float32)
    inputs = [*leaves(given), *scheme.parameters()]
    before = [each.detach().clone() for each in inputs]
    outputs = FEW.attend(*inputs[:3], sight, scheme)
    once = torch.autograd.grad(outputs, inputs, torch.ones_like(outputs), retain_graph=True)
    twice = torch.autograd.grad(outputs, inputs, torch.ones_like(outputs))
    for each, old, first, second in zip(inputs, before, once, twice, strict=True):
        assert torch.equal(first, second) and torch.equal(each.detach(), old)


def test_only_what_asks_gets_a_gradient():
    scheme, sight = scheme_of("kerple + dape_v1", Shape(13)).float().requires_grad_(False), Sight.causal(13)
    given = tensors(scheme, 13, 1, dtype=torch.float32)
    queries = given.queries.clone().requires_grad_()
    outputs = FEW.attend(queries, given.keys, given.values, sight, scheme)
    (found,) = torch.autograd.grad(outputs.sum(), queries)
    (expected,) = torch.autograd.grad(reference.attend(queries, given.keys, given.values, sight, scheme).sum(), queries)
    assert_near(found, expected)
    with torch.inference_mode():
        assert torch.equal(FEW.attend(given.queries, given.keys, given.values, sight, scheme), outputs)


def test_autocast_does_not_narrow_what_is_exact():
    scheme, sight = scheme_of("kerple + dape_v2", Shape(13)).float(), Sight.causal(13)
    given = tensors(scheme, 13, 1, dtype=torch.float32)
    expected = results(FEW.attend, given, sight, scheme)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = results(FEW.attend, given, sight, scheme)
    assert all(torch.equal(found[what], expected[what]) for what in expected)


def test_strips_are_many_where_they_are_small(monkeypatch):
    """What is said of strips is said of several."""
    sight = Sight.causal(37)
    strips = MANY._strips(sight, 1)
    assert [(each.start, each.stop, each.last) for each in strips] == [(0, 16, 16), (16, 32, 32), (32, 37, 37)]
    assert len(FEW._strips(sight, 1)) == 3 and len(Dape()._strips(sight, 1)) == 1
    assert dape.PAIRS // 32768 >= dape.ROWS, "at 32k a strip has more than the least rows"


@pytest.mark.long
def test_the_square_is_never_held():
    """Forward and backward, the largest tensor is the hidden map of a strip; the interpreter copies it byte by byte."""
    tokens, rows, channels = 128, 16, 16
    scheme, sight = scheme_of(f"kerple + dape_v2(hidden={channels})", Shape(tokens)).float(), Sight.causal(tokens)
    given = leaves(tensors(scheme, tokens, 1, dtype=torch.float32))
    kernel = Dape(pairs=rows * tokens, tiles=replace(LARGE, keys=128, exact=128))
    with Largest() as watched:
        kernel.attend(*given, sight, scheme).sum().backward()
    assert watched.numbers == rows * tokens * channels * torch.float32.itemsize < tokens * tokens * channels


@pytest.mark.long
@pytest.mark.parametrize("heads", [3, 12])
@pytest.mark.parametrize("expression", ["kerple + dape_v1", "kerple + dape_v2(kernel=5) + stable_mask"])
def test_longer_calls_are_the_definition(expression, heads):
    shape = Shape(101, heads=heads, groups=heads // 3, head_width=16)
    kernel = Dape(pairs=4096, tiles=replace(LARGE, instances=7, partial=5))
    compare(kernel, scheme_of(expression, shape).float(), shape.sight(), shape)


@pytest.mark.long
def test_longer_calls_with_large_biases_are_as_exact_as_the_definition():
    as_exact(Dape(pairs=4096, tiles=LARGE), "alibi + dape_v2", Shape(101, heads=12, head_width=16), torch.bfloat16)


def test_the_call_of_an_interpreter_is_taken():
    assert Dape().refusal(scheme_of("kerple + dape_v2", Shape(1)), Call(device="cpu")) is None
