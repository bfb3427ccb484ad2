"""The decoder: its sizes, its options, its cache and its errors."""

import warnings

import pytest
import torch
from torch.nn import functional as F

import lookfar
from lookfar.attention.scheme import build_scheme
from lookfar.batch import consecutive
from lookfar.errors import UserError
from lookfar.model.decoder import hidden_width, layer_scheme, layer_window
from lookfar.sight import Sight
from test_laws import one_thread  # noqa: F401  # the fixture works by its name
from tolerance import assert_near

SMALL = {"vocabulary": 17, "width": 24, "layers": 2, "heads": 4, "context": 16, "hidden": 16, "device": "cpu"}


def build(seed=0, **settings):
    torch.manual_seed(seed)
    return lookfar.Decoder(lookfar.ModelConfig(**{**SMALL, **settings}))


def words(tokens=13, batch=2, seed=7):
    return torch.randint(17, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def count(**settings):
    return sum(each.numel() for each in build(**settings).parameters())


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("tokens", [1, 2, 13])
@pytest.mark.parametrize("scheme", ["rope", "learned", "kerple + dape_v2 + stable_mask", "t5 + differential"])
def test_tokens_become_logits(scheme, tokens, batch):
    model = build(scheme=scheme)
    logits = model(words(tokens, batch))
    assert logits.shape == (batch, tokens, 17) and logits.dtype == torch.float32
    states = model.states(words(tokens, batch))
    assert states.shape == (batch, tokens, 24)
    assert torch.equal(model.logits(states), logits)


EVERY = ["nope", *lookfar.names("methods"), "rope(scaling=dynamic, factor=2)", "kerple + dape_v2(repair=paper)"]
TRIPLES = ["rope + dape_v2 + stable_mask", "alibi + learned_sink + gate", "t5 + stable_mask + differential", "learned"]


@pytest.mark.parametrize("scheme", [*EVERY, *TRIPLES])
def test_the_last_states_alone_are_the_last_of_all(scheme):
    model = build(scheme=scheme, dtype="float64", layers=3)
    jolt(model)
    ways = {"consecutive": None, "shuffled": torch.randperm(13, generator=torch.Generator().manual_seed(1))[None]}
    for positions in ways.values():
        states = model.states(words(), positions=positions)
        for last in (1, 5, 13):
            assert_near(model.states(words(), positions=positions, last=last), states[:, -last:], f"{scheme} {last}")


@pytest.mark.parametrize("window", [1, 3, (None, 4), (4, None, 2), (2, 5, 3), 20])
@pytest.mark.parametrize("scheme", ["rope", "alibi + stable_mask", "kerple + dape_v2", "learned + differential_v2"])
def test_the_last_states_under_windows_are_the_last_of_all(scheme, window):
    model = build(scheme=scheme, window=window, dtype="float64", layers=3)
    jolt(model)
    states = model.states(words())
    for last in (1, 2, 7, 13):
        assert_near(model.states(words(), last=last), states[:, -last:], f"{scheme} {last}")


def test_the_last_states_of_documents_are_the_last_of_all():
    model = build(scheme="alibi + dape_v2", dtype="float64")
    documents = torch.tensor([[0] * 6 + [1] * 7, [-1] * 2 + [0] * 11])
    states = model.states(words(), documents=documents)
    assert_near(model.states(words(), documents=documents, last=3), states[:, -3:])


def test_the_last_states_cost_only_what_they_need(monkeypatch):
    model, rows = build(layers=3, window=(None, 4, 3)), []
    for block in model.blocks:
        block.feed_forward.register_forward_hook(lambda module, given, made: rows.append(made.shape[1]))
    model.states(words(), last=2)
    assert rows == [2 + 2 + 3, 2 + 2, 2]
    rows.clear()
    model.states(words())
    assert rows == [13, 13, 13]


@pytest.mark.parametrize("last", [0, 14])
def test_more_than_there_is_cannot_be_asked_for(last):
    with pytest.raises(UserError, match=f"last={last} asks for the last of 13 tokens"):
        build().states(words(), last=last)


def jolt(model):
    """Move every parameter, so that what starts at zero matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def plain(model, tokens):
    """The whole decoder written out once more: pre-norm blocks around causal attention, no positions."""
    config, x = model.config, model.embedding(tokens)
    for block in model.blocks:
        normed = F.rms_norm(x, (24,), block.attention_norm.weight, 1e-6)
        query, key, value = (
            each.unflatten(-1, (config.heads, -1)).transpose(1, 2)
            for each in (normed @ block.attention.project.weight.T).chunk(3, -1)
        )
        heads = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + heads.transpose(1, 2).flatten(2) @ block.attention.output.weight.T
        normed = F.rms_norm(x, (24,), block.feed_forward_norm.weight, 1e-6)
        gate, up = (normed @ block.feed_forward.up.weight.T).chunk(2, -1)
        x = x + (F.silu(gate) * up) @ block.feed_forward.down.weight.T
    return F.rms_norm(x, (24,), model.norm.weight, 1e-6) @ model.embedding.weight.T


def test_the_decoder_is_the_usual_one():
    model = build(scheme="nope", dtype="float64")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert_near(model(words()), plain(model, words()))


def test_a_tied_model_predicts_with_the_matrix_that_embeds():
    tied, own = build(), build(tied=False)
    assert tied.head is None and own.head.weight.shape == own.embedding.weight.shape
    assert count(tied=False) - count() == 17 * 24
    x = torch.randn(2, 24)
    assert_near(tied.logits(x), x @ tied.embedding.weight.T)
    assert_near(own.logits(x), x @ own.head.weight.T)
    own(words()).sum().backward()
    assert own.head.weight.grad.abs().sum() > 0 and own.embedding.weight.grad.abs().sum() > 0


def test_fewer_groups_mean_fewer_keys_and_values():
    model = build(groups=2)
    assert model.blocks[0].attention.project.weight.shape == (24 + 2 * 12, 24)
    assert count() - count(groups=2) == 2 * 2 * 12 * 24
    cache = model.cache(batch=2)
    model(words(), cache=cache)
    keys, values = cache.layers[0].append(torch.zeros(2, 2, 0, 6), torch.zeros(2, 2, 0, 6))
    assert keys.shape == values.shape == (2, 2, 13, 6)


def test_grouped_heads_are_heads_whose_keys_are_alike():
    grouped, full = build(groups=2, dtype="float64"), build(dtype="float64")
    with torch.no_grad():
        for parameter, target in zip(grouped.parameters(), full.parameters(), strict=True):
            if parameter.shape == target.shape:
                target.copy_(parameter)
        for few, many in zip(grouped.blocks, full.blocks, strict=True):
            queries, keys, values = few.attention.project.weight.split([24, 12, 12])
            twice = [each.unflatten(0, (2, 6)).repeat_interleave(2, 0).flatten(0, 1) for each in (keys, values)]
            many.attention.project.weight.copy_(torch.cat([queries, *twice]))
    assert_near(grouped(words()), full(words()))


@pytest.mark.parametrize(
    ("scheme", "extra"), [("differential", 2 * (4 * 6 + 2 * 6)), ("t5", 32 * 4), ("learned", 16 * 24)]
)
def test_a_scheme_adds_its_own_parameters_and_no_others(scheme, extra):
    assert count(scheme=scheme) - count(scheme="nope") == extra


def test_feed_forward_layers_have_the_usual_widths():
    def hidden(**settings):
        return hidden_width(lookfar.ModelConfig(**settings))

    assert hidden(width=768, activation="gelu") == 3072 and hidden(width=768) == 2048
    assert hidden(width=100) % 16 == 0 and hidden(width=4, heads=2) == 16
    assert hidden(width=768, hidden=5) == 5
    assert build(activation="gelu").blocks[0].feed_forward.up.weight.shape == (16, 24)
    assert build(activation="swiglu").blocks[0].feed_forward.up.weight.shape == (32, 24)


@pytest.mark.parametrize(("name", "function"), [("gelu", F.gelu), ("relu", F.relu)])
def test_plain_activations_are_themselves(name, function):
    layer, x = build(activation=name).blocks[0].feed_forward, torch.randn(2, 3, 24)
    assert_near(layer(x), function(x @ layer.up.weight.T) @ layer.down.weight.T)


def test_normed_queries_and_keys_forget_their_size():
    for normed in (True, False):
        model = build(qk_norm=normed, scheme="rope")
        before = model(words())
        with torch.no_grad():
            for block in model.blocks:
                block.attention.project.weight[: 2 * 24] *= 30
        assert torch.allclose(model(words()), before, atol=1e-3) == normed


def reach(model, tokens=13):
    """Which inputs each output token depends on."""
    matrix = torch.zeros(tokens, tokens, dtype=torch.bool)
    text = words(tokens, 1)
    whole = model(text)
    for place in range(tokens):
        changed = text.clone()
        changed[0, place] = (text[0, place] + 1) % 17
        matrix[:, place] = (model(changed) - whole).abs().amax(-1)[0] > 1e-9
    return matrix


@torch.no_grad()
@pytest.mark.parametrize(
    ("window", "sees"), [(None, 13), (4, 7), ((4, 2), 5), ((1, 1), 1), ((3, None), 13), ((99, 1), 13)]
)
def test_windows_limit_what_each_layer_sees(window, sees):
    place = torch.arange(13)
    behind = place[:, None] - place
    assert torch.equal(reach(build(window=window, dtype="float64")), (behind >= 0) & (behind < sees))


def test_patterns_cycle_over_the_layers():
    config = lookfar.ModelConfig(**{**SMALL, "layers": 5}, scheme=("rope", "nope + alibi"), window=(4, None, 2))
    assert [layer_scheme(config, layer) for layer in range(5)] == ["rope", "nope + alibi"] * 2 + ["rope"]
    assert [layer_window(config, layer) for layer in range(5)] == [4, None, 2, 4, None]
    model = lookfar.Decoder(config)
    assert [block.attention.scheme.expression for block in model.blocks] == ["rope", "alibi", "rope", "alibi", "rope"]
    assert model.windows == [4, None, 2, 4, None]
    assert model(words()).isfinite().all()


def test_each_layer_knows_its_place():
    starts = [block.attention.scheme.merges[0].start for block in build(scheme="differential", layers=3).blocks]
    assert [round(start, 4) for start in starts] == [0.2, 0.3555, 0.4707]


def test_one_pattern_encodes_the_embeddings_in_one_way():
    with pytest.raises(UserError, match="Learned and Sinusoidal cannot be combined in a pattern"):
        build(scheme=("learned", "sinusoidal"))
    model = build(scheme=("learned", "rope"))
    assert model.encoding is not None and model(words()).shape == (2, 13, 17)


@torch.no_grad()
def test_a_logit_soft_cap_bounds_logits_and_an_attention_soft_cap_bounds_scores():
    bare, logits, scores = build(), build(logit_soft_cap=0.5), build(attention_soft_cap=0.01)
    expected = bare(words())
    assert_near(logits(words()), 0.5 * torch.tanh(expected / 0.5))
    assert (scores(words()) - expected).abs().max() > 1e-3
    for block in bare.blocks:
        block.attention.project.weight[: 2 * 24] *= 1e-6
    assert torch.allclose(scores(words()), bare(words()), atol=0.05), "scores capped to nothing are equal scores"


@pytest.mark.parametrize("option", ["dropout", "embedding_dropout"])
def test_dropout_acts_in_training_only(option):
    model = build(**{option: 0.5})
    assert not torch.equal(model.train()(words()), model(words()))
    assert torch.equal(model.eval()(words()), model(words()))
    assert_near(model(words()), build()(words()))


CHANGES = {
    "vocabulary": 18,
    "width": 32,
    "layers": 3,
    "heads": 2,
    "groups": 2,
    "head_width": 8,
    "hidden": 32,
    "context": 20,
    "positions": 40,
    "scheme": "alibi",
    "window": 3,
    "activation": "gelu",
    "tied": False,
    "qk_norm": True,
    "slots": 3,
    "slot_positions": "shared",
    "slot_embeddings": "one",
    "dropout": 0.3,
    "embedding_dropout": 0.3,
    "attention_soft_cap": 0.5,
    "logit_soft_cap": 0.5,
    "device": "meta",
    "dtype": "float64",
}


@pytest.mark.parametrize("option", lookfar.ModelConfig.model_fields)
def test_every_option_changes_something(option):
    base = {"scheme": "learned"} if option in ("context", "positions") else {}
    base |= {"slots": 2, "scheme": "alibi"} if option.startswith("slot_") else {}
    seen = []
    for settings in (base, base, {**base, option: CHANGES[option]}):
        model = build(**settings)
        shapes = {name: (each.shape, each.dtype, each.device) for name, each in model.state_dict().items()}
        torch.manual_seed(1)
        tokens = words().to(model.embedding.weight.device)
        answer = None if tokens.is_meta else model(tokens).tolist()
        asked = None if model.slot_embedding is None else model.slot_states(tokens)[1].tolist()
        seen.append((shapes, answer, asked))
    assert seen[0] == seen[1], "the same settings give the same model"
    assert seen[0] != seen[2]


# Positions and documents


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["rope", "alibi", "kerple + dape_v2", "learned", "t5 + differential", "stable_mask"])
def test_packed_documents_are_documents_alone(scheme):
    model, tokens = build(scheme=scheme, dtype="float64"), words(12, 1)
    documents = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3])
    packed = model(tokens, documents=documents)
    for start, stop in ((0, 5), (5, 9), (9, 12)):
        assert_near(model(tokens[:, start:stop]), packed[:, start:stop], f"from {start}")
    given = model(tokens, documents=documents, positions=consecutive(documents))
    assert_near(given, packed)


@torch.no_grad()
@pytest.mark.parametrize(
    ("scheme", "same"), [("rope", True), ("alibi", True), ("stable_mask", False), ("learned", False)]
)
def test_positions_feed_methods(scheme, same):
    model, tokens = build(scheme=scheme, dtype="float64", positions=64), words()
    shifted = model(tokens, positions=torch.arange(13)[None] + 9)
    assert torch.allclose(shifted, model(tokens), atol=1e-9) == same, "a relative method does not see a shift"
    stretched = model(tokens, positions=torch.arange(13)[None] * 2)
    assert not torch.allclose(stretched, model(tokens), atol=1e-9)


@torch.no_grad()
def test_a_sight_stands_for_positions_documents_and_windows():
    model, tokens = build(dtype="float64", window=4), words()
    narrow = build(dtype="float64", window=2)
    assert_near(model(tokens, sight=Sight.causal(13, window=2)), narrow(tokens))
    assert_near(model(tokens, sight=Sight.causal(13)), build(dtype="float64")(tokens))


# The cache


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 5, 256])
def test_a_cache_grows_when_it_is_full(length):
    model, tokens = build(scheme="alibi", dtype="float64"), words(40)
    cache = model.cache(batch=2, length=length)
    pieces = [model(tokens[:, place : place + 5], cache=cache) for place in range(0, 40, 5)]
    assert_near(torch.cat(pieces, 1), model(tokens))
    assert cache.length == 40


@torch.no_grad()
def test_a_cache_remembers_positions_and_documents():
    model, tokens = build(scheme="rope + alibi + stable_mask", dtype="float64"), words()
    positions = torch.tensor([[5, 3, 3, 9, 1, 0, 2, 8, 8, 4, 6, 7, 11]])
    documents = torch.tensor([[0, 0, 1, 0, 1, 1, 0, 2, 2, 0, -1, 1, 0]] * 2)
    for given in ({"positions": positions}, {"documents": documents}, {"positions": positions, "documents": documents}):
        cache = model.cache(batch=2)
        pieces = []
        for start, stop in ((0, 4), (4, 5), (5, 11), (11, 13)):
            part = {name: each[:, start:stop] for name, each in given.items()}
            pieces.append(model(tokens[:, start:stop], cache=cache, **part))
        assert_near(torch.cat(pieces, 1), model(tokens, **given), str(sorted(given)))


@torch.no_grad()
def test_documents_may_come_late():
    """What was cached without documents belongs to document 0."""
    model, tokens = build(scheme="alibi", dtype="float64"), words()
    cache = model.cache(batch=2)
    first = model(tokens[:, :6], cache=cache)
    documents = torch.tensor([[0, 0, 1, 1, 0, 1, 0]] * 2)
    second = model(tokens[:, 6:], documents=documents, cache=cache)
    together = torch.cat([torch.zeros(2, 6, dtype=torch.long), documents], 1)
    assert_near(torch.cat([first, second], 1), model(tokens, documents=together))


def test_a_cache_of_another_batch_is_refused():
    model = build()
    with pytest.raises(UserError, match="This cache holds 2 sequences; the call has 1"):
        model(words(batch=1), cache=model.cache(batch=2))


@torch.no_grad()
def test_decoding_under_autocast_is_the_full_pass_under_autocast():
    model, tokens = build(scheme="alibi"), words()
    with torch.autocast("cpu", torch.bfloat16):
        cache = model.cache(batch=2)
        pieces = [model(tokens[:, :7], cache=cache), model(tokens[:, 7:], cache=cache)]
        assert_near(torch.cat(pieces, 1), model(tokens))


def test_normed_queries_and_keys_do_not_warn_under_autocast():
    with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16):
        warnings.simplefilter("error")
        build(qk_norm=True)(words())


# Types, devices and other mistakes


@pytest.mark.parametrize("scheme", lookfar.names("methods"))
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_a_model_computes_in_the_type_it_is_given(dtype, scheme):
    model = build(scheme=f"{scheme} + stable_mask", dtype=dtype, qk_norm=True, window=(None, 3), groups=2)
    kind = getattr(torch, dtype)
    logits = model(words())
    assert logits.dtype == model.embedding.weight.dtype == kind and logits.isfinite().all()
    logits.sum().backward()
    with torch.no_grad():
        cache = model.cache(batch=2)
        pieces = [model(words()[:, :5], cache=cache), model(words()[:, 5:], cache=cache)]
    assert_near(torch.cat(pieces, 1), logits)


def test_bfloat16_is_near_float32():
    exact = build()
    narrow = build(dtype="bfloat16")
    assert (exact(words()) - narrow(words()).float()).abs().max() < 0.1
    assert not torch.equal(exact(words()), narrow(words()).float())


@pytest.mark.parametrize("device", ["tpu", "cuda:77", "nonsense", ""])
def test_a_device_that_is_not_there_is_told(device):
    with pytest.raises(UserError, match=f"There is no device '{device}' here .*; try device='auto'"):
        build(device=device)


def test_auto_is_a_device_that_is_there():
    assert build(device="auto").embedding.weight.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_decoder_needs_a_vocabulary():
    with pytest.raises(UserError, match=r"needs model\.vocabulary; for bytes it is 256"):
        build(vocabulary=None)


def test_a_learned_table_does_not_reach_beyond_its_end():
    model = build(scheme="learned", context=8)
    assert model.farthest == 8 and model(words(8)).shape == (2, 8, 17)
    with pytest.raises(UserError, match=r"13 tokens are more than the 8 positions .* model\.positions=13"):
        model(words())
    cache = model.cache(batch=2)
    model(words(8), cache=cache)
    with pytest.raises(UserError, match="9 tokens are more than the 8 positions"):
        model(words(1), cache=cache)
    with pytest.raises(UserError, match="9 tokens are more than the 8 positions"):
        model(words(8), positions=torch.arange(8)[None] + 1)
    documents = torch.tensor([[0] * 7 + [1] * 6] * 2)
    assert model(words(), documents=documents).shape == (2, 13, 17), "each document is short enough"
    assert build(scheme="learned", context=8, positions=13)(words()).shape == (2, 13, 17)
    assert build(scheme="alibi").farthest is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 5}, r"heads \(5\) must divide width \(24\)"),
        ({"groups": 3}, r"groups \(3\) must divide heads \(4\)"),
        ({"positions": 3}, r"positions \(3\) must be at least context \(16\)"),
        ({"head_width": 5, "scheme": "rope"}, r"head_width \(5\) must be even"),
        ({"groups": 1, "scheme": "differential"}, "both must be even"),
        ({"scheme": "alibbi"}, "Did you mean 'alibi'"),
        ({"scheme": ("rope", "learned + sinusoidal")}, "'learned' and 'sinusoidal' cannot be combined"),
        ({"dtype": "float8"}, "dtype"),
        ({"dropout": 1.0}, "dropout"),
        ({"window": 0}, "window"),
        ({"window": (4, 0)}, "window"),
        ({"logit_soft_cap": 0}, "logit_soft_cap"),
    ],
)
def test_settings_that_do_not_fit_are_told(settings, message):
    with pytest.raises(UserError, match=message):
        build(**settings)


# The layer on its own


@torch.no_grad()
def test_an_attention_layer_stands_alone():
    torch.manual_seed(0)
    layer = lookfar.Attention(24, 4, scheme="rope + differential", groups=2, window=5, qk_norm=True).double()
    x = torch.randn(2, 13, 24, dtype=torch.float64)
    whole = layer(x)
    assert whole.shape == x.shape
    assert_near(layer(x, sight=Sight.causal(13, window=5)), whole)
    assert (layer(x, sight=Sight.causal(13)) - whole).abs().max() > 1e-3
    for rows in (1, 6):
        assert_near(layer(x[:, :rows]), whole[:, :rows])


@torch.no_grad()
def test_an_attention_layer_decodes_with_a_cache_of_its_own():
    from lookfar.model.cache import LayerCache

    torch.manual_seed(0)
    layer = lookfar.Attention(24, 4, scheme="alibi + stable_mask", window=5).double()
    x = torch.randn(2, 13, 24, dtype=torch.float64)
    cache = LayerCache(layer.scheme.heads, 2, 3, torch.device("cpu"))
    pieces = [layer(x[:, start:stop], cache=cache) for start, stop in ((0, 2), (2, 9), (9, 10), (10, 13))]
    assert_near(torch.cat(pieces, 1), layer(x))


def test_an_attention_layer_takes_a_built_scheme_and_a_kernel():
    scheme = build_scheme("kerple", heads=4, width=24)
    layer = lookfar.Attention(24, 4, scheme=scheme, kernel="sdpa")
    assert layer.scheme is scheme
    with pytest.raises(UserError, match="The kernel sdpa does not take this call"):
        layer(torch.randn(1, 3, 24))


@pytest.mark.parametrize("first", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("second", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_cache_can_be_filled_in_one_mode_and_read_in_another(first, second, frozen):
    model = build(groups=2, dtype="float64").requires_grad_(not frozen)
    cache = model.cache(batch=2, length=32)
    with first():
        model(words()[:, :7], cache=cache)
    with second():
        got = [model(words()[:, 7:9], cache=cache), model(words()[:, 9:], cache=cache)]
    assert_near(torch.cat([each.detach() for each in got], dim=1), model(words())[:, 7:].detach())
    if second is torch.enable_grad and not frozen:
        got[-1].sum().backward()
        assert all(torch.isfinite(each.grad).all() for each in model.parameters() if each.grad is not None)
