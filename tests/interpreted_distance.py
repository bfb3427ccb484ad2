"""The kernel `distance` against the definition, its programs interpreted: test_distance.py runs it in a process.

Every product, lookup and sum of the programs is done here as on a GPU, in small blocks, so that a few dozen tokens make
several tiles. Memory that a program is to write is full of NaN before.
"""

import copy
import itertools
import os
from collections import defaultdict
from dataclasses import replace

import pytest
import torch

from lookfar import kernels
from lookfar.attention import reference
from lookfar.attention.scheme import build_scheme
from lookfar.kernels.base import Call
from lookfar.kernels.distance import Distance
from lookfar.kernels.programs.distance_blocks import PIECE, Blocks
from lookfar.sight import Sight
from test_kernels import Shape, leaves, results, scheme_of
from test_laws import randomised, tensors
from tolerance import assert_as_good, assert_near

assert os.environ.get("TRITON_INTERPRET") == "1", "test_distance.py starts this file"

from lookfar.kernels.programs import distance_plan  # noqa: E402  # imports triton, which reads the variable

SMALL = Distance(blocks=Blocks(32, 16), programs=3)  # several tiles, and programs with several blocks of queries each
SQUARE = Distance(blocks=Blocks(16, 16), programs=1)


class Poisoned:
    """torch, whose fresh memory is full of NaN."""

    def __getattr__(self, name):
        return getattr(torch, name)

    @staticmethod
    def empty(*shape, **settings):
        return torch.full(shape, torch.nan, **settings)

    @staticmethod
    def empty_like(tensor):
        return torch.full_like(tensor, torch.nan)


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    monkeypatch.setattr(distance_plan, "torch", Poisoned())


def call_of(given, sight, scheme):
    return Call.of(given.queries, given.keys, given.values, sight, scheme)


def assert_is_the_definition(kernel, scheme, shape):
    """Outputs and all gradients, and the outputs of few queries without gradients, which other programs make."""
    sight, given = shape.sight(), tensors(scheme, shape.tokens, shape.batch, shape.queries, dtype=torch.float32)
    assert kernel.refusal(scheme, call_of(given, sight, scheme)) is None
    expected = results(reference.attend, given, sight, scheme)
    for what, value in results(kernel.attend, given, sight, scheme).items():
        assert_near(value, expected[what], what)
    if shape.queries is not None:
        with torch.no_grad():
            again = kernel.attend(given.queries, given.keys, given.values, sight, scheme)
        assert_near(again, expected["outputs"], "outputs without gradients")


ODD = Shape(37, heads=2)
GROUPED = Shape(35, heads=4, groups=2)
SCHEMES = {
    "nope": ODD,
    "rope": GROUPED,
    "alibi": GROUPED,
    "alibi(learned=true)": ODD,
    "alibi(form=separate)": ODD,
    "alibi(form=offset)": GROUPED,
    "alibi(form=split)": ODD,
    "kerple": ODD,
    "kerple(kernel=power)": GROUPED,
    "t5": GROUPED,
    "t5(scale=original)": ODD,
    "alibi + kerple + t5": ODD,
    "stable_mask + alibi": GROUPED,
    "stable_mask(gamma=0.5, columns=20)": ODD,  # no sink from place 19 on
    "learned_sink + kerple": ODD,
    "learned_sink + stable_mask": GROUPED,
    "differential + kerple": GROUPED,
    "differential + kerple + learned_sink": Shape(19, heads=8, groups=4, batch=2),
    "differential_v2 + t5": GROUPED,
    "differential_v2(share_bias=true) + alibi(learned=true) + stable_mask": Shape(35, heads=2, groups=1),
}


@pytest.mark.parametrize("expression", SCHEMES)
def test_every_scheme_is_the_definition(expression):
    shape = SCHEMES[expression]
    assert_is_the_definition(SMALL, scheme_of(expression, shape), shape)


SHAPES = {
    "one token": Shape(1),
    "thirteen": Shape(13, heads=6, groups=2),
    "a block and one": Shape(65, numbered=True),
    "two blocks and two": Shape(130, heads=1, groups=1),
    "a window": Shape(70, window=9, batch=2),
    "a window of one": Shape(37, window=1),
    "a wide window": Shape(70, window=50),
    "packed": Shape(70, documents="packed", batch=2),
    "padded": Shape(45, documents="padded", batch=2),
    "packed in a window": Shape(70, documents="packed", batch=2, window=11),
    "prefill chunk": Shape(77, queries=40),
    "prefill chunk in a window": Shape(77, queries=35, window=20),
    "prefill chunk in documents": Shape(77, queries=35, documents="packed", batch=2),
    "decode": Shape(65, queries=1, batch=2, heads=4),
    "decode in groups": Shape(65, queries=3, heads=6, groups=2),
    "decode in a window": Shape(70, queries=2, window=9),
    "decode in documents": Shape(45, queries=1, documents="packed", batch=2),
}


@pytest.mark.parametrize("place", SHAPES)
def test_every_sight_is_the_definition(place):
    shape = SHAPES[place]
    assert_is_the_definition(SMALL, scheme_of("learned_sink + kerple", shape), shape)


@pytest.mark.parametrize("queries", [None, 9, 1])
@pytest.mark.parametrize("window", [None, 20])
def test_documents_in_between_one_another_are_the_definition(queries, window):
    """Without a bias: their distances are not places between tokens."""
    shape = Shape(45, documents="interleaved", batch=2, queries=queries, window=window)
    assert_is_the_definition(SMALL, scheme_of("stable_mask", shape), shape)


@pytest.mark.long
@pytest.mark.parametrize("place", ["decode", "decode in groups", "decode in documents"])
@pytest.mark.parametrize("expression", ["differential + kerple", "differential_v2 + t5 + stable_mask"])
def test_decoding_two_maps_is_the_definition(expression, place):
    shape = SHAPES[place]
    shape = Shape(shape.tokens, shape.queries, 4, 2, 8, shape.batch, shape.window, shape.documents)
    assert_is_the_definition(SMALL, scheme_of(expression, shape), shape)


@pytest.mark.parametrize("width", [16, 24, 64, 80, 128])
def test_every_width_is_the_definition(width):
    shape = Shape(21, heads=2, head_width=width)
    assert_is_the_definition(SMALL, scheme_of("kerple", shape), shape)


def assert_is_as_exact(kernel, expression, shapes, dtype, seeds=2):
    """No further from the truth than the definition, over draws: the error of one call is a matter of luck."""
    found, definition, true = defaultdict(list), defaultdict(list), defaultdict(list)
    for shape, seed in itertools.product(shapes, range(seeds)):
        scheme, sight = scheme_of(expression, shape), shape.sight()
        given = tensors(scheme, shape.tokens, shape.batch, shape.queries, seed, dtype)
        wide = type(given)(*(each.double() for each in (given.queries, given.keys, given.values, given.x)))
        exact = results(reference.attend, wide, sight, copy.deepcopy(scheme).double())
        defined = results(reference.attend, given, sight, scheme)
        for what, value in results(kernel.attend, given, sight, scheme).items():
            found[what].append(value)
            definition[what].append(defined[what])
            true[what].append(exact[what])
    for what in found:
        assert_as_good(found[what], definition[what], true[what], dtype, what)


@pytest.mark.long
@pytest.mark.parametrize("expression", ["kerple", "differential + kerple"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_blocks_of_a_gpu_are_as_exact_as_the_definition(expression, dtype):
    """The widths that it has blocks for, each in more than one tile; values twice as wide."""
    widths = (64, 128, 256) if expression == "kerple" else (32, 64, 128)
    assert_is_as_exact(Distance(), expression, [Shape(200, heads=2, head_width=width) for width in widths], dtype)


@pytest.mark.parametrize(
    ("expression", "dtype"),
    [
        ("alibi(learned=true) + learned_sink", torch.bfloat16),
        pytest.param("alibi(learned=true) + learned_sink", torch.float16, marks=pytest.mark.long),
        pytest.param("t5", torch.bfloat16, marks=pytest.mark.long),
        ("kerple + stable_mask", torch.float32),
    ],
    ids=str,
)
def test_every_type_is_as_exact_as_the_definition(expression, dtype):
    shapes = [Shape(13, heads=2, batch=2), Shape(33, heads=4, groups=2), Shape(37, queries=9, window=20)]
    assert_is_as_exact(SMALL, expression, shapes, dtype)


def test_a_soft_cap_is_the_definition():
    for queries in (None, 2):
        shape = Shape(37, queries=queries)
        scheme = randomised(build_scheme("kerple", heads=2, head_width=8, soft_cap=0.8))
        assert_is_the_definition(SMALL, scheme, shape)


@pytest.mark.parametrize("kernel", [SMALL, SQUARE], ids=["rectangles", "squares"])
def test_the_gradient_of_a_table_is_the_sum_along_diagonals(kernel):
    """T5 with a bucket for every distance: each parameter is one diagonal, also those of no or one pair."""
    shape = Shape(53, heads=1, groups=1, batch=2)
    scheme = scheme_of("t5(buckets=120, farthest=1000)", shape)
    assert_is_the_definition(kernel, scheme, shape)
    given, sight = tensors(scheme, 53, 2, dtype=torch.float32), shape.sight()
    gradient = results(kernel.attend, given, sight, scheme)["methods.0.table"]
    assert (gradient[53:60] == 0).all() and (gradient[:53] != 0).all()


@pytest.mark.parametrize("place", ["two blocks and two", "packed in a window"])
def test_two_runs_are_the_same_to_the_last_bit(place):
    shape = SHAPES[place]
    scheme, sight = scheme_of("t5 + learned_sink", shape), shape.sight()
    given = tensors(scheme, shape.tokens, shape.batch, dtype=torch.float32)
    first, second = (results(SMALL.attend, given, sight, scheme) for _ in range(2))
    for what, value in first.items():
        assert torch.equal(value, second[what]), what


@pytest.mark.parametrize("learned", [True, False])
def test_gradients_reach_only_what_asks_for_them(learned):
    """Keys and values of a cache need none, and a table may be all that is learned."""
    shape = Shape(40)
    scheme, sight = scheme_of("kerple", shape), shape.sight()
    given, parameters = tensors(scheme, 40, dtype=torch.float32), [*scheme.parameters()]
    queries = given.queries.clone().requires_grad_(not learned)
    for parameter in parameters:
        parameter.requires_grad_(learned)
    asking = parameters if learned else [queries]
    attended = [
        torch.autograd.grad(attend(queries, given.keys, given.values, sight, scheme).square().sum(), asking)
        for attend in (SMALL.attend, reference.attend)
    ]
    for found, expected in zip(*attended, strict=True):
        assert_near(found, expected)


def test_tensors_may_lie_anywhere():
    """Queries, keys and values are views of one projection; the gradient that comes in is one number, repeated."""
    shape = Shape(40, batch=2, heads=3, groups=3)
    scheme, sight = scheme_of("alibi", shape), shape.sight()
    together = torch.randn(2, 40, 9, 8, generator=torch.Generator().manual_seed(3)).requires_grad_()
    found = [
        torch.autograd.grad(attend(*together.transpose(1, 2).split(3, dim=1), sight, scheme).sum(), together)[0]
        for attend in (SMALL.attend, reference.attend)
    ]
    assert_near(*found)
    flipped = together.detach().transpose(1, 2).mT.contiguous().mT  # the numbers of a row lie apart
    assert_near(*(attend(*flipped.split(3, dim=1), sight, scheme) for attend in (SMALL.attend, reference.attend)))


@pytest.mark.parametrize("far", ["tokens", "heads"])
def test_rows_may_lie_further_apart_than_32_bits_tell(far):
    """Keys and values are a view of memory that is hardly touched, and so takes no room."""
    shape, step = Shape(17, heads=3, groups=3, head_width=16), 1 << 27
    scheme, sight = scheme_of("kerple", shape), shape.sight()
    given = tensors(scheme, 17, 1, dtype=torch.bfloat16)
    room = torch.empty(16 * step + 512, dtype=torch.bfloat16)
    apart = room.as_strided(given.keys.shape, (0, 16, step, 1) if far == "tokens" else (0, 8 * step, 16, 1))
    apart.copy_(given.keys)
    found = []
    for keys in (apart, given.keys):
        own = [given.queries.clone().requires_grad_(), keys.detach().requires_grad_()]
        output = SMALL.attend(own[0], own[1], own[1], sight, scheme)
        with torch.no_grad():
            last = SMALL.attend(own[0][:, :, 16:], own[1], own[1], sight.rows(16, 17), scheme)
        found.append([output, last, *torch.autograd.grad(output.float().square().sum(), own)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("place", ["thirteen", "decode"])
def test_an_empty_batch_gives_nothing(place):
    shape = replace(SHAPES[place], batch=0)
    scheme, sight = scheme_of("learned_sink + kerple", shape), shape.sight()
    given = tensors(scheme, shape.tokens, 0, shape.queries, dtype=torch.float32)
    found, expected = (results(attend, given, sight, scheme) for attend in (SMALL.attend, reference.attend))
    assert all(torch.equal(found[what], expected[what]) for what in expected)
    with torch.no_grad():
        assert SMALL.attend(given.queries, given.keys, given.values, sight, scheme).shape == given.queries.shape


def test_many_parts_of_a_row_are_merged():
    shape = Shape(16 * PIECE + 20, queries=1, heads=1, groups=1)
    assert_is_the_definition(Distance(blocks=Blocks(16, 16)), scheme_of("learned_sink + kerple", shape), shape)


def test_tiles_that_nobody_sees_are_not_visited():
    """Keys and values that are NaN, where no query of a block looks."""
    for shape in (Shape(64, window=8), Shape(64, queries=16, window=8), Shape(64, queries=1, window=8)):
        scheme, sight = scheme_of("kerple", shape), shape.sight()
        given = tensors(scheme, 64, 1, shape.queries, dtype=torch.float32)
        first = 0 if shape.queries is None else 64 - shape.queries - 8 - 16  # a tile has 16 keys
        keys, values = given.keys.clone(), given.values.clone()
        keys[:, :, :first] = values[:, :, :first] = torch.nan
        with torch.no_grad():
            found = SMALL.attend(given.queries, keys, values, sight, scheme)
            expected = reference.attend(given.queries, given.keys, given.values, sight, scheme)
        assert_near(found, expected)


def test_a_second_derivative_is_refused():
    shape = Shape(20)
    scheme, sight = scheme_of("kerple", shape), shape.sight()
    queries, keys, values = leaves(tensors(scheme, 20, dtype=torch.float32))
    (gradient,) = torch.autograd.grad(
        SMALL.attend(queries, keys, values, sight, scheme).square().sum(), queries, create_graph=True
    )
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


def test_the_interpreter_lets_a_cpu_take_it():
    shape = Shape(20)
    scheme, given = scheme_of("kerple", shape), tensors(scheme_of("kerple", shape), 20, dtype=torch.float32)
    found = kernels.attend(given.queries, given.keys, given.values, Sight.causal(20), scheme, "distance")
    assert_near(found, reference.attend(given.queries, given.keys, given.values, Sight.causal(20), scheme))
