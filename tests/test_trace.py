"""Traces: every stage of attention, equal to the definition, none of them the other's memory, nothing left behind."""

import runpy
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch

import lookfar
from lookfar.analysis.traces import trace, watching
from lookfar.attention import reference
from lookfar.attention.scheme import build_scheme
from lookfar.attention.trace import trace as trace_rows
from lookfar.batch import consecutive
from lookfar.errors import UserError
from lookfar.model.attention import Attention
from lookfar.sight import Sight
from tolerance import assert_near

T = 13
COMBINED = [
    "kerple + dape_v2 + stable_mask",
    "rope + cope",
    "alibi + learned_sink + differential",
    "t5 + differential_v2(share_bias=true)",
    "fire + dape_v1",
    "kerple + dape_v1(equation=2)",
    "transformer_xl + gate",
    "rope + log_n + gate",
    "alibi + kerple + stable_mask + differential(share_bias=true)",
    "gate + fire + learned_sink + differential_v2",
    "alibi + dape_v2(kernel=5)",
    "learned + stable_mask",
    "sinusoidal + cope + learned_sink",
]
EVERY = ["nope", *lookfar.names("methods"), *COMBINED]
DOCUMENTS = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2], [-1, -1, 0, 0, 1, 0, 0, 1, 1, 1, 0, 0, 0]])


def built(expression, **settings):
    torch.manual_seed(3)
    scheme = build_scheme(expression, heads=4, groups=2, head_width=8, context=32, **settings).double()
    with torch.no_grad():
        for parameter in scheme.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return scheme


def tensors(scheme, tokens=T, batch=2):
    torch.manual_seed(11)
    counts = scheme.heads
    return (
        torch.randn(batch, counts.score_heads, tokens, counts.head_width, dtype=torch.float64),
        torch.randn(batch, counts.key_heads, tokens, counts.head_width, dtype=torch.float64),
        torch.randn(batch, counts.value_heads, tokens, counts.value_width, dtype=torch.float64),
        torch.randn(batch, tokens, counts.heads * counts.value_width, dtype=torch.float64),
    )


def sights():
    packed = {"positions": consecutive(DOCUMENTS), "documents": DOCUMENTS}
    return [Sight.causal(T), Sight.causal(T, window=4), Sight.causal(T, **packed), Sight.causal(T, window=5, **packed)]


def model(scheme="alibi", **settings):
    torch.manual_seed(0)
    config = {"vocabulary": 50, "width": 32, "layers": 3, "heads": 4, "context": 16, "dtype": "float64"}
    found = lookfar.Decoder(lookfar.ModelConfig(**{**config, "scheme": scheme, "device": "cpu", **settings})).eval()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return found


def words(batch=2, tokens=T):
    return torch.randint(0, 50, (batch, tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("expression", EVERY)
def test_a_trace_gives_what_the_definition_gives(expression):
    scheme = built(expression)
    queries, keys, values, x = tensors(scheme)
    for sight in sights():
        found = trace_rows(queries, keys, values, sight, scheme, x)
        expected = reference.attend(queries, keys, values, sight, scheme)
        assert_near(found.outputs, expected, expression)
        assert_near(found.merged, scheme.merge(expected, x), expression)


@pytest.mark.parametrize("expression", EVERY)
def test_the_stages_of_a_trace_follow_from_one_another(expression):
    scheme = built(expression)
    queries, keys, values, x = tensors(scheme)
    for sight in sights():
        found = trace_rows(queries, keys, values, sight, scheme, x)
        hidden = ~found.rows.visible.expand_as(found.scores)
        assert found.scores[hidden].eq(-torch.inf).all() and found.weights[hidden].eq(0).all()
        assert_near(found.before, queries @ scheme.heads.keys_for_scores(keys).mT * scheme.scale)
        added = found.bias if found.bias is not None and all(each.keeps_bias for each in scheme.maps) else 0.0
        assert_near(found.scores.masked_fill(hidden, 0.0), (found.after + added).masked_fill(hidden, 0.0))
        assert_near(found.weights.sum(-1), torch.ones_like(found.logsumexp))
        assert_near(found.given.sum(-1) + found.swallowed, torch.ones_like(found.logsumexp))
        assert bool(scheme.sinks) == bool(found.swallowed.any())


@pytest.mark.parametrize("expression", EVERY)
def test_no_stage_shares_memory_with_another(expression):
    scheme = built(expression)
    queries, keys, values, x = tensors(scheme)
    found = trace_rows(queries, keys, values, Sight.causal(T), scheme, x)
    stages = (found.before, found.after, found.scores, found.weights, found.outputs, found.merged)
    for one, other in combinations(stages, 2):
        assert one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr()
    kept = found.before.clone()
    found.after.add_(1.0)
    found.scores.fill_(0.0)
    assert torch.equal(found.before, kept)


def test_scores_before_a_bias_are_not_those_after_it():
    found = trace_rows(*tensors(built("alibi"))[:3], Sight.causal(T), built("alibi"))
    lower = torch.ones(T, T).tril(-1).bool()
    assert torch.equal(found.before, found.after)
    assert (found.scores[..., lower] < found.before[..., lower]).all()  # ALiBi takes off at every distance


def test_a_method_that_is_not_exact_is_refused():
    scheme = built("alibi + dape_v2(repair=paper)")
    with pytest.raises(UserError, match="plain causal"):
        trace_rows(*tensors(scheme)[:3], Sight.causal(T, window=4), scheme)


@pytest.mark.parametrize("rows", [None, 1, 5])
@pytest.mark.parametrize("documents", [None, DOCUMENTS])
def test_a_traced_model_gives_each_layer_what_the_layer_computes(rows, documents):
    subject = model(("kerple + dape_v2 + stable_mask", "rope + gate", "t5"), window=(None, 5))
    given = []
    hooks = [
        block.attention.output.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
        for block in subject.blocks
    ]
    subject(words(), documents=documents)
    for hook in hooks:
        hook.remove()
    merged = {}
    for layer, found in trace(subject, words(), documents=documents, rows=rows):
        assert rows is None or found.sight.queries <= rows
        merged.setdefault(layer, []).append(found.merged)
    assert sorted(merged) == [0, 1, 2]
    for layer, pieces in merged.items():
        assert_near(torch.cat(pieces, 2).transpose(1, 2).flatten(2), given[layer], f"layer {layer}")


def test_slots_can_be_traced():
    subject = model("alibi", slots=3)
    with watching(subject) as seen:
        subject.slot_states(words())
    for _, found in seen.traces():
        assert found.weights.shape[-2:] == (T + 3, T + 3)
        assert not found.weights[..., :T, T:].any()  # no text sees a slot


def test_nothing_is_left_in_a_traced_model():
    subject = model()
    before = subject(words())
    walk = trace(subject, words())
    next(walk)
    assert torch.is_grad_enabled()
    assert not any(module._forward_pre_hooks for module in subject.modules())
    del walk
    with pytest.raises(UserError, match="cache"), watching(subject):
        subject(words(), cache=subject.cache(batch=2))
    assert not any(module._forward_pre_hooks for module in subject.modules())
    assert torch.equal(subject(words()), before)
    assert all(parameter.grad is None for parameter in subject.parameters())


def test_distances_are_counted_in_keys_that_are_seen():
    scheme, sight = built("nope"), sights()[3]
    found = trace_rows(*tensors(scheme)[:3], sight, scheme)
    for line in range(2):
        for query in range(T):
            visible = found.rows.visible[line, 0, query].nonzero()[:, 0].tolist()
            assert found.seen[line, query] == len(visible)
            assert found.behind[line, 0, query, visible].tolist() == list(range(len(visible)))[::-1]
    assert not found.asked[1, :2].any() and found.asked[1, 2:].all() and found.asked[0].all()
    assert trace_rows(
        *tensors(scheme)[:3], replace(sight, query_documents=None, key_documents=None), scheme
    ).asked.all()


EXAMPLE = runpy.run_path(str(Path(__file__).parent.parent / "examples" / "nope_theorem.py"))


@pytest.mark.parametrize("kernel", [None, "reference"])
@pytest.mark.parametrize("length", [1, 2, 13, 4096])
def test_without_positions_a_layer_can_count(kernel, length):
    layer: Attention = EXAMPLE["counting_layer"](kernel)
    counted = layer(EXAMPLE["stream"](length))[0, :, EXAMPLE["FIRST"]]
    expected = 1 / torch.arange(1, length + 1, dtype=torch.float64)
    assert (counted - expected).abs().max() <= 1e-12


@pytest.mark.parametrize("kernel", [None, "reference"])
def test_without_a_first_token_it_cannot(kernel):
    counted = EXAMPLE["counting_layer"](kernel)(EXAMPLE["stream"](13, first=False))
    assert not counted.any()  # every position gives the same
