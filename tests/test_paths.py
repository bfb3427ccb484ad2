"""Parity: every method, alone and in pairs, gives on every path what the definition gives, or refuses with a reason."""

import importlib.util
import random
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch._dynamo.exc import Unsupported

import lookfar
import paths
from lookfar.attention import reference
from lookfar.errors import UserError
from lookfar.sight import Sight
from paths import GROUPS, KERNELS, ON_A_GPU, PASSES, PATHS, SIGHTS, TYPES
from test_kernels import KERNELS as BUILT
from test_kernels import Shape, leaves, scheme_of
from test_laws import ALONE, CHOICES, METHODS, PAIRS, one_thread, tensors, words  # noqa: F401  # a fixture

ROOT = Path(__file__).parent.parent
SAMPLE = random.Random(3).sample(PAIRS, 6)
COMPILED = ["aot_eager", "inductor"]
UNCOMPILED = [name for name in PATHS if name not in COMPILED]
ONE_OF_A_KIND = ["sinusoidal", "rope", "fire", "alibi", "dape_v2", "stable_mask", "differential", "gate"]
ALL_KINDS = "sinusoidal + rope + kerple + dape_v2 + stable_mask + differential"

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")


def load(file):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


page = load(ROOT / "docs" / "paths.py")
COMMITTED = page.read()
TOLD = next(iter(COMMITTED.values()), {})  # what has a row
SETTINGS = [each for each in dict.fromkeys([*CHOICES, *ALONE]) if each not in page.methods()]


def assert_told(path, expression):
    """Exact or refused, as the committed page says; settings without a row are refused where their method is."""
    reason, method = PATHS[path](expression), expression.partition("(")[0]
    if expression in TOLD:
        assert COMMITTED[path][expression] == page.cell(reason)
    elif method in TOLD:
        assert (COMMITTED[path][method] == "exact") == (reason is None)
    return reason


@pytest.mark.parametrize("path", UNCOMPILED)
@pytest.mark.parametrize("expression", page.methods())
def test_a_method_is_exact_on_every_path_or_says_why_not(expression, path):
    reason = assert_told(path, expression)
    if path not in GROUPS[KERNELS] and "sdpa" not in path:
        assert reason is None, "a method without settings takes every path; only a kernel that is named may refuse"
    elif path in ("chunked", "slots"):
        assert reason is None
    elif reason is not None:
        assert len(reason) > 10 and not reason.endswith(".")


@pytest.mark.parametrize(
    "expression",
    [pytest.param(each, marks=() if each in TOLD else pytest.mark.long) for each in SETTINGS],
)
def test_settings_are_exact_on_every_path_or_say_why_not(expression):
    for path in [*GROUPS[SIGHTS], *GROUPS[KERNELS]]:
        reason = assert_told(path, expression)
        if "(" not in expression and path in (*GROUPS[SIGHTS], "chunked", "slots"):
            assert reason is None


@pytest.mark.long
@pytest.mark.parametrize("expression", SETTINGS)
def test_settings_are_exact_in_every_type_and_backward_pass(expression):
    for path in ["float32", "bfloat16", "aot_eager", *GROUPS[PASSES]]:
        assert_told(path, expression)


@pytest.mark.parametrize(
    "expression",
    [pytest.param(each, id=each, marks=() if each in SAMPLE else pytest.mark.long) for each in PAIRS],
)
def test_a_pair_is_exact_on_every_path_or_says_why_not(expression):
    for path in [*GROUPS[SIGHTS], "chunked", "slots"]:
        assert PATHS[path](expression) is None, path
    for path in ("square", "sdpa", "sdpa, packed", "row"):
        reason, alone = PATHS[path](expression), [PATHS[path](each) for each in expression.split(" + ")]
        assert (reason is None) == (alone == [None, None]), "a pair is refused where one of both is"


@pytest.mark.long
@pytest.mark.parametrize("expression", PAIRS)
def test_a_pair_is_exact_in_every_type_and_backward_pass(expression):
    for path in ("float32", "bfloat16", "second backward", "second derivative"):
        assert PATHS[path](expression) is None, path


@pytest.mark.parametrize("expression", page.methods())
def test_a_compiled_method_is_the_method(expression):
    assert assert_told("aot_eager", expression) is None


@pytest.mark.long
@needs_compiler
@pytest.mark.parametrize("expression", [*ONE_OF_A_KIND, ALL_KINDS])
def test_a_method_of_each_kind_is_itself_in_compiled_code(expression):
    assert assert_told("inductor", expression) is None


@pytest.mark.long
@needs_compiler
@pytest.mark.parametrize("expression", ["nope", "rope + stable_mask"])
def test_compiled_code_keeps_a_dense_mask_in_its_gradients(expression):
    paths.apart().submit(paths.compile_masked, expression, "inductor").result()


@pytest.mark.long
@pytest.mark.parametrize("expression", page.methods())
def test_a_compiled_model_decodes_and_takes_other_lengths(expression):
    paths.apart().submit(paths.decode_compiled, expression, "aot_eager").result()


@pytest.mark.xfail(strict=True, raises=Unsupported, reason="a kernel is imported by its name while a graph is traced")
def test_a_model_compiles_into_one_graph():
    try:
        paths.apart().submit(paths.compile_with, "rope", "aot_eager", fullgraph=True).result()
    except Exception as error:
        raise error from None


def test_a_second_derivative_by_fused_attention_is_exact_or_refused():
    """Of the sink's own gradient alone, which torch's refusal does not reach."""
    scheme, sight = scheme_of("learned_sink", Shape(13)).double(), Sight.causal(13)
    given = tensors(scheme, 13)

    def second(attend):
        queries, keys, values = leaves(given)
        (gradient,) = torch.autograd.grad(
            attend(queries, keys, values, sight, scheme).square().sum(), [*scheme.parameters()], create_graph=True
        )
        return torch.autograd.grad(gradient.square().sum(), queries)[0]

    expected = second(reference.attend)
    assert expected.abs().max() > 0
    with pytest.raises(NotImplementedError, match="no second derivative of a sink"):
        second(BUILT["sdpa"].attend)


def test_gradients_through_a_cache_are_exact_or_refused_in_words():
    model, tokens = paths.model_of("rope"), words(13)

    def in_pieces():
        room = model.cache(batch=2, length=13)
        return torch.cat([model(tokens[:, place : place + 1], cache=room) for place in range(13)], dim=1)

    expected = paths.results(model, lambda: model(tokens), "reference")
    try:
        paths.agree(paths.results(model, in_pieces), expected)
    except UserError as error:
        assert "gradient" in str(error)


SEEN_ELSEWHERE = [*COMPILED, "second backward"]  # another process, or the same error twice


@pytest.mark.parametrize(
    "path", [name for name in PATHS if name not in SEEN_ELSEWHERE and name != "second derivative, sdpa"]
)
def test_a_kernel_that_is_a_little_wrong_is_found_on_every_path(path):
    attend = lookfar.kernels.attend

    def wrong(queries, keys, values, sight, scheme, kernel=None):
        outputs = attend(queries, keys, values, sight, scheme, kernel)
        return outputs if kernel == "reference" else outputs * (1.2 if path == "bfloat16" else 1 + 1e-4)

    with (
        mock.patch("lookfar.kernels.attend", wrong),
        mock.patch.object(paths, "MANY", 2),
        pytest.raises(AssertionError),
    ):
        PATHS[path]("rope")


@pytest.mark.parametrize(
    "path", ["kv cache", "left padding", "packed documents", "windows", "parallel slots", "both ways"]
)
def test_a_sight_that_shows_too_little_is_found(path):
    visible = Sight.visible

    def short(sight):
        return visible(sight) & ~visible(sight).int().cumsum(-1).eq(1) | visible(sight).int().sum(-1, keepdim=True).eq(
            1
        )

    attend = lookfar.kernels.attend

    def wrong(queries, keys, values, sight, scheme, kernel=None):
        if kernel == "reference":
            return attend(queries, keys, values, sight, scheme, kernel)
        with mock.patch.object(Sight, "visible", short):
            return attend(queries, keys, values, sight, scheme, "reference")

    with mock.patch("lookfar.kernels.attend", wrong), pytest.raises(AssertionError):
        PATHS[path]("kerple")


def test_the_page_has_a_cell_for_every_method_on_every_path():
    assert list(COMMITTED) == list(PATHS) == [name for names in GROUPS.values() for name in names]
    for path, cells in COMMITTED.items():
        assert set(page.methods()) <= set(cells), path
        assert all(cell == "exact" or cell.startswith("refuses, because ") for cell in cells.values()), path
    assert {*lookfar.names("kernels")} <= {*PATHS} | ON_A_GPU
    assert page.methods() == ["nope", *METHODS] and {*GROUPS} == {SIGHTS, KERNELS, TYPES, PASSES}
    assert COMMITTED["both ways"]["dape_v2(repair=paper)"].startswith("refuses, because dape_v2(repair=paper) is exact")
