"""Every kernel against the definition: outputs and gradients, in double and in the types that are used."""

import copy
import itertools
import random
from collections import defaultdict
from dataclasses import dataclass, replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lookfar
from lookfar import kernels, plugins
from lookfar.attention import reference
from lookfar.attention.scheme import build_scheme
from lookfar.batch import consecutive
from lookfar.errors import UserError
from lookfar.kernels import compiled, sdpa, square
from lookfar.kernels.base import Call
from lookfar.kernels.chunked import Chunked
from lookfar.kernels.dispatch import choose, preference
from lookfar.kernels.strips import Strips
from lookfar.sight import Sight
from test_laws import ALONE, CHOICES, PAIRS, one_thread, randomised, tensors  # noqa: F401  # the fixture works by its name
from tolerance import assert_as_good, assert_near

KERNELS = {name: plugins.find("kernels", name)() for name in plugins.names("kernels") if name != "reference"}
FUSED = [
    "nope",
    "rope",
    "alibi",
    "alibi + alibi",
    "kerple",
    "fire",
    "stable_mask",
    "learned_sink",
    "alibi + stable_mask",
]
FUSED += ["differential + alibi + rope", "differential_v2", "t5 + learned_sink + differential_v2(share_bias=true)"]
SOME = [*dict.fromkeys([*FUSED, *ALONE, *CHOICES, *random.Random(2).sample(PAIRS, 8)])]


@dataclass(frozen=True)
class Shape:
    """A call's sizes, and who sees whom in it."""

    tokens: int
    queries: int | None = None
    heads: int = 2
    groups: int = 2
    head_width: int = 8
    batch: int = 1
    window: int | None = None
    documents: str | None = None  # packed, padded, interleaved
    numbered: bool = False  # positions are told, though they are 0, 1, 2, …
    ahead: bool = False  # what comes after is seen, too

    def sight(self, device=None):
        documents = positions = None
        if self.documents is not None:
            place = torch.arange(self.tokens)[None] + torch.arange(self.batch)[:, None]
            documents = {
                "packed": place * 3 // (self.tokens + self.batch),
                "padded": (place > self.tokens // 3).long() - 1,
                "interleaved": (place * 7 % 11) // 4 - 1,
            }[self.documents].to(device)
            positions = consecutive(documents)
        elif self.numbered:
            positions = torch.arange(self.tokens, device=device)[None]
        told = {"positions": positions, "documents": documents, "window": self.window, "device": device}
        if self.ahead:
            return Sight.bidirectional(self.tokens, **told)
        return Sight.causal(self.tokens, queries=self.queries, **told)


SHAPES = {
    "one token": Shape(1),
    "two tokens": Shape(2, batch=3),
    "thirteen": Shape(13, batch=2, heads=6),
    "a block less one": Shape(63, head_width=16),
    "a block": Shape(64, heads=4),
    "a block and one": Shape(65, heads=6, groups=2),
    "two blocks less one": Shape(127, head_width=48),
    "two blocks and one": Shape(129, heads=6, groups=6, head_width=64),
    "long": Shape(257, heads=4),
    "wide": Shape(13, heads=10, groups=10, head_width=64),
    "numbered": Shape(13, numbered=True, batch=2),
    "window": Shape(65, window=5, batch=2),
    "window of one": Shape(13, window=1),
    "window of a block": Shape(129, window=64),
    "packed": Shape(65, documents="packed", batch=2, heads=4),
    "padded": Shape(13, documents="padded", batch=2, heads=6, groups=2),
    "interleaved": Shape(65, documents="interleaved", batch=2),
    "interleaved in a window": Shape(63, documents="interleaved", window=9, batch=3),
    "decode": Shape(65, queries=1, batch=2, heads=4),
    "decode in a window": Shape(65, queries=1, window=9),
    "decode in documents": Shape(13, queries=1, documents="interleaved", batch=2),
    "prefill chunk": Shape(129, queries=7, heads=6, groups=2),
    "prefill chunk in a window": Shape(129, queries=40, window=9),
    "prefill chunk in documents": Shape(65, queries=9, documents="packed", batch=2),
    "both ways": Shape(33, ahead=True, batch=2),
    "both ways in a window": Shape(65, ahead=True, window=4, heads=4),
    "both ways in documents": Shape(33, ahead=True, documents="interleaved", window=20),
}


def scheme_of(expression, shape, layer=1):
    torch.manual_seed(4)
    sizes = {"heads": shape.heads, "groups": shape.groups, "head_width": shape.head_width}
    return randomised(build_scheme(expression, **sizes, layer=layer, layers=2, context=32))


def leaves(given):
    return [each.clone().requires_grad_() for each in (given.queries, given.keys, given.values)]


def results(attend, given, sight, scheme):
    """Outputs and all gradients by name; what a kernel leaves alone counts as zero."""
    own = leaves(given)
    outputs = attend(*own, sight, scheme)
    towards = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    names, parameters = ["queries", "keys", "values"], []
    for name, parameter in scheme.named_parameters():
        names.append(name)
        parameters.append(parameter)
    gradients = torch.autograd.grad(outputs, own + parameters, towards.to(outputs), allow_unused=True)
    zero = [
        torch.zeros_like(each) if found is None else found
        for each, found in zip(own + parameters, gradients, strict=True)
    ]
    return {"outputs": outputs.detach(), **dict(zip(names, zero, strict=True))}


TELLING = ["thirteen", "a block and one", "interleaved in a window", "decode", "prefill chunk", "both ways in a window"]
CUT = ["thirteen", "a block and one", "window", "interleaved in a window", "prefill chunk in documents", "both ways"]


def cases():
    """What fused kernels are made for in every shape, all else in the telling ones; all cut into small chunks."""
    for expression in SOME:
        for place in SHAPES if expression in FUSED else TELLING:
            yield pytest.param(expression, place, False, id=f"{expression}-{place}")
        for place in CUT:
            yield pytest.param(expression, place, True, id=f"{expression}-{place}, cut small")


def call_of(given, sight, scheme):
    """The facts of the call that `results` makes, which asks for gradients."""
    call = Call.of(given.queries, given.keys, given.values, sight, scheme)
    return replace(call, gradients=torch.is_grad_enabled())


@pytest.mark.parametrize(("expression", "place", "small"), [*cases()])
def test_every_kernel_is_the_definition(expression, place, small, monkeypatch):
    shape, some = SHAPES[place], KERNELS
    if small:
        monkeypatch.setattr(square, "CHUNK", 5)
        some = {"square": KERNELS["square"], "chunked": Chunked(entries=1, whole=0)}
    scheme, sight = scheme_of(expression, shape).double(), shape.sight()
    if scheme.refusal(sight):
        return
    given = tensors(scheme, shape.tokens, shape.batch, shape.queries)
    expected = results(reference.attend, given, sight, scheme)
    willing = {n: each for n, each in some.items() if each.refusal(scheme, call_of(given, sight, scheme)) is None}
    assert "chunked" in willing
    for name, kernel in willing.items():
        for what, value in results(kernel.attend, given, sight, scheme).items():
            assert_near(value, expected[what], f"{what} of {name}")


def test_small_chunks_are_many(monkeypatch):
    """What is said of chunks is said of chunks."""
    scheme, sight, asked = scheme_of("nope", Shape(65)), Sight.causal(65), []

    def count(queries, *rest):
        asked.append(queries.shape[2])
        return reference_attend(queries, *rest)

    reference_attend = reference.attend
    monkeypatch.setattr(reference, "attend", count)
    given = tensors(scheme, 65)
    with torch.no_grad():
        Chunked(entries=1, whole=0).attend(given.queries, given.keys, given.values, sight, scheme)
    assert asked == [1, 16, 16, 16, 16], "the largest first"


def test_square_keeps_a_sink_in_double():
    shape = Shape(13)
    scheme, sight = scheme_of("stable_mask", shape).double(), shape.sight()
    given = tensors(scheme, 13, 1)
    expected = results(reference.attend, given, sight, scheme)
    for what, value in results(KERNELS["square"].attend, given, sight, scheme).items():
        assert_near(value, expected[what], what)


NARROW = ["nope", *lookfar.names("methods"), "kerple + stable_mask", "alibi + rope + differential", "dape_v2 + t5"]
NARROW_SHAPES = ["thirteen", "a block and one", "long", "interleaved in a window", "decode", "prefill chunk"]


def without_effect(name, scheme):
    """Its true gradient is zero, so that only rounding could be compared."""
    return name.endswith("second.bias") and not scheme.sinks


def wide(given):
    return type(given)(*(each.double() for each in (given.queries, given.keys, given.values, given.x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("expression", NARROW)
def test_every_kernel_is_as_exact_as_the_definition(expression, dtype):
    """Over two draws of several shapes: the error of one call is a matter of luck."""
    found, definition, true = defaultdict(list), defaultdict(list), defaultdict(list)
    for place, seed in itertools.product(NARROW_SHAPES, range(2)):
        scheme, sight = scheme_of(expression, shape := SHAPES[place]), SHAPES[place].sight()
        given = tensors(scheme, shape.tokens, shape.batch, shape.queries, seed, dtype)
        exact = results(reference.attend, wide(given), sight, copy.deepcopy(scheme).double())
        defined = results(reference.attend, given, sight, scheme)
        for name, kernel in KERNELS.items():
            if kernel.refusal(scheme, call_of(given, sight, scheme)) is None:
                for what, value in results(kernel.attend, given, sight, scheme).items():
                    if not without_effect(what, scheme):
                        found[name, what].append(value)
                        definition[name, what].append(defined[what])
                        true[name, what].append(exact[what])
    for name, what in found:
        assert_as_good(found[name, what], definition[name, what], true[name, what], dtype, f"{what} of {name}")


far = [
    (name, dtype, tokens)
    for name in ("sdpa", "square")
    for dtype in (torch.float32, torch.bfloat16)
    for tokens in (257, 258, 2049, 2050, 2056, 2059, 16385, 16386)
]


@pytest.mark.parametrize(("name", "dtype", "tokens"), far, ids=str)
def test_alibi_near_the_diagonal_is_as_exact_far_from_the_start(name, dtype, tokens):
    """The last rows of a long sequence: a position that is rounded would move their nearest keys."""
    shape = Shape(tokens, queries=16, heads=6, groups=6, head_width=16)
    scheme, sight = scheme_of("alibi", shape), shape.sight()
    draws = [tensors(scheme, tokens, 1, 16, seed, dtype) for seed in range(3)]
    assert KERNELS[name].refusal(scheme, call_of(draws[0], sight, scheme)) is None
    true = [results(reference.attend, wide(given), sight, copy.deepcopy(scheme).double()) for given in draws]
    definition = [results(reference.attend, given, sight, scheme) for given in draws]
    found = [results(KERNELS[name].attend, given, sight, scheme) for given in draws]
    for what in true[0]:
        assert_as_good(*([each[what] for each in kind] for kind in (found, definition, true)), dtype, what)


@torch.no_grad()
@pytest.mark.parametrize(
    "tokens",
    [1025, 1100, 2050],
)
def test_a_long_causal_call_is_as_exact_as_the_definition(tokens):
    shape = Shape(tokens, heads=6, groups=6, head_width=16)
    scheme, sight = scheme_of("alibi", shape), shape.sight()
    given = tensors(scheme, tokens, 1, dtype=torch.float32)
    three = [
        [attend(each.queries, each.keys, each.values, sight, scheme)]
        for attend, each in ((KERNELS["sdpa"].attend, given), (KERNELS["chunked"].attend, given))
    ]
    far = wide(given)
    true = KERNELS["chunked"].attend(far.queries, far.keys, far.values, sight, copy.deepcopy(scheme).double())
    assert_as_good(*three, [true], torch.float32)


@pytest.mark.parametrize("expression", ["nope", "alibi", "stable_mask"])
def test_rows_whose_first_tiles_are_hidden_are_exact(expression):
    """Fused kernels go through the keys in tiles of some hundreds; a window hides whole tiles."""
    shape = Shape(1100, heads=2, window=6)
    scheme, sight = scheme_of(expression, shape).double(), shape.sight()
    given = tensors(scheme, 1100, 1)
    expected = results(reference.attend, given, sight, scheme)
    for name, kernel in KERNELS.items():
        if kernel.refusal(scheme, call_of(given, sight, scheme)) is None:
            for what, value in results(kernel.attend, given, sight, scheme).items():
                assert_near(value, expected[what], f"{what} of {name}")


# A sink without a log-sum-exp, as on a GPU: one key more in front


def in_front(queries, keys, values, sight, scheme):
    keys, values, width = scheme.heads.keys_for_scores(keys), scheme.heads.values_for_scores(values), values.shape[-1]
    sink = scheme.sink(sight.query_positions)
    return sdpa._with_key_in_front(queries, keys, values, sink, scheme.scale)[..., :width]


@pytest.mark.parametrize(
    "shape", ["one token", "thirteen", "a block and one", "two blocks less one", "numbered", "wide"]
)
@pytest.mark.parametrize(
    "expression",
    [
        "stable_mask",
        "stable_mask(gamma=0.5)",
        "stable_mask(gamma=0, columns=2000)",
        "rope + stable_mask",
        "stable_mask + differential",
        "stable_mask + differential(share_bias=true)",
    ],
)
def test_a_key_in_front_is_a_sink(expression, shape):
    shape = SHAPES[shape]
    scheme, sight = scheme_of(expression, shape).double(), shape.sight()
    given = tensors(scheme, shape.tokens, shape.batch)
    expected = results(reference.attend, given, sight, scheme)
    for what, value in results(in_front, given, sight, scheme).items():
        assert_near(value, expected[what], what)


def test_a_key_in_front_may_have_no_score():
    shape = Shape(13)
    scheme, sight = scheme_of("stable_mask(gamma=0.5, columns=9)", shape).double(), shape.sight()
    given = tensors(scheme, 13, 1)
    expected = results(reference.attend, given, sight, scheme)
    for what, value in results(in_front, given, sight, scheme).items():
        assert_near(value, expected[what], what)


# Gradients and memory


@pytest.mark.parametrize("kernel", ["sdpa", "square", "chunked", "small chunks", "reference"])
@pytest.mark.parametrize("expression", ["alibi + stable_mask", "kerple", "kerple + dape_v2(hidden=3)"])
def test_a_second_backward_gives_the_same_gradients(expression, kernel):
    scheme, sight = scheme_of(expression, Shape(37)).double(), Sight.causal(37)
    chosen = {
        **KERNELS,
        "small chunks": Chunked(entries=1, whole=0),
        "reference": plugins.find("kernels", "reference")(),
    }[kernel]
    given = tensors(scheme, 37)
    if chosen.refusal(scheme, call_of(given, sight, scheme)) is not None:
        return
    inputs = [*leaves(given), *scheme.parameters()]
    outputs = chosen.attend(*inputs[:3], sight, scheme)
    towards = torch.randn_like(outputs)
    once = torch.autograd.grad(outputs, inputs, towards, retain_graph=True)
    twice = torch.autograd.grad(outputs, inputs, towards)
    for first, second in zip(once, twice, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("expression", ["nope", "alibi + stable_mask", "kerple"])
def test_no_kernel_changes_what_it_is_given(expression, kernel):
    scheme, sight = scheme_of(expression, Shape(13)).double(), Sight.causal(13)
    given = tensors(scheme, 13)
    if KERNELS[kernel].refusal(scheme, call_of(given, sight, scheme)) is not None:
        return
    before = [each.clone() for each in (given.queries, given.keys, given.values)]
    for queries in (given.queries, given.queries.clone().requires_grad_()):
        KERNELS[kernel].attend(queries, given.keys, given.values, sight, scheme)
    for each, old in zip((given.queries, given.keys, given.values), before, strict=True):
        assert torch.equal(each, old)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kernel", [name for name in KERNELS if name not in ("row", "slots")])
def test_gradients_reach_only_what_asks_for_them(kernel, dtype):
    """Keys and values of a cache need none, and inference mode must work too."""
    scheme, sight = scheme_of("stable_mask", Shape(40)).to(dtype), Sight.causal(40)
    given = tensors(scheme, 40, dtype=dtype)
    queries = given.queries.clone().requires_grad_()
    if KERNELS[kernel].refusal(scheme, Call.of(queries, given.keys, given.values, sight, scheme)) is not None:
        return
    outputs = KERNELS[kernel].attend(queries, given.keys, given.values, sight, scheme)
    (gradient,) = torch.autograd.grad(outputs.sum(), queries)
    (expected,) = torch.autograd.grad(reference.attend(queries, given.keys, given.values, sight, scheme).sum(), queries)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    with torch.inference_mode():
        again = KERNELS[kernel].attend(given.queries, given.keys, given.values, sight, scheme)
    torch.testing.assert_close(again, outputs.detach(), rtol=1e-6, atol=1e-6)


class Largest(TorchDispatchMode):
    """Watches how many numbers the largest tensor holds that an operation makes, forward and backward."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else [made]:
            if isinstance(each, torch.Tensor):
                self.numbers = max(self.numbers, each.untyped_storage().nbytes() // max(1, each.element_size()))
        return made


def largest(attend, tokens, expression, window=None):
    scheme, sight = scheme_of(expression, Shape(tokens)), Sight.causal(tokens, window=window)
    given = leaves(tensors(scheme, tokens, 1, dtype=torch.float32))
    with Largest() as watched:
        attend(*given, sight, scheme).sum().backward()
    return watched.numbers


def test_chunks_never_hold_the_square():
    """DAPE V2 at 2,048 tokens: memory goes with chunk × length × channels, forward and backward."""
    tokens, heads, hidden, rows = 2048, 2, 4, 32
    chunked = Chunked(entries=heads * tokens * rows, whole=0)
    expression = f"alibi + dape_v2(hidden={hidden})"
    assert chunked.rows(heads, Sight.causal(tokens)) == rows
    held = largest(chunked.attend, tokens, expression)
    assert held <= rows * tokens * max(hidden, 2 * heads)
    assert largest(reference.attend, 256, expression) >= 256 * 256 * hidden, "the watch sees the square where it is"


def test_under_a_window_chunks_hold_only_what_it_shows():
    tokens, window = 2048, 64
    chunked = Chunked(entries=1, whole=0)
    assert chunked.rows(2, Sight.causal(tokens, window=window)) == 16
    held = largest(chunked.attend, tokens, "dape_v2(hidden=4)", window)
    assert held <= max((16 + window) * 16 * 4, tokens * 2 * 8), "no more than a chunk, or the inputs themselves"


def test_smaller_chunks_for_more_heads_and_longer_rows():
    chunked = Chunked()
    rows = [chunked.rows(maps, Sight.causal(tokens)) for maps, tokens in ((2, 512), (8, 512), (8, 4096), (8, 1 << 20))]
    assert rows == sorted(rows, reverse=True) and rows[-1] == 16
    assert all(each & (each - 1) == 0 for each in rows)


@pytest.mark.parametrize("expression", ["nope", "kerple", "cope", "dape_v2"])
def test_strips_are_not_laid_out_for_a_few_queries(expression):
    scheme = build_scheme(expression, heads=2, head_width=8)
    for queries in (1, 2, 7):
        assert not isinstance(choose(scheme, Call(queries=queries, keys=4096, gradients=False)), Strips)
    assert isinstance(choose(scheme, Call(queries=64, keys=4096, gradients=False)), Strips)


# Who takes a call


def calls():
    sizes = itertools.product([torch.float32, torch.bfloat16, torch.float16], [1, 64, 4096], ["cpu", "cuda"])
    for dtype, queries, device in sizes:
        for plain, consecutive_ in ((True, True), (True, False), (False, True), (False, False)):
            for keys in {queries, 4096}:
                yield Call(device, dtype, queries, keys, batch=8, plain=plain, consecutive=consecutive_)


@pytest.mark.parametrize("expression", SOME)
def test_every_kernel_is_willing_or_says_why_not(expression):
    scheme = scheme_of(expression, Shape(1, heads=4, groups=4))
    for call in calls():
        told = kernels.explain(scheme, call)
        assert sorted(name for name, _ in told) == plugins.names("kernels")
        for name, reason in told:
            assert reason is None or (reason.strip() == reason and len(reason) > 10 and not reason.endswith("."))
            assert reason == plugins.find("kernels", name)().refusal(scheme, call)
        first = next(name for name, reason in told if reason is None)
        assert isinstance(kernels.choose(scheme, call), plugins.find("kernels", first))
        assert dict(told)["chunked"] is None and dict(told)["reference"] is None


@pytest.mark.parametrize(
    ("expression", "call", "first"),
    [
        ("nope", {"queries": 128, "keys": 128}, "square"),
        ("nope", {"queries": 256, "keys": 256}, "strips"),
        ("kerple", {"queries": 7, "keys": 4096}, "square"),
        ("kerple", {"queries": 16, "keys": 4096}, "strips"),
        ("kerple", {"queries": 1, "keys": 4096}, "row"),
        ("kerple", {"queries": 512, "keys": 512, "dtype": torch.bfloat16}, "square"),
        ("fire", {"queries": 512, "keys": 512, "dtype": torch.bfloat16}, "strips"),
        ("kerple", {"queries": 2048, "keys": 2048, "dtype": torch.bfloat16}, "strips"),
        ("cope", {"queries": 64, "keys": 64}, "strips"),
        ("transformer_xl", {"queries": 4096, "keys": 4096}, "chunked"),
        ("nope", {"queries": 512, "keys": 512, "causal": False, "plain": False}, "sdpa"),
        ("nope", {"queries": 512, "keys": 512, "dtype": torch.float64}, "sdpa"),
        ("nope", {"slots": True}, "slots"),
    ],
)
def test_a_processor_has_the_kernel_that_was_measured_to_be_fastest(expression, call, first):
    if first == "strips" and compiled.refusal():
        pytest.skip(compiled.refusal())
    scheme, call = build_scheme(expression, heads=2, head_width=8), Call(**call)
    assert isinstance(kernels.choose(scheme, call), plugins.find("kernels", first))
    order = preference(scheme, call)
    assert order.index("flex") > order.index("reference"), "on a CPU only by name"


@pytest.mark.parametrize(
    ("kernel", "expression", "call", "reason"),
    [
        ("sdpa", "kerple", Call(), "Kerple adds a bias"),
        ("sdpa", "alibi + t5", Call(), "T5 adds a bias"),
        ("sdpa", "dape_v2", Call(), "DapeV2 rewrites the scores"),
        ("sdpa", "alibi", Call(consecutive=False), "positions count up"),
        ("sdpa", "alibi", Call(dtype=torch.float16), "float16"),
        ("sdpa", "nope", Call(batch=64, queries=4096, keys=4096, plain=False), "dense mask of 1,073,741,824 entries"),
        ("sdpa", "stable_mask", Call(device="cuda", queries=4, keys=9), "plain causal sight"),
        ("square", "dape_v2", Call(), "rewrites the scores"),
        ("square", "nope", Call(batch=64, queries=4096, keys=4096), "weights, more than"),
    ],
)
def test_a_refusal_names_its_cause(kernel, expression, call, reason):
    assert reason in KERNELS[kernel].refusal(scheme_of(expression, Shape(1, heads=4, groups=4)), call)


@pytest.mark.parametrize("kernel", ["sdpa", "square"])
def test_soft_capped_scores_are_refused_where_they_are_not_computed(kernel):
    scheme = build_scheme("nope", heads=2, soft_cap=5.0)
    assert "soft-capped" in KERNELS[kernel].refusal(scheme, Call())


def test_a_kernel_that_is_named_and_refuses_is_an_error_with_its_reason():
    given = torch.zeros(1, 2, 5, 8)
    for name, expression in (("sdpa", "kerple"), ("square", "dape_v2")):
        scheme = build_scheme(expression, heads=2, head_width=8)
        reason = KERNELS[name].refusal(scheme, Call())
        with pytest.raises(UserError) as told:
            kernels.attend(given, given, given, Sight.causal(5), scheme, name)
        assert name in str(told.value) and reason in str(told.value)


@torch.no_grad()
@pytest.mark.parametrize("expression", SOME)
def test_without_a_name_the_first_willing_kernel_computes(expression, monkeypatch):
    shape = Shape(13, heads=4, groups=2)
    scheme, sight = scheme_of(expression, shape), shape.sight()
    given = tensors(scheme, 13, dtype=torch.float32)
    first = next(name for name, reason in kernels.explain(scheme, call_of(given, sight, scheme)) if reason is None)
    asked = [given.queries, given.keys, given.values, sight, scheme]
    assert torch.equal(kernels.attend(*asked), kernels.attend(*asked, first))


def test_the_facts_of_a_call_are_those_of_its_tensors():
    scheme, given = build_scheme("kerple", heads=2, head_width=8), torch.zeros(3, 2, 9, 8, dtype=torch.bfloat16)
    sight = Sight.causal(9, queries=4, positions=torch.arange(9)[None], window=3)
    call = Call.of(given[:, :, 5:], given, given, sight, scheme)
    assert call == Call("cpu", torch.bfloat16, 4, 9, 3, gradients=True, plain=False, consecutive=False)
    with torch.no_grad():
        assert not Call.of(given, given, given, Sight.causal(9), scheme).gradients
    assert not Call.of(given, given, given, Sight.causal(9), build_scheme("nope", heads=2, head_width=8)).gradients


# The same on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("expression", SOME)
def test_every_kernel_is_the_definition_on_a_gpu(expression):
    for place, shape in SHAPES.items():
        scheme, sight = scheme_of(expression, shape).double().cuda(), shape.sight("cuda")
        if scheme.refusal(sight):
            continue
        given = tensors(scheme, shape.tokens, shape.batch, shape.queries)
        given = type(given)(*(each.cuda() for each in (given.queries, given.keys, given.values, given.x)))
        expected = results(reference.attend, given, sight, scheme)
        for name, kernel in KERNELS.items():
            if kernel.refusal(scheme, call_of(given, sight, scheme)) is None:
                for what, value in results(kernel.attend, given, sight, scheme).items():
                    assert_near(value, expected[what], f"{what} of {name}, {place}")


@pytest.mark.parametrize(
    "expression", ["nope", "alibi", "stable_mask", "alibi + differential(share_bias=true)", "kerple"]
)
@pytest.mark.parametrize("rows", [(3, 4), (3, 7), (12, 13)], ids=str)
def test_queries_that_are_not_the_last_keys_see_nothing_ahead(expression, rows):
    """A chunk may come with keys beyond its last query: they stay hidden."""
    shape = Shape(13)
    scheme, sight = scheme_of(expression, shape).double(), Sight.causal(13).rows(*rows, step=8)
    given = tensors(scheme, sight.keys, 1, sight.queries)
    expected = results(reference.attend, given, sight, scheme)
    for name, kernel in KERNELS.items():
        if kernel.refusal(scheme, call_of(given, sight, scheme)) is None:
            for what, value in results(kernel.attend, given, sight, scheme).items():
                assert_near(value, expected[what], f"{what} of {name}")
