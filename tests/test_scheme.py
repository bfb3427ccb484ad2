"""Schemes: how an expression is read, checked, spelled and built; and attention as a function."""

import itertools
import sys

import pytest
import torch

import lookfar
from lookfar import plugins
from lookfar.attention.scheme import build_scheme, parse, spell
from lookfar.errors import UserError
from lookfar.methods.base import InputEncoding, ScoreMap
from lookfar.sight import Sight
from tolerance import assert_near


def told(expression, check=parse):
    with pytest.raises(UserError) as error:
        check(expression)
    return str(error.value)


def decoder(scheme, **settings):
    config = lookfar.ModelConfig(vocabulary=5, width=16, heads=4, layers=3, scheme=scheme, device="cpu", **settings)
    return lookfar.Decoder(config)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("alibbi", "No method is named 'alibbi'. Did you mean 'alibi'?"),
        ("alibi + kerpel", "No method is named 'kerpel'. Did you mean 'kerple'?"),
        ("dape_v2(kernal=3)", "'dape_v2' has no setting 'kernal'. Did you mean 'kernel'?"),
        ("base", "No method is named 'base'."),
        ("Alibi", "No method is named 'Alibi'. Did you mean 'alibi'?"),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest(expression, message):
    assert told(expression).startswith(message)


def test_a_name_that_is_near_to_none_is_answered_with_all():
    assert "Known: " + ", ".join(lookfar.names("methods")) in told("qqqqqq")


@pytest.mark.parametrize(
    "expression",
    ["", "alibi +", "alibi kerple", "alibi - kerple", "2 * alibi", "rope(100)", "rope(base=)", "rope(**x)", "[alibi]",
     "rope(base=100)(base=3)", "rope(base=100, base=3)", "'alibi'", "alibi + 3", "rope(base=f(3))", "rope[1]", "\0"],
)  # fmt: skip
def test_what_is_no_expression_is_told_with_the_words_that_were_given(expression):
    message = told(expression)
    assert repr(expression)[1:-1] in message or "is not understood" in message or "is not a value" in message


@pytest.mark.parametrize(
    ("expression", "both"),
    [
        ("sinusoidal + learned", ("sinusoidal", "learned", "encodes the embeddings")),
        ("sinusoidal + sinusoidal", ("sinusoidal", "encodes the embeddings")),
        ("rope + alibi + rope(base=3)", ("rope", "rotates queries and keys")),
        ("dape_v2 + kerple + dape_v2(kernel=1)", ("dape_v2", "rewrites the scores")),
        ("differential + alibi + differential", ("differential", "has several maps")),
    ],
)
def test_methods_that_cannot_be_combined_are_both_named(expression, both):
    message = told(expression)
    assert all(word in message for word in both) and "at most one" in message


def test_a_pair_is_illegal_only_where_both_act_in_one_place():
    methods = {name: plugins.find("methods", name) for name in lookfar.names("methods")}
    for (one, first), (two, second) in itertools.combinations(methods.items(), 2):
        clash = any(issubclass(first, kind) and issubclass(second, kind) for kind in (InputEncoding, ScoreMap))
        clash |= getattr(first, "rotation", False) and getattr(second, "rotation", False)
        clash |= getattr(first, "maps", 1) > 1 and getattr(second, "maps", 1) > 1
        if clash:
            message = told(f"{one} + {two}")
            assert repr(one) in message and repr(two) in message
        else:
            assert [term.name for term in parse(f"{one} + {two}")] == [one, two]


@pytest.mark.parametrize(
    ("expression", "part"),
    [
        ("dape_v2(kernel=0)", "dape_v2(kernel=0) is not possible"),
        ("dape_v2(kernel=2.5)", "dape_v2(kernel=2.5) is not possible"),
        ("dape_v2(repair=none)", "dape_v2(repair=none) is not possible"),
        ("dape_v2(repair=never)", "'hidden' or 'paper'"),
        ("rope(base=0)", "greater than 0"),
        ("rope(base=true)", "rope(base=true) is not possible"),
        ("rope(layout=diagonal)", "'halves' or 'interleaved'"),
        ("stable_mask(gamma=-1)", "stable_mask(gamma=-1) is not possible"),
        ("stable_mask(columns=0)", "stable_mask(columns=0) is not possible"),
        ("t5(buckets=many)", "t5(buckets=many) is not possible"),
        ("nope(base=3)", "nope is the empty scheme and has no settings"),
        ("alibi(slope=3)", "'alibi' has no setting 'slope'"),
    ],
)  # fmt: skip
def test_settings_are_checked_before_anything_is_built(expression, part):
    assert part in told(expression)


@pytest.mark.parametrize(
    ("expression", "part"),
    [
        ("dape_v2(kernel=4)", "odd kernel, not 4; try kernel=5"),
        ("t5(buckets=1)", "buckets"),
        ("t5(buckets=32, farthest=16)", "farthest (16)"),
        ("stable_mask(gamma=0)", "infinite mass"),
    ],
)
def test_settings_that_make_no_sense_are_told_when_they_are_built(expression, part):
    assert part in told(expression, lambda each: build_scheme(each, heads=4))


@pytest.mark.parametrize(
    ("given", "spelled"),
    [
        ("alibi+ nope", "alibi"),
        ("nope", "nope"),
        ("nope + nope", "nope"),
        ("  kerple+dape_v2( kernel = 3 )", "kerple + dape_v2(kernel=3)"),
        ("dape_v2(repair='paper')", "dape_v2(repair=paper)"),
        ("t5(shared=false)", "t5(shared=false)"),
        ("rope(base=1e4)", "rope(base=10000)"),
        ("stable_mask(columns=infinite,gamma=0.5)", "stable_mask(columns=infinite, gamma=0.5)"),
        ("alibi + (kerple + rope)", "alibi + kerple + rope"),
    ],
)
def test_every_scheme_has_one_spelling(given, spelled):
    assert spell(given) == spelled
    assert spell(spelled) == spelled
    assert build_scheme(given, heads=2).expression == spelled


def test_the_order_of_methods_does_not_change_what_is_computed():
    given = torch.randn(1, 4, 7, 8, dtype=torch.float64)
    built = {}
    for expression in ("rope + alibi + stable_mask", "stable_mask + alibi + rope"):
        scheme = build_scheme(expression, heads=4, head_width=8).double()
        built[expression] = lookfar.attend(given, given, given, scheme=scheme)
    one, two = built.values()
    assert_near(one, two)


def test_a_shared_table_is_one_table_in_all_layers():
    shared, own = decoder("t5"), decoder("t5(shared=false)")
    tables = [block.attention.scheme.biases[0].table for block in shared.blocks]
    assert all(table is tables[0] for table in tables)
    bare = sum(each.numel() for each in decoder("nope").parameters())
    assert sum(each.numel() for each in shared.parameters()) - bare == 32 * 4
    assert sum(each.numel() for each in own.parameters()) - bare == 3 * 32 * 4
    assert len({id(block.attention.scheme.biases[0].table) for block in own.blocks}) == 3


def test_shared_methods_are_shared_only_under_equal_settings():
    model = decoder(("t5", "t5(buckets=8)", "t5"))
    first, other, last = (block.attention.scheme.biases[0] for block in model.blocks)
    assert first is last and first is not other


def test_a_switch_may_be_told_in_any_word_that_is_understood():
    tables = {id(block.attention.scheme.biases[0].table) for block in decoder("t5(shared=off)").blocks}
    scheme = build_scheme("alibi + differential(share_bias=no)", heads=4)
    assert (len(tables), scheme.merges[0].share_bias, scheme.biases[0].slopes.shape[-1]) == (3, False, 4)


def test_a_shared_table_stays_one_when_the_model_is_moved():
    model = decoder("t5 + kerple").double()
    tables = {id(block.attention.scheme.biases[0].table) for block in model.blocks}
    rates = {id(block.attention.scheme.biases[1].rate) for block in model.blocks}
    assert len(tables) == 1 and len(rates) == 3, "kerple learns in every layer"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": 6, "groups": 4}, r"groups \(4\) must divide heads \(6\)"),
        ({"heads": 6, "groups": 0}, r"groups \(0\) must divide heads \(6\)"),
        ({"heads": 5, "width": 64}, r"heads \(5\) must divide width \(64\)"),
        ({"heads": 4, "head_width": 7, "expression": "rope"}, r"head_width \(7\) must be even"),
        ({"heads": 3, "expression": "differential"}, r"heads \(3\) and groups \(3\): both must be even"),
        ({"heads": 4, "groups": 1, "expression": "differential"}, r"groups \(1\): both must be even"),
    ],
)
def test_heads_that_do_not_fit_are_told(arguments, message):
    with pytest.raises(UserError, match=message):
        build_scheme(arguments.pop("expression", "nope"), **arguments)


def test_sizes_that_are_not_given_are_derived():
    assert build_scheme("nope", heads=4).heads.head_width == 64
    assert build_scheme("nope", heads=4, width=48).heads.head_width == 12
    assert build_scheme("nope", heads=4, width=48, head_width=5).heads.head_width == 5
    assert build_scheme("nope", heads=4).heads.key_heads == 4
    assert build_scheme("nope", heads=4, groups=2).heads.value_heads == 2
    assert build_scheme("learned", heads=4, context=40).inputs[0].table.shape == (40, 256)
    assert build_scheme("learned", heads=4, context=40, positions=90).inputs[0].table.shape == (90, 256)
    assert build_scheme("nope", heads=4, head_width=16).scale == 0.25


def test_methods_are_sorted_by_where_they_act():
    scheme = build_scheme("differential + stable_mask + dape_v2 + kerple + alibi + rope + sinusoidal", heads=4)
    found = {
        "inputs": scheme.inputs,
        "encodings": scheme.encodings,
        "biases": scheme.biases,
        "maps": scheme.maps,
        "sinks": scheme.sinks,
        "merges": scheme.merges,
    }
    assert {place: [type(each).__name__ for each in methods] for place, methods in found.items()} == {
        "inputs": ["Sinusoidal"],
        "encodings": ["Rope"],
        "biases": ["Kerple", "Alibi"],
        "maps": ["DapeV2"],
        "sinks": ["StableMask"],
        "merges": ["Differential"],
    }


def test_biases_add_and_sinks_join_by_their_exponentials():
    sight = Sight.causal(5)
    both = build_scheme("alibi + t5 + stable_mask + stable_mask(gamma=0.5)", heads=2)
    one, two = both.biases
    places = sight.query_positions
    assert_near(both.bias(sight), one.between(places, places) + two.between(places, places))
    sinks = [sink.score(places).exp() for sink in both.sinks]
    assert_near(both.sink(places).exp(), sinks[0] + sinks[1])
    assert build_scheme("rope", heads=2).bias(sight) is None
    assert build_scheme("rope", heads=2).sink(places) is None


def test_a_soft_cap_bounds_the_scores_before_the_bias_is_added():
    torch.manual_seed(0)
    queries, keys, values = torch.randn(3, 1, 2, 6, 8, dtype=torch.float64) * 4
    scheme = build_scheme("alibi", heads=2, head_width=8, soft_cap=1.5).double()
    scores = 1.5 * torch.tanh(queries @ keys.mT * 8**-0.5 / 1.5) + scheme.bias(Sight.causal(6))
    scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    assert_near(lookfar.attend(queries, keys, values, scheme=scheme), scores.softmax(-1) @ values)


# Attention as a function


def test_attend_takes_an_expression_or_a_built_scheme():
    queries, keys, values = torch.randn(2, 6, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    by_name = lookfar.attend(queries, keys, values, scheme="rope + alibi + stable_mask")
    scheme = build_scheme("rope + alibi + stable_mask", heads=6, groups=2, head_width=8)
    assert by_name.shape == (2, 6, 9, 8)
    assert torch.equal(by_name, lookfar.attend(queries, keys, values, scheme=scheme))


def test_attend_is_causal_attention_by_default():
    queries, keys, values = torch.randn(3, 2, 4, 9, 8).unbind(0)
    expected = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    assert_near(lookfar.attend(queries, keys, values, scheme="nope"), expected)


def test_fewer_queries_than_keys_are_the_last_ones():
    queries, keys, values = torch.randn(3, 2, 4, 9, 8).unbind(0)
    whole = lookfar.attend(queries, keys, values, scheme="rope + alibi")
    last = lookfar.attend(queries[:, :, 6:], keys, values, scheme="rope + alibi")
    assert_near(last, whole[:, :, 6:])


def test_attend_under_a_sight_of_its_own():
    queries, keys, values = torch.randn(3, 1, 4, 9, 8).unbind(0)
    windowed = lookfar.attend(queries, keys, values, scheme="nope", sight=Sight.causal(9, window=1))
    assert_near(windowed, values)


def test_attend_merges_the_maps_of_a_head():
    scheme = build_scheme("differential", heads=4, head_width=8)
    shapes = [(2, 4, 7, 8), (2, 4, 7, 8), (2, 2, 7, 16)]
    assert lookfar.attend(*(torch.randn(shape) for shape in shapes), scheme=scheme).shape == (2, 2, 7, 16)


def test_attend_refuses_to_build_parameters_that_would_not_persist():
    given = torch.randn(1, 2, 3, 8)
    with pytest.raises(UserError, match=r"'kerple' has parameters: build it once with lookfar\.build_scheme"):
        lookfar.attend(given, given, given, scheme="kerple")


def test_attend_refuses_heads_that_the_scheme_was_not_built_for():
    given, scheme = torch.randn(1, 2, 3, 8), build_scheme("alibi", heads=4, head_width=8)
    with pytest.raises(UserError, match=r"built for heads .*'queries': 4.*; these tensors have .*'queries': 2"):
        lookfar.attend(given, given, given, scheme=scheme)


def test_attend_names_the_kernel_that_is_unknown_or_refuses():
    given = torch.randn(1, 2, 3, 8)
    with pytest.raises(UserError, match=r"No kernel is named 'sdpaa'. Did you mean 'sdpa'\?"):
        lookfar.attend(given, given, given, scheme="nope", kernel="sdpaa")
    scheme = build_scheme("kerple", heads=2, head_width=8)
    with pytest.raises(UserError, match="The kernel sdpa does not take this call: Kerple adds a bias"):
        lookfar.attend(given, given, given, scheme=scheme, kernel="sdpa")


# A method of the user's own

OWN = '''
"""Prefers the near by a step."""
import torch
from torch import nn
from lookfar.methods.base import DistanceBias


class Step(DistanceBias):
    def __init__(self, site, *, width: int = 2, drop: float = 1.0):
        super().__init__(site)
        self.heads, self.width, self.drop = site.heads.score_heads, width, drop
        self.factor = nn.Parameter(torch.ones(()))

    def at(self, distances):
        return (-self.drop * self.factor * (distances >= self.width)).expand(self.heads, -1)
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "house").mkdir()
    (tmp_path / "house" / "step.py").write_text(OWN)
    (tmp_path / "house" / "nothing.py").write_text("x = 1\n")
    (tmp_path / "house" / "two.py").write_text(OWN + OWN.replace("Step", "Stair"))
    monkeypatch.syspath_prepend(tmp_path)
    yield "house.step"
    for name in [name for name in sys.modules if name.split(".")[0] == "house"]:
        del sys.modules[name]


def test_a_method_of_ones_own_is_named_by_its_module(own):
    scheme = build_scheme(f"rope + {own}(width=3, drop=2)", heads=2, head_width=8)
    assert scheme.expression == "rope + house.step(width=3, drop=2)"
    assert scheme.bias(Sight.causal(5))[0, 1, 4].tolist() == [-2, -2, 0, 0, 0]
    model = decoder(own)
    model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    assert model.blocks[0].attention.scheme.biases[0].factor.grad is not None


def test_a_method_of_ones_own_is_checked_like_any_other(own):
    assert "'house.step' has no setting 'widht'. Did you mean 'width'?" in told(f"{own}(widht=3)")
    assert "is not possible" in told(f"{own}(width=far)")
    assert "'house.nothing' must define exactly one public method; it defines 0." in told("house.nothing")
    assert "it defines 2" in told("house.two")
    assert "'house.missing' cannot be imported" in told("house.missing")
