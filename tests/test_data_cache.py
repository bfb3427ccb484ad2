"""Corpora: what streams hold, and how they are kept in the cache."""

import json
import multiprocessing
import os
import resource
import signal
import sys

import numpy as np
import pytest

from lookfar.config import DataConfig
from lookfar.data import cache, shards
from lookfar.data.base import SPLITS
from lookfar.data.cache import publish
from lookfar.data.corpus import open_corpus
from lookfar.data.tokenizers import BytesTokenizer
from lookfar.errors import UserError
from lookfar.files import cache_folder

LINES = [f"line {number} costs 3 €, or naïvely {number * 7919 % 101}.\n" for number in range(300)]


@pytest.fixture
def config(tmp_path):
    (tmp_path / "book.txt").write_text("".join(LINES), encoding="utf-8")
    return DataConfig(source="text_file", path=str(tmp_path / "book.txt"), cache=str(tmp_path / "cache"))


@pytest.fixture
def folder_config(tmp_path):
    for number in range(150):
        (tmp_path / "books").mkdir(exist_ok=True)
        (tmp_path / "books" / f"{number}.txt").write_text(f"book {number}", encoding="utf-8")
    return DataConfig(source="text_file", path=str(tmp_path / "books"), cache=str(tmp_path / "cache"))


def streams(corpus):
    return {split: corpus.tokens(split)[:].tolist() for split in SPLITS}


def visible(config):
    return sorted(each.name for each in cache_folder(config.cache).iterdir() if not each.name.startswith("."))


def test_a_file_of_n_bytes_is_n_tokens(config):
    corpus = open_corpus(config)
    content = "".join(LINES).encode()
    assert b"".join(corpus.tokens(split)[:].tobytes() for split in SPLITS) == content
    assert corpus.tokens("train").dtype == np.uint8
    assert corpus.starts("train").tolist() == [0]


def test_the_separator_stands_between_documents_only(folder_config):
    corpus = open_corpus(folder_config)
    for split in SPLITS:
        tokens, starts = corpus.tokens(split)[:], corpus.starts(split)
        assert starts.dtype == np.int64
        assert np.flatnonzero(tokens == corpus.tokenizer.separator).tolist() == (starts[1:] - 1).tolist()
        texts = corpus.tokenizer.decode(tokens).split("\0")
        assert len(texts) == len(starts) > 1
        assert all(text.startswith("book ") for text in texts)


def test_bpe_is_trained_on_the_corpus_and_loses_nothing(config):
    corpus = open_corpus(config.model_copy(update={"tokenizer": "bpe", "vocabulary": 300}))
    assert corpus.tokenizer.vocabulary == 300
    assert corpus.tokens("train").dtype == np.uint16
    assert "".join(corpus.tokenizer.decode(corpus.tokens(split)[:]) for split in SPLITS) == "".join(LINES)
    size = sum(corpus.tokenizer.lengths[corpus.tokens(split)[:]].sum() for split in SPLITS)
    assert size == len("".join(LINES).encode())


def test_a_given_tokenizer_takes_the_place_of_the_configured_one(config):
    corpus = open_corpus(config.model_copy(update={"tokenizer": "bpe"}), tokenizer=BytesTokenizer())
    assert isinstance(corpus.tokenizer, BytesTokenizer)
    assert corpus.fingerprint == open_corpus(config).fingerprint


def test_the_label_names_the_source_its_file_and_the_fingerprint(config, tmp_path):
    corpus = open_corpus(config)
    assert corpus.texts[0].name == "text_file:book.txt"
    assert corpus.label == f"text_file:book.txt@{corpus.fingerprint[:8]}"
    (tmp_path / "book.txt").write_text("".join(LINES[1:]), encoding="utf-8")
    assert open_corpus(config).fingerprint != corpus.fingerprint


def test_tokens_are_mapped_and_cannot_be_written(config):
    tokens = open_corpus(config).tokens("train")
    with pytest.raises(TypeError, match="does not support item assignment"):
        tokens[0] = 1
    assert all(isinstance(part, np.memmap) and not part.flags.writeable for part in tokens._parts)


def test_a_corpus_is_built_once(config):
    told = []
    for _ in range(2):
        open_corpus(config, progress=lambda what, part: told.append(what))
    assert [what.split(":")[0] for what in told] == [f"tokenizing {split}" for split in SPLITS]


def test_the_cache_is_chosen_by_setting_then_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("LOOKFAR_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert cache_folder(str(tmp_path)) == tmp_path
    assert cache_folder() == tmp_path / "a"
    monkeypatch.delenv("LOOKFAR_CACHE")
    assert cache_folder() == tmp_path / "b" / "lookfar"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "lookfar"


DAMAGES = ["truncate", "lengthen", "remove", "flip", "no record", "no manifest", "broken manifest", "a file"]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_a_damaged_entry_is_rebuilt(config, damage, tokenizer):
    config = config.model_copy(update={"tokenizer": tokenizer, "vocabulary": 300})
    corpus = open_corpus(config)
    folder = corpus.texts[0].shards.folder
    before, tokens = streams(corpus), folder / "valid-00000.shard"
    if damage in ("truncate", "lengthen"):
        os.truncate(tokens, tokens.stat().st_size + (2 if damage == "lengthen" else -2))
    elif damage == "remove":
        tokens.unlink()
    elif damage == "flip":
        content = bytearray(tokens.read_bytes())
        content[3] ^= 1
        tokens.write_bytes(content)
    elif damage == "no record":
        tokens.with_suffix(".json").unlink()
    elif damage == "no manifest":
        (folder / "manifest.json").unlink()
    elif damage == "broken manifest":
        (folder / "manifest.json").write_text('{"splits": 3}')
    else:
        folder.rename(folder.with_name("elsewhere"))
        folder.touch()
    assert streams(open_corpus(config)) == before


def test_a_damaged_cached_tokenizer_is_trained_again(config):
    config = config.model_copy(update={"tokenizer": "bpe", "vocabulary": 300})
    corpus = open_corpus(config)
    (file,) = cache_folder(config.cache).glob("*-bpe-300/tokenizer.json")
    file.write_text(file.read_text()[:-50])
    assert open_corpus(config).fingerprint == corpus.fingerprint


def build_together(config, barrier, answers):
    waited = []

    def wait(what, part):
        if not waited:  # one is in the middle, the other finds it there, when either goes on
            waited.append(barrier.wait(30))

    answers.put((os.getpid(), streams(open_corpus(config, progress=wait))))


@pytest.mark.parametrize("state", ["missing", "damaged"])
def test_two_processes_may_build_at_once(config, state):
    if state == "damaged":
        (open_corpus(config).texts[0].shards.folder / "train-00000.shard").unlink()
    spawn = multiprocessing.get_context("spawn")
    barrier, answers = spawn.Barrier(2), spawn.Queue()
    builders = [spawn.Process(target=build_together, args=(config, barrier, answers)) for _ in range(2)]
    for each in builders:
        each.start()
    (first, tokens), (second, others) = (answers.get(timeout=50) for _ in range(2))
    for each in builders:
        each.join(30)
    assert [each.exitcode for each in builders] == [0, 0]
    assert first != second
    assert tokens == others == streams(open_corpus(config))
    assert list(cache_folder(config.cache).glob(".*")) == []
    assert len(visible(config)) == 1


def test_whoever_comes_second_takes_what_is_there(tmp_path):
    folder = tmp_path / "entry"

    def faster(empty):
        (empty / "word").write_text("first")

    def slower(empty):
        (empty / "word").write_text("second")
        publish(folder, faster, lambda entry: (entry / "word").exists())

    publish(folder, slower, lambda entry: (entry / "word").exists())
    assert (folder / "word").read_text() == "first"
    assert list(tmp_path.iterdir()) == [folder]


def build_and_hang(config, pipe):
    def hang(what, part):
        pipe.send(what)
        signal.pause()

    open_corpus(config, progress=hang)


def test_a_preparation_that_was_killed_does_no_harm(config):
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    builder = spawn.Process(target=build_and_hang, args=(config, there))
    builder.start()
    assert here.poll(50)
    assert here.recv().startswith("tokenizing train")
    builder.kill()
    builder.join(30)
    assert builder.exitcode == -signal.SIGKILL
    (left,) = cache_folder(config.cache).iterdir()
    assert [each.name for each in left.iterdir() if not each.name.startswith(".")] == []
    assert b"".join(open_corpus(config).tokens(split)[:].tobytes() for split in SPLITS) == "".join(LINES).encode()
    assert sorted(each.name for each in left.glob(".*")) == [".lock"]


def test_what_dead_builds_have_left_is_swept_after_a_day(config):
    for name, age in [(".building-old", 2 * 24 * 3600), (".building-new", 60)]:
        folder = cache_folder(config.cache) / name
        (folder / "entry").mkdir(parents=True)
        (folder / "entry" / "train.tokens").touch()
        then = (folder.stat().st_mtime - age,) * 2
        for each in (folder / "entry" / "train.tokens", folder / "entry", folder):
            os.utime(each, then)
    open_corpus(config.model_copy(update={"tokenizer": "bpe", "vocabulary": 300}))
    assert [each.name for each in cache_folder(config.cache).glob(".*")] == [".building-new"]


def test_an_interrupted_preparation_leaves_no_half_shard(config):
    def interrupt(what, part):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_corpus(config, progress=interrupt)
    assert [each.name for each in cache_folder(config.cache).glob("*/*")] == [".lock"]


def build_with_little_room(config, answers):
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    try:
        open_corpus(config)
    except UserError as error:
        answers.put(str(error))
    else:
        answers.put("no error")


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files with setrlimit")
def test_a_full_disk_is_told_and_leaves_no_half_shard(config):
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.Queue()
    builder = spawn.Process(target=build_with_little_room, args=(config, answers))
    builder.start()
    message = answers.get(timeout=50)
    builder.join(30)
    assert "cannot be written (File too large)" in message
    assert [each.name for each in cache_folder(config.cache).glob("*/*")] == [".lock"]


def test_a_cache_that_cannot_be_written_is_told(config, tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"cannot be written.*set data.cache or \$LOOKFAR_CACHE"):
            open_corpus(config.model_copy(update={"cache": str(place)}))


def test_a_cache_that_is_read_only_still_serves(config, monkeypatch):
    open_corpus(config)
    monkeypatch.setattr(cache, "TemporaryDirectory", None)  # any attempt to write fails
    monkeypatch.setattr(shards, "write", None)
    monkeypatch.setattr(shards, "_held", None)
    assert len(open_corpus(config).tokens("train"))


def test_a_split_without_two_tokens_is_told_and_not_kept(config, tmp_path):
    (tmp_path / "book.txt").write_text("ab\nc")
    with pytest.raises(UserError, match=r"The valid split of text_file:book\.txt has 0 tokens"):
        open_corpus(config)
    assert list(cache_folder(config.cache).iterdir()) == []


def test_an_unknown_source_is_told_with_the_nearest_name(config):
    with pytest.raises(UserError, match="Did you mean 'text_file'"):
        open_corpus(config.model_copy(update={"source": "textfile"}))


def test_the_manifest_tells_the_sizes(config):
    corpus = open_corpus(config)
    manifest = json.loads((corpus.texts[0].shards.folder / "manifest.json").read_text())
    assert manifest["dtype"] == "uint8"
    assert manifest["splits"]["valid"] == {"shards": 1, "tokens": len(corpus.tokens("valid")), "documents": 1}
