"""lookfar against packages that anyone can install: with a peer's weights, the same outputs and the same gradients.

Peers compute norms, angles and softmax in float32, whatever the type of their weights. `in_double` lets that name mean
float64 while a peer is built and run, so that the comparison is as tight as any; one test runs its peer in float32.
"""

import warnings
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch.nn import functional as F

import lookfar
from lookfar.attention.scheme import build_scheme, parse
from lookfar.batch import consecutive
from lookfar.model.attention import Attention
from lookfar.model.generate import Sampling, generate
from lookfar.sight import Sight
from tolerance import assert_near

transformers = pytest.importorskip("transformers")
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)  # used at its import
    x_transformers = pytest.importorskip("x_transformers").x_transformers

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402  # after the skip
from transformers.models.t5.modeling_t5 import T5Attention  # noqa: E402

TOKENS = 13
PADDING = torch.tensor([[0] * 4 + [1] * 9, [1] * 13, [0] * 12 + [1]])  # on the left; 1 is a token
HOLES = torch.tensor([[0, 1, 1, 0, 0, 1, 0, 1, 1, 1, 0, 1, 1], [1] * 12 + [0], [0] * 7 + [1] * 6])


@contextmanager
def in_double():
    """Let float32 mean float64, by name and by default."""
    usual = torch.get_default_dtype()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(usual)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens():
    return torch.randint(61, (3, TOKENS), generator=torch.Generator().manual_seed(5))


def peer(make, *arguments, **settings):
    """A peer whose weights are large enough that its attention is far from uniform."""
    with in_double():
        model = make(*arguments, **settings).double().eval()
    with torch.no_grad():
        for place, (name, parameter) in enumerate(model.named_parameters()):
            draw = noise(*parameter.shape, seed=place)
            if parameter.ndim > 1:
                parameter.copy_(1.5 * draw * parameter.shape[-1] ** -0.5)
            elif not name.endswith("bias"):  # lookfar's maps have none
                parameter.add_(0.3 * draw)
    return model


def layer(scheme, *, width, heads, **site):
    """One attention layer of lookfar in float64; slopes too are as exact as a peer's."""
    parse(scheme)  # imports the methods while float32 is still itself
    with in_double():
        return Attention(width, heads, scheme=build_scheme(scheme, heads=heads, width=width, **site)).double()


def sight(mask=None, positions=None, window=None):
    """What a peer's mask of tokens (1) and padding (0) lets each query see."""
    if mask is None:
        return Sight.causal(TOKENS, positions=positions, window=window)
    documents = mask - 1
    return Sight.causal(TOKENS, positions=consecutive(documents), documents=documents, window=window)


def recorded(model, ends, *inputs, **settings):
    """Run a peer; what the first map of each attention module reads, and what its last map gives."""
    seen = {}

    def keep(module, inputs, output):
        seen[module] = inputs[0], output

    handles = [each.register_forward_hook(keep) for pair in ends for each in pair]
    with in_double():
        model(*inputs, **settings)
    for handle in handles:
        handle.remove()
    return [(seen[first][0], seen[last][1]) for first, last in ends]


def assert_same(own, translate, named, reads, gives, sight, mask=None):
    """With the peer's weights, the layer gives what the peer gives and has its gradients, at every token."""
    own.load_state_dict({**own.state_dict(), **translate({name: each.detach() for name, each in named.items()})})
    own_reads = reads.detach().requires_grad_()
    own_gives = own(own_reads, sight=sight)
    kept = torch.ones(gives.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    assert_near(own_gives[kept], gives[kept], "outputs")
    pull = noise(*gives.shape, seed=7) * kept[..., None]
    found = torch.autograd.grad((own_gives * pull).sum(), [own_reads, *own.parameters()])
    wanted = torch.autograd.grad((gives * pull).sum(), [reads, *named.values()], retain_graph=True, allow_unused=True)
    assert_near(found[0], wanted[0], "gradient of the input")
    expected = translate(dict(zip(named, wanted[1:], strict=True)))
    assert expected, "no weight was compared"
    for (name, _), gradient in zip(own.named_parameters(), found[1:], strict=True):
        if name in expected:
            assert_near(gradient, expected[name], name)


def separate(named, names="q_proj k_proj v_proj o_proj"):
    """lookfar's names for four maps that a peer keeps apart."""
    *projections, output = (named[f"{name}.weight"] for name in names.split())
    return {"project.weight": torch.cat(projections), "output.weight": output}


def joined(named, heads, project, output):
    """lookfar's names for maps whose rows are head by head, each with its query, key and value."""
    weight = named[f"{project}.weight"].unflatten(0, (heads, 3, -1))  # (h 3 e) d -> h 3 e d
    return {"project.weight": weight.transpose(0, 1).flatten(0, 2), "output.weight": named[f"{output}.weight"]}


# x-transformers: query head h uses key head h mod groups, so that its heads are lookfar's in another order


def x_heads(weight, heads, groups, axis=0):
    """From a peer's order of query heads, [head of a group, group], to [group, head of a group]."""
    return weight.unflatten(axis, (heads // groups, groups, -1)).transpose(axis, axis + 1).flatten(axis, axis + 2)


def x_translated(named, heads, groups, more):
    queries = x_heads(named["to_q.weight"], heads, groups)
    return {
        "project.weight": torch.cat([queries, named["to_k.weight"], named["to_v.weight"]]),
        "output.weight": x_heads(named["to_out.weight"], heads, groups, axis=1),
        **{own: take(named) for own, take in more.items()},
    }


def assert_x_transformers(
    scheme,
    *,
    heads=4,
    groups=4,
    mask=None,
    soft_cap=None,
    window=None,
    more=None,
    call=None,
    settings=None,
    numbers=None,
):
    """`call` are arguments of the peer's forward, `more` says where the parameters of a method are in the peer."""
    call = {} if call is None else call
    attention = peer(
        x_transformers.Attention, dim=20, dim_head=8, heads=heads, kv_heads=groups, causal=True, **(settings or {})
    )
    named = dict(attention.named_parameters())
    if isinstance(call.get("rel_pos"), torch.nn.Module):
        named |= dict(call["rel_pos"].named_parameters())
    x = noise(3, TOKENS, 20, seed=3).requires_grad_()
    with in_double():
        gives = attention(x, mask=None if mask is None else mask.bool(), **call)
    own = layer(scheme, width=20, heads=heads, groups=groups, head_width=8, soft_cap=soft_cap)
    translate = partial(x_translated, heads=heads, groups=groups, more=more or {})
    assert_same(own, translate, named, x, gives, sight(mask, positions=numbers, window=window), mask)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 6), (12, 12), (4, 2), (6, 1)])
def test_alibi_is_that_of_x_transformers(heads, groups):
    slopes = torch.tensor(x_transformers.AlibiPositionalBias._get_slopes(heads), dtype=torch.float64)
    slopes = slopes.view(groups, heads // groups).T.flatten()  # a slope goes with its head
    alibi = peer(x_transformers.AlibiPositionalBias, heads=heads, slopes=slopes.tolist())
    assert_x_transformers("alibi", heads=heads, groups=groups, call={"rel_pos": alibi})


def test_alibi_at_any_positions_is_that_of_x_transformers():
    numbers = torch.tensor([[0, 1, 2, 3, 7, 20, 21, 22, 40, 41, 400, 500, 511]])
    alibi = peer(x_transformers.AlibiPositionalBias, heads=4)
    assert_x_transformers("alibi", numbers=numbers, call={"rel_pos": alibi, "pos": numbers[0]})


@pytest.mark.parametrize("groups", [4, 2])
def test_t5_with_a_multiplied_table_is_the_relative_bias_of_x_transformers(groups):
    bias = peer(x_transformers.RelativePositionBias, scale=8**0.5, causal=True, num_buckets=6, max_distance=11, heads=4)
    table = {"scheme.methods.0.table": lambda named: x_heads(named["relative_attention_bias.weight"], 4, groups, 1)}
    scheme = "t5(buckets=6, farthest=11, scale=multiplied)"
    assert_x_transformers(scheme, groups=groups, more=table, call={"rel_pos": bias})


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize(
    ("width", "settings", "scheme"),
    [
        (4, {}, "rope(fraction=0.5, layout=interleaved)"),
        (8, {"base": 500.0}, "rope(base=500, layout=interleaved)"),
        (8, {"interpolation_factor": 4.0}, "rope(layout=interleaved, scaling=pi, factor=4)"),
        (8, {"base_rescale_factor": 4.0}, "rope(layout=interleaved, scaling=ntk, factor=4)"),
    ],
)
def test_rope_is_the_rotary_embedding_of_x_transformers(groups, width, settings, scheme):
    rotary = peer(x_transformers.RotaryEmbedding, width, **settings)
    assert_x_transformers(scheme, groups=groups, call={"rotary_pos_emb": rotary.forward_from_seq_len(TOKENS)})


@pytest.mark.parametrize("mask", [None, HOLES])
@pytest.mark.parametrize("groups", [4, 2])
def test_a_learned_sink_is_the_first_column_of_x_transformers(groups, mask):
    sink = {"scheme.methods.0.value": lambda named: x_heads(named["attend.head_attn_sink"], 4, groups)}
    assert_x_transformers("learned_sink", groups=groups, mask=mask, more=sink, settings={"head_learned_sink": True})


@pytest.mark.parametrize("mask", [None, HOLES])
def test_a_fixed_sink_of_nought_is_a_key_and_value_of_noughts(mask):
    assert_x_transformers("learned_sink(learned=false)", mask=mask, settings={"add_zero_kv": True})


@pytest.mark.parametrize("mask", [None, HOLES])
@pytest.mark.parametrize("groups", [4, 1])
def test_cope_is_that_of_x_transformers(groups, mask):
    table = {"scheme.methods.0.embedding": lambda named: named["attend.cope.pos_emb"].T}
    settings = {"use_cope": True, "cope_max_pos": 5}
    assert_x_transformers("cope(positions=5)", groups=groups, mask=mask, more=table, settings=settings)


def test_a_soft_cap_is_that_of_x_transformers():
    settings = {"softclamp_logits": True, "logit_softclamp_value": 0.7}
    assert_x_transformers("nope", soft_cap=0.7, settings=settings)


def test_a_window_is_that_of_x_transformers():
    alibi = peer(x_transformers.AlibiPositionalBias, heads=4)
    assert_x_transformers("alibi", window=4, settings={"max_attend_past": 3}, call={"rel_pos": alibi})


@pytest.mark.parametrize("per", ["head", "feature"])
@pytest.mark.parametrize("groups", [4, 2])
def test_a_gate_is_that_of_x_transformers(groups, per):
    gate = {"scheme.methods.0.project.weight": lambda named: x_heads(named["to_v_gate.weight"], 4, groups)}
    settings = {"gate_values": True, "gate_values_headwise": per == "head"}
    assert_x_transformers(f"gate(per={per})", groups=groups, more=gate, settings=settings)


def test_sinusoidal_is_the_scaled_embedding_of_x_transformers():
    sinusoids = peer(x_transformers.ScaledSinusoidalEmbedding, 6)
    own = build_scheme("sinusoidal(scaled=false)", heads=1, head_width=6).methods[0]
    x, positions = noise(2, TOKENS, 6), torch.arange(300, 300 + TOKENS)
    with torch.no_grad():
        expected = x + sinusoids(x, pos=positions) / sinusoids.scale
    assert_near(own.encode(x, positions[None]), expected)


# Llama and its like: whole models


def family(name, **settings):
    """A small model of a family."""
    config = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        **settings,
    }
    return peer(getattr(transformers, f"{name}ForCausalLM"), getattr(transformers, f"{name}Config")(**config))


def decoder(model, dtype="float64", **settings):
    """The decoder with the peer's sizes and weights."""
    config = model.config
    own = lookfar.Decoder(
        lookfar.ModelConfig(
            vocabulary=config.vocab_size,
            width=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            groups=config.num_key_value_heads,
            head_width=getattr(config, "head_dim", None),
            hidden=config.intermediate_size,
            tied=config.tie_word_embeddings,
            device="cpu",
            dtype=dtype,
            **settings,
        )
    )
    own.load_state_dict(whole(dict(model.named_parameters())))
    return own


def whole(named):
    """lookfar's names for the weights of a model of Llama's kind, or for their gradients."""
    renamed = {"embedding.weight": named["model.embed_tokens.weight"], "norm.weight": named["model.norm.weight"]}
    if "lm_head.weight" in named:
        renamed["head.weight"] = named["lm_head.weight"]
    for place in range(sum(name.endswith("mlp.up_proj.weight") for name in named)):
        start, own = f"model.layers.{place}.", f"blocks.{place}."
        part = {name.removeprefix(start): each for name, each in named.items() if name.startswith(start)}
        attention = {name.removeprefix("self_attn."): each for name, each in part.items()}
        renamed |= {f"{own}attention.{name}": each for name, each in separate(attention).items()}
        renamed |= {
            f"{own}attention_norm.weight": part["input_layernorm.weight"],
            f"{own}feed_forward_norm.weight": part["post_attention_layernorm.weight"],
            f"{own}feed_forward.up.weight": torch.cat([part["mlp.gate_proj.weight"], part["mlp.up_proj.weight"]]),
            f"{own}feed_forward.down.weight": part["mlp.down_proj.weight"],
        }
        if "self_attn.q_norm.weight" in part:
            renamed[f"{own}attention.query_norm.weight"] = part["self_attn.q_norm.weight"]
            renamed[f"{own}attention.key_norm.weight"] = part["self_attn.k_norm.weight"]
    return renamed


def assert_whole(model, own, mask=None):
    """Logits, loss and the gradient of every weight are the same."""
    given = tokens()
    labels = given.clone()
    if mask is not None:
        labels[:, 1:][mask[:, :-1] == 0] = -100  # what a peer predicts from padding is of no use
    with in_double():
        answer = model(given, attention_mask=mask, labels=labels, use_cache=False)
    answer.loss.backward()
    logits = own(given, documents=None if mask is None else mask - 1)
    kept = torch.ones_like(given, dtype=torch.bool) if mask is None else mask.bool()
    assert_near(logits[kept], answer.logits[kept].detach(), "logits")
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    assert_near(loss, answer.loss.detach(), "loss")
    expected = whole({name: each.grad for name, each in model.named_parameters()})
    for name, parameter in own.named_parameters():
        assert_near(parameter.grad, expected.pop(name), name)
    assert not expected


@pytest.mark.parametrize("mask", [None, PADDING])
@pytest.mark.parametrize(("groups", "tied"), [(4, False), (2, False), (1, True)])
def test_a_decoder_with_rope_is_llama(groups, tied, mask):
    model = family("Llama", num_key_value_heads=groups, tie_word_embeddings=tied)
    assert_whole(model, decoder(model, scheme="rope"), mask)


@torch.no_grad()
def test_a_decoder_with_rope_is_llama_in_float32():
    model = family("Llama").float()
    own = decoder(model, dtype="float32", scheme="rope")
    assert_near(own(tokens()), model(tokens()).logits)


@pytest.mark.parametrize(
    ("scaling", "scheme"),
    [
        ({"rope_type": "default", "rope_theta": 500.0}, "rope(base=500)"),
        ({"rope_type": "linear", "factor": 4.0}, "rope(scaling=pi, factor=4)"),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            "rope(scaling=llama3, factor=8, original=64)",
        ),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
            "rope(scaling=yarn, factor=4, original=64)",
        ),
    ],
)
def test_a_scaled_rope_is_llamas(scaling, scheme):
    model = family("Llama", hidden_size=64, rope_parameters={"rope_theta": 10000.0, **scaling})
    assert_whole(model, decoder(model, scheme=scheme))


def frequencies(base, width, **scaling):
    """The frequencies that transformers computes, and by how much queries and keys grow."""
    config = transformers.LlamaConfig(
        hidden_size=width,
        num_attention_heads=1,
        max_position_embeddings=1 << 17,
        rope_parameters={"rope_theta": base, **scaling},
    )
    with in_double():
        return ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, seq_len=1 << 19)


def own_frequencies(base, width, settings):
    rope = build_scheme(f"rope(base={base}, {settings})", heads=1, head_width=width).methods[0]
    return torch.tensor(rope.frequencies, dtype=torch.float64), rope.growth


@pytest.mark.parametrize("width", [8, 64, 128])
@pytest.mark.parametrize(("base", "original"), [(1e4, 64), (1e4, 2048), (1e4, 4096), (5e5, 8192), (1e6, 32768)])
def test_yarn_and_llama3_have_the_frequencies_of_transformers(base, original, width):
    common = {"factor": 4.0, "original_max_position_embeddings": original}
    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    for name, more in (("yarn", {}), ("llama3", llama3)):
        expected, growth = frequencies(base, width, rope_type=name, **common, **more)
        found, own_growth = own_frequencies(base, width, f"scaling={name}, factor=4, original={original}")
        assert ((found - expected) / expected).abs().max() < 1e-12, name
        assert own_growth == pytest.approx(growth)


@pytest.mark.parametrize(("base", "original", "width"), [(1e4, 65536, 128), (1e4, 8192, 8), (5e5, 131072, 8)])
def test_yarn_has_the_frequencies_of_transformers_where_all_waves_turn_often(base, original, width):
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": original}
    expected, _ = frequencies(base, width, **scaling)
    found, _ = own_frequencies(base, width, f"scaling=yarn, factor=4, original={original}")
    assert ((found - expected) / expected).abs().max() < 1e-12


@pytest.mark.parametrize("width", [8, 64])
def test_ntk_is_the_dynamic_scaling_of_transformers_at_one_length(width):
    """At n times its length, here 4, the dynamic form with factor f is the static form with factor f · n - (f - 1)."""
    expected, growth = frequencies(10000.0, width, rope_type="dynamic", factor=2.0)
    found, own_growth = own_frequencies(10000.0, width, "scaling=ntk, factor=7")
    assert ((found - expected) / expected).abs().max() < 1e-12
    assert (growth, own_growth) == (1, 1)


@pytest.mark.parametrize("mask", [None, PADDING])
@pytest.mark.parametrize(
    ("name", "settings", "own"),
    [
        ("Mistral", {"sliding_window": 5}, {"window": 5}),
        ("Qwen3", {"head_dim": 6}, {"qk_norm": True}),
        ("SmolLM3", {"no_rope_layer_interval": 2, "no_rope_layers": None}, {"scheme": ("rope", "nope")}),
    ],
    ids=["a window is Mistral's", "normed queries are Qwen3's", "a pattern is SmolLM3's"],
)
def test_an_option_of_the_decoder_is_that_of_a_known_model(name, settings, own, mask):
    model = family(name, **settings)
    assert_whole(model, decoder(model, **own), mask)


@torch.no_grad()
def test_cached_logits_are_llamas_full_logits():
    model, given = family("Llama"), tokens()
    own = decoder(model, scheme="rope")
    with in_double():
        expected = model(given, use_cache=False).logits
    cache, found = own.cache(batch=len(given), length=4), []
    for start, stop in ((0, 5), (5, 6), (6, 7), (7, 11), (11, TOKENS)):
        found.append(own(given[:, start:stop], cache=cache))
    assert_near(torch.cat(found, dim=1), expected)


@torch.no_grad()
def test_prompts_of_unequal_length_are_continued_as_by_llama():
    model, given = family("Llama", pad_token_id=0), tokens()
    with in_double():
        expected = model.generate(given, attention_mask=PADDING, do_sample=False, max_new_tokens=9)[:, TOKENS:]
    prompts = [line[kept.bool()].tolist() for line, kept in zip(given, PADDING, strict=True)]
    assert generate(decoder(model), prompts, tokens=9, sampling=Sampling(temperature=0.0)) == expected.tolist()


# Other models: each of their attention modules, in their own forward pass


@pytest.mark.parametrize("mask", [None, PADDING, HOLES])
@pytest.mark.parametrize("heads", [4, 6, 12])
def test_alibi_is_blooms(heads, mask):
    """Bloom adds slope · key position, which differs by a constant of the row; padding does not count in either."""
    config = transformers.BloomConfig(vocab_size=61, hidden_size=4 * heads, n_layer=2, n_head=heads)
    model = peer(transformers.BloomForCausalLM, config)
    modules = [block.self_attention for block in model.transformer.h]
    ends = [(each.query_key_value, each.dense) for each in modules]
    runs = recorded(model, ends, tokens(), attention_mask=mask, use_cache=False)
    translate = partial(joined, heads=heads, project="query_key_value", output="dense")
    for module, (reads, gives) in zip(modules, runs, strict=True):
        own = layer("alibi", width=4 * heads, heads=heads)
        assert_same(own, translate, dict(module.named_parameters()), reads, gives, sight(mask), mask)


@pytest.mark.parametrize("mask", [None, PADDING])
@pytest.mark.parametrize("heads", [4, 6, 12])
def test_alibi_is_mpts(heads, mask):
    config = transformers.MptConfig(vocab_size=61, d_model=4 * heads, n_layers=2, n_heads=heads, max_seq_len=40)
    model = peer(transformers.MptForCausalLM, config)
    modules = [block.attn for block in model.transformer.blocks]
    ends = [(each.Wqkv, each.out_proj) for each in modules]
    runs = recorded(model, ends, tokens(), attention_mask=mask, use_cache=False)

    def translate(named):
        return {"project.weight": named["Wqkv.weight"], "output.weight": named["out_proj.weight"]}

    for module, (reads, gives) in zip(modules, runs, strict=True):
        own = layer("alibi", width=4 * heads, heads=heads)
        assert_same(own, translate, dict(module.named_parameters()), reads, gives, sight(mask), mask)


@pytest.mark.parametrize("mask", [None, PADDING])
def test_t5_with_unscaled_scores_is_t5s(mask):
    config = transformers.T5Config(
        vocab_size=61,
        d_model=20,
        d_kv=6,
        d_ff=16,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=6,
        relative_attention_max_distance=11,
        decoder_start_token_id=0,
    )
    model = peer(transformers.T5ForConditionalGeneration, config)
    modules = [block.layer[0].SelfAttention for block in model.decoder.block]
    ends = [(each.q, each.o) for each in modules]
    runs = recorded(
        model,
        ends,
        tokens(),
        decoder_input_ids=tokens(),
        decoder_attention_mask=mask,
        use_cache=False,
    )
    shared = {}
    for place, (module, (reads, gives)) in enumerate(zip(modules, runs, strict=True)):
        scheme = "t5(buckets=6, farthest=11, scale=original)"
        own = layer(scheme, width=20, heads=4, head_width=6, layer=place, layers=2, shared=shared)

        def translate(named):
            table = {} if len(named) == 4 else {"scheme.methods.0.table": named["relative_attention_bias.weight"]}
            return {**separate(named, "q k v o"), **table}  # the first layer has the table of all

        assert_same(own, translate, dict(module.named_parameters()), reads, gives, sight(mask), mask)


@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (8, 20), (9, 50), (64, 1000)])
def test_t5_has_the_buckets_of_both_peers(buckets, farthest):
    distances = torch.arange(-20, 3 * farthest)
    own = build_scheme(f"t5(buckets={buckets}, farthest={farthest})", heads=1).methods[0].bucket(distances)
    sizes = {"num_buckets": buckets, "max_distance": farthest}
    theirs = T5Attention._relative_position_bucket(-distances, bidirectional=False, **sizes)
    assert own.tolist() == theirs.tolist()
    theirs = x_transformers.RelativePositionBias._relative_position_bucket(-distances, causal=True, **sizes)
    assert own.tolist() == theirs.tolist()


@pytest.mark.parametrize("mask", [None, PADDING])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (8, 4), (8, 2), (2, 2)])
def test_differential_is_diff_llamas(heads, groups, mask):
    """DiffLlama joins value heads m and m + groups/2, has no weight in its head norm and keeps its vectors apart."""
    config = transformers.DiffLlamaConfig(
        vocab_size=61,
        hidden_size=6 * heads,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        rms_norm_eps=1e-5,
        pad_token_id=None,
    )
    model = peer(transformers.DiffLlamaForCausalLM, config)
    modules = [block.self_attn for block in model.model.layers]
    runs = recorded(model, [(each.q_proj, each.o_proj) for each in modules], tokens(), attention_mask=mask)

    def translate(named):
        values = named["v_proj.weight"].unflatten(0, (2, groups // 2, 6)).transpose(0, 1).flatten(0, 2)
        vectors = torch.stack([named[f"lambda_{each}"] for each in ("q1", "k1", "q2", "k2")])
        return {**separate({**named, "v_proj.weight": values}), "scheme.methods.1.vectors": vectors}

    for place, (module, (reads, gives)) in enumerate(zip(modules, runs, strict=True)):
        own = layer("rope + differential", width=6 * heads, heads=heads, groups=groups, layer=place, layers=3)
        assert_same(own, translate, dict(module.named_parameters()), reads, gives, sight(mask), mask)


@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_rope_of_a_fraction_is_gpt_neoxs(fraction):
    config = transformers.GPTNeoXConfig(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=16,
        attention_bias=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": fraction},
    )
    model = peer(transformers.GPTNeoXForCausalLM, config)
    modules = [block.attention for block in model.gpt_neox.layers]
    runs = recorded(model, [(each.query_key_value, each.dense) for each in modules], tokens())
    translate = partial(joined, heads=4, project="query_key_value", output="dense")
    for module, (reads, gives) in zip(modules, runs, strict=True):
        own = layer(f"rope(fraction={fraction})", width=32, heads=4)
        assert_same(own, translate, dict(module.named_parameters()), reads, gives, sight())


def test_interleaved_rope_is_gpt_js():
    config = transformers.GPTJConfig(vocab_size=61, n_positions=40, n_embd=32, n_layer=2, n_head=4, rotary_dim=6)
    model = peer(transformers.GPTJForCausalLM, config)
    modules = [block.attn for block in model.transformer.h]
    runs = recorded(model, [(each.q_proj, each.out_proj) for each in modules], tokens())
    translate = partial(separate, names="q_proj k_proj v_proj out_proj")
    for module, (reads, gives) in zip(modules, runs, strict=True):
        own = layer("rope(layout=interleaved, fraction=0.75)", width=32, heads=4)
        assert_same(own, translate, dict(module.named_parameters()), reads, gives, sight())


GROUPED = {  # the sizes of models whose heads share keys and values
    "vocab_size": 61,
    "hidden_size": 20,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
}


@pytest.mark.parametrize("mask", [None, PADDING])
def test_a_soft_cap_and_windows_in_turn_are_gemma_2s(mask):
    config = transformers.Gemma2Config(
        **GROUPED,
        query_pre_attn_scalar=6,
        attn_logit_softcapping=0.8,
        sliding_window=5,
        attn_implementation="eager",  # the only one with a soft cap
    )
    model = peer(transformers.Gemma2ForCausalLM, config)
    modules = [block.self_attn for block in model.model.layers]
    runs = recorded(model, [(each.q_proj, each.o_proj) for each in modules], tokens(), attention_mask=mask)
    for module, window, (reads, gives) in zip(modules, (5, None), runs, strict=True):
        own = layer("rope", width=20, heads=4, groups=2, head_width=6, soft_cap=0.8)
        named = dict(module.named_parameters())
        assert_same(own, separate, named, reads, gives, sight(mask, window=window), mask)


@pytest.mark.parametrize("mask", [None, PADDING])
def test_a_learned_sink_is_gpt_osss(mask):
    config = transformers.GptOssConfig(
        **GROUPED,
        num_local_experts=2,
        num_experts_per_tok=1,
        attention_bias=False,
        sliding_window=5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attn_implementation="eager",  # the only one with a sink on a CPU
        experts_implementation="eager",  # the only one in float64
    )
    model = peer(transformers.GptOssForCausalLM, config)
    modules = [block.self_attn for block in model.model.layers]
    runs = recorded(model, [(each.q_proj, each.o_proj) for each in modules], tokens(), attention_mask=mask)

    def translate(named):
        return {**separate(named), "scheme.methods.1.value": named["sinks"]}

    for module, window, (reads, gives) in zip(modules, (5, None), runs, strict=True):
        own = layer("rope + learned_sink", width=20, heads=4, groups=2, head_width=6)
        named = dict(module.named_parameters())
        assert_same(own, translate, named, reads, gives, sight(mask, window=window), mask)


def test_transformer_xl_is_the_attention_of_xlnet():
    config = transformers.XLNetConfig(vocab_size=61, d_model=24, n_layer=1, n_head=3, d_inner=16, attn_type="uni")
    model = peer(transformers.XLNetModel, config)
    theirs = model.layer[0].rel_attn
    queries, keys, values = noise(3, 2, 3, TOKENS, 8, seed=4).requires_grad_().unbind()
    with in_double():
        sinusoids = model.relative_positional_encoding(TOKENS, TOKENS, bsz=2)
        places = torch.einsum("tbd,dhe->tbhe", sinusoids, theirs.r)
        hidden = model.create_mask(TOKENS, 0)[:, :, None, None]
        expected = theirs.rel_attn_core(
            *(each.permute(2, 0, 1, 3) for each in (queries, keys, values)), places, attn_mask=hidden
        ).permute(1, 2, 0, 3)
    scheme = build_scheme("transformer_xl", heads=3, width=24).double()
    named = {
        "methods.0.content": theirs.r_w_bias,
        "methods.0.place": theirs.r_r_bias,
        "methods.0.project.weight": theirs.r,
    }

    def translated(each):
        return each.flatten(1).T if each.ndim == 3 else each  # d h e -> (h e) d

    scheme.load_state_dict({name: translated(each.detach()) for name, each in named.items()})
    found = lookfar.attend(queries, keys, values, scheme=scheme)
    assert_near(found, expected, "outputs")
    pull, inputs = noise(*found.shape, seed=7), [queries, keys, values]
    own = dict(scheme.named_parameters())
    gradients = torch.autograd.grad((found * pull).sum(), [*inputs, *own.values()], retain_graph=True)
    wanted = torch.autograd.grad((expected * pull).sum(), [*inputs, *(named[name] for name in own)])
    for name, gradient, each in zip(["queries", "keys", "values", *own], gradients, wanted, strict=True):
        assert_near(gradient, translated(each) if each.ndim == 3 else each, name)
