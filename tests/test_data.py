"""Sources of text, and tokenizers."""

import hashlib
import tokenize

import numpy as np
import pytest

from lookfar import plugins
from lookfar.data.base import SPLITS, split_of
from lookfar.data.python_library import PythonLibrary
from lookfar.data.text_file import TextFile, read_text
from lookfar.data.tokenizers import BpeTokenizer, BytesTokenizer, load_tokenizer, train_bpe
from lookfar.errors import UserError

LINES = [f"line {number} costs 3 €, – or naïvely 日本 {number * 7919 % 101}.\n" for number in range(200)]


@pytest.fixture(scope="module")
def library():
    return PythonLibrary()


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(LINES, 400)


def texts(source):
    return {split: [document.text for document in source.documents(split)] for split in SPLITS}


def joined(source):
    return {split: "".join(each).encode() for split, each in texts(source).items()}


def test_each_source_is_found_by_its_name():
    assert plugins.names("data") == ["hugging_face", "python_library", "text_file"]


# --- python_library


def test_the_library_is_divided_about_90_5_5(library):
    sizes = {split: sum(map(len, each)) for split, each in texts(library).items()}
    total = sum(sizes.values())
    assert total > 5e6
    assert 0.8 < sizes["train"] / total < 0.97
    assert sizes["valid"] / total > 0.01
    assert sizes["test"] / total > 0.01


def test_a_library_file_falls_into_one_split_by_its_path_alone(library):
    names = {split: [document.name for document in library.documents(split)] for split in SPLITS}
    assert all(split_of(name) == split for split, each in names.items() for name in each)
    everything = [name for each in names.values() for name in each]
    assert len(everything) == len(set(everything))
    assert {"json/decoder.py", "random.py"} <= set(everything)
    assert not any("site-packages" in name or "_sysconfigdata" in name or "\\" in name for name in everything)


def test_the_first_64k_characters_of_held_out_library_are_several_files(library):
    for split in ("valid", "test"):
        sizes = [len(document.text) for document in library.documents(split)]
        assert np.searchsorted(np.cumsum(sizes), 64 * 1024) >= 2


def test_library_files_are_read_in_their_coding_and_bad_ones_left_out(tmp_path, monkeypatch):
    (tmp_path / "latin.py").write_bytes("# coding: latin-1\r\nname = 'é'\r\n".encode("latin-1"))
    (tmp_path / "wrong.py").write_bytes(b"name = '\xe9'\n")
    (tmp_path / "unknown.py").write_bytes(b"# coding: no-such-coding\n")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "foreign.py").write_text("foreign = True\n")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    found = [document for split in SPLITS for document in PythonLibrary().documents(split)]
    assert [(each.name, each.text) for each in found] == [("latin.py", "# coding: latin-1\nname = 'é'\n")]
    with pytest.raises((SyntaxError, UnicodeDecodeError)), tokenize.open(tmp_path / "wrong.py") as file:
        file.read()


def test_the_library_takes_no_path_and_tells_where_source_is_missing(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="takes no path \\('books'"):
        PythonLibrary(path="books")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match="no source of its library"):
        PythonLibrary()


# --- text_file


def test_a_file_is_cut_at_line_ends_into_90_5_5_and_nothing_is_lost(tmp_path):
    content = "".join(LINES).replace("\n", "\r\n", 20).encode()
    (tmp_path / "book.txt").write_bytes(content)
    parts = joined(TextFile(path=str(tmp_path / "book.txt")))
    assert b"".join(parts[split] for split in SPLITS) == content
    assert all(part.endswith(b"\n") for part in parts.values())
    assert abs(len(parts["train"]) / len(content) - 0.9) < 0.02
    assert abs(len(parts["valid"]) / len(content) - 0.05) < 0.02


@pytest.mark.parametrize("content", ["€" * 101, "no line ends here, only words " * 9, "a\n" + "ü" * 99, "ab\n" * 40])
def test_a_file_without_lines_is_cut_between_characters(tmp_path, content):
    (tmp_path / "book.txt").write_text(content, encoding="utf-8")
    parts = joined(TextFile(path=str(tmp_path / "book.txt")))
    assert b"".join(parts[split] for split in SPLITS) == content.encode()
    assert all(parts.values())


def test_three_files_are_the_three_splits(tmp_path):
    contents = {split: f"\ufeff{split}\r\n\n tail" for split in SPLITS}
    for split, content in contents.items():
        (tmp_path / f"{split}.txt").write_bytes(content.encode())
    (tmp_path / "README.md").write_text("not part of it")
    assert texts(TextFile(path=str(tmp_path))) == {split: [content] for split, content in contents.items()}
    (tmp_path / "valid.txt").unlink()
    with pytest.raises(UserError, match=r"train\.txt but no valid\.txt"):
        TextFile(path=str(tmp_path))


def test_many_files_are_divided_by_the_hash_of_their_path(tmp_path):
    for number in range(120):
        file = tmp_path / f"part{number % 3}" / f"{number}.md"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"text {number}")
    for ignored in (".hidden.txt", ".git/config.txt", "picture.png", "empty.txt"):
        (tmp_path / ignored).parent.mkdir(exist_ok=True)
        (tmp_path / ignored).write_text("" if ignored == "empty.txt" else "must not be read")
    source = TextFile(path=str(tmp_path))
    names = {split: [document.name for document in source.documents(split)] for split in SPLITS}
    assert sum(map(len, names.values())) == 120
    assert all(names[split] == sorted(name for name in names[split] if split_of(name) == split) for split in SPLITS)


def test_few_files_are_cut_like_one_so_that_no_split_is_empty(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("".join(LINES[number * 10 : number * 10 + 10]), encoding="utf-8")
    parts = joined(TextFile(path=str(tmp_path)))
    assert b"".join(parts[split] for split in SPLITS) == "".join(LINES[:30]).encode()
    assert all(part.endswith(b"\n") for part in parts.values())


def test_files_of_one_line_are_kept_whole(tmp_path):
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text("x" * 10)
    parts = texts(TextFile(path=str(tmp_path)))
    assert parts["train"] == ["x" * 10] * 9
    assert "".join(parts["valid"] + parts["test"]) == "x" * 10


def test_bytes_that_are_not_utf8_are_told_with_their_file_and_place(tmp_path):
    (tmp_path / "book.txt").write_bytes(b"good line\n" * 30 + b"bad \xff byte\n" + b"good line\n" * 2)
    with pytest.raises(UserError, match=r"book\.txt is not UTF-8: byte 304 \(0xff\)"):
        texts(TextFile(path=str(tmp_path / "book.txt")))
    with pytest.raises(UserError, match="byte 304"):
        TextFile(path=str(tmp_path / "book.txt")).fingerprint()
    with pytest.raises(UserError, match="byte 304"):
        read_text(tmp_path / "book.txt")


def test_what_is_missing_or_empty_is_told(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    for path, reason in [
        (None, "needs a path"),
        (str(tmp_path / "nowhere"), "no file or folder"),
        (str(tmp_path / "empty.txt"), r"empty\.txt is empty"),
        (str(tmp_path / "folder"), "holds no text"),
    ]:
        with pytest.raises(UserError, match=reason):
            TextFile(path=path)
    with pytest.raises(UserError, match="is empty"):
        read_text(tmp_path / "empty.txt")
    with pytest.raises(UserError, match="is a folder"):
        read_text(tmp_path)
    with pytest.raises(UserError, match="no file"):
        read_text(tmp_path / "nowhere")


def test_the_fingerprint_is_of_the_text_not_of_the_place(tmp_path):
    prints = []
    for folder, content in [("a", "same"), ("b", "same"), ("c", "other")]:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "book.txt").write_text(content * 50)
        prints.append(TextFile(path=str(tmp_path / folder / "book.txt")).fingerprint())
    assert prints[0] == prints[1] != prints[2]
    assert len(prints[0]) == 16


# --- tokenizers


@pytest.mark.parametrize(
    "text", [*LINES[:3], "", "\0", "a<|endoftext|>b", " \n\n\t x\r\n", "👩‍👩‍👧 e\u0301 \u2028 \x1c", "日" * 999]
)
def test_what_is_encoded_decodes_to_the_same_text(bpe, text):
    for tokenizer in (BytesTokenizer(), bpe):
        tokens = tokenizer.encode(text)
        assert tokens.dtype == tokenizer.dtype
        assert tokenizer.decode(tokens) == text
        assert tokenizer.lengths[tokens].sum() == len(text.encode())


def test_text_is_never_taken_for_the_separator_of_bpe(bpe):
    assert bpe.separator not in bpe.encode("<|endoftext|> and again<|endoftext|>")
    assert bpe.lengths[bpe.separator] == 0
    assert bpe.decode([bpe.separator]) == "<|endoftext|>"


def test_every_token_has_the_length_of_its_bytes(bpe):
    single = [token for token in range(bpe.vocabulary) if bpe.lengths[token] == 1]
    assert len(single) == 256
    assert bpe.vocabulary == 400
    for token in range(bpe.vocabulary):
        text = bpe.decode([token])
        if token != bpe.separator and "\ufffd" not in text:
            assert len(text.encode()) == bpe.lengths[token]


def test_several_texts_encode_as_each_alone(bpe):
    for tokenizer in (BytesTokenizer(), bpe):
        together = tokenizer.encode_batch([*LINES[:5], "", LINES[5]])
        for tokens, text in zip(together, [*LINES[:5], "", LINES[5]], strict=True):
            np.testing.assert_array_equal(tokens, tokenizer.encode(text))


def test_a_long_text_has_the_tokens_of_the_uncut_text(bpe):
    text = "".join(LINES * 30) + "no space " * 9 + "x" * 70_000 + " \n \n  y" * 9_000
    expected = bpe._model.encode(text, add_special_tokens=False).ids
    assert len(text) > 3 * 64 * 1024
    np.testing.assert_array_equal(bpe.encode(text), expected)


def test_bytes_that_are_no_text_decode_to_a_replacement(bpe):
    assert BytesTokenizer().decode([0xE2, 0x82, 65]) == "\ufffdA"
    assert "\ufffd" in bpe.decode(bpe.encode("€")[:1]) or len(bpe.encode("€")) == 1
    for tokenizer in (BytesTokenizer(), bpe):
        assert tokenizer.decode(tokenizer.encode("half \ud800")) == "half ?"


def test_training_twice_gives_the_same_tokenizer(bpe):
    again = train_bpe(iter(LINES), 400)
    assert again.content == bpe.content
    assert again.fingerprint == bpe.fingerprint != train_bpe(LINES, 401).fingerprint


def test_a_small_text_gives_a_smaller_vocabulary():
    assert train_bpe(["aa"], 1000).vocabulary == 258


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_a_saved_tokenizer_loads_the_same(tmp_path, bpe, kind):
    tokenizer = bpe if kind == "bpe" else BytesTokenizer()
    tokenizer.save(tmp_path / "run")
    loaded = load_tokenizer(tmp_path / "run")
    assert type(loaded) is type(tokenizer)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.separator not in loaded.encode("<|endoftext|>")
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["tokenizer.json"]


def test_a_tokenizer_is_saved_whole_or_not_at_all(tmp_path, bpe, monkeypatch):
    BytesTokenizer().save(tmp_path)

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        bpe.save(tmp_path)
    assert isinstance(load_tokenizer(tmp_path), BytesTokenizer)
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]


def test_a_damaged_or_missing_tokenizer_is_told(tmp_path, bpe):
    with pytest.raises(UserError, match="no tokenizer in"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(bpe.content[:-100])
    with pytest.raises(UserError, match="is damaged"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(bpe.content.replace("<|endoftext|>", "<|stop|>"))
    with pytest.raises(UserError, match=r"no token '<\|endoftext\|>'"):
        load_tokenizer(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        BytesTokenizer().save(tmp_path / "file")


def test_tokenizers_of_one_content_share_a_fingerprint(bpe):
    assert BpeTokenizer(bpe.content).fingerprint == hashlib.sha256(bpe.content.encode()).hexdigest()[:16]
