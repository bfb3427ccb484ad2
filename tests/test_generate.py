"""Writing on from prompts: what is written is what the full pass says, whoever is beside it, and ends when told."""

import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lookfar
from lookfar import cli, config
from lookfar.data.tokenizers import BytesTokenizer, load_tokenizer, train_bpe
from lookfar.data.writing import Writer
from lookfar.errors import UserError
from lookfar.methods.base import Heads
from lookfar.model import cache as cache_room
from lookfar.model import generate as generate_room
from lookfar.model.cache import LayerCache
from lookfar.model.generate import Sampling, generate, stream
from lookfar.tasks.symbols import BOS
from lookfar.training.checkpoint import load
from lookfar.training.problems import problems_of
from lookfar.training.run import run_whole
from test_decoder import build
from test_laws import one_thread, randomised  # noqa: F401  # the fixture works by its name
from tolerance import assert_near

GREEDY = Sampling(temperature=0.0)
PROMPTS = [[3], [1, 4, 1, 5, 9, 2, 6], [16, 0, 0, 7]]
SCHEMES = [
    "nope",
    "rope + log_n",
    "alibi",
    "kerple + dape_v2 + stable_mask",
    "t5 + differential",
    "fire + gate + learned_sink",
    "sinusoidal + differential_v2",
    "learned + cope",
    "transformer_xl",
    "alibi + dape_v1",
]
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


def model_of(scheme="rope", **settings):
    """A small model in double, with noise on its weights so that its texts wander."""
    return randomised(build(scheme=scheme, **{"dtype": "float64", "positions": 32, **settings})).eval()


@torch.no_grad()
def by_full_passes(model, prompt, tokens):
    """The likeliest token after the whole text, again and again."""
    text = list(prompt)
    for _ in range(tokens):
        text.append(model(torch.tensor([text]))[0, -1].argmax().item())
    return text[len(prompt) :]


# What is written


@every_scheme
def test_greedy_takes_the_likeliest_token_of_the_full_pass(scheme):
    model = model_of(scheme, window=(5, None))
    expected = [by_full_passes(model, prompt, 11) for prompt in PROMPTS]
    assert [generate(model, [prompt], tokens=11, sampling=GREEDY)[0] for prompt in PROMPTS] == expected
    assert len(set().union(*expected)) > 2, "texts that only repeat a token would show little"


def test_what_cannot_be_cached_is_encoded_anew_at_every_step():
    model = model_of("rope(scaling=dynamic, factor=3)", context=4)
    with pytest.raises(UserError, match="none can be cached"):
        model(torch.tensor([[1, 2]]), cache=model.cache())
    expected = [by_full_passes(model, prompt, 9) for prompt in PROMPTS]
    assert expected != [by_full_passes(model_of("rope", context=4), prompt, 9) for prompt in PROMPTS]
    assert generate(model, PROMPTS, tokens=9, sampling=GREEDY) == expected


@every_scheme
@pytest.mark.parametrize("penalty", [1.0, 1.7])
def test_prompts_of_unequal_length_write_what_each_writes_alone(scheme, penalty):
    """Padding stands before the short ones; it is seen by none and is no token that was said before."""
    model = model_of(scheme)
    for sampling in (GREEDY, Sampling(seed=3), Sampling(temperature=0.7, top_k=9, top_p=0.9, seed=3)):
        told = {**vars(sampling), "repetition_penalty": penalty}
        together = generate(model, PROMPTS, tokens=9, sampling=Sampling(**told))
        for row, prompt in enumerate(PROMPTS):
            alone = generate(model, [prompt], tokens=9, sampling=Sampling(**{**told, "seed": told["seed"] + row}))
            assert together[row] == alone[0], f"row {row}, {sampling}"


def test_a_text_is_the_same_for_the_same_seed_and_another_for_another():
    model = model_of()
    texts = [generate(model, PROMPTS, tokens=9, sampling=Sampling(seed=seed)) for seed in (5, 5, 6, 5)]
    assert texts[0] == texts[1] == texts[3] != texts[2]
    assert generate(model, PROMPTS, tokens=9) == generate(model, PROMPTS, tokens=9, sampling=Sampling(seed=0))


def test_the_same_prompt_twice_gives_two_texts():
    first, second = generate(model_of(), [PROMPTS[1]] * 2, tokens=9)
    assert first != second


def test_writing_draws_nothing_from_the_callers_generator():
    model = model_of()
    state = torch.get_rng_state()
    first = generate(model, PROMPTS, tokens=4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert generate(model, PROMPTS, tokens=4) == first, "nor does it depend on it"


def test_a_short_text_is_the_beginning_of_a_long_one():
    model = model_of("alibi")
    long = generate(model, PROMPTS, tokens=12)
    for tokens in (1, 5):
        assert generate(model, PROMPTS, tokens=tokens) == [each[:tokens] for each in long]


def test_a_stream_is_the_text_token_by_token():
    model = model_of()
    steps = list(stream(model, PROMPTS, tokens=7))
    assert [list(each) for each in zip(*steps, strict=True)] == generate(model, PROMPTS, tokens=7)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_any_type_of_model_writes(dtype):
    written = generate(build(dtype=dtype).eval(), PROMPTS, tokens=5, sampling=Sampling(top_p=0.9))
    assert [len(each) for each in written] == [5, 5, 5]


# Each token is computed once, into a cache that is large enough


def test_every_token_passes_through_the_model_once():
    model, fed = model_of(), []
    model.embedding.register_forward_hook(lambda layer, given, made: fed.append(given[0].shape[1]))
    steps = stream(model, PROMPTS, tokens=6)
    assert next(steps) and fed == [7], "the first token is given out before the second is thought of"
    assert len(list(steps)) == 5
    assert fed == [7, 1, 1, 1, 1, 1], "nothing is computed for what nobody asked for"


def test_nothing_is_computed_after_the_last_token_though_the_first_text_is_done():
    model, fed, first = model_of(), [], generate(model_of(), PROMPTS, tokens=1)[0]
    model.embedding.register_forward_hook(lambda layer, given, made: fed.append(given[0].shape[1]))
    generate(model, PROMPTS, tokens=4, stop=lambda written: written == first)
    assert fed == [7, 1, 1, 1]


def test_a_cache_that_grows_copies_seldom():
    """A new buffer at every doubling: 1,000 tokens one by one need 10, not 1,000."""
    layer, kept = LayerCache(Heads(2, 2, 2, 3, 3), 1, 1, torch.device("cpu")), []
    for token in range(1000):
        new = torch.full((1, 2, 1, 3), float(token))
        keys, values = layer.append(new, -new)
        kept.append((keys, values))  # held, so that no address is used again
    for place in (0, 1):
        buffers = {each[place].untyped_storage().data_ptr() for each in kept}
        assert len(buffers) <= 1 + math.ceil(math.log2(1000))
        assert kept[-1][place].abs()[0, 1, :, 2].tolist() == list(range(1000)), "and nothing is lost"
    assert kept[3][0].shape[2] == 4


def test_a_text_of_known_length_needs_one_buffer(monkeypatch):
    def grown(buffer, size):
        raise AssertionError(f"a buffer of {buffer.shape[2]} tokens was copied into one of {size}")

    monkeypatch.setattr(cache_room, "_grown", grown)
    generate(model_of(), PROMPTS, tokens=40)
    with pytest.raises(AssertionError, match="of 2 tokens was copied into one of 4"), torch.no_grad():
        model_of()(torch.zeros(1, 3, dtype=torch.long), cache=model_of().cache(length=2))


# How a token is chosen


def chances(logits, sampling, seen=()):
    """The chance of each token in plain numbers: penalty, temperature, k likeliest, nucleus, least share."""
    numbers = list(logits)
    for token in set(seen):
        change = 1 / sampling.repetition_penalty if numbers[token] > 0 else sampling.repetition_penalty
        numbers[token] *= change
    numbers = [math.exp((each - max(numbers)) / sampling.temperature) for each in numbers]
    order = sorted(range(len(numbers)), key=lambda token: -numbers[token])
    kept = order if sampling.top_k is None else order[: sampling.top_k]
    if sampling.top_p is not None:
        nucleus, held, all_kept = [], 0.0, sum(numbers[token] for token in kept)
        for token in kept:
            if held < sampling.top_p:
                nucleus.append(token)
            held += numbers[token] / all_kept
        kept = nucleus
    if sampling.min_p is not None:
        kept = [token for token in kept if numbers[token] >= sampling.min_p * numbers[order[0]]]
    total = sum(numbers[token] for token in kept)
    return [numbers[token] / total if token in kept else 0.0 for token in range(len(numbers))]


RULES = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 4},
    {"top_k": 100},
    {"top_p": 0.6},
    {"top_p": 1.0},
    {"top_p": 1e-9},
    {"min_p": 0.0},
    {"min_p": 0.15},
    {"min_p": 1.0},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.6},
    {"temperature": 0.7, "top_k": 6, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.3},
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_chances_follow_their_definition(rule):
    random, sampling, cut = torch.Generator().manual_seed(1), Sampling(**rule), 0
    for _ in range(50):
        logits = 2 * torch.randn(3, 11, generator=random)
        seen = torch.randint(-1, 11, (3, 5), generator=random)
        found = sampling.logits(logits, seen).softmax(-1)
        for line in range(3):
            said = [token for token in seen[line].tolist() if token >= 0]
            expected = chances(logits[line].tolist(), sampling, said)
            assert_near(found[line], torch.tensor(expected))
            cut += expected.count(0.0)
    narrow = sampling.top_p not in (None, 1.0) or sampling.min_p not in (None, 0.0) or sampling.top_k in (1, 4, 6)
    assert (cut > 0) == narrow


def test_tokens_are_drawn_by_their_chances():
    logits, draws = torch.tensor([[2.0, 1.0, 0.0, -1.0, -9.0]]), 3000
    sampling = Sampling(temperature=0.8, top_k=4)
    generators = [torch.Generator().manual_seed(seed) for seed in range(draws)]
    drawn = sampling.choose(logits.expand(draws, -1), None, generators).bincount(minlength=5) / draws
    for token, chance in enumerate(chances(logits[0].tolist(), sampling)):
        assert abs(drawn[token] - chance) <= 4 * math.sqrt(chance * (1 - chance) / draws)


def test_temperature_nought_takes_the_likeliest_whatever_else_is_asked():
    logits = torch.tensor([[0.5, 3.0, 2.9], [1.0, -1.0, 4.0]])
    for rule in ({}, {"top_k": 2}, {"top_p": 0.1}, {"min_p": 1.0}):
        assert Sampling(temperature=0.0, **rule).choose(logits, None, []).tolist() == [1, 2]
    penalty = Sampling(temperature=0.0, repetition_penalty=2.0)
    assert penalty.choose(logits, torch.tensor([[1, 1], [0, -1]]), []).tolist() == [2, 2]


@pytest.mark.parametrize("temperature", [1e-3, 1e-30])
def test_a_temperature_near_nought_takes_the_likeliest(temperature):
    logits = torch.tensor([[0.5, 3.0, 2.9]])
    assert Sampling(temperature=temperature).choose(logits, None, [torch.Generator()]).tolist() == [1]


def test_a_temperature_smaller_than_any_float32_takes_the_likeliest():
    logits = torch.tensor([[0.5, 3.0, 2.9]])
    assert Sampling(temperature=1e-45).choose(logits, None, [torch.Generator()]).tolist() == [1]


@pytest.mark.parametrize(
    "rule",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_p": math.nan},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": -2.0},
    ],
    ids=str,
)
def test_a_setting_that_makes_no_sense_is_told(rule):
    ((name, value),) = rule.items()
    with pytest.raises(UserError, match=f"^{name}={value} is not possible"):
        Sampling(**rule)


def test_a_seed_beyond_64_bits_is_told():
    with pytest.raises(UserError, match="seed"):
        generate(model_of(), PROMPTS, tokens=1, sampling=Sampling(seed=1 << 64))


# When it ends


def test_a_text_that_is_done_waits_for_the_others():
    model = model_of()
    free = generate(model, PROMPTS, tokens=9)
    told = []

    def stop(written):
        told.append(list(written))
        return written in (free[0][:2], free[2][:5])

    steps = list(stream(model, PROMPTS, tokens=9, stop=stop))
    assert [[step[row] is None for step in steps].index(True) for row in (0, 2)] == [2, 5]
    assert generate(model, PROMPTS, tokens=9, stop=stop) == [free[0][:2], free[1], free[2][:5]]
    assert all(any(each == text[: len(each)] for text in free) for each in told), "the prompt is not in what is told"


def test_nothing_is_written_after_all_are_done():
    model = model_of()
    steps = list(stream(model, PROMPTS, tokens=9, stop=lambda written: len(written) == 3))
    assert len(steps) == 3 and None not in steps[-1]


def test_time_ends_a_text(monkeypatch):
    """A clock that goes a second further whenever it is read: at the start, then after each token."""
    for seconds, tokens in ((0.0, 1), (3.5, 4), (100.0, 9), (None, 9)):
        clock = iter(range(1000))
        monkeypatch.setattr(generate_room, "time", SimpleNamespace(monotonic=lambda clock=clock: next(clock)))
        written = generate(model_of(), PROMPTS, tokens=9, seconds=seconds)
        assert [len(each) for each in written] == [tokens] * 3, seconds


@pytest.mark.parametrize("tokens", [1, 2, 19])
def test_as_many_tokens_are_written_as_were_asked_for(tokens):
    assert [len(each) for each in generate(model_of(), PROMPTS, tokens=tokens)] == [tokens] * 3


def test_between_two_tokens_the_reader_is_in_a_mode_of_its_own():
    model, modes = model_of(), []
    for _ in stream(model, PROMPTS, tokens=2):
        modes.append(torch.is_inference_mode_enabled())
    assert modes == [False, False]


def test_two_streams_at_once_leave_the_reader_able_to_train():
    """In a thread of their own, as a mode that is left behind lasts as long as its thread."""

    def read():
        model = model_of()
        one, two = stream(model, PROMPTS, tokens=2), stream(model, PROMPTS, tokens=3)
        assert next(one) and next(two) and list(one) and list(two)
        return torch.is_inference_mode_enabled()

    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(read).result() is False


def test_a_learned_table_ends_a_text_before_it_begins():
    model = model_of("learned", context=8, positions=8)
    for prompts, tokens, left in (([[1, 2, 3]], 7, 6), (PROMPTS, 5, 2), ([[1] * 8], 2, 1), ([[1] * 9], 1, 0)):
        with pytest.raises(UserError, match=f"beyond the 8 positions of the learned table; ask for at most {left} "):
            generate(model, prompts, tokens=tokens)


@pytest.mark.parametrize("scheme", ["learned", "learned + rope(scaling=dynamic, factor=3)"])
@pytest.mark.parametrize("prompts", [[[1, 2, 3]], [[1], [2, 3, 4]], [[1] * 8]])
def test_a_text_ends_one_token_after_a_learned_table(scheme, prompts):
    """The last token is never read, so it needs no position; padding has none of its own."""
    model = model_of(scheme, context=8, positions=8)
    assert model.once == (scheme == "learned")
    asked, encode = [], model.encoding.encode
    model.encoding.encode = lambda x, places: asked.append(int(places.max())) or encode(x, places)
    tokens = 9 - max(map(len, prompts))
    found = generate(model, prompts, tokens=tokens, sampling=GREEDY)
    assert max(asked) == 7, "each position of the table is used, and none beyond"
    assert found == [by_full_passes(model, prompt, tokens) for prompt in prompts]


@pytest.mark.parametrize("positions", ["offset", "shared"])
@pytest.mark.parametrize("block", [1, 2, 3, 4])
@pytest.mark.parametrize("size", range(1, 9))
def test_blocks_are_written_as_far_as_their_slots_have_positions(positions, block, size):
    model = model_of("learned", context=8, positions=8, slots=4, slot_positions=positions)
    most = 0
    for tokens in range(1, 12):
        last = size + (tokens - 1) // block * block  # the text that the last block follows
        if last + (block if positions == "offset" else 1) <= 8:
            most = tokens
            assert len(generate(model, [[1] * size], tokens=tokens, block=block)[0]) == tokens
        else:
            with pytest.raises(UserError, match=f"{block} at once, .* 8 positions .* at most {most} tokens"):
                generate(model, [[1] * size], tokens=tokens, block=block)


@pytest.mark.parametrize(
    ("prompts", "tokens", "message"),
    [
        ([], 5, "A prompt is empty; give at least one token"),
        ([[]], 5, "A prompt is empty"),
        ([[1], []], 5, "A prompt is empty"),
        ([[1], [2, 17]], 5, "Token 17 is not in the vocabulary of 17"),
        ([[-1]], 5, "Token -1 is not in the vocabulary of 17"),
        ([[1]], 0, "0 tokens cannot be written; ask for at least 1"),
        ([[1]], -3, "-3 tokens cannot be written"),
    ],
)
def test_what_cannot_be_written_on_from_is_told(prompts, tokens, message):
    with pytest.raises(UserError, match=message):
        generate(model_of(), prompts, tokens=tokens)


# From tokens to text

BYTES = BytesTokenizer()
CORPUS = ["the cat sat on the mat, the naïve café, 日本語 日本 🙂🙂 and the end of the text\n" * 3]
letters = st.characters(exclude_categories=("Cs",), exclude_characters="\0\ufffd") | st.sampled_from("the €é日🙂")
texts = st.text(letters, max_size=12)


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(CORPUS, 290)


def written(tokenizer, tokens, stops=()):
    """What a writer gives out at each token, and at the end; it is told when to stop."""
    writer, pieces = Writer(tokenizer, stops), []
    for place, token in enumerate(tokens):
        pieces.append(writer.add(token))
        if writer.stops(tokens[: place + 1]):
            break
    return pieces, writer.rest()


@settings(deadline=None)
@given(text=texts)
def test_text_comes_out_in_whole_characters_as_soon_as_they_are(bpe, text):
    for tokenizer in (BYTES, bpe):
        tokens = tokenizer.encode(text).tolist()
        pieces, rest = written(tokenizer, tokens)
        assert "".join(pieces) == text and rest == ""
        assert not any("\ufffd" in piece for piece in pieces)
        for place in range(len(tokens)):
            whole = tokenizer.decode(tokens[: place + 1]).rstrip("\ufffd")
            assert "".join(pieces[: place + 1]) == whole, "nothing waits longer than its last byte"


@settings(deadline=None)
@given(tokens=st.lists(st.integers(1, 255), max_size=9))
def test_bytes_that_are_no_text_come_out_in_the_end(tokens):
    pieces, rest = written(BYTES, tokens)
    assert "".join(pieces) + rest == BYTES.decode(tokens)


def cut(text, stops):
    """The text up to the first stop text in it."""
    return text[: min([text.find(stop) for stop in stops if stop in text], default=len(text))]


def assert_cut(tokenizer, text, stops):
    tokens = tokenizer.encode(text).tolist()
    begun = next((n for n in range(len(tokens) + 1) if any(s in tokenizer.decode(tokens[:n]) for s in stops)), None)
    pieces, rest = written(tokenizer, tokens, stops)
    assert len(pieces) == (len(tokens) if begun is None else begun), "it is done at the token that completes a stop"
    assert "".join(pieces) + rest == cut(tokenizer.decode(tokens[: len(pieces)]), stops)


@settings(deadline=None)
@given(text=st.text("abc", max_size=14), stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_no_part_of_a_stop_text_comes_out_however_it_is_split(bpe, text, stops):
    assert_cut(BYTES, text, stops)
    assert_cut(bpe, text, stops)


@settings(deadline=None)
@given(text=st.text("the cat", max_size=14), stops=st.lists(st.text("the cat", min_size=1, max_size=6), max_size=3))
def test_a_stop_text_may_end_within_a_token(bpe, text, stops):
    assert_cut(bpe, text, stops)


@pytest.mark.parametrize(("text", "stop"), [("xa€b", "a€"), ("日本語", "日本"), ("ab🙂", "b🙂")])
def test_a_stop_text_may_hold_characters_of_several_bytes(text, stop):
    assert_cut(BYTES, text, [stop])


def test_the_beginning_of_a_stop_text_comes_out_when_it_was_none():
    pieces, rest = written(BYTES, list(b"on <en> and <e"), ["<end>"])
    assert pieces[3:8] == ["", "", "", "<en>", " "] and pieces[-1] == "" and rest == "<e"


def test_the_end_of_a_document_ends_a_text_and_is_not_shown(bpe):
    for tokenizer in (BYTES, bpe):
        tokens = [*tokenizer.encode("the").tolist(), tokenizer.separator, *tokenizer.encode("end").tolist()]
        pieces, rest = written(tokenizer, tokens)
        assert "".join(pieces) + rest == "the"


def test_a_text_that_is_done_adds_nothing():
    writer = Writer(BYTES)
    assert [writer.add(token) for token in (104, None, 105, None)] == ["h", "", "i", ""] and writer.rest() == ""


def test_an_empty_stop_text_is_told():
    with pytest.raises(UserError, match="A stop text is empty"):
        Writer(BYTES, ["end", ""])


# The command


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text("".join(f"line {number} of a text\n" for number in range(300)), encoding="utf-8")
    content = {
        "model": {"width": 16, "layers": 1, "heads": 2, "context": 16, "scheme": "alibi", "device": "cpu"},
        "data": {"source": "text_file", "path": str(folder / "text.txt")},
        "training": {"updates": 60, "batch": 4, "rate": 0.02, "precision": "float32"},
        "evaluation": {"lengths": [16], "tokens": 32},
    }
    run_whole(config.build(content, ()), folder / "alibi")
    return folder / "alibi"


def command(monkeypatch, capsys, *words):
    """The exit code of a command, and what it printed on stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["lookfar", "generate", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    out, err = capsys.readouterr()
    return left.value.code or 0, out, err


def expected(trained, prompt, tokens=40, **rule):
    """The text that a model writes, by its parts."""
    tokenizer = load_tokenizer(trained)
    sampling = Sampling(**{"temperature": 0.8, **rule})
    stop = Writer(tokenizer).stops
    given = [tokenizer.encode(prompt).tolist()]
    (tokens,) = generate(load(trained), given, tokens=tokens, sampling=sampling, stop=stop)
    writer = Writer(tokenizer)
    return "".join(writer.add(token) for token in tokens) + writer.rest()


@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"temperature": 0.0},
        {"seed": 7, "top_k": 3},
        {"top_p": 0.7, "min_p": 0.05, "repetition_penalty": 1.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("prompt", ["line 7", "x", "naïve 🙂 ", "line 12 of a text\nline 13 of a text"])
def test_the_command_writes_what_the_model_says(trained, monkeypatch, capsys, prompt, rule):
    options = [word for name, value in rule.items() for word in (f"--{name.replace('_', '-')}", value)]
    code, out, err = command(monkeypatch, capsys, trained, "--prompt", prompt, "--tokens", 40, *options)
    assert (code, err) == (0, "") and out == prompt + expected(trained, prompt, **rule) + "\n"


def test_the_command_stops_before_a_stop_text(trained, monkeypatch, capsys):
    free = expected(trained, "line 7")
    middle = free[len(free) // 2 :][:3]
    for stops in ([middle], ["never written", middle], [middle, middle + "?"]):
        options = [word for stop in stops for word in ("--stop", stop)]
        code, out, _ = command(monkeypatch, capsys, trained, "--prompt", "line 7", "--tokens", 40, *options)
        assert code == 0 and out == "line 7" + cut(free, stops) + "\n"
    _, out, _ = command(monkeypatch, capsys, trained, "--prompt", "line 7", "--tokens", 40, "--stop", "never written")
    assert out == "line 7" + free + "\n"


def test_the_command_ends_in_time_and_runs_under_another_scheme(trained, monkeypatch, capsys):
    _, out, _ = command(monkeypatch, capsys, trained, "--prompt", "line", "--seconds", 0)
    assert out == "line" + expected(trained, "line", tokens=1) + "\n"
    words = [trained, "--prompt", "line 7", "--tokens", 40]
    texts = [
        command(monkeypatch, capsys, *words, *more)[:2] for more in ([], ["--scheme", "alibi"], ["--scheme", "nope"])
    ]
    assert [code for code, _ in texts] == [0, 0, 0] and texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--prompt", ""], "A prompt is empty; give at least one token"),
        (["--prompt", "x", "--top-p", 1.5], "top_p=1.5 is not possible"),
        (["--prompt", "x", "--min-p", -1], "min_p=-1.0 is not possible"),
        (["--prompt", "x", "--repetition-penalty", 0], "repetition_penalty=0.0 is not possible"),
        (["--prompt", "x", "--stop", ""], "A stop text is empty"),
        (["--prompt", "x", "--scheme", "alibbi"], "Did you mean 'alibi'"),
    ],
)
def test_a_mistake_is_one_sentence(trained, monkeypatch, capsys, words, told):
    code, _, err = command(monkeypatch, capsys, trained, *words)
    assert code == 2 and err.startswith("lookfar: ") and told in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("words", [[], ["--prompt", "x", "--tokens", 0], ["--prompt", "x", "--temperature", "nan"]])
def test_a_mistake_in_the_words_of_the_command_is_told_with_its_use(trained, monkeypatch, capsys, words):
    code, out, err = command(monkeypatch, capsys, trained, *words)
    assert code == 2 and not out and "Usage" in err and "Traceback" not in err


def test_a_seed_that_is_too_large_is_one_sentence(trained, monkeypatch, capsys):
    code, _, err = command(monkeypatch, capsys, trained, "--prompt", "x", "--tokens", 1, "--seed", 1 << 64)
    assert code == 2 and "seed" in err


def test_a_folder_without_a_run_is_told(tmp_path, monkeypatch, capsys):
    code, _, err = command(monkeypatch, capsys, tmp_path, "--prompt", "x")
    assert code == 2 and err.startswith("lookfar: ") and str(tmp_path) in err


def test_a_prompt_that_is_no_text_leaves_no_traceback(trained):
    """A byte that is not UTF-8 reaches Python as half a character that nothing can print."""
    words = [sys.executable, "-m", "lookfar", "generate", trained, "--tokens", "3", "--prompt", b"li\xffne"]
    done = subprocess.run(words, capture_output=True, env={**os.environ, "PYTHONUTF8": "1"})
    assert b"Traceback" not in done.stderr and done.returncode in (0, 2), done.stderr[-300:]


def test_the_vocabulary_of_a_model_may_be_larger_than_its_texts():
    """A token that no text holds can still be written, and is shown as what it is not."""
    model = lookfar.Decoder(
        lookfar.ModelConfig(vocabulary=256, width=16, heads=2, layers=1, context=8, scheme="nope", device="cpu")
    )
    (tokens,) = generate(model.eval(), [[200, 255]], tokens=30, sampling=Sampling(temperature=5.0))
    pieces, rest = written(BYTES, tokens)
    assert "".join(pieces) + rest == BYTES.decode(tokens[: len(pieces)]).replace("\0", "")


def test_the_command_writes_on_from_several_prompts(trained, monkeypatch, capsys):
    told = ["--tokens", 5, "--temperature", 0]
    alone = [command(monkeypatch, capsys, trained, "--prompt", each, *told)[1] for each in ("line", "a")]
    code, out, _ = command(monkeypatch, capsys, trained, "--prompt", "line", "--prompt", "a", *told)
    assert code == 0 and out == f"{alone[0]}\n{alone[1]}"


# The command, with a run of a task


def addition(folder, *overrides):
    content = {
        "model": {"width": 16, "layers": 1, "heads": 2, "context": 32, "scheme": "alibi", "device": "cpu"},
        "task": {"name": "addition", "lengths": [1, 2], "examples": 2},
        "training": {"updates": 2, "batch": 4, "precision": "float32"},
        "evaluation": {"lengths": [2]},
    }
    run_whole(run := config.build(content, overrides), folder)
    return problems_of(run.task)


@pytest.mark.parametrize("bos", ["true", "false"])
@pytest.mark.parametrize("end", ["", " "])
def test_the_command_reads_a_problem_as_it_is_measured(tmp_path, monkeypatch, capsys, bos, end):
    (problem,) = addition(tmp_path, f"task.bos={bos}").measured(2, 1)
    prompt = problem.encoded.tokens[~problem.encoded.written].tolist()
    solution = problem.encoded.tokens[problem.encoded.written].tolist()
    given = []

    def perfect(model, prompts, *, stop, **others):
        given.extend(prompts)
        for place, token in enumerate(solution):
            assert not stop(solution[:place] or [-1])
            yield [token]
        assert stop(solution), "measuring ends at EOS, and so does the command"

    monkeypatch.setattr(generate_room, "stream", perfect)
    asked = problem.example.input.rstrip()
    code, out, _ = command(monkeypatch, capsys, tmp_path, "--prompt", asked + end)
    assert code == 0 and given == [prompt] and (prompt[0] == BOS) == (bos == "true")
    assert out == f"{asked} {problem.example.target}\n"


@pytest.mark.parametrize(("bos", "most"), [("true", 25), ("false", 26)])
def test_the_command_writes_to_the_end_of_a_learned_table(tmp_path, monkeypatch, capsys, bos, most):
    addition(tmp_path, "model.scheme=learned", f"task.bos={bos}")
    words = [tmp_path, "--prompt", "Compute 1 2 + 3 4 ?", "--temperature", 0]  # 7 tokens and BOS, of 32
    code, out, err = command(monkeypatch, capsys, *words, "--tokens", most)
    assert (code, err) == (0, "") and out.startswith("Compute 1 2 + 3 4 ?")
    code, _, err = command(monkeypatch, capsys, *words, "--tokens", most + 1)
    assert code == 2 and f"ask for at most {most} tokens" in err
