"""Text at scale: shards that are made in parallel and go on after a kill, mixtures, and documents kept apart."""

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lookfar.batch import consecutive
from lookfar.config import DataConfig, ModelConfig, Run, TrainingConfig
from lookfar.data import portions, shards
from lookfar.data.base import SPLITS, Document, Source
from lookfar.data.corpus import open_corpus
from lookfar.data.encoders import Encoders
from lookfar.data.mixture import Mixture, ingredients, order
from lookfar.data.mixture import shares as weights_as_parts
from lookfar.data.packing import Lines
from lookfar.data.shards import Shards
from lookfar.data.stream import Stream
from lookfar.data.tokenizers import BytesTokenizer, train_bpe
from lookfar.errors import UserError
from lookfar.files import cache_folder
from lookfar.model.decoder import Decoder
from lookfar.training import objectives
from lookfar.training.train import train
from tolerance import assert_near

WORDS = ["attention", "looks", "further", "than", "it", "was", "trained", "to,", "naïvely,", "for", "3", "€;", "\n"]
TEXTS = {
    split: [" ".join(np.random.default_rng([seed, n]).choice(WORDS, 5 + 31 * n % 150)) for n in range(count)]
    for seed, (split, count) in enumerate({"train": 90, "valid": 3, "test": 2}.items())
}
TEXTS["train"][40] = " ".join(TEXTS["train"])  # longer than a shard


class Texts(Source):
    """Documents in memory, some of them in parts."""

    def __init__(self, broken_after=None):
        self.broken_after = broken_after

    def documents(self, split):
        for number, text in enumerate(TEXTS[split]):
            if split == "train" and number == self.broken_after:
                raise UserError("The hub cannot be reached.")
            yield Document(str(number), text[:100])
            yield from (Document(str(number), text[i : i + 999], True) for i in range(100, len(text), 999))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(portions, "_PIECE", 300)
    monkeypatch.setattr(portions, "_PORTION", 1000)
    monkeypatch.setattr(shards, "_PORTIONS", 4)


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(TEXTS["train"], 300)


def quiet(what, part):
    pass


def made(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*.shard"))}


def prepared(folder, tokenizer=None, source=None, workers=1, tell=quiet):
    found = Shards(folder, tokenizer or BytesTokenizer())
    found.prepare("texts", source or Texts(), tell, workers)
    return found


# Shards


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_documents_keep_their_borders_in_shards_of_any_size(tmp_path, bpe, kind):
    tokenizer = bpe if kind == "bpe" else BytesTokenizer()
    found = prepared(tmp_path / "a", tokenizer)
    assert len(made(tmp_path / "a")) > 5
    for split in SPLITS:
        stream = found.stream(split)
        starts = stream.starts()
        ends = [*(starts[1:] - 1), len(stream)]
        assert [tokenizer.decode(stream[a:b]) for a, b in zip(starts, ends, strict=True)] == TEXTS[split]
        assert all(stream[end : end + 1][0] == tokenizer.separator for end in ends[:-1])
        np.testing.assert_array_equal(stream[ends[0] :], np.asarray(stream)[ends[0] :])


def test_a_text_in_parts_has_the_tokens_of_the_whole(bpe):
    for text in (*TEXTS["train"][:9], TEXTS["train"][40], "x" * 3000 + " y" * 999):
        parts = [Document("a", text[i : i + 37], i > 0) for i in range(0, len(text), 37)]
        assert [each for each, _ in portions.pieces(parts)] == portions.cut(text)
        together = bpe.encode_batch(portions.cut(text))
        assert np.concatenate(together).tolist() == bpe._model.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_any_number_of_workers_gives_the_same_bytes(tmp_path, bpe, kind):
    tokenizer = bpe if kind == "bpe" else BytesTokenizer()
    for workers in (1, 2, 3):
        prepared(tmp_path / str(workers), tokenizer, workers=workers)
    assert made(tmp_path / "1") == made(tmp_path / "2") == made(tmp_path / "3")


def test_two_workers_are_two_processes(bpe):
    with Encoders(bpe, 2) as encoders:
        assert list(encoders.encode_all(iter(portions.portions(Texts().documents("valid")))))
        assert [process.poll() for process in encoders._processes] == [None, None]
        assert os.getpid() not in {process.pid for process in encoders._processes}
    assert all(process.returncode is not None for process in encoders._processes)


def test_a_worker_that_dies_is_told_and_what_is_done_is_kept(tmp_path, bpe, monkeypatch):
    ask = Encoders._ask

    def kill(self, portion):
        if len(made(tmp_path / "a")) == 2:
            self._processes[0].kill()
            self._processes[1].kill()
        return ask(self, portion)

    monkeypatch.setattr(Encoders, "_ask", kill)
    with pytest.raises(UserError, match="ended with code -9; is there enough memory"):
        prepared(tmp_path / "a", bpe, workers=2)
    kept = made(tmp_path / "a")
    assert len(kept) >= 2
    monkeypatch.undo()


def test_a_source_that_breaks_off_goes_on_where_it_was(tmp_path):
    prepared(tmp_path / "whole")
    with pytest.raises(UserError, match="cannot be reached"):
        prepared(tmp_path / "a", source=Texts(broken_after=60))
    before = {name: (tmp_path / "a" / name).stat().st_mtime_ns for name in made(tmp_path / "a")}
    assert before
    told = []
    prepared(tmp_path / "a", tell=lambda what, part: told.append(what))
    assert made(tmp_path / "a") == made(tmp_path / "whole")
    assert all((tmp_path / "a" / name).stat().st_mtime_ns == time for name, time in before.items())
    assert sum("is there" in what for what in told) == len(before)


HANG = """
import sys
sys.path.insert(0, {tests!r})
import test_data_shards as tests
from lookfar.data import encoders
tests.portions._PIECE, tests.portions._PORTION, tests.shards._PORTIONS = 300, 1000, 4
tokenizer = tests.train_bpe(tests.TEXTS["train"], 300)
start, told = encoders.Encoders._start, []
def note(self):
    start(self)
    print(*[process.pid for process in self._processes], flush=True)
encoders.Encoders._start = note
def tell(what, part):
    told.append(what)
    if len(told) == 14:
        print("in the middle", flush=True)
        sys.stdin.read()
tests.Shards(tests.shards.Path({folder!r}), tokenizer).prepare("texts", tests.Texts(), tell, {workers})
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_preparation_that_was_killed_goes_on_where_it_was(tmp_path, bpe, workers):
    prepared(tmp_path / "whole", bpe)
    script = HANG.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "a"), workers=workers)
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    pids = child.stdout.readline().split() if workers > 1 else []
    assert child.stdout.readline() == "in the middle\n"
    child.kill()
    with child:
        pass
    before = {name: (tmp_path / "a" / name).stat().st_mtime_ns for name in made(tmp_path / "a")}
    assert len(before) >= 3
    assert list((tmp_path / "a").glob(".*.shard.*"))
    assert not Shards(tmp_path / "a", bpe).are_whole()
    prepared(tmp_path / "a", bpe, workers=workers)
    assert made(tmp_path / "a") == made(tmp_path / "whole")
    assert all((tmp_path / "a" / name).stat().st_mtime_ns == then for name, then in before.items())
    assert not list((tmp_path / "a").glob(".*.shard.*"))
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "the workers outlive the process that started them"
        time.sleep(0.05)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "no record", "half a record"])
def test_only_a_damaged_shard_is_made_again(tmp_path, damage):
    whole = prepared(tmp_path / "a")
    names = list(made(tmp_path / "a"))
    before, file = made(tmp_path / "a"), tmp_path / "a" / names[4]
    times = {name: (tmp_path / "a" / name).stat().st_mtime_ns for name in names}
    record = file.with_suffix(".json")
    if damage == "flip":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "truncate":
        os.truncate(file, file.stat().st_size - 8)
    elif damage == "half a record":
        record.write_text(record.read_text()[:20])
    else:
        (file if damage == "remove" else record).unlink()
    assert not whole.are_whole()
    prepared(tmp_path / "a")
    assert whole.are_whole()
    assert made(tmp_path / "a") == before
    again = {name for name in names if (tmp_path / "a" / name).stat().st_mtime_ns != times[name]}
    assert again == {names[4]}


def test_a_shard_that_was_only_touched_is_believed(tmp_path):
    whole = prepared(tmp_path / "a")
    for file in (tmp_path / "a").glob("*.shard"):
        os.utime(file)
    assert whole.are_whole()


MEMORY = """
import sys
from pathlib import Path
from lookfar.config import DataConfig
from lookfar.data import portions, shards
from lookfar.data.corpus import Shards, open_corpus
from lookfar.data.text_file import TextFile
from lookfar.data.tokenizers import load_tokenizer
path, cache, size = sys.argv[1:]
portions._PORTION = int(size)
portions._PIECE = min(portions._PIECE, int(size))
source = TextFile(path=path)
source.fingerprint()
found = Shards(Path(cache), load_tokenizer(Path(path).parent))
found.prepare("text", source, lambda what, part: None, 1)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize(("kind", "size", "portion"), [("bytes", 6_000_000, 500_000), ("bpe", 600_000, 50_000)])
def test_ten_times_the_text_takes_no_more_memory(tmp_path, bpe, kind, size, portion):
    (bpe if kind == "bpe" else BytesTokenizer()).save(tmp_path)
    peaks = []
    for factor in (1, 10):
        file = tmp_path / f"{factor}.txt"  # one document in one file: all of it would be the easiest thing to hold
        with file.open("w", encoding="utf-8") as opened:
            while opened.tell() < size * factor:
                opened.write(TEXTS["train"][40])
        command = [sys.executable, "-c", MEMORY, str(file), str(tmp_path / f"cache{factor}"), str(portion)]
        environment = {**os.environ, "RAYON_NUM_THREADS": "1"}
        answer = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, timeout=100)
        peaks.append(int(answer.stdout) / 1024)
    assert peaks[1] - peaks[0] < 6, f"{peaks} megabytes"


# Streams


@settings(deadline=None)
@given(sizes=st.lists(st.integers(0, 9), max_size=6), data=st.data())
def test_a_stream_reads_like_one_array(sizes, data):
    parts = [np.arange(100 * i, 100 * i + size, dtype=np.uint16) for i, size in enumerate(sizes)]
    starts = [np.array(sorted(data.draw(st.sets(st.integers(0, max(size - 1, 0)), max_size=size)))) for size in sizes]
    starts = [each.astype(np.int64) for each in starts]
    whole = np.concatenate([np.empty(0, np.uint16), *parts])
    stream = Stream(parts, starts)
    assert len(stream) == len(whole)
    start, stop = data.draw(st.integers(-12, 60)), data.draw(st.integers(-12, 60))
    np.testing.assert_array_equal(stream[start:stop], whole[start:stop])
    np.testing.assert_array_equal(np.asarray(stream), whole)
    if len(whole):
        places = np.array(data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=8)), np.int64).reshape(-1, 1)
        np.testing.assert_array_equal(stream[places], whole[places])
        offsets = np.cumsum([0, *sizes])[:-1]
        begins = np.concatenate([np.empty(0, np.int64), *(s + o for s, o in zip(starts, offsets, strict=True))])
        np.testing.assert_array_equal(stream.starts(), begins)
        np.testing.assert_array_equal(stream.documents(places), (begins[None] <= places).sum(1)[:, None] - 1)
        with pytest.raises(IndexError):
            stream[np.array([len(whole)])]


def test_lines_are_the_same_over_one_shard_and_over_many():
    tokens = np.arange(500, dtype=np.uint16)
    many = Stream(np.split(tokens, [3, 17, 18, 250]), [np.empty(0, np.int64)] * 5)
    np.testing.assert_array_equal(Lines(many, context=13).batch(5, 70), Lines(tokens, context=13).batch(5, 70))


# Isolated documents


def isolated(texts=(b"abc", b"defgh", b"i", b"jklmno" * 9), context=13, seed=1):
    tokens = np.frombuffer(b"\0".join(texts), np.uint8)
    starts = np.cumsum([0, *(len(text) + 1 for text in texts[:-1])])
    parts, edge = np.split(tokens, [7]), int(np.searchsorted(starts, 7))
    return Lines(Stream(parts, [starts[:edge], starts[edge:] - 7]), context=context, seed=seed, isolated=True)


def test_a_separator_belongs_to_the_document_that_it_ends():
    lines = isolated()
    served = next(i for i in range(len(lines)) if lines.place(np.array([i]))[0] == 0)
    assert bytes(lines.batch(served, 1)[0].astype(np.uint8)) == b"abc\0defgh\0i\0jk"
    assert lines.documents(served, 1).tolist() == [[0] * 4 + [1] * 6 + [2] * 2 + [3] * 2]
    assert Lines(lines.tokens, context=13).documents(0, 2) is None
    assert (lines.documents(0, len(lines))[:, 0] == 0).all()


@pytest.mark.parametrize("scheme", ["alibi", "rope + stable_mask", "sinusoidal"])
def test_isolated_documents_equal_separate_ones(scheme):
    torch.manual_seed(0)
    lines = isolated()
    model = Decoder(ModelConfig(vocabulary=256, width=16, layers=2, heads=2, context=13, scheme=scheme)).double()
    served = next(i for i in range(len(lines)) if lines.place(np.array([i]))[0] == 0)
    tokens, documents = (torch.from_numpy(each(served, 1)) for each in (lines.batch, lines.documents))
    together = model(tokens[:, :-1], documents=documents[:, :-1])
    losses = []
    for number in documents.unique():
        alone = tokens[documents == number][None]
        inputs = alone[:, : int((documents[:, :-1] == number).sum())]
        assert_near(together[documents[:, :-1] == number], model(inputs)[0])
        if alone.shape[1] > 1:
            logits = model(alone[:, :-1])[0].float()
            losses.append(torch.nn.functional.cross_entropy(logits, alone[0, 1:], reduction="none"))
    objective = objectives.find("next_token", model.config)
    assert_near(objective(model, tokens, None, torch.rand(1, 13), documents), torch.cat(losses).mean())
    numbers = consecutive(documents[:, :-1])  # what the training loop makes of positions that are given
    assert_near(model(tokens[:, :-1], positions=numbers, documents=documents[:, :-1]), together)


def test_slots_are_not_asked_for_what_lies_in_another_document():
    torch.manual_seed(0)
    lines = isolated()
    config = ModelConfig(vocabulary=256, width=16, layers=1, heads=2, context=13, slots=3)
    model, chance = Decoder(config).double(), torch.rand(1, 13)
    objective = objectives.find("slots(anchors=13)", config)
    served = next(i for i in range(len(lines)) if lines.place(np.array([i]))[0] == 0)
    tokens, documents = (torch.from_numpy(each(served, 1)) for each in (lines.batch, lines.documents))
    alone = [tokens[documents == number][None] for number in range(4)]
    weights = [sum(min(3, len(each[0]) - end) for end in range(1, len(each[0]))) for each in alone]
    only = objectives.find("slots(anchors=13, next_token=0)", config)
    found = [only(model, each, None, torch.rand(1, len(each[0]) - 1)).item() for each in alone]
    expected = sum(loss * weight for loss, weight in zip(found, weights, strict=True)) / sum(weights)
    assert only(model, tokens, None, chance, documents).item() == pytest.approx(expected, rel=1e-5)
    assert objective(model, tokens, None, chance, documents).isfinite()


# Mixtures


@settings(deadline=None, max_examples=60)
@given(parts=st.lists(st.integers(1, 60), min_size=1, max_size=6))
def test_every_prefix_has_its_shares_to_within_one_line(parts):
    chosen = order(parts)
    counts = np.cumsum(chosen[:, None] == np.arange(len(parts)), axis=0)
    ideal = np.arange(1, len(chosen) + 1)[:, None] * np.array(parts) / sum(parts)
    assert np.abs(counts - ideal).max() < 1
    assert counts[-1].tolist() == parts


def mixture(weights=(0.5, 0.2, 0.3), seed=3):
    streams = [np.arange(1000 * n, 1000 * n + 131, dtype=np.uint16) for n in range(len(weights))]
    return Mixture([Lines(each, context=13, seed=seed) for each in streams], weights)


def test_each_source_serves_its_own_lines_in_its_own_order():
    mixed = mixture()
    served = mixed.batch(0, 200)
    source = served[:, 0] // 1000
    assert np.bincount(source).tolist() == [100, 40, 60]
    for number, lines in enumerate(mixed.lines):
        own = served[source == number]
        np.testing.assert_array_equal(own, lines.batch(0, len(own)))  # over several epochs of ten lines


@given(first=st.integers(0, 10_000), count=st.integers(1, 30))
def test_a_mixture_goes_on_from_the_count_of_lines_alone(first, count):
    np.testing.assert_array_equal(mixture().batch(first, count), mixture().batch(0, first + count)[first:])


def test_weights_count_in_proportion_only():
    assert weights_as_parts([0.7, 0.2, 0.1]) == weights_as_parts([14.0, 4.0, 2.0]) == [7, 2, 1]
    assert weights_as_parts([1.0, 1.0]) == [1, 1]
    assert weights_as_parts([1e-4, 0.9999]) == [1, 9999]


@pytest.fixture
def books(tmp_path):
    for name in "ab":
        text = "".join(f"{name * 5} {n % 89} {name * 5}\n" for n in range(900))
        (tmp_path / f"{name}.txt").write_text(text)
    a, b = (str(tmp_path / f"{name}.txt") for name in "ab")
    source = f"text_file(path={a!r}, weight=2) + text_file(path={b!r})"
    return DataConfig(source=source, cache=str(tmp_path / "cache"))


def test_a_mixture_is_named_and_measured_on_its_first_source(books, tmp_path):
    corpus = open_corpus(books)
    alone = open_corpus(DataConfig(source="text_file", path=str(tmp_path / "a.txt"), cache=books.cache))
    assert corpus.label == f"2 text_file:a.txt + 1 text_file:b.txt@{corpus.fingerprint[:8]}"
    assert corpus.texts[0].label == alone.label
    assert np.array_equal(corpus.tokens("valid"), alone.tokens("valid"))
    other = books.model_copy(update={"source": books.source.replace("weight=2", "weight=3")})
    assert open_corpus(other).fingerprint != corpus.fingerprint
    same = books.model_copy(update={"source": books.source.replace("weight=2", "weight=2.0")})
    assert open_corpus(same).label == corpus.label
    texts = [corpus.tokenizer.decode(line) for line in corpus.lines(context=20, seed=0).batch(0, 30)]
    assert [sum(name * 5 in text for text in texts) for name in "ab"] == [20, 10]
    assert len(list(cache_folder(books.cache).glob("*/manifest.json"))) == 2


def test_a_tokenizer_is_trained_on_all_that_is_mixed(books):
    corpus = open_corpus(books.model_copy(update={"tokenizer": "bpe", "vocabulary": 300}))
    words = {corpus.tokenizer.decode([token]) for token in range(corpus.tokenizer.vocabulary)}
    assert {"aaaaa", "bbbbb"} <= {word.strip() for word in words}
    assert corpus.texts[0].shards.tokenizer is corpus.texts[1].shards.tokenizer


@pytest.mark.parametrize(
    ("source", "path", "reason"),
    [
        ("text_file(weight=0, path=a) + python_library", None, "weight that is not possible; it is a number above 0"),
        ("python_library(weight=inf)", None, "weight that is not possible"),
        ("python_library(weight='much')", None, "weight that is not possible"),
        ("python_library(wieght=2)", None, "has no setting 'wieght'. Did you mean"),
        ("python_library + textfile(path=a)", None, "Did you mean 'text_file'"),
        ("python_library + text_file", "a.txt", "goes with a lone source; write it into"),
        ("text_file(path=b)", "a.txt", "goes with a lone source"),
        ("python_library(weight=0.1234567) + text_file(path=a)", None, "write them with fewer digits"),
        ("python library", None, "is not an expression"),
    ],
)
def test_what_cannot_be_mixed_is_told_at_the_door(source, path, reason):
    with pytest.raises(UserError) as told:
        ingredients(DataConfig(source=source, path=path))
    assert reason in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("documents", ["joined", "isolated"])
def test_training_on_a_mixture_resumes_to_the_same_bytes(books, tmp_path, documents):
    run = Run(
        model=ModelConfig(width=16, layers=1, heads=2, context=13, scheme="alibi"),
        data=books.model_copy(update={"documents": documents}),
        training=TrainingConfig(
            updates=6, batch=4, accumulation=2, checkpoint_every=1, numbering="randomized(largest=20)"
        ),
    )

    def stop(event):
        if event["event"] == "update" and event["update"] == 4:
            raise KeyboardInterrupt

    train(run, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(run, tmp_path / "halted", stop)
    train(run, tmp_path / "halted")
    whole, halted = (tmp_path / name / "checkpoints" / "6" / "model.safetensors" for name in ("whole", "halted"))
    assert whole.read_bytes() == halted.read_bytes()
