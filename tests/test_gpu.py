"""On a GPU: every kernel that takes a call is as exact as the definition, and models train and decode (`make gpu`)."""

import copy
import itertools
from collections import defaultdict

import pytest
import torch
from torch.nn import functional as F

import lookfar
from lookfar import plugins
from lookfar.attention import reference
from lookfar.attention.scheme import build_scheme
from lookfar.kernels.base import Call
from lookfar.kernels.dispatch import preference
from lookfar.model.generate import Sampling, generate
from lookfar.sight import Sight
from test_kernels import Shape, call_of, leaves, results, scheme_of, without_effect
from test_laws import METHODS, tensors
from tolerance import assert_as_good, assert_near

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings(r"ignore:::torch\..*"),  # what its compiler says of types and tuning
]
KERNELS = {name: plugins.find("kernels", name)() for name in plugins.names("kernels") if name != "reference"}
ORDERED = [name for name in ("distance", "dape") if name in KERNELS]  # kernels whose sums have one order
SCHEMES = [
    "nope",
    *METHODS,
    "alibi(learned=true)",
    "alibi(form=split)",
    "kerple(kernel=power)",
    "alibi + t5",
    "alibi + stable_mask",
    "kerple + learned_sink",
    "kerple + dape_v2",
    "kerple + dape_v1",
    "t5 + dape_v2 + stable_mask",
    "rope + stable_mask",
    "alibi + differential",
    "kerple + differential_v2(share_bias=true)",
    "fire + differential_v2",
]
SHAPES = {
    "one token": Shape(1, head_width=16),
    "thirteen": Shape(13, batch=2, heads=4, head_width=16),
    "a block and one": Shape(129, heads=4, groups=2, head_width=64),
    "grouped by three": Shape(200, heads=6, groups=2, head_width=32),
    "a narrow head": Shape(150, heads=2, head_width=48),
    "many blocks": Shape(515, heads=2, head_width=64),
    "a window": Shape(300, window=140, batch=2, head_width=32),
    "packed": Shape(300, documents="packed", batch=2, head_width=32),
    "interleaved in a window": Shape(200, documents="interleaved", window=90, batch=2, head_width=32),
    "decode": Shape(257, queries=1, batch=3, heads=4, groups=2, head_width=64),
    "prefill chunk": Shape(300, queries=140, head_width=32),
    "both ways": Shape(150, ahead=True, batch=2, head_width=32),
}
DRAWS = 3


def on_gpu(given, dtype):
    return type(given)(*(each.to("cuda", dtype) for each in (given.queries, given.keys, given.values, given.x)))


def test_every_kernel_is_asked_or_told():
    assert {*preference(build_scheme("kerple", heads=2), Call(device="cuda"))} == {*plugins.names("kernels")}


def compare(expression, dtype, cases):
    """Outputs and all gradients, in the mean over some draws of every shape and sight, against float64."""
    found, definition, true = defaultdict(list), defaultdict(list), defaultdict(list)
    for (shape, sight), seed in itertools.product(cases, range(DRAWS)):
        scheme = scheme_of(expression, shape).cuda()
        if scheme.refusal(sight):
            continue
        drawn = tensors(scheme, shape.tokens, shape.batch, shape.queries, seed, dtype)
        given = on_gpu(drawn, dtype)
        exact = results(reference.attend, on_gpu(drawn, torch.float64), sight, copy.deepcopy(scheme).double())
        defined = results(reference.attend, given, sight, scheme)
        for name, kernel in KERNELS.items():
            if kernel.refusal(scheme, call_of(given, sight, scheme)) is None:
                for what, value in results(kernel.attend, given, sight, scheme).items():
                    if not without_effect(what, scheme):
                        found[name, what].append(value)
                        definition[name, what].append(defined[what])
                        true[name, what].append(exact[what])
    assert {"chunked"} <= {name for name, _ in found}
    for name, what in found:
        assert_as_good(found[name, what], definition[name, what], true[name, what], dtype, f"{what} of {name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("expression", SCHEMES)
def test_every_kernel_is_as_exact_as_the_definition(expression, dtype):
    compare(expression, dtype, [(shape, shape.sight("cuda")) for shape in SHAPES.values()])


@pytest.mark.parametrize("expression", ["alibi", "t5", "kerple + learned_sink", "fire"])
def test_any_whole_positions_are_as_exact(expression):
    """Far apart, and in disorder with repetitions."""
    place, shape = torch.arange(200, device="cuda")[None], Shape(200, head_width=32)
    sights = [Sight.causal(200, positions=positions) for positions in (place * 5, place * 37 % 101)]
    compare(expression, torch.float32, [(shape, sight) for sight in sights])


@pytest.mark.parametrize("name", ORDERED)
@pytest.mark.parametrize("expression", ["kerple", "t5 + stable_mask", "kerple + dape_v2", "dape_v1"])
def test_the_same_call_gives_the_same_bits(expression, name):
    shape = Shape(777, heads=4, groups=4, head_width=64, batch=2)
    scheme, sight = scheme_of(expression, shape).cuda(), shape.sight("cuda")
    given = on_gpu(tensors(scheme, 777, 2, dtype=torch.bfloat16), torch.bfloat16)
    if (reason := KERNELS[name].refusal(scheme, call_of(given, sight, scheme))) is not None:
        pytest.skip(f"{name}: {reason}")
    first = results(KERNELS[name].attend, given, sight, scheme)
    for _ in range(3):
        for what, value in results(KERNELS[name].attend, given, sight, scheme).items():
            assert torch.equal(value, first[what]), f"{what} of {name}"


def peak(kernel, expression, tokens):
    """Bytes that forward and backward add at their peak to what is there before."""
    scheme = build_scheme(expression, heads=4, head_width=64).cuda()
    sight = Sight.causal(tokens, device="cuda")
    given = leaves(on_gpu(tensors(scheme, tokens, 1, dtype=torch.bfloat16), torch.bfloat16))
    for _ in range(2):  # what is loaded once is not counted
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(
            kernel.attend(*given, sight, scheme).sum(), [*given, *scheme.parameters()], allow_unused=True
        )
        torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize(
    "expression", ["nope", "alibi", "stable_mask", "kerple", "t5 + learned_sink", "kerple + dape_v2"]
)
@pytest.mark.parametrize("name", [name for name in KERNELS if name not in ("square", "row", "slots")])
def test_memory_goes_with_the_length(expression, name):
    """Four times the length takes at most five times the memory, and a little; the square would take sixteen."""
    scheme = build_scheme(expression, heads=4, head_width=64)
    call = Call(device="cuda", dtype=torch.bfloat16, queries=16384, keys=16384)
    if (reason := KERNELS[name].refusal(scheme, call)) is not None:
        pytest.skip(f"{name}: {reason}")
    short, long = (peak(KERNELS[name], expression, tokens) for tokens in (4096, 16384))
    assert long <= 5 * short + (1 << 24), f"{name}: {short:,} bytes, then {long:,}"


def test_the_watch_of_memory_sees_the_square():
    definition = plugins.find("kernels", "reference")()
    assert peak(definition, "kerple", 4096) > 10 * peak(definition, "kerple", 1024)


def test_other_lengths_and_methods_are_not_compiled_anew():
    flex = plugins.find("kernels", "flex")()
    torch.compiler.reset()

    def attend(expression, tokens):
        scheme = build_scheme(expression, heads=4, head_width=64).cuda()
        given = leaves(on_gpu(tensors(scheme, tokens, 2, dtype=torch.bfloat16), torch.bfloat16))
        flex.attend(*given, Sight.causal(tokens, device="cuda"), scheme).sum().backward()

    for tokens in (384, 640):
        attend("kerple", tokens)
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for expression, tokens in itertools.product(("kerple", "t5", "alibi(learned=true)"), (300, 512, 777, 1024)):
        attend(expression, tokens)
    assert compiled > 0 and torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled


def model_of(expression, **settings):
    torch.manual_seed(3)
    sizes = {"vocabulary": 31, "width": 128, "layers": 2, "heads": 4, "groups": 2, "context": 128}
    return lookfar.Decoder(lookfar.ModelConfig(**sizes, scheme=expression, device="cuda", **settings)).cuda()


TRAINED = [
    "rope",
    "alibi",
    "kerple",
    "t5 + stable_mask",
    "differential_v2 + kerple",
    "fire",
    "cope",
    "kerple + dape_v2",
]


@pytest.mark.parametrize("expression", TRAINED)
def test_a_model_learns_to_repeat(expression):
    """The second half of a text is the first: what is left of its loss after some updates is little."""
    model, generator = model_of(expression), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    words = torch.randint(31, (4, 32), generator=generator)
    tokens, losses = torch.cat([words, words], dim=1).cuda(), []
    for _ in range(60):
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 2.5 and losses[-1] < 0.5, losses[::10]
    assert all(each.isfinite().all() for each in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("expression", TRAINED)
def test_decoding_through_the_cache_is_the_full_pass(expression):
    model = model_of(expression).eval()
    tokens = torch.randint(31, (2, 100), generator=torch.Generator().manual_seed(1)).cuda()
    room, pieces = model.cache(batch=2, length=100), []
    for piece in tokens.split([64, 7, *[1] * 29], dim=1):
        pieces.append(model(piece, cache=room))
    whole, exact = model(tokens), copy.deepcopy(model).double()(tokens)
    assert_as_good([torch.cat(pieces, dim=1)], [whole], [exact], torch.float32, expression)
    assert_near(model_of(expression, dtype="float64").eval()(tokens), exact, "the model in float64")


@pytest.mark.parametrize("expression", ["rope", "kerple", "stable_mask + alibi"])
def test_a_gpu_writes_what_a_processor_writes(expression):
    model = model_of(expression).double().eval()
    prompt, greedy = [[3, 1, 4, 1, 5, 9, 2, 6]], Sampling(temperature=0.0)
    written = generate(model, prompt, tokens=40, sampling=greedy)
    assert written == generate(model.cpu(), prompt, tokens=40, sampling=greedy)
