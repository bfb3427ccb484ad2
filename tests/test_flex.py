"""FlexAttention against the definition: by its own score functions and masks on a CPU, compiled in the long tests."""

import copy
import shutil
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex

from lookfar import kernels
from lookfar.attention import reference
from lookfar.attention.scheme import build_scheme
from lookfar.errors import UserError
from lookfar.kernels import flex
from lookfar.kernels.base import Call
from lookfar.kernels.dispatch import preference
from lookfar.kernels.flex import Flex
from lookfar.sight import Sight
from test_kernels import SHAPES, Shape, results, scheme_of, wide
from test_laws import one_thread, tensors  # noqa: F401  # the fixture works by its name
from tolerance import assert_as_good, assert_near

SCHEMES = [
    "nope",
    "rope",
    "alibi",
    "alibi(learned=true)",
    "alibi(form=split)",
    "t5",
    "t5(scale=original)",
    "kerple",
    "kerple(kernel=power)",
    "alibi + t5",
    "learned_sink",
    "stable_mask",
    "kerple + stable_mask",
    "differential",
    "t5 + differential + learned_sink",
    "differential_v2",
    "kerple + differential_v2(share_bias=true)",
]
LONGER = {
    "three blocks": Shape(300, heads=4, groups=2),
    "three blocks in a window": Shape(300, window=130, batch=2),
    "three blocks in documents": Shape(300, documents="packed", batch=3),
    "three blocks, interleaved": Shape(300, documents="interleaved", window=140, batch=2),
    "three blocks, the last rows": Shape(300, queries=140),
    "three blocks both ways": Shape(300, ahead=True, window=131),
}
ALL = {**SHAPES, **LONGER}
GRADIENTS = [
    "thirteen",
    "three blocks",
    "three blocks, interleaved",
    "prefill chunk in a window",
    "both ways in a window",
]
COMPILED = ["three blocks", "three blocks, interleaved", "decode", "prefill chunk in a window", "both ways"]

BY_COMPILER = [
    pytest.mark.long,
    pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler for a CPU, g++, is not installed"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),  # the compiler's own
]


def by_compiler(test):
    """A test that compiles for a CPU."""
    for mark in BY_COMPILER:
        test = mark(test)
    return test


@pytest.fixture
def in_python(monkeypatch):
    """Score functions and masks are run by torch as they are, pair for pair, and nothing is compiled."""
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """One graph for any length, forward and backward, whose operators are run by torch one after another."""
    torch.compiler.reset()
    compiled = torch.compile(torch_flex.flex_attention, backend="aot_eager", dynamic=True, fullgraph=True)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)  # no backward is compiled for a CPU
    monkeypatch.setattr(flex, "_compiled", lambda device: compiled)


def compare(kernel, expression, shapes, dtype=torch.float32):
    """Outputs as good as the definition's in the mean over some shapes."""
    found, definition, true = [], [], []
    for shape in shapes:
        scheme, sight = scheme_of(expression, shape), shape.sight()
        given = tensors(scheme, shape.tokens, shape.batch, shape.queries, 0, dtype)
        call = Call.of(given.queries, given.keys, given.values, sight, scheme)
        assert kernel.refusal(scheme, call) is None
        found.append(kernel.attend(given.queries, given.keys, given.values, sight, scheme))
        definition.append(reference.attend(given.queries, given.keys, given.values, sight, scheme))
        far = wide(given)
        true.append(reference.attend(far.queries, far.keys, far.values, sight, copy.deepcopy(scheme).double()))
        assert found[-1].dtype == dtype
    assert_as_good(found, definition, true, dtype, expression)


@torch.no_grad()
@pytest.mark.parametrize("expression", SCHEMES)
@pytest.mark.parametrize("place", ALL)
def test_flex_is_the_definition(expression, place, in_python):
    compare(Flex(compiled=False), expression, [ALL[place]])


@torch.no_grad()
@pytest.mark.parametrize("expression", ["nope", "kerple + stable_mask", "t5 + differential"])
def test_flex_is_the_definition_in_bfloat16(expression, in_python):
    compare(Flex(compiled=False), expression, [*ALL.values()], torch.bfloat16)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # the compiler looks at all inputs
@pytest.mark.parametrize(
    "expression",
    [
        "kerple + stable_mask",
        *(
            pytest.param(each, marks=pytest.mark.long)
            for each in (
                "nope",
                "alibi(learned=true)",
                "t5 + learned_sink",
                "kerple + differential",
                "t5 + differential_v2",
            )
        ),
    ],
)
def test_gradients_through_the_graph_of_a_gpu_are_the_definitions(expression, as_on_a_gpu):
    """Forward and backward."""
    for place in GRADIENTS:
        shape = replace(ALL[place], heads=4, groups=2, batch=2)
        scheme, sight = scheme_of(expression, shape).double(), shape.sight()
        given = tensors(scheme, shape.tokens, shape.batch, shape.queries)
        expected = results(reference.attend, given, sight, scheme)
        for what, value in results(Flex().attend, given, sight, scheme).items():
            assert_near(value, expected[what], f"{what}, {place}")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_projections_get_their_gradient(as_on_a_gpu):
    """Queries, keys and values are views of one projection, as in a model."""
    scheme, sight = scheme_of("kerple", Shape(40, head_width=16)).double(), Sight.causal(40)
    project = torch.randn(1, 40, 3 * 32, dtype=torch.float64, requires_grad=True)
    towards = torch.randn(1, 2, 40, 16, dtype=torch.float64)

    def gradients(attend):
        three = (each.unflatten(-1, (2, 16)).transpose(1, 2) for each in (project * 1.0).split(32, dim=-1))
        outputs, wanted = attend(*three, sight, scheme), [project, *scheme.parameters()]
        return torch.autograd.grad(outputs, wanted, towards)

    for value, expected in zip(gradients(Flex().attend), gradients(reference.attend), strict=True):
        assert_near(value, expected)


def test_no_captured_table_is_a_view():
    """Torch's compiler drops the gradient of a captured view, without a word."""
    for expression in ("kerple", "t5", "alibi(learned=true)", "t5 + differential_v2(share_bias=true)"):
        scheme = scheme_of(expression, Shape(13))
        score_mod = flex._score_mod(Sight.causal(13), scheme, 1)
        (table,) = (cell.cell_contents for cell in score_mod.__closure__ if getattr(cell.cell_contents, "ndim", 0) == 2)
        assert table.requires_grad and not table._is_view() and table.is_contiguous()


@torch.no_grad()
@by_compiler
@pytest.mark.parametrize("expression", ["nope", "alibi", "kerple + differential"])
def test_compiled_flex_is_the_definition(expression):
    for place in COMPILED:
        compare(Flex(), expression, [replace(ALL[place], groups=2, heads=4, batch=2)])


@torch.no_grad()
@by_compiler
def test_other_methods_are_not_compiled_anew():
    torch.compiler.reset()
    flex._compiled.cache_clear()
    compare(Flex(), "kerple", [Shape(300)])
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for expression in ("t5", "alibi", "alibi + kerple", "kerple(kernel=power)"):
        compare(Flex(), expression, [Shape(300)])
    assert compiled > 0 and torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled


@torch.no_grad()
@pytest.mark.parametrize("steady", [True, False])
@pytest.mark.parametrize("expression", ["nope", "kerple"])
def test_the_soft_cap_comes_before_the_bias(expression, steady, in_python):
    scheme = build_scheme(expression, heads=2, head_width=16, soft_cap=0.5)
    positions = torch.arange(20)[None] if steady else torch.arange(20)[None] * 3
    sight = Sight.causal(20, positions=positions)
    given = tensors(scheme, 20, dtype=torch.float32)
    asked = given.queries * 9, given.keys, given.values, sight, scheme
    assert_near(Flex(compiled=False).attend(*asked), reference.attend(*asked))


@torch.no_grad()
@pytest.mark.parametrize("expression", ["alibi", "kerple", "t5", "alibi(form=offset) + learned_sink"])
def test_any_whole_positions_are_looked_up(expression, in_python):
    """Repeated, decreasing and far apart; other ones in every line."""
    scheme = build_scheme(expression, heads=2, head_width=16)
    positions = torch.randint(0, 1000, (2, 140), generator=torch.Generator().manual_seed(0))
    sight = Sight.causal(140, positions=positions, queries=137)
    assert not sight.steady
    given = tensors(scheme, 140, 2, 137, dtype=torch.float32)
    asked = given.queries, given.keys, given.values, sight, scheme
    assert_near(Flex(compiled=False).attend(*asked), reference.attend(*asked))


@torch.no_grad()
def test_the_log_sum_exp_is_natural(in_python):
    zeros = torch.zeros(1, 2, 10, 16)
    mask = flex._block_mask(Sight.causal(10), 1)
    given = {"block_mask": mask, "return_aux": flex.AuxRequest(lse=True)}
    _, aux = Flex(compiled=False)._call(zeros, zeros, zeros, given)
    torch.testing.assert_close(aux.lse[0, 0], torch.arange(1.0, 11.0).log())


@pytest.mark.parametrize("place", [place for place in ALL if place != "both ways"])
def test_blocks_hold_all_that_is_seen(place):
    """What is not in a block is not seen, all of a full block is, and blocks without any document are the fewest."""
    shape = replace(ALL[place], batch=2)
    sight = shape.sight()
    mask, visible = flex._block_mask(sight, 2), sight.visible()
    size = [visible.shape[2] + -visible.shape[2] % 128, visible.shape[3] + -visible.shape[3] % 128]
    filled = torch.zeros(len(visible), 1, *size, dtype=torch.bool)
    filled[:, :, : visible.shape[2], : visible.shape[3]] = visible
    blocks = filled.unflatten(2, (-1, 128)).unflatten(4, (-1, 128)).transpose(3, 4).flatten(4)  # b 1 i j pairs
    some, every = blocks.any(-1), blocks.all(-1)
    partial, full = dense(mask.kv_num_blocks, mask.kv_indices), dense(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert not (partial & full).any()
    assert not (some & ~(partial | full)).any() and not (full & ~every).any()
    if sight.key_documents is None:
        assert torch.equal(partial | full, some[:1]) and torch.equal(full, every[:1])


def dense(counts, indices):
    blocks = torch.zeros(indices.shape, dtype=torch.bool)
    for place in torch.cartesian_prod(*(torch.arange(size) for size in counts.shape)).tolist():
        blocks[(*place, indices[tuple(place)][: counts[tuple(place)]].long())] = True
    return blocks


def test_a_document_of_its_own_fills_its_blocks():
    documents = torch.arange(512)[None] // 256
    sight = Sight.causal(512, positions=torch.arange(512)[None], documents=documents)
    mask = flex._block_mask(sight, 1)
    full, partial = dense(mask.full_kv_num_blocks, mask.full_kv_indices), dense(mask.kv_num_blocks, mask.kv_indices)
    assert full[0, 0].nonzero().tolist() == [[1, 0], [3, 2]]
    assert partial[0, 0].nonzero().tolist() == [[0, 0], [1, 1], [2, 2], [3, 3]]


def test_masks_that_are_kept_serve_a_backward_pass():
    flex._masked_by_order.cache_clear()
    with torch.inference_mode():
        mask = flex._block_mask(Sight.causal(300), 1)
    assert flex._block_mask(Sight.causal(300), 1) is mask
    assert not mask.kv_indices.is_inference()


@pytest.mark.parametrize(
    ("expression", "call", "reason"),
    [
        ("dape_v2", Call(device="cuda"), "DapeV2 rewrites the scores"),
        ("fire + alibi", Call(device="cuda"), "Fire adds a bias that is no table"),
        ("kerple", Call(device="cuda", whole=False), "between whole numbers"),
        ("nope", Call(device="cuda", slots=True), "slots"),
        ("nope", Call(device="cuda", dtype=torch.float64), "takes no float64"),
        ("nope", Call(), "no backward on a CPU"),
        ("stable_mask", Call(gradients=False), "no log-sum-exp on a CPU"),
    ],
)
def test_flex_says_why_not(expression, call, reason):
    scheme = build_scheme(expression, heads=2, head_width=16)
    assert reason in Flex().refusal(scheme, call)


def test_heads_that_are_too_wide_are_refused_on_a_gpu():
    scheme = build_scheme("nope", heads=2, head_width=256)
    assert "256 wide, more than 128" in Flex().refusal(scheme, Call(device="cuda"))
    assert Flex().refusal(scheme, Call(device="cuda", dtype=torch.bfloat16)) is None


def test_what_is_summed_in_no_order_is_refused_where_order_is_asked_for():
    scheme, call = build_scheme("kerple", heads=2, head_width=16), Call(device="cuda")
    assert Flex().refusal(scheme, call) is None
    torch.use_deterministic_algorithms(True)
    try:
        assert "no fixed order" in Flex().refusal(scheme, call)
        assert Flex().refusal(scheme, replace(call, gradients=False)) is None
        assert Flex().refusal(build_scheme("alibi", heads=2, head_width=16), call) is None
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_gpu_prefers_flex_to_the_square_and_a_single_query_its_row():
    order = preference(build_scheme("kerple", heads=2), Call(device="cuda"))
    assert order.index("distance") < order.index("row") < order.index("flex") < order.index("square")
    told = dict(kernels.explain(build_scheme("kerple", heads=2), Call(device="cuda", queries=512, keys=512)))
    assert told["flex"] is None and told["sdpa"] and told["row"]


def test_flex_on_a_cpu_is_an_error_with_its_reason_where_gradients_are_needed():
    scheme = build_scheme("kerple", heads=2, head_width=16)
    given = torch.zeros(1, 2, 5, 16)
    with pytest.raises(UserError, match="flex does not take this call: FlexAttention has no backward on a CPU"):
        kernels.attend(given, given, given, Sight.causal(5), scheme, "flex")
