"""Files are written whole or not at all; lines that a crash left half-written are passed over."""

import hashlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lookfar import files
from lookfar.errors import UserError

VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text())
ROWS = st.lists(st.dictionaries(st.text(), VALUES, max_size=3), max_size=4)


class Crash(BaseException):
    """Stands for a machine that stops: nothing catches it."""


def crash(*arguments, **settings):
    raise Crash


def test_a_file_holds_what_was_written_and_nothing_else_is_left(tmp_path):
    for content in (b"old", b"", b"new \x00\xff"):
        files.write(tmp_path / "file", content)
        assert (tmp_path / "file").read_bytes() == content
        assert [each.name for each in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("owner", "step"), [(Path, "write_bytes"), (files, "sync"), (Path, "replace")], ids=["write", "sync", "rename"]
)
@pytest.mark.parametrize("error", [Crash, OSError(28, "No space left on device")], ids=["crash", "full"])
def test_a_crash_before_the_rename_leaves_the_old_content(tmp_path, monkeypatch, owner, step, error):
    files.write(tmp_path / "file", b"old")

    def fail(*arguments, **settings):
        raise error

    monkeypatch.setattr(owner, step, fail)
    with pytest.raises((Crash, OSError)):
        files.write(tmp_path / "file", b"new")
    monkeypatch.undo()
    assert (tmp_path / "file").read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_content_lies_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    steps = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda opened: (steps.append("fsync"), fsync(opened))[1])
    monkeypatch.setattr(Path, "replace", lambda file, other: (steps.append("rename"), replace(file, other))[1])
    files.write(tmp_path / "file", b"content")
    assert steps == ["fsync", "rename"]


@given(content=st.binary(max_size=200))
def test_a_digest_is_the_sha256_of_the_content(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "digest"
    file.write_bytes(content)
    assert files.digest(file) == hashlib.sha256(content).hexdigest()


@given(rows=ROWS)
def test_lines_that_are_written_are_read_again(tmp_path_factory, rows):
    file = tmp_path_factory.getbasetemp() / "rows.jsonl"
    files.write_lines(file, rows)
    assert files.read_lines(file) == rows
    assert len(file.read_bytes().splitlines()) == len(rows)


@given(rows=ROWS.filter(bool), data=st.data())
def test_a_file_that_is_cut_off_anywhere_keeps_its_whole_lines(tmp_path_factory, rows, data):
    file = tmp_path_factory.getbasetemp() / "cut.jsonl"
    files.write_lines(file, rows)
    content = file.read_bytes()
    end = data.draw(st.integers(0, len(content)))
    file.write_bytes(content[:end])
    whole = content[:end].count(b"\n")
    kept = files.read_lines(file)
    assert kept[:whole] == rows[:whole]
    assert len(kept) == whole + (content[end : end + 1] == b"\n")  # a line that lacks only its end is whole


def test_a_line_cut_inside_a_character_is_passed_over(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes('{"a": 1}\n{"b": "é'.encode()[:-1])
    assert files.read_lines(file) == [{"a": 1}]


def test_a_missing_file_has_no_lines(tmp_path):
    assert files.read_lines(tmp_path / "rows.jsonl") == []


@pytest.mark.parametrize(
    ("lines", "number"), [(["{", '{"a": 1}'], 1), (['{"a": 1}', "", '{"a": 1}'], 2), (['{"a": 1}', "[1]"], 2)]
)
def test_a_broken_line_before_the_last_is_told_with_its_number(tmp_path, lines, number):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(UserError, match=rf"rows\.jsonl, line {number}, is not"):
        files.read_lines(file)


def test_rows_keep_numbers_that_json_does_not_know(tmp_path):
    file = tmp_path / "rows.jsonl"
    files.write_lines(file, [{"value": float("inf")}])
    assert files.read_lines(file) == [{"value": float("inf")}]


def test_a_crash_while_lines_are_written_keeps_the_old_lines(tmp_path, monkeypatch):
    file = tmp_path / "rows.jsonl"
    files.write_lines(file, [{"a": 1}])
    monkeypatch.setattr(files, "sync", crash)
    with pytest.raises(Crash):
        files.write_lines(file, [{"a": 2}])
    assert json.loads(file.read_text()) == {"a": 1}


def test_what_a_killed_writer_left_is_swept_and_nothing_else(tmp_path):
    for name in (".rows.jsonl.4711", ".manifest.json.1", ".lock", ".keep.me", "rows.jsonl", "checkpoint.12"):
        (tmp_path / name).write_text("half")
    (tmp_path / ".folder.7").mkdir()
    files.sweep(tmp_path)
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted(
        [".lock", ".keep.me", "rows.jsonl", "checkpoint.12", ".folder.7"]
    )
