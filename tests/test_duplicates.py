"""Every duplicate that is planted is found, none that is not, and the counts are those of comparing all with all."""

import re
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lookfar import cli
from lookfar.data import duplicates as room
from lookfar.data.base import SPLITS, Document, Source, split_of
from lookfar.data.duplicates import Documents, Duplicates, Joined, Pair, duplicates, single
from lookfar.errors import UserError

VOCABULARY = [f"{first}{second}" for first in "bdfgk" for second in "aeiou"]


def text(random, size=60, vocabulary=VOCABULARY):
    return " ".join(random.choices(vocabulary, k=size))


def documents(*texts):
    return [Document(f"{place}", each) for place, each in enumerate(texts)]


def changed(words, *places):
    """A text in which the words at some places are others."""
    return " ".join("changed" if place in places else word for place, word in enumerate(words.split()))


def shingles(written, words=5):
    found = re.findall(r"\w+", written.lower())
    return {tuple(found[start : start + words]) for start in range(max(1, len(found) - words + 1))}


def jaccard(one, other, words=5):
    a, b = shingles(one, words), shingles(other, words)
    return len(a & b) / len(a | b)


def compared(train, held_out, threshold, words):
    """How many are exact and near, by comparing all with all."""
    texts = {tuple(re.findall(r"\w+", each.text.lower())) for each in train}
    exact = [each for each in held_out if tuple(re.findall(r"\w+", each.text.lower())) in texts]
    others = [each for each in held_out if each not in exact]
    near = [each for each in others if any(jaccard(each.text, one.text, words) >= threshold for one in train)]
    return len(exact), len(near)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("words", [1, 3, 5])
def test_counts_are_those_of_comparing_all_with_all(threshold, words):
    random = Random(words)
    train = [text(random, random.randint(3, 90), VOCABULARY[:15]) for _ in range(60)]
    held_out = [text(random, random.randint(3, 90), VOCABULARY[:15]) for _ in range(10)] + train[:3]
    for each in random.sample(train, 40):
        size = len(each.split())
        held_out.append(changed(each, *random.sample(range(size), random.randint(0, max(1, size // 9)))))
    held_out.append(" ".join(train[3].split() + train[3].split()))  # where words=1, the same set, and yet not exact
    train, held_out = documents(*train), documents(*held_out)
    found = duplicates(train, held_out, threshold=threshold, words=words, examples=1000)
    assert (found.exact, found.near) == compared(train, held_out, threshold, words)
    assert found.exact >= 3 and (found.held_out, found.train) == (54, 60)
    assert len(found.examples) == found.exact + found.near
    for pair in found.examples:
        one, other = held_out[int(pair.held_out)].text, train[int(pair.train)].text
        assert pair.similarity == pytest.approx(jaccard(one, other, words)) and pair.similarity >= threshold


def test_a_planted_duplicate_is_told():
    """One word of 205 is in 5 of 201 shingles: 196 of 206 are shared. Ten such words share 151 of 251."""
    random = Random(0)
    texts = [text(random, 205) for _ in range(8)]
    spread = [10 + 20 * place for place in range(10)]
    held_out = documents(
        text(random, 205),
        changed(texts[3], 100),
        texts[5].upper().replace(" ", ",\n  "),
        changed(texts[6], *spread[:10]),
    )
    assert duplicates(documents(*texts), held_out) == Duplicates(
        held_out=4, train=8, exact=1, near=1, examples=(Pair("2", "5", 1.0), Pair("1", "3", 196 / 206))
    )
    assert duplicates(documents(*texts), held_out).share == 0.5
    assert duplicates(documents(*texts), held_out, threshold=151 / 251).near == 2
    assert duplicates(documents(*texts), held_out, threshold=151 / 251 + 1e-9).near == 1
    assert len(duplicates(documents(*texts), held_out, examples=1).examples) == 1


def test_nothing_is_overlooked():
    """A hundred pairs just above the threshold."""
    random = Random(1)
    texts = [text(random, 105) for _ in range(100)]
    held_out = documents(*(changed(each, 30, 60) for each in texts))  # 91 of 111 shingles
    assert all(0.8 < jaccard(each.text, one) < 0.83 for each, one in zip(held_out, texts, strict=True))
    assert duplicates(documents(*texts), held_out).near == 100


@pytest.mark.parametrize("threshold", [0.05, 0.2, 0.5, 0.8, 0.95, 1.0])
def test_bands_fit_the_threshold(threshold):
    rows = room._rows(threshold)
    assert (1 - threshold**rows) ** (room.HASHES // rows) <= room.OVERLOOKED or rows == 1
    assert room._rows(0.8) == 5 and room._rows(0.5) == 2


@given(data=st.data())
@settings(max_examples=25)
def test_parts_of_a_document_are_one_text(data):
    random = Random(data.draw(st.integers(0, 99)))
    one, other = text(random, 40), text(random, 40)
    parts, rest = [], changed(one, 2)
    while rest:
        size = data.draw(st.integers(1, 60))
        parts.append(Document("held", rest[:size], continues=bool(parts)))
        rest = rest[size:]
    whole = duplicates(documents(other, one), documents(changed(one, 2)), threshold=0.5)
    again = duplicates(documents(other, one), parts, threshold=0.5)
    assert whole.near == again.near == 1
    assert again.examples == (replace(whole.examples[0], held_out="held"),)
    assert duplicates(parts, documents(changed(one, 2))).exact == 1


def test_long_documents_are_read_in_stretches(monkeypatch):
    random = Random(2)
    long = text(random, 3000)
    whole = duplicates(documents(long), documents(changed(long, 1500, 2500)))
    assert whole.near == 1
    for stretch in (20, 100):
        monkeypatch.setattr(room, "STRETCH", stretch)
        assert duplicates(documents(long), documents(changed(long, 1500, 2500))) == whole
        assert duplicates(documents(long), documents(long)).exact == 1


def test_short_and_empty_documents():
    found = duplicates(documents("", "one two", "…"), documents("One, two!", "two one", " ", "one"))
    assert (found.held_out, found.train, found.exact, found.near) == (3, 1, 1, 0)
    assert found.examples == (Pair("0", "1", 1.0),)
    assert duplicates([], []) == Duplicates(0, 0, 0, 0, ())
    assert duplicates([], []).share == 0


def test_the_order_of_words_matters():
    words = text(Random(3), 50).split()
    assert duplicates(documents(" ".join(words)), documents(" ".join(reversed(words)))).near == 0


def test_the_splits_of_a_source_are_compared():
    class Songs(Source):
        def documents(self, split):
            return iter(documents("a b c d e f", "g h i") if split == "train" else documents("G H I"))

    assert duplicates(Documents(Songs(), "train"), Documents(Songs(), "test")).exact == 1


def test_what_makes_no_sense_is_refused():
    for wrong in ({"threshold": 0.0}, {"threshold": 1.1}, {"words": 0}):
        with pytest.raises(UserError, match="must be above 0 and at most 1"):
            duplicates([], [], **wrong)
    with pytest.raises(UserError, match="Documents are read twice"):
        duplicates(iter([]), [])


def test_sources_are_joined_and_named():
    joined = Joined([("songs", [Document("a", "la"), Document("a", " la", continues=True)]), ("books", documents("x"))])
    wanted = [("a of songs", False), ("a of songs", True), ("0 of books", False)]
    assert (
        [(each.name, each.continues) for each in joined] == wanted == [(each.name, each.continues) for each in joined]
    )


def test_parts_do_not_make_two_documents():
    parts = [Document("a", "la"), Document("a", " la", continues=True)]
    assert single(parts)
    assert not single([*parts, Document("b", "x")]) and not single([])


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """`lookfar duplicates` of this source, from the folder of the texts: what it prints."""
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "text.toml"

    def run(source, *words):
        recipe.write_text(f'[data]\nsource = "{source}"\n')
        monkeypatch.setattr("sys.argv", ["lookfar", "duplicates", str(recipe), *words])
        with pytest.raises(SystemExit) as left:
            cli.main()
        told = capsys.readouterr().out
        assert left.value.code == 0, told
        return told

    return run


def folder_of(place, texts):
    """A folder with a file for each text, by name."""
    place.mkdir()
    for name, written in texts.items():
        (place / name).write_text(written)


def test_the_command_looks_in_the_training_text_of_all_sources(tmp_path, command):
    random = Random(4)
    names = {split: [f"{n}.txt" for n in range(400) if split_of(f"{n}.txt") == split][:6] for split in SPLITS}
    songs = {name: text(random) for each in names.values() for name in each}
    letters = {name: text(random) for each in names.values() for name in each}
    copied, to = names["valid"][2], names["train"][1]
    letters[to] = songs[copied]
    folder_of(tmp_path / "songs", songs)
    folder_of(tmp_path / "letters", letters)
    assert "of 6 held-out documents 0 are word for word among 6 training" in command("text_file(path=songs)")
    told = command("text_file(path=songs) + text_file(path=letters)").splitlines()
    assert told == [
        "text_file:songs: of 6 held-out documents 1 are word for word among 12 training documents, and 0 nearly "
        "(similarity 0.8 or more): 16.67%.",
        f"  1.00  {copied}  is like  {to} of text_file:letters",
        "text_file:letters: of 6 held-out documents 0 are word for word among 12 training documents, and 0 nearly "
        "(similarity 0.8 or more): 0.00%.",
    ]


@pytest.mark.parametrize("held_out", ["valid", "test"])
def test_the_command_says_that_one_document_tells_nothing(tmp_path, command, held_out):
    folder_of(tmp_path / "book", {f"{split}.txt": text(Random(split), 200) for split in SPLITS})
    told = command("text_file(path=book)", "--split", held_out)
    assert "of 1 held-out documents 0 are word for word among 1 training documents" in told and "%" not in told
    assert "One document only: the held-out text, the training text of text_file:book. " in told
    assert "of copies inside a long one this tells nothing" in told


def test_the_command_says_whose_training_text_is_one_document(tmp_path, command):
    names = [f"{n}.txt" for n in range(200)]
    folder_of(tmp_path / "songs", {name: text(Random(name)) for name in names})
    (tmp_path / "book.txt").write_text("\n".join(text(Random(line)) for line in range(40)))
    songs, book = command("text_file(path=songs) + text_file(path='book.txt')").split("text_file:book.txt: of ")
    assert "One document only: the training text of text_file:book.txt. " in songs
    assert "One document only: the held-out text, the training text of text_file:book.txt. " in book
    assert "One document only" not in command("text_file(path=songs)")


def test_the_command_counts_what_a_text_has_twice(tmp_path, command):
    (tmp_path / "book.txt").write_text("the same words in the same order\n" * 400)
    told = command("text_file(path='book.txt')")
    assert told.startswith("text_file:book.txt: of 1 held-out documents 0 are word for word among 1 training documents")
    assert "and 1 nearly" in told and "is like" in told
