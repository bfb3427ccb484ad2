"""The laws of attention, kept by every method alone, in every legal pair and in triples.

Row law: what a query receives depends only on that query, its position and what it can see. Once law: a key is encoded
once, from itself and its own position. Hidden law: a key that cannot be seen has no effect, whether masked or absent.
"""

import itertools
import random
import typing
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from torch import nn

import lookfar
from lookfar import kernels, plugins
from lookfar.attention.scheme import Scheme, build_scheme, parse
from lookfar.batch import consecutive
from lookfar.errors import UserError
from lookfar.methods.base import DistanceBias, InputEncoding, ScoreMap
from lookfar.methods.dape_v1 import DapeV1
from lookfar.methods.dape_v2 import DapeV2
from lookfar.sight import Sight
from tolerance import assert_near

METHODS = lookfar.names("methods")
SETTINGS = [  # numbers that a short sequence can feel, and forms that a method has only beside another
    "alibi(factor=3)",
    "alibi + dape_v2(repair=paper)",
    "cope(positions=4)",
    "dape_v2(kernel=1)",
    "dape_v2(kernel=5, hidden=3)",
    "fire(threshold=5)",
    "kerple + dape_v1(equation=2)",
    "rope(base=50, p=0.5)",
    "rope(fraction=0.5)",
    "rope(scaling=yarn, factor=4, original=60)",
    "stable_mask(gamma=0.5, columns=9)",
    "stable_mask(gamma=0, columns=40)",
    "t5(buckets=4, farthest=6)",
    "alibi + kerple + stable_mask + differential(share_bias=true)",
    "gate + fire + learned_sink + differential_v2(share_bias=true)",
]


def choices(name):
    """A method with every value of its settings that are a choice among words or of true and false."""
    cls = plugins.find("methods", name)
    for key, kind in plugins.settings(cls).items():
        parts = [kind, *typing.get_args(kind)]
        words = [word for part in parts if typing.get_origin(part) is typing.Literal for word in typing.get_args(part)]
        for value in [*words, *([True, False] if bool in parts else [])]:
            if value != plugins.defaults(cls)[key]:
                yield str(plugins.Term(name, {key: value}))


def legal(expression):
    try:
        parse(expression)
    except UserError:
        return False
    return True


def joined(count):
    """All legal expressions of so many methods; a pair may be a method and itself."""
    combine = itertools.combinations_with_replacement if count == 2 else itertools.combinations
    return [expression for each in combine(METHODS, count) if legal(expression := " + ".join(each))]


ALONE = ["nope", *METHODS, *SETTINGS]  # held to the laws in every way; all others in fewer rows
LAWLESS = ("rope(scaling=dynamic)",)  # breaks the once law, and is refused where that would be wrong: test_methods
CHOICES = [choice for name in METHODS for choice in choices(name) if choice not in LAWLESS]
PAIRS, TRIPLES = joined(2), joined(3)
SAMPLE = random.Random(1).sample(TRIPLES, min(40, len(TRIPLES)))
HEADS = 6


def cases():
    """Every expression with few key heads or many in turn; a method alone with both."""
    for name in METHODS:
        yield from (pytest.param(name, groups, id=f"{name}-{groups}") for groups in (2, HEADS))
    for place, expression in enumerate(["nope", *SETTINGS, *CHOICES, *PAIRS, *TRIPLES]):
        marks = [] if expression not in TRIPLES or expression in SAMPLE else [pytest.mark.long]
        yield pytest.param(expression, (2, HEADS)[place % 2], id=expression, marks=marks)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small are only slowed down by threads that wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


every_scheme = pytest.mark.parametrize(("expression", "groups"), [*cases()])
every_method = pytest.mark.parametrize("expression", ALONE)


def randomised(module, seed=5):
    """The module with noise on all parameters, so that none sits at a special value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return module


@dataclass(frozen=True)
class Tensors:
    """What one layer is given: projected queries, keys and values, and the input of the layer."""

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    x: torch.Tensor

    def at(self, batch=slice(None), asked=slice(None), seen=slice(None)):
        """Some rows, against some keys."""
        return Tensors(
            self.queries[batch][:, :, asked],
            self.keys[batch][:, :, seen],
            self.values[batch][:, :, seen],
            self.x[batch][:, asked],
        )


class Layer(nn.Module):
    """A scheme as a layer uses it: encode, attend by the reference, merge."""

    def __init__(self, scheme: Scheme):
        super().__init__()
        self.scheme = scheme

    def forward(self, queries, keys, values, x, sight):
        queries = self.scheme.queries(queries, sight.query_positions)
        keys = self.scheme.keys(keys, sight.key_positions)
        return self.scheme.merge(kernels.attend(queries, keys, values, sight, self.scheme, "reference"), x)

    def gives(self, tensors, sight):
        return self(tensors.queries, tensors.keys, tensors.values, tensors.x, sight)


@cache
def layer(expression, groups=2, heads=HEADS, head_width=8):
    torch.manual_seed(3)
    scheme = build_scheme(expression, heads=heads, groups=groups, head_width=head_width, context=32, layer=1, layers=2)
    return Layer(randomised(scheme.double()))


def tensors(scheme, tokens, batch=2, queries=None, seed=11, dtype=torch.float64):
    counts, generator = scheme.heads, torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    queries = tokens if queries is None else queries
    return Tensors(
        noise(batch, counts.score_heads, queries, counts.head_width),
        noise(batch, counts.key_heads, tokens, counts.head_width),
        noise(batch, counts.value_heads, tokens, counts.value_width),
        noise(batch, queries, counts.heads * counts.value_width),
    )


@dataclass(frozen=True)
class View:
    """Who sees whom, told so that a double loop can tell it too."""

    documents: tuple[str, ...] | None = None  # a letter for each token, '.' for padding; one word for each line
    window: int | None = None
    positions: tuple[int, ...] | None = None

    def places(self, tokens):
        if self.positions is not None:
            return torch.tensor([self.positions[:tokens]])
        return torch.arange(tokens)[None] if self.documents is None else consecutive(self.numbers(tokens))

    def numbers(self, tokens):
        return torch.tensor([[".abcdef".index(letter) - 1 for letter in line[:tokens]] for line in self.documents])

    def sight(self, tokens, queries=None):
        numbered = self.documents is not None or self.positions is not None
        return Sight.causal(
            tokens,
            queries=queries,
            positions=self.places(tokens) if numbered else None,
            documents=None if self.documents is None else self.numbers(tokens),
            window=self.window,
        )

    def seen(self, line, row):
        """The keys that a row sees, in their order."""
        first = 0 if self.window is None else max(0, row - self.window + 1)
        if self.documents is None:
            return list(range(first, row + 1))
        own = self.documents[line][row]
        return [key for key in range(first, row + 1) if key == row or (self.documents[line][key] == own != ".")]


T = 13
VIEWS = {
    "plain": View(),
    "window": View(window=4),
    "padded": View(("...aaaaaaaaaa", "aaaaaaaaaaaaa")),
    "packed": View(("aaaaabbbbbbcc", "abbbbbbbbbbbb")),
    "interleaved": View(("ab.aabcacbbaa", "..aabbaabbaab")),
    "numbered": View(positions=(3, 3, 9, 1, 0, 14, 14, 2, 7, 5, 6, 21, 4)),
    "all": View(("ab.aabcacbbaa", "..aabbaabbaab"), window=5),
}
HARDEST = VIEWS["all"]


def views(expression):
    """Combinations meet the hardest sight; a method alone, and what may refuse it, the plain one too."""
    return (VIEWS["plain"], HARDEST) if expression in ALONE else (HARDEST,)


def refuses(layer, sight):
    """Whether some method refuses the sight; only a setting may, and then attention is an error with its reason."""
    reason = layer.scheme.refusal(sight)
    if reason is None:
        return False
    assert "(" in layer.scheme.expression, "a method without settings takes every sight"
    with pytest.raises(UserError) as told:
        layer.gives(tensors(layer.scheme, sight.keys), sight)
    assert str(told.value) == reason
    return True


def assert_rows_stand_alone(layer, view, sizes, lasts):
    given, sight = tensors(layer.scheme, T), view.sight(T)
    if refuses(layer, sight):
        return
    together = layer.gives(given, sight)
    for size in sizes:
        for start in range(0, T, size):
            part = sight.rows(start, min(start + size, T))
            seen = slice(part.first_key, part.first_key + part.keys)
            rows = layer.gives(given.at(asked=slice(start, start + size), seen=seen), part)
            assert_near(rows, together[:, :, start : start + size], f"rows from {start}, {size} at a time")
    for queries in lasts:
        last = layer.gives(given.at(asked=slice(T - queries, None)), view.sight(T, queries))
        assert_near(last, together[:, :, T - queries :], f"the last {queries}")


@every_scheme
def test_rows_asked_alone_or_in_chunks_are_the_rows_asked_together(expression, groups):
    assert_rows_stand_alone(layer(expression, groups), HARDEST, sizes=(5,), lasts=(1,))


@every_method
@pytest.mark.parametrize("view", VIEWS)
def test_rows_stand_alone_under_every_sight(expression, view):
    assert_rows_stand_alone(layer(expression), VIEWS[view], sizes=(1,), lasts=(2, T - 1))


@every_scheme
def test_rows_do_not_change_when_the_sequence_grows(expression, groups):
    under = layer(expression, groups)
    given = tensors(under.scheme, T)
    for view in views(expression):
        if refuses(under, view.sight(T)):
            continue
        whole = under.gives(given, view.sight(T))
        for length in range(1, T) if expression in ALONE else (4, 9):
            begun = under.gives(given.at(asked=slice(length), seen=slice(length)), view.sight(length))
            assert_near(begun, whole[:, :, :length], f"the first {length}")


@every_scheme
def test_keys_encoded_one_at_a_time_are_the_keys_encoded_together(expression, groups):
    scheme = layer(expression, groups).scheme
    given, places = tensors(scheme, T), HARDEST.places(T)
    keys, queries = scheme.keys(given.keys, places), scheme.queries(given.queries, places)
    for token in range(T) if expression in ALONE else (0, 8):
        one = slice(token, token + 1)
        assert_near(scheme.keys(given.keys[:, :, one], places[:, one]), keys[:, :, one], f"key {token}")
        assert_near(scheme.queries(given.queries[:, :, one], places[:, one]), queries[:, :, one], f"query {token}")


def assert_masked_is_absent(layer, view, rows):
    given, sight = tensors(layer.scheme, T), view.sight(T)
    if refuses(layer, sight):
        return
    whole, places = layer.gives(given, sight), view.places(T).expand(2, -1)
    for line, row in itertools.product(range(2), rows):
        seen = view.seen(line, row)
        alone = Sight.causal(len(seen), queries=1, positions=places[line : line + 1, seen])
        one = given.at(slice(line, line + 1), slice(row, row + 1), seen)
        assert_near(layer.gives(one, alone), whole[line : line + 1, :, row : row + 1], f"line {line}, row {row}")


@every_scheme
def test_hidden_keys_may_as_well_be_absent(expression, groups):
    assert_masked_is_absent(layer(expression, groups), HARDEST, rows=(3, 9, 12))


@every_method
@pytest.mark.parametrize("view", VIEWS)
def test_hidden_keys_may_be_absent_under_every_sight(expression, view):
    assert_masked_is_absent(layer(expression), VIEWS[view], rows=range(0, T, 2))


@every_scheme
def test_hidden_keys_do_not_matter(expression, groups):
    under = layer(expression, groups)
    given = tensors(under.scheme, T)
    wild = tensors(under.scheme, T, seed=12)
    for view in views(expression):
        if refuses(under, view.sight(T)):
            continue
        whole = under.gives(given, view.sight(T))
        for row in range(T) if expression in ALONE else (3, 9, 12):
            hidden = torch.ones(2, 1, T, 1, dtype=torch.bool)
            for line in range(2):
                hidden[line, 0, view.seen(line, row)] = False
            keys = torch.where(hidden, 1e4 * wild.keys, given.keys)
            values = torch.where(hidden, 1e4 * wild.values, given.values)
            disturbed = under.gives(replace(given, keys=keys, values=values), view.sight(T))
            assert_near(disturbed[:, :, row], whole[:, :, row], f"row {row}")


@every_method
def test_every_visible_value_matters(expression):
    under = layer(expression)
    given = tensors(under.scheme, T)
    for view in (VIEWS["plain"], HARDEST):
        if refuses(under, view.sight(T)):
            continue
        whole = under.gives(given, view.sight(T))
        for key in range(T):
            values = given.values.clone()
            values[:, :, key] += 1
            changed = (under.gives(replace(given, values=values), view.sight(T)) - whole).abs().amax((1, 3)) > 1e-9
            for line, row in itertools.product(range(2), range(T)):
                assert changed[line, row] == (key in view.seen(line, row)), f"line {line}, row {row}, key {key}"


@every_method
def test_documents_packed_together_are_documents_run_alone(expression):
    under = layer(expression)
    given = tensors(under.scheme, T)
    view = VIEWS["interleaved"]
    if refuses(under, view.sight(T)):
        return
    whole = under.gives(given, view.sight(T))
    for line, word in enumerate(view.documents):
        for letter in set(word) - {"."}:
            own = [place for place in range(T) if word[place] == letter]
            alone = under.gives(given.at(slice(line, line + 1), own, own), Sight.causal(len(own)))
            assert_near(alone, whole[line : line + 1, :, own], f"document {letter} of line {line}")


@every_scheme
def test_padding_on_the_left_changes_nothing(expression, groups):
    under = layer(expression, groups)
    given, junk = tensors(under.scheme, 8), tensors(under.scheme, 5, seed=12)
    alone = under.gives(given, Sight.causal(8))
    for pads in range(6) if expression in ALONE else (3,):
        documents = torch.tensor([[-1] * pads + [0] * 8] * 2)
        sight = Sight.causal(pads + 8, positions=consecutive(documents), documents=documents)
        if refuses(under, sight):
            return
        rubbish = junk.at(asked=slice(pads), seen=slice(pads))
        padded = Tensors(
            torch.cat([1e4 * rubbish.queries, given.queries], 2),
            torch.cat([1e4 * rubbish.keys, given.keys], 2),
            torch.cat([1e4 * rubbish.values, given.values], 2),
            torch.cat([1e4 * rubbish.x, given.x], 1),
        )
        outputs = under.gives(padded, sight)
        assert_near(outputs[:, :, pads:], alone, f"{pads} pads")
        assert outputs.isfinite().all()


@every_method
def test_numbering_tokens_from_nought_is_the_default(expression):
    under = layer(expression)
    given = tensors(under.scheme, T)
    for queries, window in ((T, None), (4, None), (T, 3)):
        asked = given.at(asked=slice(T - queries, None))
        default = Sight.causal(T, queries=queries, window=window)
        numbered = Sight.causal(T, queries=queries, window=window, positions=torch.arange(T)[None])
        if not refuses(under, default):
            assert_near(under.gives(asked, numbered), under.gives(asked, default))


@every_scheme
def test_any_whole_positions_give_finite_outputs(expression, groups):
    under = layer(expression, groups)
    given = tensors(under.scheme, T)
    some = [5] * T, [*range(T - 1, -1, -1)], [0, 0, 1, 1, 30, 30, 2, 2, 0, 9, 8, 7, 7]
    for positions in some if expression in ALONE else some[-1:]:
        sight = Sight.causal(T, positions=torch.tensor([positions]))
        assert under.gives(given, sight).isfinite().all(), positions


@every_scheme
def test_fractional_positions_are_taken_or_refused_in_words(expression, groups):
    under = layer(expression, groups)
    given = tensors(under.scheme, T)
    positions = torch.arange(T).flip(0)[None] / 4 + torch.tensor([[0.0], [0.3]])
    sight = Sight.causal(T, positions=positions)
    try:
        outputs = under.gives(given, sight)
    except UserError as error:
        assert "needs whole positions" in str(error)
    else:
        assert outputs.isfinite().all()


@every_method
def test_fractional_positions_agree_with_whole_ones_where_they_meet(expression):
    under = layer(expression)
    given = tensors(under.scheme, T)
    sight, whole = Sight.causal(T, positions=torch.arange(T)[None] * 1.0), Sight.causal(T)
    try:
        outputs = under.gives(given, sight)
    except UserError as error:
        assert "needs whole positions" in str(error)
    else:
        assert_near(outputs, under.gives(given, whole))


@every_scheme
def test_gradients_are_those_of_finite_differences(expression, groups):
    check_gradients(layer(expression, 2 if groups == 2 else 4, heads=4, head_width=4), fast=True)


@pytest.mark.long
@every_method
def test_every_entry_of_every_gradient_is_that_of_a_finite_difference(expression):
    check_gradients(layer(expression, 2, heads=2, head_width=4), fast=False)


def check_gradients(under, fast):
    given = tensors(under.scheme, 5, batch=1)
    names, parameters = [], []
    for name, parameter in under.named_parameters():
        if not any(parameter is each for method in under.scheme.inputs for each in method.parameters()):
            names.append(name)
            parameters.append(parameter.detach().clone().requires_grad_())
    sight = Sight.causal(5)

    def outputs(queries, keys, values, *parameters):
        given_parameters = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(under, given_parameters, (queries, keys, values, given.x, sight))

    leaves = [each.clone().requires_grad_() for each in (given.queries, given.keys, given.values)]
    assert torch.autograd.gradcheck(outputs, (*leaves, *parameters), fast_mode=fast)


# What follows goes through a whole model, so that input encodings and the cache take part.


@cache
def decoder(expression, groups=2, **settings):
    torch.manual_seed(3)
    settings = {"layers": 2, "context": 16, "positions": 32, "hidden": 16, "dtype": "float64", **settings}
    config = lookfar.ModelConfig(
        vocabulary=17, width=24, heads=HEADS, groups=groups, scheme=expression, device="cpu", **settings
    )
    model = lookfar.Decoder(config).eval()
    for block in model.blocks:
        block.attention.kernel = "reference"
        randomised(block.attention.scheme)
    return model


def words(tokens=T, batch=2, seed=7):
    return torch.randint(17, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def turned_away(model, **call):
    """Whether some layer refuses documents or windows; only a setting may, and then the model is an error."""
    if "repair=paper" not in model.config.scheme:
        return False
    with pytest.raises(UserError, match="plain causal sight only"), torch.no_grad():
        model(words(), **call)
    return True


@every_scheme
@torch.no_grad()
def test_logits_do_not_change_when_the_text_grows(expression, groups):
    model, tokens = decoder(expression, groups), words()
    whole = model(tokens)
    for length in (1, 6) if expression in ALONE else (6,):
        assert_near(model(tokens[:, :length]), whole[:, :length], f"the first {length}")


@every_scheme
@torch.no_grad()
def test_a_future_token_changes_no_bit_of_earlier_logits(expression, groups):
    model, tokens = decoder(expression, groups), words()
    whole = model(tokens)
    for place in (1, T - 1) if expression in ALONE else (6,):
        changed = tokens.clone()
        changed[:, place] = (tokens[:, place] + 5) % 17
        logits = model(changed)
        assert torch.equal(logits[:, :place], whole[:, :place]), place
        assert not torch.allclose(logits[:, place], whole[:, place]), place


def assert_decodes(model, sizes, documents=None):
    tokens = words()
    whole = model(tokens, documents=documents)
    cache, start = model.cache(batch=2, length=4), 0
    for size in sizes:
        new = slice(start, start + size)
        logits = model(tokens[:, new], documents=None if documents is None else documents[:, new], cache=cache)
        assert_near(logits, whole[:, new], f"tokens {start} to {start + size}")
        start += size
    assert start == cache.length == T


@every_scheme
@torch.no_grad()
def test_decoding_with_a_cache_gives_the_logits_of_the_full_pass(expression, groups):
    model = decoder(expression, groups, window=(5, None))
    if not turned_away(model):
        assert_decodes(model, (1, 3, 7, 1, 1), HARDEST.numbers(T))


@every_method
@pytest.mark.parametrize("sizes", [(1,) * T, (3, 3, 3, 1, 1, 1, 1), (7, *(1,) * 6)], ids=str)
@torch.no_grad()
def test_decoding_from_any_prefill_gives_the_logits_of_the_full_pass(expression, sizes):
    model = decoder(expression, window=(None, 4))
    assert_decodes(decoder(expression) if turned_away(model) else model, sizes)


def assert_packed_is_alone(model, view, lines):
    tokens = words()
    if turned_away(model, documents=view.numbers(T)):
        return
    whole = model(tokens, documents=view.numbers(T))
    for line, word in enumerate(view.documents[:lines]):
        for letter in sorted(set(word) - {"."}):
            own = [place for place in range(T) if word[place] == letter]
            assert_near(model(tokens[line : line + 1, own]), whole[line : line + 1, own], f"{letter} of line {line}")


@every_scheme
@torch.no_grad()
def test_texts_packed_into_one_line_are_texts_run_alone(expression, groups):
    assert_packed_is_alone(decoder(expression, groups), VIEWS["interleaved"], lines=1)


@every_method
@torch.no_grad()
def test_texts_packed_under_a_window_are_texts_run_alone_under_it(expression):
    assert_packed_is_alone(decoder(expression, window=(4, None)), VIEWS["packed"], lines=2)


@every_scheme
@torch.no_grad()
def test_padding_a_text_on_the_left_changes_nothing(expression, groups):
    model, tokens = decoder(expression, groups), words(8)
    alone = model(tokens)
    for pads in (1, 4) if expression in ALONE else (3,):
        documents = torch.tensor([[-1] * pads + [0] * 8] * 2)
        if "repair=paper" in expression:
            with pytest.raises(UserError, match="plain causal sight only"):
                model(torch.cat([words(pads), tokens], 1), documents=documents)
        else:
            padded = model(torch.cat([words(pads), tokens], 1), documents=documents)
            assert_near(padded[:, pads:], alone, f"{pads} pads")


def without_effect(name, scheme):
    """A last bias adds one number to a whole row: a softmax without a sink ignores it, unless a map has read it."""
    if not name.endswith("second.bias") or scheme.sinks:
        return False
    method = scheme.methods[int(name.split("methods.")[1].split(".")[0])]
    return isinstance(method, ScoreMap) or not any(isinstance(each, DapeV1 | DapeV2) for each in scheme.maps)


@every_scheme
def test_every_parameter_that_can_matter_receives_a_gradient(expression, groups):
    model = decoder(expression, groups)
    model.zero_grad()
    model(words()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if without_effect(name, model.blocks[0].attention.scheme):
            assert parameter.grad.abs().max() < 1e-12, name
        else:
            assert parameter.grad.abs().max() > 1e-9, name


def test_every_file_and_many_combinations_are_tested():
    assert len(METHODS) >= 9 and len(PAIRS) >= 30 and len(SAMPLE) == 40
    assert all(name in PAIRS[0] + " ".join(PAIRS) for name in METHODS)


def test_a_distance_bias_lays_out_a_band_as_it_looks_up_pairs():
    found = 0
    for name in METHODS:
        scheme = layer(name).scheme
        for bias in scheme.biases:
            if isinstance(bias, DistanceBias):
                found += 1
                for first, queries, keys in ((0, 5, 5), (7, 3, 10), (2, 4, 3)):
                    asked, given = torch.arange(queries)[None] + first, torch.arange(keys)[None]
                    assert torch.equal(bias.band(first, queries, keys), bias.between(asked, given))
    assert found >= 3
    assert any(issubclass(plugins.find("methods", name), InputEncoding) for name in METHODS)
