"""Corpora of the hub: from a local folder, from a small hub on this computer, and without one."""

import builtins
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from lookfar.data.base import SPLITS, split_of
from lookfar.data.hugging_face import HuggingFace, _articles
from lookfar.errors import UserError

COMMIT = "a" * 40
ROWS = [f"row {number}" for number in range(400)]


def lines(rows, column="text"):
    return "".join(json.dumps({column: row}) + "\n" for row in rows)


def texts(source):
    return {split: [document.text for document in source.documents(split)] for split in SPLITS}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="needs the extra hub")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "corpus"
    folder.mkdir()
    return folder


def test_a_folder_with_three_splits_is_read_as_it_is(folder):
    for name in ("train", "validation", "test"):
        (folder / f"{name}.jsonl").write_text(lines([f"{name} {number}" for number in range(3)]))
    source = HuggingFace(path=str(folder))
    assert texts(source) == {
        split: [f"{name} {number}" for number in range(3)]
        for split, name in zip(SPLITS, ("train", "validation", "test"), strict=True)
    }
    before = source.fingerprint()
    (folder / "test.jsonl").write_text(lines(["changed"]))
    assert HuggingFace(path=str(folder)).fingerprint() != before


def test_splits_that_are_lacking_are_held_out_of_train_by_hash(folder):
    (folder / "train.jsonl").write_text(lines(ROWS))
    found = texts(HuggingFace(path=str(folder)))
    assert found == {split: [row for row in ROWS if split_of(row) == split] for split in SPLITS}
    (folder / "test.jsonl").write_text(lines(["its own"]))
    found = texts(HuggingFace(path=str(folder)))
    assert found["test"] == ["its own"]
    assert found["train"] == [row for row in ROWS if split_of(row) != "valid"]


def test_the_only_column_of_strings_is_the_text(folder):
    (folder / "train.jsonl").write_text(
        "".join(json.dumps({"id": i, "body": row}) + "\n" for i, row in enumerate(ROWS))
    )
    assert sum(map(len, texts(HuggingFace(path=str(folder))).values())) == len(ROWS)
    (folder / "train.jsonl").write_text(json.dumps({"title": "a", "body": "b"}) + "\n")
    with pytest.raises(UserError, match=r"no column 'text' and 2 columns of strings.*title, body"):
        texts(HuggingFace(path=str(folder)))


def test_a_data_set_without_train_is_told(folder):
    (folder / "test.jsonl").write_text(lines(ROWS))
    with pytest.raises(UserError, match="no train split, only test"):
        texts(HuggingFace(path=str(folder)))


def test_a_folder_that_is_no_data_set_is_told(folder):
    with pytest.raises(UserError, match=r"corpus' cannot be read"):
        texts(HuggingFace(path=str(folder)))


def test_lines_of_wikitext_are_joined_to_articles_without_loss():
    articles = [" \n = One = \n \n text , = x = \n = = Part = = \n more \n", " = Two = \n \n end \n"]
    rows = ["" if line == " " else f"{line}\n" for article in articles for line in article.splitlines()]
    assert list(_articles(rows)) == articles


def test_a_path_is_needed():
    with pytest.raises(UserError, match="needs a path"):
        HuggingFace()


def test_a_missing_library_is_told_with_how_to_install_it(monkeypatch):
    usual = builtins.__import__

    def refuse(name, *arguments, **settings):
        if name == "datasets":
            raise ImportError("No module named 'datasets'")
        return usual(name, *arguments, **settings)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match=r'pip install "lookfar\[hub\]"'):
        HuggingFace(path="wikitext-2")


class Hub(BaseHTTPRequestHandler):
    """As much of a hub as `datasets` asks of one that holds a single data set, owner/corpus."""

    files: ClassVar = {"README.md": b"---\nlicense: mit\n---\n", "train.jsonl": lines(ROWS).encode()}

    def do_GET(self):
        path = self.path.split("?")[0]
        if path == "/api/datasets/owner/corpus" or path.endswith(f"/owner/corpus/revision/{COMMIT}"):
            files = [{"rfilename": name} for name in self.files]
            self.answer(200, json.dumps({"id": "owner/corpus", "sha": COMMIT, "siblings": files}).encode())
        elif path.endswith(f"/owner/corpus/tree/{COMMIT}"):
            self.answer(200, json.dumps([self.entry(name) for name in self.files]).encode())
        elif path.startswith("/datasets/owner/corpus/resolve/") and (name := path.rsplit("/", 1)[1]) in self.files:
            self.answer(200, self.files[name], etag=self.entry(name)["oid"])
        elif "owner/corpus" in path:
            self.answer(404, b"{}", problem="EntryNotFound")
        else:
            self.answer(401, b"{}", problem="RepoNotFound")

    do_HEAD = do_GET  # noqa: N815

    def entry(self, name):
        content = self.files[name]
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def answer(self, status, content, etag="", problem=""):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        if etag:
            self.send_header("ETag", f'"{etag}"')
        if problem:
            self.send_header("X-Error-Code", problem)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments):
        pass


OPEN = """
import json, sys
from lookfar.config import DataConfig
from lookfar.data.corpus import open_corpus
from lookfar.errors import UserError
for path in sys.argv[1:]:
    try:
        corpus = open_corpus(DataConfig(source="hugging_face", path=path))
        print(json.dumps([corpus.label, corpus.tokenizer.decode(corpus.tokens("valid")[:])]))
    except UserError as error:
        print(json.dumps(str(error)))
"""


def test_a_hub_corpus_is_read_named_by_its_commit_and_opens_again_without_the_hub(tmp_path):
    pytest.importorskip("datasets", reason="needs the extra hub")
    hub = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",  # read when huggingface_hub is imported
        "HF_HOME": str(tmp_path / "hub"),
        "LOOKFAR_CACHE": str(tmp_path / "cache"),
    }

    def ask(*paths):
        command = [sys.executable, "-c", OPEN, *paths]
        answer = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, timeout=50)
        return [json.loads(line) for line in answer.stdout.splitlines()]

    serving = threading.Thread(target=hub.serve_forever)
    serving.start()
    try:
        corpus, unknown, wrong, impossible = ask("owner/corpus", "owner/other", "owner/corpus:fr", "a b")
    finally:
        hub.shutdown()
        hub.server_close()
        serving.join()
    label, valid = corpus
    assert label.startswith("hugging_face:owner/corpus@")
    assert valid == "\0".join(row for row in ROWS if split_of(row) == "valid")
    assert "has no data set 'owner/other'" in unknown
    assert "'owner/corpus:fr' cannot be read: BuilderConfig 'fr' not found" in wrong
    assert "'a b' is not a name on the hub" in impossible

    again, unreachable = ask("owner/corpus", "wikitext-103")  # the hub is gone, the tokens are not
    assert again == corpus
    assert "cannot be reached to read 'Salesforce/wikitext'" in unreachable
