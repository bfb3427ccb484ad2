"""Which tokens `last` scores, what BOS changes, and how losses are added up: by document, by place, by word."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from lookfar import files
from lookfar.config import build
from lookfar.data.spelling import spell
from lookfar.data.tokenizers import BytesTokenizer, train_bpe
from lookfar.errors import UserError
from lookfar.evaluation import perplexity
from lookfar.evaluation.base import Model, Text
from lookfar.evaluation.perplexity import Perplexity
from lookfar.evaluation.protocols import find
from lookfar.evaluation.tally import Tally
from lookfar.model.packed import pack
from lookfar.training.evaluate import evaluate_run
from lookfar.training.run import run_whole
from test_evaluation import losses_after, measure, model, quiet, scored, text

STARTS = [0, 20, 21, 50, 90]


def documents(count=110, seed=0):
    plain = text(count, seed)
    return Text(plain.tokens, plain.spelling, plain.label, starts=np.array(STARTS), bos=3)


# Windows


@given(predicted=st.integers(1, 150), length=st.integers(1, 40), k=st.integers(1, 50), more=st.integers(0, 30))
@example(predicted=39, length=13, k=5, more=0)
def test_last_scores_the_end_of_every_whole_window(predicted, length, k, more):
    stride = min(k, length) + more
    windows = find(f"last(k={k}, stride={stride})").windows(predicted, length)
    if predicted < length:
        assert [(each.start, each.inputs) for each in windows] == [(0, predicted)]
    else:
        ends = [each.start + each.inputs for each in windows]
        assert ends == [end for end in range(stride, predicted + 1, stride) if end >= length]
        assert all(each.inputs == length and each.scored == min(k, length) for each in windows)
    tokens = [token for window in windows for token in scored(window)]
    assert len(tokens) == len(set(tokens))


def test_last_is_256_tokens_of_windows_side_by_side():
    windows = find("last").windows(5000, 1024)
    assert [each.start for each in windows] == [0, 1024, 2048, 3072]
    assert {(each.inputs, each.scored) for each in windows} == {(1024, 256)}
    assert {each.scored for each in find("last").windows(5000, 128)} == {128}


def test_under_a_common_stride_all_lengths_score_the_same_tokens():
    protocol = find("last(k=3, stride=32)")
    found = [[token for window in protocol.windows(200, n) for token in scored(window)] for n in (3, 8, 13, 32)]
    assert found[0] == found[1] == found[2] == found[3]
    assert len(found[0]) == 3 * 6


def test_last_of_documents_is_a_window_for_each_token():
    windows = find("last(k=3, of=documents)").windows(109, 10, STARTS)
    assert {(each.inputs, each.scored) for each in windows} == {(10, 1)}
    expected = [place for end in (20, 50, 90, 110) for place in range(end - 3, end)]
    assert [scored(each)[0] for each in windows] == expected
    for window in windows:  # nothing of another document is read
        assert np.searchsorted(STARTS, window.start, "right") == np.searchsorted(STARTS, scored(window)[0], "right")
    fewer = find("last(k=3, of=documents, shortest=25)").windows(109, 10, STARTS)
    assert [scored(each)[0] for each in fewer] == expected[3:9]


@pytest.mark.parametrize(("cap", "expected"), [(1, 1), (3, 3), (5, 4), (8, 8), (1000, 24)])
def test_a_cap_keeps_the_first_windows_of_last(cap, expected):
    windows = find(f"last(k=4, tokens={cap})").windows(61, 10)
    assert sum(each.scored for each in windows) == expected
    assert windows[0].start == 0 and windows[0].inputs == 10


@pytest.mark.parametrize(
    ("expression", "answer"),
    [
        ("last(k=5, stride=4)", "A stride of 4 would score tokens twice; it must be at least the 5 scored"),
        ("last(of=documents, stride=4)", "a stride is of last"),
        ("last(shortest=4)", "is of documents"),
        ("last(of=pages)", r"last\(of=.*is not possible"),
        ("last(k=0)", "is not possible"),
        ("sliding(bos=3)", "bos must be true or false"),
    ],
)
def test_what_last_cannot_be_is_told(expression, answer):
    with pytest.raises(UserError, match=answer):
        find(expression).windows(100, 10, [0])


def test_a_text_without_a_document_long_enough_is_refused():
    with pytest.raises(UserError, match=r"No part of words@12345678 is long enough for last.* at length 60"):
        measure(model(), documents(), 60, "last(k=3, of=documents)")


# Values


def test_last_is_the_mean_over_what_it_scores():
    decoder, stream = model(scheme="alibi"), documents()
    blocks = [stream.tokens[start : start + 14] for start in range(0, 110 - 13, 13)]
    expected = [each for block in blocks for each in losses_after(decoder, block)[-5:]]
    found = measure(decoder, stream, 13, "last(k=5)")
    assert found["loss"]["value"] == pytest.approx(np.mean(expected), rel=1e-6)
    assert (found["loss"]["count"], found["loss"]["protocol"]) == (len(expected), "last(k=5)")
    ends = [place for end in (20, 50, 90, 110) for place in range(end - 3, end)]
    alone = [losses_after(decoder, stream.tokens[place - 10 : place + 1])[-1] for place in ends]
    found = measure(decoder, stream, 10, "last(k=3, of=documents)")
    assert found["loss"]["value"] == pytest.approx(np.mean(alone), rel=1e-6)


@pytest.mark.parametrize("protocol", ["non_overlapping", "sliding(stride=1)", "sliding(stride=4)"])
def test_bos_stands_before_every_window_and_changes_nothing_else(protocol):
    decoder, stream = model(scheme="rope"), documents()
    plain = measure(decoder, stream, 8, protocol)["loss"]
    name = f"{protocol[:-1]}, bos=true)" if "(" in protocol else f"{protocol}(bos=true)"
    found = measure(decoder, stream, 8, name)["loss"]
    expected = []
    for window in find(protocol).windows(109, 8):
        own = stream.tokens[window.start : window.start + window.inputs + 1]
        expected += losses_after(decoder, np.concatenate([[3], own]))[-window.scored :]
    assert found["value"] == pytest.approx(np.mean(expected), rel=1e-6) != plain["value"]
    assert found["count"] == plain["count"]
    assert (plain["first"], found["first"], found["protocol"]) == ("context", "bos", name)


def test_a_text_that_nothing_begins_is_refused_with_bos():
    with pytest.raises(UserError, match="has no token that begins a text; measure without bos=true"):
        measure(model(), text(50), 8, "sliding(bos=true)")


@pytest.mark.parametrize("scheme", ["rope", "nope", "sinusoidal", "kerple + dape_v2 + stable_mask", "t5 + gate"])
@pytest.mark.parametrize("stride", [1, 3])
def test_overlapping_windows_share_work_and_give_the_same(scheme, stride):
    decoder = model(scheme=scheme)
    lines = torch.from_numpy(text(40).tokens.astype(np.int64)).unfold(0, 13, stride)
    with torch.no_grad():
        expected = decoder.states(lines)[:, -stride:]
        assert torch.allclose(decoder.states(lines, last=stride, step=stride), expected, atol=1e-12)


@pytest.mark.parametrize("window", [None, (None, 4), 3])
@pytest.mark.parametrize("scheme", ["alibi", "rope + differential_v2", "learned + gate"])
def test_weights_that_are_laid_out_for_speed_give_the_same(scheme, window, monkeypatch):
    decoder, laid = model(scheme=scheme, window=window, dtype="float32"), []
    monkeypatch.setattr(perplexity, "pack", lambda *given: (laid.append(pack(*given)), laid[-1])[1])
    found = measure(decoder, text(60), 8, "sliding(stride=2)")["loss"]["value"]
    assert laid[0] is not decoder
    monkeypatch.setattr(perplexity, "pack", lambda decoder, rows: decoder)
    assert found == pytest.approx(measure(decoder, text(60), 8, "sliding(stride=2)")["loss"]["value"], rel=1e-5)


def test_a_decoder_is_a_model_to_measure():
    assert isinstance(model(), Model)


# By place in the window


def test_the_loss_by_position_is_that_of_shorter_windows_that_begin_there():
    decoder, stream = model(scheme="alibi"), text(90)
    protocol = find("non_overlapping")
    rows = Perplexity(by_position=True).measure(decoder, stream, length=13, protocol=protocol, progress=quiet)
    found = [row for row in rows if row["metric"] == "loss_at"]
    assert [(row["from"], row["to"]) for row in found] == [(1, 1), (2, 2), (3, 4), (5, 8), (9, 13)]
    blocks = [losses_after(decoder, stream.tokens[start : start + 14]) for start in range(0, 89, 13)]
    for row in found:
        expected = [each for block in blocks for each in block[row["from"] - 1 : row["to"]]]
        assert row["count"] == len(expected) and row["of"] == 89
        assert row["value"] == pytest.approx(np.mean(expected), rel=1e-6)
    reached = [row for row in found if row["to"] <= 4]
    mean = sum(row["value"] * row["count"] for row in reached) / sum(row["count"] for row in reached)
    short = [losses_after(decoder, stream.tokens[start : start + 5]) for start in range(0, 89, 13)]
    assert mean == pytest.approx(np.mean(np.concatenate(short)), rel=1e-6)


# Intervals over documents


def test_an_interval_is_of_documents_not_of_tokens():
    found = measure(model(), documents(), 9)
    for row in found.values():
        if not math.isnan(row["value"]):
            assert row["low"] < row["value"] < row["high"]
            assert row["documents"] == 5
    assert math.log(found["perplexity"]["low"]) == pytest.approx(found["loss"]["low"], rel=1e-12)
    assert "low" not in measure(model(), text(110), 9)["loss"]


def test_the_interval_of_documents_that_are_alike_is_a_point_and_draws_weigh_tokens():
    stream = Text(np.zeros(61, np.uint8), spell([b"x "]), "zeros", starts=np.array([0, 10, 40]))
    tally = Tally(stream, 60, 60)
    tally.add(np.zeros((1, 61), np.int64), np.arange(1, 61)[None], np.full((1, 60), 0.5))
    loss = next(iter(tally.rows()))
    assert (loss["low"], loss["value"], loss["high"]) == (0.5, 0.5, 0.5)
    assert tally.sums[:, 1].tolist() == [9, 30, 21]  # the first token is not scored
    uneven = Tally(stream, 60, 60)
    uneven.add(np.zeros((1, 61), np.int64), np.arange(1, 61)[None], np.repeat([9.0, 1.0, 1.0], [9, 30, 21])[None])
    loss = next(iter(uneven.rows()))
    assert loss["value"] == pytest.approx((81 + 51) / 60)
    assert (loss["low"], loss["high"]) == (1.0, 9.0)  # the first document never, or it alone


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    random, covered = np.random.default_rng(0), 0
    starts = np.arange(0, 40 * 25, 25)
    stream = Text(np.zeros(40 * 25 + 1, np.uint8), spell([b"x"]), "zeros", starts=starts)
    for _ in range(60):
        losses = 3 + random.normal(size=40).repeat(25) + random.normal(size=40 * 25)
        tally = Tally(stream, 1000, 1000)
        tally.add(np.zeros((1, 1001), np.int64), np.arange(1, 1001)[None], losses[None])
        loss = next(iter(tally.rows()))
        covered += loss["low"] <= 3 <= loss["high"]
    assert 50 <= covered < 60


# Words


@pytest.mark.parametrize("content", ["one two  three", " a\tb\nc ", "\u00a0x y\u3000z", "   ", "x", "é\x0b\x0c\rü 3 €"])
def test_words_are_what_white_space_leaves_together(content):
    bpe = train_bpe(["one two three  one two\tthree\n é ü"], 280)
    for tokenizer in (BytesTokenizer(), bpe):
        tokens = np.concatenate([[tokenizer.separator], tokenizer.encode(content)]).astype(np.int64)
        sizes, words = tokenizer.spelling.count(tokens[1:], tokens[:-1], np.arange(1, len(tokens)))
        assert sizes.sum() == len(content.encode())
        assert words.sum() == len(content.encode().split())


def test_a_separator_ends_a_word():
    tokenizer = BytesTokenizer()
    tokens = np.frombuffer(b"\0one\0two", np.uint8)
    _, words = tokenizer.spelling.count(tokens[1:], tokens[:-1], np.arange(1, 8))
    assert words.tolist() == [1, 0, 0, 0, 1, 0, 0]


# In a run


def test_a_run_measures_by_position_once_and_keeps_both(tmp_path, monkeypatch):
    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / "text" / f"{number}.txt").write_text(f"document {number} has a few words\n" * 3, encoding="utf-8")
    content = {
        "model": {"width": 16, "layers": 1, "heads": 2, "context": 16, "device": "cpu"},
        "data": {"source": "text_file", "path": str(tmp_path / "text"), "cache": str(tmp_path / "cache")},
        "training": {"updates": 1, "batch": 2},
        "evaluation": {"lengths": [16], "protocols": ["non_overlapping", "last(k=4)"]},
    }
    before = run_whole(build(content), tmp_path / "run")
    measured = [row for row in before if row["protocol"] != "training"]
    assert all(row["documents"] > 1 and row["low"] < row["high"] for row in measured)
    rows = evaluate_run(tmp_path / "run", by_position=True)
    assert {row["to"] for row in rows if row["metric"] == "loss_at"} == {1, 2, 4, 8, 16}
    assert [row for row in rows if row["metric"] != "loss_at"] == measured
    kept = files.read_lines(tmp_path / "run" / "rows.jsonl")
    assert len(kept) == len(before) + sum(row["metric"] == "loss_at" for row in rows)
    monkeypatch.setattr(Perplexity, "measure", None)
    assert evaluate_run(tmp_path / "run", by_position=True) == rows
