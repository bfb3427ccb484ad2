"""The traps that other libraries fell into, each as a test that would fail if this one did."""

import copy
import itertools
import math
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import lookfar
from lookfar import plugins
from lookfar.attention import reference
from lookfar.attention.scheme import Scheme, build_scheme
from lookfar.batch import consecutive
from lookfar.errors import UserError
from lookfar.kernels.base import Call
from lookfar.kernels.chunked import Chunked
from lookfar.methods.alibi import Alibi
from lookfar.methods.base import DistanceBias, QueryKeyEncoding, ScoreBias, ScoreMap, Sink, Site, slopes
from lookfar.sight import Sight
from test_laws import METHODS, SETTINGS, one_thread, randomised, tensors  # noqa: F401  # the fixture works by its name
from tolerance import assert_near

KERNELS = {name: plugins.find("kernels", name)() for name in plugins.names("kernels")}
T = 13
COMBINED = [each for each in SETTINGS if "repair=paper" not in each and "+" in each]
every_method = pytest.mark.parametrize("expression", ["nope", *METHODS, *COMBINED])


def decoder(expression, kernel=None, **settings):
    """A small model in double, with noise on its weights; `kernel` None lets each call choose."""
    torch.manual_seed(3)
    settings = {"context": 16, "positions": 64, "dtype": "float64", "groups": 2, "layers": 2, **settings}
    config = lookfar.ModelConfig(
        vocabulary=17, width=24, heads=6, hidden=16, scheme=expression, device="cpu", **settings
    )
    model = randomised(lookfar.Decoder(config)).eval()
    for block in model.blocks:
        block.attention.kernel = kernel
    return model


def willing(scheme, sight, queries, keys, values):
    """The kernels that take a call."""
    call = Call.of(queries, keys, values, sight, scheme)
    return {name: kernel for name, kernel in KERNELS.items() if kernel.refusal(scheme, call) is None}


def words(tokens=T, batch=2, seed=7):
    return torch.randint(17, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def decoded(model, tokens, start, documents=None):
    """Logits of a first piece, then of one token after another, through the cache."""
    cache, pieces = model.cache(batch=len(tokens), length=1), []
    for stop in range(start, tokens.shape[1] + 1):
        new = slice(cache.length, stop)
        pieces.append(model(tokens[:, new], documents=None if documents is None else documents[:, new], cache=cache))
    return torch.cat(pieces, dim=1)


# Length


@every_method
@torch.no_grad()
def test_a_text_beyond_the_context_needs_no_larger_table(expression):
    """Elsewhere a bias is laid out for the configured length, and one token more is an error of sizes."""
    model, tokens = decoder(expression, context=8), words(33)
    whole = model(tokens)
    assert whole.isfinite().all()
    for length in (8, 9, 17):
        assert_near(model(tokens[:, :length]), whole[:, :length], f"the first {length}")
    assert_near(decoded(model, tokens, 7), whole, "decoded")


@pytest.mark.parametrize(
    "expression",
    [
        *(f"rope(scaling={scaling}, factor=4, original=8)" for scaling in ("pi", "ntk", "yarn", "llama3")),
        "alibi(factor=4)",
        "alibi(factor=4, learned=true)",
        "stable_mask(columns=8)",
        "log_n(clip=true)",
        "fire(threshold=8) + log_n(learned=true)",
    ],
)
@torch.no_grad()
def test_what_stretches_a_model_does_not_look_at_the_current_length(expression):
    """Elsewhere dynamic scaling turns new keys by other angles than those in the cache (transformers #25104)."""
    model, tokens = decoder(expression, context=8), words(29)
    whole = model(tokens)
    for length in (7, 8, 9, 28):
        assert_near(model(tokens[:, :length]), whole[:, :length], f"the first {length}")
    assert_near(decoded(model, tokens, 3), whole, "decoded across the trained length")


@torch.no_grad()
def test_a_table_that_ends_says_so_while_decoding():
    """Elsewhere a position beyond the table is an error of indices, or silently the last row."""
    model, tokens = decoder("learned", context=8, positions=8), words(9)
    with pytest.raises(UserError, match="9 tokens are more than the 8 positions of the learned table"):
        decoded(model, tokens, 5)


# Rounding


def far(tokens=4100, queries=5, told=False):
    """The last queries of a long text; positions counted or told."""
    return Sight.causal(tokens, queries=queries, positions=torch.arange(tokens)[None] if told else None)


BIASES = [name for name in METHODS if issubclass(plugins.find("methods", name), ScoreBias)]


@pytest.mark.parametrize("told", [False, True], ids=["counted", "told"])
@pytest.mark.parametrize("name", [*BIASES, "kerple(kernel=power)", "alibi(learned=true)", "alibi(form=offset)"])
def test_distances_are_exact_in_a_model_of_half_precision(name, told):
    """Elsewhere distances are cast to the type of the scores: bfloat16 knows 769 whole numbers below 4,096."""
    torch.manual_seed(0)
    exact = build_scheme(name, heads=4, head_width=8)
    sight, cast = far(told=told), copy.deepcopy(exact).to(torch.bfloat16)
    expected = exact.bias(sight)
    assert torch.equal(cast.bias(sight), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cast.bias(sight), expected), "nor does autocast reach it"
    if not name.startswith("t5"):
        near = expected[0, :, -1].diff(dim=-1).abs()
        assert (near[0] > 0).all(), "neighbours differ at every distance"


@pytest.mark.parametrize("name", METHODS)
def test_half_precision_is_as_near_far_from_the_start_as_at_it(name):
    """Elsewhere positions are rounded to the type of the queries: at 4,096 a step of bfloat16 is 32 tokens."""
    torch.manual_seed(0)
    scheme = randomised(build_scheme(name, heads=4, head_width=8, context=4200))
    true = copy.deepcopy(scheme).double()
    for first in (0, 4090):
        sight = Sight.causal(T, positions=torch.arange(first, first + T)[None])
        given = tensors(scheme, T, batch=1, dtype=torch.bfloat16)
        found, expected = (
            reference.attend(
                each.queries(given.queries.to(dtype), sight.query_positions),
                each.keys(given.keys.to(dtype), sight.key_positions),
                given.values.to(dtype),
                sight,
                each,
            )
            for each, dtype in ((scheme, torch.bfloat16), (true, torch.float64))
        )
        assert_near(found, expected.to(torch.bfloat16), f"from {first}")
        for encoding, exact in zip(scheme.inputs, true.inputs, strict=True):
            zero = torch.zeros(1, T, 32)
            rounded = encoding.encode(zero.bfloat16(), sight.query_positions)
            assert_near(rounded, exact.encode(zero.double(), sight.query_positions).bfloat16(), f"from {first}")


# The cache and what is hidden in it

padded = pytest.mark.parametrize("documents", [None, "..aaaaaaaaaaa", "aaaaabbb.bbbb"], ids=["plain", "left", "packed"])


def numbers(word, batch):
    return None if word is None else torch.tensor([[".ab".index(letter) - 1 for letter in word]] * batch)


@every_method
@padded
@torch.no_grad()
def test_a_single_text_keeps_its_padding_on_every_kernel_at_every_step(expression, documents):
    """Elsewhere the mask is dropped for a batch of one (transformers #46773), or after the first step of decoding."""
    tokens, documents = words(batch=1), numbers(documents, 1)
    expected = decoder(expression, "reference")(tokens, documents=documents)
    if documents is not None and (documents[0, :2] < 0).all():
        alone = decoder(expression, "reference")(tokens[:, 2:])
        assert_near(expected[:, 2:], alone, "padding changes nothing")
    asked = 0
    for kernel in (None, *KERNELS):
        model = decoder(expression, kernel)
        try:
            whole = model(tokens, documents=documents)
            steps = decoded(model, tokens, 4, documents)
        except UserError as error:
            assert kernel not in (None, "chunked", "reference")
            assert f"The kernel {kernel} does not take this call" in str(error)
            continue
        asked += 1
        assert_near(whole, expected, f"kernel {kernel}")
        assert_near(steps, expected, f"kernel {kernel}, step by step")
    assert asked >= 3


@contextmanager
def uninitialised_memory_is_nan():
    """torch fills what it allocates with NaN, where otherwise old numbers would look like good ones."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@every_method
@torch.no_grad()
def test_room_in_a_cache_that_is_not_written_yet_is_not_read(expression):
    """Elsewhere attention runs over a whole static buffer, which is off by 101 % (gpt-fast #233)."""
    model, tokens = decoder(expression), words()
    whole = model(tokens)
    with uninitialised_memory_is_nan():
        assert torch.empty(3).isnan().all()
        for length in (5, 64):
            cache = model.cache(batch=2, length=length)
            pieces = [model(tokens[:, start : start + 1], cache=cache) for start in range(T)]
            assert_near(torch.cat(pieces, dim=1), whole, f"room for {length}")


@every_method
def test_no_kernel_reads_memory_that_it_did_not_write(expression):
    """Elsewhere a buffer is taken for zeros, and is zeros until the memory is used again."""
    torch.manual_seed(4)
    scheme = randomised(build_scheme(expression, heads=6, groups=2, head_width=8, context=32).double())
    sights = Sight.causal(T), Sight.causal(T, queries=1), Sight.causal(T, window=3)
    for sight in sights:
        given = tensors(scheme, T, queries=sight.queries)
        leaves = [each.clone().requires_grad_() for each in (given.queries, given.keys, given.values)]
        for kernel in (*willing(scheme, sight, *leaves).values(), Chunked(entries=1, whole=0)):
            with uninitialised_memory_is_nan():
                outputs = kernel.attend(*leaves, sight, scheme)
                gradients = torch.autograd.grad(outputs.sum(), leaves)
            assert all(each.isfinite().all() for each in (outputs, *gradients))


@torch.no_grad()
def test_the_number_of_a_token_counts_the_tokens_of_its_text_alone():
    """Elsewhere a left-padded text is numbered by its place in the cache (unsloth #3795)."""
    model, cache = decoder("sinusoidal + stable_mask"), decoder("nope").cache(batch=2)
    documents = torch.tensor([[-1, -1, 0, 0], [0, 0, 0, 0]])
    model(words(4), documents=documents, cache=cache)
    for step in range(2):
        model(words(1, seed=step), documents=torch.zeros(2, 1, dtype=torch.long), cache=cache)
    assert cache.positions.tolist() == [[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]


# Batches


@every_method
@torch.no_grad()
def test_a_text_is_read_alike_whatever_lies_beside_it(expression):
    """Elsewhere a mask is repeated to a fixed number of rows, or one row's padding is used for all (fairseq)."""
    model, tokens = decoder(expression, window=(None, 5)), words(batch=3)
    documents = torch.tensor([[-1] * 4 + [0] * 9, [0] * 7 + [1] * 6, [0] * 13])
    together = model(tokens, documents=documents)
    for row in range(3):
        alone = model(tokens[row : row + 1], documents=documents[row : row + 1])
        assert_near(together[row : row + 1], alone, f"row {row}")
    turned = [2, 0, 1]
    assert_near(model(tokens[turned], documents=documents[turned]), together[turned])


@every_method
def test_a_line_of_nothing_but_padding_harms_no_other(expression):
    """Elsewhere a row that sees nothing is 0/0, and its NaN reaches every weight (pytorch #103749)."""
    model, tokens = decoder(expression), words()
    documents = torch.tensor([[0] * T, [-1] * T])
    outputs = model(tokens, documents=documents)
    assert outputs.isfinite().all()
    outputs[0].square().sum().backward()
    found = {name: each.grad.clone() for name, each in model.named_parameters()}
    model.zero_grad()
    model(tokens[:1]).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert_near(found[name], parameter.grad, name)


@every_method
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_padding_adds_nothing_to_any_gradient(expression, left):
    """Elsewhere padding is hidden from the outputs and still learned from, or counted as tokens that are ahead."""
    model, tokens, pads = decoder(expression), words(batch=1), 3
    model(tokens).square().sum().backward()
    expected = {name: each.grad.clone() for name, each in model.named_parameters()}
    model.zero_grad()
    junk = words(pads, 1, seed=8)
    documents = torch.tensor([[-1] * pads + [0] * T if left else [0] * T + [-1] * pads])
    outputs = model(torch.cat([junk, tokens] if left else [tokens, junk], dim=1), documents=documents)
    (outputs[:, pads:] if left else outputs[:, :T]).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert_near(parameter.grad, expected[name], name)


# Heads


@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (6, 3), (5, 1), (12, 4)])
def test_each_query_head_has_its_slope_and_the_key_head_of_its_group(heads, groups):
    """Elsewhere slopes go by key head, or query head h reads key head h mod groups (x-transformers)."""
    scheme = build_scheme("alibi", heads=heads, groups=groups, head_width=4).double()
    given = tensors(scheme, 5, batch=1)
    some = willing(scheme, Sight.causal(5), given.queries, given.keys, given.values)
    assert len(some) >= 4
    for name, kernel in some.items():
        outputs = kernel.attend(given.queries, given.keys, given.values, Sight.causal(5), scheme)
        for head, row in itertools.product(range(heads), range(5)):
            group = head // (heads // groups)
            scores = given.keys[0, group, : row + 1] @ given.queries[0, head, row] / 2
            scores = scores - slopes(heads)[head].double() * (row - torch.arange(row + 1))
            expected = scores.softmax(-1) @ given.values[0, group, : row + 1]
            assert_near(outputs[0, head, row], expected, f"{name}, head {head}, row {row}")


@pytest.mark.parametrize("head_width", [1, 3, 5, 20])
@pytest.mark.parametrize("expression", ["nope", "alibi", "kerple", "stable_mask", "alibi + learned_sink", "cope"])
def test_heads_of_any_width_and_any_number_to_a_group_are_the_definition(expression, head_width):
    """Elsewhere fused kernels want a width of 16 and a power of two of heads to a group, or fall back unsaid."""
    torch.manual_seed(4)
    scheme = randomised(build_scheme(expression, heads=5, groups=1, head_width=head_width).double())
    assert_kernels_agree(scheme, Sight.causal(T), Sight.causal(T, queries=1), Sight.causal(T, queries=4, window=3))


def assert_kernels_agree(scheme, *sights):
    for sight in sights:
        given = tensors(scheme, sight.keys, queries=sight.queries)
        leaves = [each.clone().requires_grad_() for each in (given.queries, given.keys, given.values)]
        expected = reference.attend(*leaves, sight, scheme)
        towards = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=expected.dtype)
        gradients = torch.autograd.grad(expected, leaves, towards)
        for name, kernel in willing(scheme, sight, *leaves).items():
            outputs = kernel.attend(*leaves, sight, scheme)
            found = torch.autograd.grad(outputs, leaves, towards)
            for one, other in zip((outputs, *found), (expected, *gradients), strict=True):
                assert_near(one, other, name)


# What a kernel does not know


class Step(DistanceBias):
    """A bias of the user's own."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.drop = nn.Parameter(torch.linspace(0.5, 2.0, site.heads.score_heads))

    def at(self, distances):
        return -self.drop[:, None] * (distances.abs() >= 2)


class Turn(QueryKeyEncoding):
    """An encoding of the user's own."""

    def queries(self, queries, positions):
        return queries * (1 + positions[:, None, :, None])

    def keys(self, keys, positions):
        return keys * (1 + positions[:, None, :, None]).cos()


class Square(ScoreMap):
    """A map of the user's own."""

    def rewrite(self, scores, rows):
        return scores - 0.1 * scores.square()


class Floor(Sink):
    """A sink of the user's own."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.level = nn.Parameter(torch.tensor(0.3))

    def score(self, query_positions):
        return (self.level + query_positions[:, None, :] * 0.1).expand(-1, 2, -1)


class Bent(Alibi):
    """ALiBi that the user bent: it falls with the square root of the distance."""

    def at(self, distances):
        return -self.slopes[0][:, None] * distances.abs().double().sqrt()


def foreign(*kinds):
    heads = build_scheme("nope", heads=2, head_width=8).heads
    return Scheme("own", heads, [kind(Site(heads, 16)) for kind in kinds]).double()


OWN = [(Step,), (Turn,), (Square,), (Floor,), (Step, Turn, Square, Floor)]
own = pytest.mark.parametrize("kinds", OWN, ids=lambda kinds: "+".join(each.__name__ for each in kinds))


@own
def test_no_kernel_drops_a_method_that_it_does_not_know(kinds):
    """Elsewhere the fused path never receives the bias, and trains without positions (gpt-neox)."""
    scheme = foreign(*kinds)
    sights = Sight.causal(T), Sight.causal(T, queries=1), Sight.bidirectional(T)
    assert_kernels_agree(scheme, *sights)
    given = tensors(scheme, T)
    plain, mine = (lookfar.attend(given.queries, given.keys, given.values, scheme=each) for each in (foreign(), scheme))
    assert (plain - mine).abs().max() > 1e-3


def test_no_kernel_takes_an_heir_of_alibi_for_alibi():
    """Elsewhere the fused path computes its own formula and ignores the bias that it was given."""
    assert_kernels_agree(foreign(Bent), Sight.causal(T))


# Learned biases


@pytest.mark.parametrize(("shared", "own"), [("t5", "t5(shared=false)")])
def test_a_table_that_several_layers_use_learns_from_all_of_them(shared, own):
    """Elsewhere one learned tensor may be read at one place only, and has to be copied (FlexAttention)."""
    one, two = decoder(shared), decoder(own)
    tables = [block.attention.scheme.biases[0].table for block in two.blocks]
    with torch.no_grad():
        fresh = dict(two.named_parameters())
        for name, parameter in one.named_parameters():
            fresh[name].copy_(parameter)
        tables[1].copy_(tables[0])
    for model in (one, two):
        model(words()).square().sum().backward()
    together = one.blocks[0].attention.scheme.biases[0].table
    assert together is one.blocks[1].attention.scheme.biases[0].table
    assert_near(together.grad, tables[0].grad + tables[1].grad)
    assert tables[0].grad.abs().max() > 1e-6 and tables[1].grad.abs().max() > 1e-6


@pytest.mark.parametrize(
    "expression", ["kerple + kerple", "alibi(learned=true) + alibi", "learned_sink + learned_sink"]
)
def test_a_bias_that_is_named_twice_is_added_and_learned_twice(expression):
    """Elsewhere the second use of a captured tensor is an error, or its gradient is lost."""
    torch.manual_seed(4)
    scheme, sight = build_scheme(expression, heads=4, head_width=8).double(), Sight.causal(T)
    given = tensors(scheme, T)
    some = willing(scheme, sight, given.queries, given.keys, given.values)
    assert len(some) >= 3
    for kernel in some.values():
        scheme.zero_grad()
        kernel.attend(given.queries, given.keys, given.values, sight, scheme).square().sum().backward()
        for name, parameter in scheme.named_parameters():
            assert parameter.grad.abs().max() > 1e-6, name


# Alignment


@pytest.mark.parametrize("queries", [1, 2, 5, T])
def test_fewer_queries_than_keys_are_the_last_rows_of_plain_attention(queries):
    """Elsewhere `is_causal` aligns few queries with the first keys, so that one query sees one key (gpt-neox #1178)."""
    scheme, sight = build_scheme("nope", heads=2, head_width=8).double(), Sight.causal(T, queries=queries)
    given = tensors(scheme, T, queries=queries)
    scores = given.queries @ given.keys.mT / math.sqrt(8)
    row, key = torch.arange(T - queries, T)[:, None], torch.arange(T)
    expected = scores.masked_fill(key > row, -torch.inf).softmax(-1) @ given.values
    some = willing(scheme, sight, given.queries, given.keys, given.values)
    assert len(some) >= 4
    for name, kernel in some.items():
        assert_near(kernel.attend(given.queries, given.keys, given.values, sight, scheme), expected, name)


def test_positions_that_repeat_or_run_backwards_hide_nothing():
    """Elsewhere who sees whom is read off the position numbers, which parallel slots share."""
    tokens = words()
    model, whole = decoder("nope"), decoder("nope")(words())
    for positions in ([0] * T, [*range(T)][::-1], [3, 1] * 6 + [9]):
        assert_near(model(tokens, positions=torch.tensor([positions])), whole)
    documents = torch.tensor([[0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 0, 0, -1]] * 2)
    counted, given = consecutive(documents), torch.randint(0, 5, (2, T), generator=torch.Generator().manual_seed(2))
    expected = model(tokens, documents=documents, positions=counted)
    assert_near(model(tokens, documents=documents, positions=given), expected)


@pytest.mark.parametrize("expression", ["nope", "kerple", "cope", "dape_v2"])
def test_a_batch_of_nothing_gives_nothing(expression):
    scheme = build_scheme(expression, heads=2, head_width=8)
    given = [torch.zeros(0, 2, 40, 8, requires_grad=True) for _ in range(3)]
    sight, taken = Sight.causal(40), 0
    for kernel in (*willing(scheme, sight, *given).values(), Chunked(entries=1, whole=0)):
        output = kernel.attend(*given, sight, scheme)
        assert output.shape == (0, 2, 40, 8)
        taken += all(each.shape == given[0].shape for each in torch.autograd.grad(output.sum(), given))
    assert taken >= 2
