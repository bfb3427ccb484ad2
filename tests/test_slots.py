"""Several slots at once: each sees the text that it follows and itself, and answers as if it were alone."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import lookfar
from lookfar import config, kernels
from lookfar.attention.scheme import build_scheme
from lookfar.batch import consecutive
from lookfar.config import ModelConfig
from lookfar.errors import UserError
from lookfar.kernels import chunked, slots, square
from lookfar.model.generate import Sampling, generate
from lookfar.sight import Sight
from lookfar.training import objectives
from lookfar.training.check import check
from tolerance import assert_near

METHODS = lookfar.names("methods")
MIXED = [
    "nope",
    "kerple + dape_v2(kernel=5) + stable_mask",
    "alibi + t5 + differential(share_bias=true)",
    "rope + fire + differential_v2 + learned_sink",
    "transformer_xl + kerple + gate",
    "cope + stable_mask",
]
TEXT, WANTED = 7, 5
PADDED = torch.tensor([[-1, -1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1]])
FORMS = {
    "after all": {},
    "anchors": {"ends": torch.tensor([[2, 2, 7, 7, 4], [7, 3, 3, 0, 1]])},
    "one position": {"offsets": torch.zeros(1, WANTED, dtype=torch.long)},
    "window": {"window": 3},
    "ahead": {"ahead": True},
    "padded, packed, windowed": {
        "documents": PADDED,
        "positions": consecutive(PADDED),
        "window": 4,
        "ends": torch.tensor([[7, 7, 5, 5, 3], [4, 4, 6, 7, 7]]),
    },
    "numbered": {"positions": torch.tensor([[3, 3, 9, 1, 0, 14, 2]])},
    "slots alone ask": {"queries": WANTED},
}
every_form = pytest.mark.parametrize("form", FORMS)
every_scheme = pytest.mark.parametrize("expression", [*METHODS, *MIXED])


def scheme_of(expression):
    torch.manual_seed(3)
    scheme = build_scheme(expression, heads=4, groups=2, head_width=8, context=32, layer=1, layers=2).double()
    with torch.no_grad():
        for parameter in scheme.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return scheme


def tensors(scheme, sight, seed=11):
    counts, generator = scheme.heads, torch.Generator().manual_seed(seed)

    def noise(heads, tokens, width):
        return torch.randn(2, heads, tokens, width, generator=generator, dtype=torch.float64).requires_grad_()

    return (
        noise(counts.score_heads, sight.queries, counts.head_width),
        noise(counts.key_heads, sight.keys, counts.head_width),
        noise(counts.value_heads, sight.keys, counts.value_width),
    )


def attended(given, sight, scheme, kernel="reference"):
    queries = scheme.queries(given[0], sight.query_positions)
    return kernels.attend(queries, scheme.keys(given[1], sight.key_positions), given[2], sight, scheme, kernel)


# Who sees whom


@every_form
def test_a_slot_sees_the_text_it_follows_and_itself(form):
    sight = Sight.slots(TEXT, WANTED, **FORMS[form])
    settings = {"ends": torch.full((1, WANTED), TEXT), "window": 99, "ahead": False, **FORMS[form]}
    visible, first = sight.visible().expand(2, -1, -1, -1), TEXT + WANTED - sight.queries
    documents = settings.get("documents", torch.zeros(2, TEXT, dtype=torch.long)).tolist()
    for line, row, key in itertools.product(range(2), range(sight.queries), range(TEXT + WANTED)):
        query = first + row
        slot = query >= TEXT
        place = settings["ends"].expand(2, -1)[line, query - TEXT].item() if slot else query
        own = documents[line][place - 1 if slot else query] if place or not slot else None
        if key == query:
            seen = True
        elif key >= TEXT or documents[line][key] != own or own == -1:
            seen = False
        elif slot:
            seen = key < place and place - key < settings["window"]
        else:
            seen = (key <= place or settings["ahead"]) and abs(place - key) < settings["window"]
        assert visible[line, 0, row, key] == seen, (line, row, key)


def test_slots_are_numbered_after_the_text_they_follow():
    sight = Sight.slots(4, 6, ends=torch.tensor([[4, 4, 2, 4, 2, 0]]))
    assert sight.key_positions.tolist() == [[0, 1, 2, 3, 4, 5, 2, 6, 3, 0]]
    shared = Sight.slots(4, 2, offsets=torch.zeros(1, 2, dtype=torch.long))
    assert shared.key_positions.tolist() == [[0, 1, 2, 3, 4, 4]]
    sight = Sight.slots(5, 2, documents=PADDED[:, 2:], positions=consecutive(PADDED[:, 2:]))
    assert sight.key_positions[:, 5:].tolist() == [[5, 6], [3, 4]]
    assert sight.key_documents[:, 5:].tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize(
    ("count", "settings", "message"),
    [
        (0, {}, "0 slots after 3 tokens"),
        (2, {"ends": torch.tensor([[1, 4]])}, "between 0 and 3"),
        (2, {"ends": torch.tensor([[1]])}, "must hold 2 numbers"),
        (2, {"queries": 1}, "1 queries must be at least the 2 slots"),
        (2, {"window": 0}, "window of 0"),
        (2, {"documents": torch.zeros(1, 3, dtype=torch.long)}, "Documents need positions"),
    ],
)
def test_impossible_slots_are_told(count, settings, message):
    with pytest.raises(UserError, match=message):
        Sight.slots(3, count, **settings)


# One slot is worth many


@every_form
@every_scheme
def test_a_slot_is_the_last_token_of_what_it_sees(expression, form):
    """The law behind everything: joint equals separate, whatever else is asked for."""
    scheme, sight = scheme_of(expression), Sight.slots(TEXT, WANTED, **FORMS[form])
    given = tensors(scheme, sight)
    together, first = attended(given, sight, scheme), sight.queries - WANTED
    for line, slot in itertools.product(range(2), range(WANTED)):
        seen = sight.visible().expand(2, -1, -1, -1)[line, 0, first + slot].nonzero()[:, 0].tolist()
        numbers = sight.key_positions.expand(2, -1)[line : line + 1, seen]
        alone = Sight.causal(len(seen), queries=1, positions=numbers)
        row = slice(first + slot, first + slot + 1)
        one = (given[0][line : line + 1, :, row], *(each[line : line + 1, :, seen] for each in given[1:]))
        assert_near(attended(one, alone, scheme), together[line : line + 1, :, row], f"line {line}, slot {slot}")


@every_form
@every_scheme
def test_every_kernel_is_the_definition_for_slots(expression, form, monkeypatch):
    monkeypatch.setattr(chunked, "ENTRIES", 1)
    monkeypatch.setattr(slots, "ENTRIES", 1)
    monkeypatch.setattr(slots, "LEAST", 2)
    monkeypatch.setattr(square, "CHUNK", 3)
    scheme, sight = scheme_of(expression), Sight.slots(TEXT, WANTED, **FORMS[form])

    def results(kernel):
        given = tensors(scheme, sight)
        output = attended(given, sight, scheme, kernel)
        weights = torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).view_as(output)
        inputs = (*given, *(each for each in scheme.parameters() if each.requires_grad))
        return output, *torch.autograd.grad((output * weights).sum(), inputs, allow_unused=True)

    expected = results("reference")
    call = kernels.Call(queries=sight.queries, keys=sight.keys, batch=2, dtype=torch.float64, plain=False, slots=True)
    call = replace(call, consecutive=False, causal=not sight.ahead)
    willing = [name for name in lookfar.names("kernels") if not _refuses(name, scheme, call)]
    assert {"slots", "chunked"} <= set(willing)
    for name in willing:
        for place, (found, wanted) in enumerate(zip(results(name), expected, strict=True)):
            assert (found is None) == (wanted is None)
            if found is not None:
                assert_near(found, wanted, f"{name}, result {place}")


def _refuses(name, scheme, call):
    return lookfar.plugins.find("kernels", name)().refusal(scheme, call)


@every_scheme
def test_slots_have_no_effect_on_one_another_nor_on_the_text(expression):
    scheme, sight = scheme_of(expression), Sight.slots(TEXT, WANTED)
    given = tensors(scheme, sight)
    output = attended(given, sight, scheme, "slots")
    for slot in (0, 3):
        gradients = torch.autograd.grad(output[:, :, TEXT + slot].sum(), given, retain_graph=True)
        for each in gradients:
            others = [place for place in range(TEXT, TEXT + WANTED) if place != TEXT + slot]
            assert (each[:, :, others] == 0).all()
    for each in torch.autograd.grad(output[:, :, :TEXT].sum(), given):
        assert (each[:, :, TEXT:] == 0).all()


def test_the_published_form_of_dape_refuses_slots():
    scheme = build_scheme("alibi + dape_v2(repair=paper)", heads=4, head_width=8)
    with pytest.raises(UserError, match="plain causal sight only"):
        attended([each.detach().float() for each in tensors(scheme, Sight.slots(3, 2))], Sight.slots(3, 2), scheme)


@pytest.mark.parametrize("expression", ["nope", "kerple + stable_mask", "kerple + dape_v2"])
def test_the_cost_is_slots_times_text(expression):
    scheme = build_scheme(expression, heads=4, head_width=8)

    def work(count):
        sight = Sight.slots(64, count, queries=count)
        given = torch.randn(1, 4, count, 8), torch.randn(1, 4, 64 + count, 8), torch.randn(1, 4, 64 + count, 8)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            kernels.attend(*given, sight, scheme)
        return counter.get_total_flops()

    assert work(2048) == pytest.approx(8 * work(256), rel=0.01)


# The decoder


def model_of(scheme="alibi", **settings):
    torch.manual_seed(0)
    config = {"vocabulary": 23, "width": 32, "layers": 2, "heads": 4, "context": 12, "slots": 4, "dtype": "float64"}
    return lookfar.Decoder(ModelConfig(**{**config, "scheme": scheme, **settings})).eval()


def words(*shape, seed=0):
    return torch.randint(23, shape, generator=torch.Generator().manual_seed(seed))


DECODED = ["nope", "rope", "sinusoidal", "kerple + dape_v2", "alibi + differential", "stable_mask + cope", "learned"]


@torch.no_grad()
@pytest.mark.parametrize("scheme", DECODED)
def test_neither_the_number_of_slots_nor_other_anchors_matter(scheme):
    model, tokens = model_of(scheme, positions=40), words(2, 9)
    ends = torch.tensor([[9, 4], [2, 9]])
    text, joint = model.slot_states(tokens, ends=ends)
    assert_near(text, model.states(tokens))
    for line, (anchor, end) in itertools.product(range(2), enumerate(ends[0].tolist())):
        end = int(ends[line, anchor])
        for count in (1, 3):
            _, alone = model.slot_states(tokens[line : line + 1, :end], slots=count)
            assert_near(alone[0, 0], joint[line, anchor, :count], f"line {line}, anchor {anchor}, {count} slots")


@torch.no_grad()
@pytest.mark.parametrize("scheme", DECODED)
@pytest.mark.parametrize("window", [None, 3])
def test_slots_after_a_cached_text_are_not_kept(scheme, window):
    model, tokens = model_of(scheme, positions=40, window=(window, None)), words(2, 9)
    text, joint = model.slot_states(tokens)
    cache = model.cache(batch=2, length=4)
    model.states(tokens[:, :5], cache=cache)
    again = [model.slot_states(tokens[:, :0], cache=cache)[1] for _ in range(2)]
    assert cache.length == 5
    assert_near(again[0], model.slot_states(tokens[:, :5])[1])
    assert torch.equal(again[0], again[1])
    new, after = model.slot_states(tokens[:, 5:], cache=cache)
    assert cache.length == 9
    assert_near(new, text[:, 5:])
    assert_near(after, joint)
    assert_near(
        model.states(words(2, 1, seed=2), cache=cache),
        model.states(torch.cat([tokens, words(2, 1, seed=2)], 1))[:, -1:],
    )


@torch.no_grad()
@pytest.mark.parametrize("scheme", DECODED)
def test_left_padding_does_not_move_slots(scheme):
    model, tokens = model_of(scheme, positions=40), words(2, 9)
    documents = torch.tensor([[-1, -1, -1, 0, 0, 0, 0, 0, 0], [0] * 9])
    _, padded = model.slot_states(tokens, documents=documents)
    assert_near(padded[:1], model.slot_states(tokens[:1, 3:])[1])
    cache = model.cache(batch=2)
    model.states(tokens[:, :6], documents=documents[:, :6], cache=cache)
    _, cached = model.slot_states(tokens[:, 6:], documents=documents[:, 6:], cache=cache)
    assert_near(cached, padded)


@torch.no_grad()
def test_a_prefix_may_see_all_of_itself():
    model, tokens = model_of(), words(2, 6)
    seen = model.slot_states(tokens, ahead=True)
    assert_near(seen[0], model.states(tokens, sight=Sight.bidirectional(6)))
    assert (seen[1] - model.slot_states(tokens)[1]).abs().max() > 1e-3
    other = model.slot_states(torch.cat([words(2, 1, seed=4), tokens[:, 1:]], 1), ahead=True)
    assert (other[1] - seen[1]).abs().max() > 1e-3


@torch.no_grad()
def test_slots_that_nothing_tells_apart_collapse():
    """Without positions, one embedding gives one answer; a causal mask would hide that by showing slots to slots."""
    one = model_of("nope", slot_embeddings="one").slot_states(words(2, 6))[1]
    assert_near(one, one[:, :, :1].expand_as(one))
    for scheme, settings in (
        ("nope", {}),
        ("alibi", {"slot_embeddings": "one"}),
        ("alibi", {"slot_positions": "shared"}),
    ):
        own = model_of(scheme, **settings).slot_states(words(2, 6))[1]
        assert (own - own[:, :, :1]).abs().amax((0, 1, 3))[1:].min() > 1e-3
    with pytest.raises(UserError, match="all give the same answer"):
        ModelConfig(slots=3, slot_positions="shared", slot_embeddings="one")


@torch.no_grad()
def test_mistakes_with_slots_are_told():
    with pytest.raises(UserError, match=r"has no slots; train it with model.slots=4"):
        model_of(slots=None).slot_states(words(1, 3))
    with pytest.raises(UserError, match="5 slots are not possible: the model has 4"):
        model_of().slot_states(words(1, 3), slots=5)
    with pytest.raises(UserError, match="13 tokens are more than the 12 positions"):
        model_of("learned").slot_states(words(1, 9))


# The objective


def test_the_objective_is_a_loop_over_places():
    model, lines = model_of("kerple"), words(3, 13)
    chance = torch.rand(3, 12, generator=torch.Generator().manual_seed(1))
    objective = objectives.find("slots(anchors=5, decay=0.5, next_token=0)", model.config)
    per_line = []
    for line in range(3):
        total = weight = 0
        for end in (chance[line].topk(5).indices + 1).tolist():
            states = model.slot_states(lines[line : line + 1, :end])[1][0, 0]
            for slot in range(4):
                if end + slot < 13:
                    loss = F.cross_entropy(model.logits(states[slot]).float(), lines[line, end + slot])
                    total, weight = total + 0.5**slot * loss, weight + 0.5**slot
        per_line.append(total / weight)
    assert_near(objective(model, lines, None, chance), torch.stack(per_line).mean())
    both = objectives.find("slots(anchors=5, decay=0.5, next_token=0.3)", model.config)
    text = F.cross_entropy(model(lines[:, :-1]).flatten(0, 1).float(), lines[:, 1:].flatten())
    assert_near(both(model, lines, None, chance), torch.stack(per_line).mean() + 0.3 * text)


def test_the_objective_does_not_depend_on_how_a_batch_is_divided():
    model, lines, chance = model_of("kerple"), words(4, 13), torch.rand(4, 12)
    objective = objectives.find("slots(anchors=3)", model.config)
    pieces = [objective(model, lines[part], None, chance[part]) for part in (slice(2), slice(2, 4))]
    assert_near(torch.stack(pieces).mean(), objective(model, lines, None, chance))


@pytest.mark.parametrize(
    ("expression", "model", "message"),
    [
        ("slots", {}, "set model.slots=4"),
        ("next_token", {"slots": 2}, "would never be trained"),
        ("next_tokn", {}, "Did you mean 'next_token'"),
        ("slots(anchors=0)", {"slots": 2}, "not possible"),
    ],
)
def test_objectives_that_cannot_be_are_told(expression, model, message):
    with pytest.raises(UserError, match=message):
        objectives.find(expression, ModelConfig(**model))


# Writing in blocks


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["rope", "kerple + dape_v2"])
def test_a_block_is_what_each_slot_finds_likeliest(scheme):
    model, prompts = model_of(scheme), [[3, 1, 4, 1, 5], [9, 2]]
    written = generate(model, prompts, tokens=7, sampling=Sampling(temperature=0.0), block=3)
    for prompt, found in zip(prompts, written, strict=True):
        expected = []
        while len(expected) < 7:
            states = model.slot_states(torch.tensor([prompt + expected]), slots=3)[1][0, 0]
            expected += model.logits(states).argmax(-1).tolist()
        assert found == expected[:7]


def test_a_block_stops_inside():
    model = model_of("rope")
    whole = generate(model, [[1, 2, 3]], tokens=6, sampling=Sampling(temperature=0.0), block=4)[0]
    stopped = generate(
        model, [[1, 2, 3]], tokens=6, sampling=Sampling(temperature=0.0), block=4, stop=lambda each: len(each) == 2
    )
    assert stopped == [whole[:2]]


def test_a_block_needs_slots_and_positions():
    with pytest.raises(UserError, match="has no slots"):
        generate(model_of(slots=None), [[1]], tokens=2, block=2)
    with pytest.raises(UserError, match="ask for at most 8 tokens"):
        generate(model_of("learned"), [[1, 2, 3, 4]], tokens=9, block=4)
    assert len(generate(model_of("learned"), [[1, 2, 3, 4]], tokens=8, block=4)[0]) == 8


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.scheme=learned", "model.slots=4", "training.objective=slots"], "model.context reach 132"),
        (
            ["model.scheme=rope(scaling=dynamic, factor=2)", "model.slots=4", "training.objective=slots"],
            "whole sequences",
        ),
        (["model.scheme=rope(scaling=dynamic, factor=2)", "data.documents=isolated"], "whole sequences"),
        (["model.scheme=alibi + dape_v2(repair=paper)", "model.slots=4", "training.objective=slots"], "plain causal"),
        (["model.slot_positions=shared"], "are of slots; set slots"),
    ],
    ids=str,
)
def test_what_slots_cannot_train_is_told_at_the_door(overrides, message):
    with pytest.raises(UserError, match=message):
        check(config.build({"evaluation": {"lengths": [64]}}, overrides))


def test_a_refused_call_leaves_the_cache_as_it_was():
    model, tokens = model_of("alibi"), words(1, 6)
    documents = torch.tensor([[-1, 0, 0, 0, 0, 0]])
    cache = model.cache()
    with torch.no_grad():
        model.states(tokens[:, :5], documents=documents[:, :5], cache=cache)
        with pytest.raises(UserError, match="between 0 and 6"):
            model.slot_states(tokens[:, 5:], ends=torch.tensor([[99]]), cache=cache)
        with pytest.raises(UserError, match="has not seen the new text"):
            model.slot_states(tokens[:, 5:], ahead=True, cache=cache)
        _, slots = model.slot_states(tokens[:, 5:], documents=documents[:, 5:], cache=cache)
        assert_near(slots, model.slot_states(tokens, documents=documents)[1])


@torch.no_grad()
def test_slots_follow_the_last_token_that_is_no_padding():
    model, tokens = model_of("alibi"), words(1, 6)
    right = torch.tensor([[0, 0, 0, 0, -1, -1]])
    assert_near(model.slot_states(tokens, documents=right)[1], model.slot_states(tokens[:, :4])[1])
