"""Attention both ways, ALiBi's forms of it, and the ways to number tokens, each against a second, plainer account."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

import lookfar
from lookfar import batch, kernels, plugins
from lookfar.attention import reference
from lookfar.attention.scheme import build_scheme
from lookfar.config import build as build_run
from lookfar.errors import UserError
from lookfar.kernels.base import Call
from lookfar.methods.base import ScoreMap, slopes
from lookfar.model import numbering
from lookfar.sight import Sight
from lookfar.training.check import check
from test_laws import METHODS, SETTINGS, layer, one_thread, randomised, tensors  # noqa: F401  # the fixture works by its name
from test_sight import sees
from tolerance import assert_near

T, HEADS = 13, 4
KERNELS = {name: plugins.find("kernels", name)() for name in plugins.names("kernels")}
EVERY = ["nope", *METHODS, *SETTINGS]
every_method = pytest.mark.parametrize("expression", EVERY)

WORDS = {  # a letter for each token of a line, '.' for padding; the window
    "plain": (None, None),
    "window": (None, 4),
    "packed": (("aaaaabbbbbbcc", "abbbbbbbbbbbb"), None),
    "padded": (("...aaaaaaaaaa", "aaaaaaaaaaa.."), None),
    "interleaved in a window": (("ab.aabcacbbaa", "..aabbaabbaab"), 5),
}
every_view = pytest.mark.parametrize("view", WORDS)


def numbers(view):
    lines, _ = WORDS[view]
    return None if lines is None else torch.tensor([[".abc".index(letter) - 1 for letter in line] for line in lines])


def sight_of(view, positions=None):
    documents, (_, window) = numbers(view), WORDS[view]
    if documents is not None and positions is None:
        positions = batch.consecutive(documents)
    return Sight.bidirectional(T, positions=positions, documents=documents, window=window)


def seen(view, line, row):
    """The keys that a row sees, in their order."""
    documents, (_, window) = numbers(view), WORDS[view]
    own = None if documents is None else documents[line].tolist()
    return [key for key in range(T) if sees(own, window, row, key, ahead=True)]


def refused(under, sight):
    """Whether a method refuses the sight, which only a setting may, and then with its reason."""
    reason = under.scheme.refusal(sight)
    if reason is None:
        return False
    assert "repair=paper" in under.scheme.expression and "repair=hidden takes any" in reason
    with pytest.raises(UserError) as told:
        under.gives(tensors(under.scheme, T), sight)
    assert str(told.value) == reason
    return True


# Attention and ALiBi, by double loops


def loop(given, view, bias):
    """Each row alone: scores of the keys that it sees, a bias for each pair, a softmax, a mean of values."""
    outputs = torch.zeros_like(given.queries)
    for line, head, row in itertools.product(range(2), range(HEADS), range(T)):
        keys = seen(view, line, row)
        scores = given.keys[line, head, keys] @ given.queries[line, head, row] / math.sqrt(8)
        scores = scores + torch.tensor([bias(line, head, row, key) for key in keys], dtype=torch.float64)
        outputs[line, head, row] = scores.softmax(-1) @ given.values[line, head, keys]
    return outputs


@every_view
def test_plain_attention_both_ways_is_a_double_loop(view):
    under = layer("nope", HEADS, HEADS)
    given = tensors(under.scheme, T)
    assert_near(under.gives(given, sight_of(view)), loop(given, view, lambda *pair: 0.0))


def published(form, distance, head, slope, few):
    """The bias of ALiBi at query - key, in words; `few` are the slopes of half as many heads."""
    if form == "symmetric":
        return -slope[head] * abs(distance)
    if form == "offset":  # to the right 0, -½, -1½, …; to the left -1, -2, …
        return -slope[head] * (distance if distance >= 0 else -distance - 0.5)
    if form == "separate":  # to the right a slope of its own, half a step on in the series
        return -slope[head] * (distance if distance >= 0 else -distance * 2 ** (-4 / HEADS))
    left = head < HEADS // 2  # split: the first half looks left, the other right, and each at itself
    hidden = distance < 0 if left else distance > 0
    return -math.inf if hidden else -few[head % (HEADS // 2)] * abs(distance)


FORMS = ["symmetric", "offset", "separate", "split"]
every_form = pytest.mark.parametrize("form", FORMS)
NUMBERED = torch.tensor([[3, 3, 9, 1, 0, 14, 14, 2, 7, 5, 6, 21, 4], [*range(T)]])


PLACES = {"counted": None, "whole": NUMBERED, "fractional": NUMBERED / 4}
PAIRS = [pair for pair in itertools.product(FORMS, PLACES) if pair != ("offset", "fractional")]  # see below


@pytest.mark.parametrize(("form", "places"), PAIRS)
@every_view
def test_alibi_both_ways_is_the_published_formula(form, view, places):
    positions = PLACES[places]
    under, sight = layer(f"alibi(form={form})", HEADS, HEADS), sight_of(view, positions)
    given = tensors(under.scheme, T)
    places = sight.query_positions.expand(2, -1).double()
    slope, few = slopes(HEADS).double().tolist(), slopes(HEADS // 2).double().tolist()

    def bias(line, head, row, key):
        return published(form, (places[line, row] - places[line, key]).item(), head, slope, few)

    assert_near(under.gives(given, sight), loop(given, view, bias))


def test_alibi_falls_with_every_step_ahead_though_steps_be_small():
    bias = build_scheme("alibi(form=offset)", heads=HEADS).biases[0].at(-torch.arange(1, 20) / 8)
    assert (bias.diff(dim=1) <= 0).all()


@every_form
@every_view
def test_learned_slopes_take_the_place_of_the_published_ones(form, view):
    under, sight = layer(f"alibi(form={form}, learned=true, factor=3)", HEADS, HEADS), sight_of(view)
    given, own = tensors(under.scheme, T), under.scheme.biases[0]
    learned = (own.start.detach().exp() / 3).tolist()
    places = sight.query_positions.expand(2, -1)

    def bias(line, head, row, key):
        distance = (places[line, row] - places[line, key]).item()
        if form == "separate":
            return -learned[0 if distance >= 0 else 1][head] * abs(distance)
        few = learned[0][: HEADS // 2] if head < HEADS // 2 else learned[0][HEADS // 2 :]
        return published(form, distance, head, learned[0], few)

    assert (own.start - own.start.roll(1)).abs().min() > 1e-4, "every slope is a number of its own"
    assert_near(under.gives(given, sight).detach(), loop(given, view, bias))


# Learned slopes


@every_form
@pytest.mark.parametrize("view", ["plain", "interleaved in a window"])
def test_gradients_of_learned_slopes_are_those_of_finite_differences(form, view):
    under, sight = layer(f"alibi(form={form}, learned=true)", HEADS, HEADS), sight_of(view)
    given, own = tensors(under.scheme, T), under.scheme.biases[0]
    towards = torch.randn(2, HEADS, T, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def total(start):
        swapped = {"scheme.methods.0.start": start}
        asked = given.queries, given.keys, given.values, given.x, sight
        return (torch.func.functional_call(under, swapped, asked) * towards).sum()

    start = own.start.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(total(start), start)
    assert (gradient != 0).all(), "every slope matters"
    step = 1e-6
    for place in itertools.product(*(range(size) for size in start.shape)):
        nudge = torch.zeros_like(start)
        nudge[place] = step
        with torch.no_grad():
            difference = (total(start + nudge) - total(start - nudge)) / (2 * step)
        assert abs(difference - gradient[place]) < 1e-7 * max(1, abs(difference))


def test_slopes_of_what_lies_ahead_learn_only_where_it_is_seen():
    scheme = randomised(build_scheme("alibi(form=separate, learned=true)", heads=2, head_width=8).double())
    given = tensors(scheme, T)
    for sight, ahead in ((Sight.causal(T), False), (Sight.bidirectional(T), True), (sight_of("window"), True)):
        scheme.zero_grad()
        reference.attend(given.queries, given.keys, given.values, sight, scheme).square().sum().backward()
        behind, beyond = scheme.biases[0].start.grad.abs().amax(1)
        assert behind > 1e-6 and (beyond > 1e-6) == ahead


@every_form
@every_view
@pytest.mark.parametrize("learned", ["true", "false"])
def test_every_kernel_that_takes_a_form_computes_it(form, view, learned):
    under, sight = layer(f"alibi(form={form}, learned={learned})"), sight_of(view)
    assert assert_kernels_agree(under.scheme, sight) >= 3


def assert_kernels_agree(scheme, sight):
    """Outputs and gradients of every kernel that takes the sight, and how many these are."""
    given, parameters = tensors(scheme, T), list(scheme.parameters())
    leaves = [each.clone().requires_grad_() for each in (given.queries, given.keys, given.values)]
    expected = reference.attend(*leaves, sight, scheme)
    towards = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=expected.dtype)

    def gradients(outputs):
        found = torch.autograd.grad(outputs, [*leaves, *parameters], towards, allow_unused=True)
        return [
            torch.zeros_like(leaf) if each is None else each
            for leaf, each in zip([*leaves, *parameters], found, strict=True)
        ]

    true, call, asked = gradients(expected), Call.of(*leaves, sight, scheme), 0
    for name, kernel in KERNELS.items():
        reason = kernel.refusal(scheme, call)
        if reason is not None:
            assert len(reason) > 10, "a refusal is told"
            continue
        asked += 1
        outputs = kernel.attend(*leaves, sight, scheme)
        assert_near(outputs, expected, name)
        for one, other in zip(gradients(outputs), true, strict=True):
            assert_near(one, other, name)
    return asked


@pytest.mark.parametrize("other", [name for name in METHODS if issubclass(plugins.find("methods", name), ScoreMap)])
def test_heads_that_hide_by_their_bias_are_refused_beside_every_map(other):
    for learned in ("true", "false"):
        with pytest.raises(UserError, match="hides keys by its bias, which the map that reads the bias cannot know"):
            build_scheme(f"{other} + alibi(form=split, learned={learned})", heads=4)
        assert build_scheme(f"{other} + alibi(form=offset, learned={learned})", heads=4).maps


# The laws, both ways


@every_method
@every_view
@torch.no_grad()
def test_rows_stand_alone_both_ways(expression, view):
    under, sight = layer(expression), sight_of(view)
    given = tensors(under.scheme, T)
    if refused(under, sight):
        return
    together = under.gives(given, sight)
    for size in (1, 5):
        for start in range(0, T, size):
            part = sight.rows(start, min(start + size, T))
            keys = slice(part.first_key, part.first_key + part.keys)
            rows = under.gives(given.at(asked=slice(start, start + size), seen=keys), part)
            assert_near(rows, together[:, :, start : start + size], f"rows from {start}, {size} at a time")


@every_method
@every_view
@torch.no_grad()
def test_hidden_keys_may_as_well_be_absent_both_ways(expression, view):
    under, sight = layer(expression), sight_of(view)
    given = tensors(under.scheme, T)
    if refused(under, sight):
        return
    whole, places = under.gives(given, sight), sight.query_positions.expand(2, -1)
    for line, row in itertools.product(range(2), (0, 3, 6, 12)):
        keys = seen(view, line, row)
        own = keys.index(row)
        alone = Sight.bidirectional(len(keys), positions=places[line : line + 1, keys]).rows(own, own + 1)
        one = given.at(slice(line, line + 1), slice(row, row + 1), keys)
        assert_near(under.gives(one, alone), whole[line : line + 1, :, row : row + 1], f"line {line}, row {row}")


@every_method
@torch.no_grad()
def test_hidden_keys_do_not_matter_both_ways_and_every_visible_one_does(expression):
    under, view = layer(expression), "interleaved in a window"
    given, wild, sight = tensors(under.scheme, T), tensors(under.scheme, T, seed=12), sight_of(view)
    if refused(under, sight):
        return
    whole = under.gives(given, sight)
    for row in range(0, T, 2):
        hidden = torch.ones(2, 1, T, 1, dtype=torch.bool)
        for line in range(2):
            hidden[line, 0, seen(view, line, row)] = False
        keys = torch.where(hidden, 1e4 * wild.keys, given.keys)
        values = torch.where(hidden, 1e4 * wild.values, given.values)
        assert_near(under.gives(replace(given, keys=keys, values=values), sight)[:, :, row], whole[:, :, row])
    for key in range(T):
        values = given.values.clone()
        values[:, :, key] += 1
        changed = (under.gives(replace(given, values=values), sight) - whole).abs().amax((1, 3)) > 1e-9
        for line, row in itertools.product(range(2), range(T)):
            assert changed[line, row] == (key in seen(view, line, row)), f"line {line}, row {row}, key {key}"


@every_method
@torch.no_grad()
def test_the_first_willing_kernel_serves_both_ways(expression):
    under, sight = layer(expression), sight_of("padded")
    given = tensors(under.scheme, T)
    if refused(under, sight):
        return
    expected = reference.attend(given.queries, given.keys, given.values, sight, under.scheme)
    assert_near(kernels.attend(given.queries, given.keys, given.values, sight, under.scheme), expected)


EVEN = ["nope", "alibi", "alibi(learned=true)", "kerple", "kerple(kernel=power)", "fire", "learned_sink", "dape_v1"]
UNEVEN = ["rope", "t5", "alibi(form=offset)", "alibi(form=separate)", "alibi(form=split)", "cope", "transformer_xl"]


@pytest.mark.parametrize("expression", [*EVEN, *UNEVEN, "stable_mask", "log_n"])
@torch.no_grad()
def test_a_text_read_backwards_gives_the_same_where_left_and_right_are_alike(expression):
    under, sight = layer(expression), Sight.bidirectional(T)
    given = tensors(under.scheme, T)
    back = type(given)(given.queries.flip(2), given.keys.flip(2), given.values.flip(2), given.x.flip(1))
    forwards, backwards = under.gives(given, sight), under.gives(back, sight).flip(2)
    if expression in EVEN:
        assert_near(backwards, forwards)
    else:
        assert (backwards - forwards).abs().max() > 1e-4


@torch.no_grad()
def test_a_decoder_may_look_both_ways():
    model = decoder("rope + alibi")
    tokens = words()
    whole = model(tokens, sight=Sight.bidirectional(T))
    for place in range(T):
        changed = tokens.clone()
        changed[:, place] = (tokens[:, place] + 1) % 17
        assert ((model(changed, sight=Sight.bidirectional(T)) - whole).abs().amax((0, 2)) > 1e-9).all()
    assert (whole - model(tokens)).abs().amax((0, 2))[:-1].min() > 1e-6


# Numbering


def test_a_randomized_numbering_is_an_ordered_sample_without_repetition():
    drawn = batch.randomized(500, 5, largest=9, generator=torch.Generator().manual_seed(0))
    assert drawn.shape == (500, 5) and drawn.dtype == torch.int64
    assert (drawn.diff(dim=1) > 0).all() and drawn.min() == 0 and drawn.max() == 8
    counts = drawn.flatten().bincount(minlength=9) / 500
    assert ((counts - 5 / 9).abs() < 4 * math.sqrt(5 / 9 * 4 / 9 / 500)).all(), "every number is as likely"
    assert len({tuple(line) for line in drawn.tolist()}) > 100, "every line has a sample of its own"


def test_a_randomized_numbering_follows_its_generator():
    def draw(seed):
        return batch.randomized(3, 7, largest=40, generator=torch.Generator().manual_seed(seed))

    state = torch.get_rng_state()
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert torch.equal(torch.get_rng_state(), state), "no other generator is touched"
    assert batch.randomized(2, 7, largest=7, generator=torch.Generator()).tolist() == [[*range(7)]] * 2
    with pytest.raises(UserError, match="7 tokens cannot be numbered below 6 without repetition"):
        batch.randomized(2, 7, largest=6, generator=torch.Generator())


@pytest.mark.parametrize(("tokens", "context"), [(1, 8), (8, 8), (7, 8), (9, 8), (26, 13), (1000, 3)])
def test_an_interpolated_numbering_never_reaches_the_context(tokens, context):
    found = batch.interpolated(tokens, context=context)
    assert found.shape == (1, tokens) and found.max() < context
    if tokens <= context:
        assert found.tolist() == [[float(place) for place in range(tokens)]]
    else:
        assert_near(found[0], torch.tensor([place * context / tokens for place in range(tokens)]))


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("randomised(largest=9)", "No way to number tokens is called 'randomised.*Did you mean 'randomized'"),
        ("randomized", r"'randomized' needs largest: write it as randomized\(largest=2048\)"),
        ("randomized(largest=0)", "largest=0"),
        ("randomized(most=9)", "'randomized' has no setting 'most'"),
        ("interpolated(context=9)", "'interpolated' has no setting 'context'"),
        ("consecutive + interpolated", "No way to number tokens"),
        ("alibi", "No way to number tokens is called 'alibi'"),
    ],
)
def test_a_way_to_number_that_is_not_there_is_told(expression, message):
    with pytest.raises(UserError, match=message):
        numbering.find(expression, 8)


def number(expression, context=16, tokens=T, lines=2):
    return numbering.find(expression, context)(lines, tokens, torch.Generator().manual_seed(4))


def test_a_way_to_number_is_found_by_its_name():
    assert number("consecutive") is None
    drawn = batch.randomized(2, T, largest=50, generator=torch.Generator().manual_seed(4))
    assert torch.equal(number("randomized(largest=50)"), drawn)
    assert torch.equal(number("interpolated", 5), batch.interpolated(T, context=5))


def decoder(expression, kernel=None, **settings):
    torch.manual_seed(3)
    settings = {"context": 16, "positions": 64, "dtype": "float64", **settings}
    config = lookfar.ModelConfig(
        vocabulary=17, width=32, heads=HEADS, groups=2, layers=2, hidden=16, scheme=expression, device="cpu", **settings
    )
    model = randomised(lookfar.Decoder(config)).eval()
    for block in model.blocks:
        block.attention.kernel = kernel
    return model


def words(tokens=T):
    return torch.randint(17, (2, tokens), generator=torch.Generator().manual_seed(7))


SILENT = {"nope", "cope", "gate", "learned_sink", "differential", "differential_v2", "dape_v1", "dape_v2"}


@every_method
@pytest.mark.parametrize("way", ["randomized(largest=60)", "interpolated"])
@torch.no_grad()
def test_every_method_reads_every_numbering_or_says_that_it_cannot(expression, way):
    model, tokens, positions = decoder(expression), words(), number(way, context=5)
    names = [term.name for term in plugins.parse(expression)]
    if way == "interpolated" and {"t5", "learned"} & set(names):
        with pytest.raises(UserError, match="needs whole positions; these are fractional"):
            model(tokens, positions=positions)
        return
    whole = model(tokens, positions=positions)
    assert whole.isfinite().all()
    assert_near(decoder(expression, "reference")(tokens, positions=positions), whole, "the definition")
    for line in range(2):
        own = positions.expand(2, -1)[line : line + 1]
        assert_near(model(tokens[line : line + 1], positions=own), whole[line : line + 1], f"line {line} alone")
    cache, pieces = model.cache(batch=2), []
    for start, stop in ((0, 4), (4, 5), (5, 11), (11, 12), (12, 13)):
        pieces.append(model(tokens[:, start:stop], positions=positions[:, start:stop], cache=cache))
    assert_near(torch.cat(pieces, dim=1), whole, "decoded")
    silent = set(names) <= SILENT
    assert ((whole - model(tokens)).abs().max() < 1e-10) == silent, "only what knows no positions ignores them"


@pytest.mark.parametrize("expression", ["rope", "alibi", "kerple", "t5", "transformer_xl"])
@torch.no_grad()
def test_a_relative_method_sees_only_the_gaps_of_a_randomized_numbering(expression):
    model, tokens, positions = decoder(expression), words(), number("randomized(largest=50)")
    assert_near(model(tokens, positions=positions + 9), model(tokens, positions=positions))


@pytest.mark.parametrize(("tokens", "context"), [(T, 5), (26, 13), (T, 64)])
def test_interpolated_numbers_are_the_static_interpolation_of_each_method(tokens, context):
    """ALiBi's slopes, and the frequencies of RoPE, divided by how much longer the text is."""
    sight = Sight.causal(tokens, positions=batch.interpolated(tokens, context=context))
    factor = max(1.0, tokens / context)
    for form in FORMS:
        numbered, stretched = (
            build_scheme(f"alibi(form={form}{more})", heads=4) for more in ("", f", factor={factor}")
        )
        if form != "offset":  # whose half a token is not stretched
            found, expected = numbered.bias(sight), stretched.bias(Sight.causal(tokens))
            assert torch.equal(found.isfinite(), expected.isfinite())
            assert_near(found.nan_to_num(neginf=0), expected.nan_to_num(neginf=0), form)
    numbered, stretched = (
        build_scheme(f"rope({more})", heads=4, head_width=8) for more in ("", f"scaling=pi, factor={factor}")
    )
    given = tensors(numbered, tokens, dtype=torch.float32).queries
    assert_near(
        numbered.queries(given, sight.query_positions), stretched.queries(given, Sight.causal(tokens).query_positions)
    )


def content(**overrides):
    keys = {
        "model": {"width": 16, "layers": 1, "heads": 2, "context": 8, "scheme": "alibi", "device": "cpu"},
        "data": {"source": "python_library"},
        "training": {"updates": 1, "batch": 2},
        "evaluation": {"lengths": [8, 16]},
    }
    for key, value in overrides.items():
        table, name = key.split("__")
        keys[table][name] = value
    return build_run(keys, ())


def test_a_run_whose_numbering_works_passes_the_door():
    for way in ("consecutive", "interpolated", "randomized(largest=16)"):
        check(content(training__numbering=way, evaluation__numbering=way))
    check(content(training__numbering="randomized(largest=8)"))


@pytest.mark.parametrize(
    "overrides",
    [
        {"training__numbering": "randomized(largest=7)"},
        {"evaluation__numbering": "randomized(largest=15)"},
        {"evaluation__numbering": "interpolated", "model__scheme": "learned", "model__positions": 16},
        {"training__numbering": "randomized(largest=40)", "model__scheme": "learned", "model__positions": 16},
    ],
    ids=str,
)
def test_a_numbering_that_cannot_work_is_told_at_the_door(overrides):
    with pytest.raises(UserError):
        check(content(**overrides))
