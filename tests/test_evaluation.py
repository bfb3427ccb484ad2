"""Every token of a stream but its first is scored once, and what is measured is the mean over tokens."""

import json
import math
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.nn import functional as F

from lookfar.config import ModelConfig, Study, read
from lookfar.data.spelling import spell
from lookfar.data.tokenizers import BytesTokenizer, train_bpe
from lookfar.errors import UserError
from lookfar.evaluation import perplexity
from lookfar.evaluation.base import Text
from lookfar.evaluation.perplexity import Perplexity
from lookfar.evaluation.protocols import find
from lookfar.model.decoder import Decoder
from lookfar.training.measure import as_text

VOCABULARY = 11
PREDICTED, LENGTHS = st.integers(1, 150), st.integers(1, 40)


def quiet(what, part):
    """Nobody watches."""


def model(**settings):
    torch.manual_seed(0)
    config = ModelConfig(vocabulary=VOCABULARY, width=16, layers=2, heads=2, context=8, dtype="float64", device="cpu")
    decoder = Decoder(ModelConfig(**{**config.model_dump(), **settings})).eval()
    torch.nn.init.normal_(decoder.embedding.weight)  # so that losses differ from token to token
    return decoder


def text(count, seed=0):
    tokens = np.random.default_rng(seed).integers(0, VOCABULARY, count).astype(np.uint8)
    return Text(tokens, spell([b"x" * size for size in range(1, VOCABULARY + 1)]), "words@12345678")


def measure(decoder, stream, length, protocol="non_overlapping"):
    rows = Perplexity().measure(decoder, stream, length=length, protocol=find(protocol), progress=quiet)
    return {row["metric"]: row for row in rows}


def loss(decoder, stream, length, protocol="non_overlapping"):
    return measure(decoder, stream, length, protocol)["loss"]["value"]


def losses_after(decoder, tokens):
    """The loss of each token that follows another in one window."""
    given = torch.from_numpy(tokens.astype(np.int64))[None]
    with torch.no_grad():
        logits = decoder(given[:, :-1])
    return F.cross_entropy(logits[0], given[0, 1:], reduction="none").tolist()


def scored(window):
    """The numbers of the tokens that a window scores; token 0 is the first of the stream."""
    end = window.start + window.inputs + 1
    return list(range(end - window.scored, end))


# Windows


@given(predicted=PREDICTED, length=LENGTHS, stride=st.integers(1, 40))
@example(predicted=1, length=1, stride=1)
@example(predicted=16, length=8, stride=8)
@example(predicted=17, length=8, stride=3)
def test_every_token_but_the_first_is_scored_once_and_in_order(predicted, length, stride):
    for expression in ("non_overlapping", "sliding", f"sliding(stride={min(stride, length)})"):
        windows = find(expression).windows(predicted, length)
        assert [token for window in windows for token in scored(window)] == list(range(1, predicted + 1))
        assert all(window.start >= 0 and 1 <= window.scored <= window.inputs <= length for window in windows)


@given(predicted=PREDICTED, length=LENGTHS)
def test_non_overlapping_windows_start_from_scratch_and_keep_a_ragged_last_one(predicted, length):
    windows = find("non_overlapping").windows(predicted, length)
    assert [window.start for window in windows] == list(range(0, predicted, length))
    assert [window.inputs for window in windows[:-1]] == [length] * (len(windows) - 1)
    assert windows[-1].inputs == (predicted - 1) % length + 1
    assert all(window.scored == window.inputs for window in windows)


@given(predicted=PREDICTED, length=LENGTHS, stride=st.integers(1, 40))
def test_after_the_first_window_every_token_has_at_least_length_minus_stride_of_context(predicted, length, stride):
    stride = min(stride, length)
    first, *later = find(f"sliding(stride={stride})").windows(predicted, length)
    assert (first.start, first.inputs, first.scored) == (0, min(length, predicted), min(length, predicted))
    for window in later:
        assert window.scored <= stride
        assert window.inputs == length - stride + window.scored
        assert min(scored(window)) - window.start > length - stride  # tokens that are read before it is predicted
    assert all(window.scored == stride for window in later[:-1])
    assert [window.start for window in later] == list(range(stride, stride * len(later) + 1, stride))


@given(predicted=PREDICTED, length=LENGTHS)
def test_sliding_by_half_the_length_is_the_default(predicted, length):
    half = find(f"sliding(stride={max(1, length // 2)})").windows(predicted, length)
    assert find("sliding").windows(predicted, length) == half


@given(predicted=PREDICTED, length=LENGTHS, tokens=st.integers(1, 200))
def test_a_cap_scores_the_first_tokens_of_the_stream(predicted, length, tokens):
    for name in ("non_overlapping", "sliding"):
        capped = find(f"{name}(tokens={tokens})")
        assert capped.name == name
        assert capped.windows(predicted, length) == find(name).windows(min(predicted, tokens), length)


@pytest.mark.parametrize(
    ("expression", "answer"),
    [
        ("slidin", r"No protocol is named 'slidin'\. Did you mean 'sliding'\?"),
        ("alibi", r"No protocol is named 'alibi'"),
        ("sliding + non_overlapping", r"No protocol is named"),
        ("sliding(strid=3)", r"'sliding' has no setting 'strid'\. Did you mean 'stride'\?"),
        ("sliding(stride=0)", r"sliding\(stride=0\) is not possible"),
        ("non_overlapping(stride=3)", r"'non_overlapping' has no setting 'stride'"),
        ("sliding(tokens=0)", r"tokens must be a whole number of at least 1"),
        ("sliding(tokens=many)", r"tokens must be a whole number of at least 1"),
        ("sliding(tokens=true)", r"tokens must be a whole number of at least 1"),
        ("", r"is not an expression"),
    ],
)
def test_a_protocol_that_is_not_there_is_told(expression, answer):
    with pytest.raises(UserError, match=answer):
        find(expression)


def test_a_stride_that_would_skip_tokens_is_refused():
    with pytest.raises(UserError, match="A stride of 9 would skip tokens of windows of 8; it must be at most the len"):
        find("sliding(stride=9)").windows(20, 8)


# Values


@pytest.mark.parametrize("scheme", ["alibi", "sinusoidal", "kerple + dape_v2 + stable_mask"])
@pytest.mark.parametrize(("count", "length"), [(30, 7), (29, 7), (5, 9), (2, 1)])
def test_non_overlapping_is_each_block_alone_weighted_by_its_tokens(scheme, count, length):
    decoder, stream = model(scheme=scheme), text(count)
    blocks = [stream.tokens[start : start + length + 1] for start in range(0, count - 1, length)]
    expected = [each for block in blocks for each in losses_after(decoder, block)]
    assert len(expected) == count - 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Length 9 exceeds")
        assert loss(decoder, stream, length) == pytest.approx(np.mean(expected), rel=1e-6)


@pytest.mark.parametrize("scheme", ["alibi", "nope", "rope + stable_mask"])
@pytest.mark.parametrize("length", [1, 5, 13])
def test_sliding_by_one_is_a_window_for_each_token(scheme, length):
    decoder, stream = model(scheme=scheme), text(31)
    windows = [stream.tokens[max(0, token - length) : token + 1] for token in range(1, 31)]
    expected = [losses_after(decoder, window)[-1] for window in windows]
    assert loss(decoder, stream, length, "sliding(stride=1)") == pytest.approx(np.mean(expected), rel=1e-6)


@pytest.mark.parametrize("count", [17, 18, 20, 24, 33])
def test_sliding_by_the_length_is_non_overlapping(count):
    decoder, length = model(scheme="alibi"), 8
    sliding = measure(decoder, text(count), length, f"sliding(stride={length})")
    blocks = measure(decoder, text(count), length, "non_overlapping")
    for metric in ("loss", "perplexity", "bits_per_byte"):
        assert sliding[metric]["value"] == blocks[metric]["value"]
        assert sliding[metric]["count"] == blocks[metric]["count"] == count - 1


def test_the_mean_is_over_tokens_not_over_windows():
    decoder, stream = model(scheme="alibi"), text(12)
    long, ragged = losses_after(decoder, stream.tokens[:10]), losses_after(decoder, stream.tokens[9:])
    of_means = (np.mean(long) + np.mean(ragged)) / 2
    assert abs(of_means - np.mean(long + ragged)) > 1e-2
    assert loss(decoder, stream, 9) == pytest.approx(np.mean(long + ragged), rel=1e-6)


def test_perplexity_is_the_exponential_of_the_loss():
    rows = measure(model(), text(50), 7)
    assert rows["perplexity"]["value"] == math.exp(rows["loss"]["value"])


def test_a_loss_beyond_all_numbers_is_an_infinite_perplexity():
    decoder = model()
    with torch.no_grad():
        decoder.norm.weight.fill_(1e5)
    rows = measure(decoder, text(20), 7)
    assert rows["loss"]["value"] > 800
    assert rows["perplexity"]["value"] == math.inf


@pytest.mark.parametrize("protocol", ["non_overlapping", "sliding(stride=3)", "sliding(tokens=13)"])
def test_counts_and_names_are_in_the_rows(protocol):
    stream, count = text(30), 13 if "tokens" in protocol else 29
    rows = Perplexity().measure(model(), stream, length=7, protocol=find(protocol), progress=quiet)
    assert [row["metric"] for row in rows] == ["loss", "perplexity", "bits_per_byte", "word_perplexity"]
    for row in rows:
        assert row["count"] == count
        assert row["windows"] == len(find(protocol).windows(29, 7))
        assert (row["data"], row["length"], row["unit"]) == ("words@12345678", 7, "token")
        assert row["protocol"] == protocol.replace("(tokens=13)", "")
        assert (row["first"], row["documents"]) == ("context", 1)
        assert math.isnan(row["value"]) or json.loads(json.dumps(row)) == row


def test_a_capped_measurement_reads_nothing_beyond_its_cap():
    stream, other = text(60), text(60)
    other.tokens[21:] = 0
    for name in ("non_overlapping", "sliding"):
        assert loss(model(), stream, 7, f"{name}(tokens=20)") == loss(model(), other, 7, f"{name}(tokens=20)")
        assert loss(model(), stream, 7, f"{name}(tokens=21)") != loss(model(), other, 7, f"{name}(tokens=21)")


def test_progress_grows_to_one():
    parts = []
    told = lambda what, part: parts.append((what, part))  # noqa: E731
    Perplexity().measure(model(), text(100), length=7, protocol=find("sliding"), progress=told)
    assert {what for what, _ in parts} == {"sliding at 7"}
    assert [part for _, part in parts] == sorted(part for _, part in parts)
    assert parts[-1][1] == 1


# Bytes


def test_bits_per_byte_of_bytes_are_the_loss_in_bits():
    tokenizer = BytesTokenizer()
    stream = as_text(tokenizer.encode("Grüße, 3 € and more of it.\n" * 4), tokenizer, "text")
    rows = measure(model(vocabulary=256), stream, 9)
    assert stream.unit == "byte"
    assert rows["bits_per_byte"]["value"] == pytest.approx(rows["loss"]["value"] / math.log(2), rel=1e-12)


def test_bits_per_byte_of_bpe_count_the_bytes_of_the_scored_tokens():
    words = "the theatre of the weather, über alles 3 €\n" * 30
    tokenizer = train_bpe([words], 300)
    tokens = np.append(tokenizer.encode("the weather of the theatre\n€ über"), tokenizer.separator)
    stream = as_text(tokens, tokenizer, "text")
    decoder = model(vocabulary=tokenizer.vocabulary)
    rows = measure(decoder, stream, len(tokens) - 1)
    scored_text = tokenizer.decode(tokens[1:-1])  # all but the first; the separator stands for no bytes
    bits = sum(losses_after(decoder, tokens)) / math.log(2)
    assert stream.unit == "token"
    assert len(scored_text.encode()) > len(tokens) > 8
    assert rows["bits_per_byte"]["value"] == pytest.approx(bits / len(scored_text.encode()), rel=1e-6)
    assert rows["bits_per_byte"]["count"] == len(tokens) - 1


def test_a_separator_alone_has_bits_for_no_byte():
    tokenizer = train_bpe(["one and one"], 260)
    stream = as_text(np.array([5, tokenizer.separator], tokenizer.dtype), tokenizer, "text")
    rows = measure(model(vocabulary=tokenizer.vocabulary), stream, 1)
    assert math.isfinite(rows["perplexity"]["value"])
    assert not math.isfinite(rows["bits_per_byte"]["value"])


# What is refused, and what is warned of


def test_a_length_beyond_the_text_is_warned_of_and_measured():
    with pytest.warns(UserWarning, match="Length 50 exceeds the held-out text of 19 predicted tokens"):
        rows = measure(model(), text(20), 50)
    assert rows["loss"]["count"] == 19
    assert rows["loss"]["value"] == pytest.approx(np.mean(losses_after(model(), text(20).tokens)), rel=1e-6)
    measure(model(), text(20), 19)  # without a warning, as warnings are errors here


@pytest.mark.parametrize("name", ["non_overlapping", "sliding"])
def test_a_length_beyond_the_cap_is_warned_of(name):
    with pytest.warns(UserWarning, match="50"):
        measure(model(), text(100), 50, f"{name}(tokens=20)")


def test_a_length_beyond_a_learned_table_is_refused():
    decoder = model(scheme="learned", positions=12)
    assert math.isfinite(loss(decoder, text(40), 12))
    with pytest.raises(UserError, match=r"Length 13 lies beyond the learned table of 12 positions; .*positions=13"):
        measure(decoder, text(40), 13)


@pytest.mark.parametrize("length", [0, -3])
def test_a_length_below_one_is_refused(length):
    with pytest.raises(UserError, match=rf"A length of {length} tokens cannot be evaluated; it must be at least 1"):
        measure(model(), text(40), length)


@pytest.mark.parametrize("count", [0, 1])
def test_a_text_without_a_token_to_predict_is_refused(count):
    with pytest.raises(UserError, match=rf"words@12345678 has {count} tokens; at least two are needed"):
        measure(model(), text(count), 4)


# Memory


@pytest.fixture
def largest(monkeypatch):
    """The most entries of logits that were made at once."""
    sizes = []
    logits = Decoder.logits

    def noted(decoder, states):
        made = logits(decoder, states)
        sizes.append(made.numel())
        return made

    monkeypatch.setattr(Decoder, "logits", noted)
    return sizes


@pytest.mark.parametrize("entries", [1, VOCABULARY * 3, VOCABULARY * 3 + 5])
@pytest.mark.parametrize("protocol", ["non_overlapping", "sliding(stride=5)"])
def test_logits_are_made_a_piece_at_a_time_and_give_the_same(monkeypatch, largest, entries, protocol):
    expected = loss(model(), text(90), 16, protocol)
    assert max(largest) > VOCABULARY * 16
    largest.clear()
    monkeypatch.setattr(perplexity, "LOGITS", entries)
    assert loss(model(), text(90), 16, protocol) == pytest.approx(expected, rel=1e-12)
    assert max(largest) == max(entries // VOCABULARY, 1) * VOCABULARY


def test_only_what_is_scored_has_logits(largest):
    measure(model(), text(90), 16, "sliding(stride=2)")
    assert sum(largest) == 89 * VOCABULARY


def test_how_many_windows_are_read_at_once_changes_nothing(monkeypatch):
    expected = loss(model(), text(400), 16, "sliding(stride=5)")
    seen = []
    states = Decoder.states
    monkeypatch.setattr(
        Decoder,
        "states",
        lambda decoder, given, **more: (seen.append(given.numel()), states(decoder, given, **more))[1],
    )
    monkeypatch.setitem(perplexity.TOGETHER, "cpu", 40)
    assert loss(model(), text(400), 16, "sliding(stride=5)") == pytest.approx(expected, rel=1e-9)
    assert max(seen) <= 48  # whole windows


LARGE = """
import resource, sys
from pathlib import Path
import numpy as np
import torch
from lookfar.config import ModelConfig
from lookfar.data.spelling import spell
from lookfar.evaluation.base import Text
from lookfar.evaluation.perplexity import Perplexity
from lookfar.evaluation.protocols import find
from lookfar.model.decoder import Decoder

scheme, length = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
model = Decoder(ModelConfig(vocabulary=50_000, width=64, layers=1, heads=8, context=128, scheme=scheme)).eval()
tokens = np.random.default_rng(0).integers(0, 50_000, length + 1).astype(np.uint16)
text = Text(tokens, spell([b"x"] * 50_000), "noise")
rows = Perplexity().measure(
    model, text, length=length, protocol=find("non_overlapping"), progress=lambda what, part: None
)
assert rows[0]["count"] == length and rows[0]["windows"] == 1
status = Path("/proc/self/status")
if status.exists():  # elsewhere the peak of a process begins with its parent's
    peak = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(rows[0]["value"], peak / 2**20)
"""

DEMO = ["sinusoidal", "rope", "nope", "alibi", "t5", "kerple", "kerple + dape_v2", "rope + stable_mask"]


def gigabytes(scheme, length):
    """The most resident memory of a process that evaluates one window with 8 heads and 50,000 words."""
    command = [sys.executable, "-c", LARGE, scheme, str(length)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    found, resident = map(float, ran.stdout.split())
    assert 0 < found < 30
    return resident


def test_a_window_of_2048_stays_small():
    assert gigabytes("kerple + dape_v2", 2048) < 1


@pytest.mark.long
@pytest.mark.parametrize("scheme", [*DEMO, "differential"])
def test_a_window_of_16384_stays_under_4_gb(scheme):
    assert gigabytes(scheme, 16_384) < 4


def test_the_demo_measures_the_schemes_that_are_held_to_4_gb():
    recipe = Path(__file__).parents[1] / "recipes" / "demo.toml"
    assert list(read(recipe, kind=Study).study.schemes) == DEMO
