"""Things are found by name, and expressions of names and settings are read and written."""

import importlib
import keyword
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import lookfar
from lookfar import plugins
from lookfar.errors import UserError, nearest
from lookfar.plugins import Term, parse

WORDS = st.from_regex(r"[a-z_][a-z0-9_]{0,6}", fullmatch=True).filter(lambda word: not keyword.iskeyword(word))
NAMES = st.lists(WORDS, min_size=1, max_size=3).map(".".join)
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
PLAIN = NUMBERS | st.booleans() | st.none() | st.text(max_size=8) | WORDS
VALUES = PLAIN | st.lists(NUMBERS | st.text(max_size=3), max_size=3) | st.tuples(NUMBERS, NUMBERS)
TERMS = st.builds(Term, NAMES, st.dictionaries(WORDS, VALUES, max_size=3))


# Expressions


@given(terms=st.lists(TERMS, min_size=1, max_size=4))
@example(terms=[Term("a", {"b": "true"})])
@example(terms=[Term("a", {"b": "lambda"})])
@example(terms=[Term("a", {"b": "ﬁ"})])  # Python reads the ligature as two letters
def test_what_is_spelled_is_read_as_the_same_terms(terms):
    assert parse(" + ".join(map(str, terms))) == terms


@given(text=st.text(alphabet="ab_1.,=+()[]{}'\"- \n", max_size=25))
@example(text="a(b={[]: 1})")
@example(text="a(b={[1]})")
@example(text="a(b=-'x')")
@example(text="a(b=[c])")
@example(text="a\0b")
@example(text="a(b=1, b=2)")
@example(text="a(**{})")
@example(text="a()()")
@example(text="(" * 300)
def test_anything_is_either_understood_or_refused_in_words(text):
    try:
        terms = parse(text)
    except UserError as error:
        assert len(str(error)) > 20
    else:
        assert parse(" + ".join(map(str, terms))) == terms


@pytest.mark.parametrize(
    ("expression", "terms"),
    [
        ("alibi", [Term("alibi")]),
        ("alibi()", [Term("alibi")]),
        ("  a+b \n", [Term("a"), Term("b")]),
        ("a + (b + c)", [Term("a"), Term("b"), Term("c")]),
        ("rope(base=5e5)", [Term("rope", {"base": 500000.0})]),
        ("a(b=true, c=false, d=none)", [Term("a", {"b": True, "c": False, "d": None})]),
        ("a(b=True, c=None)", [Term("a", {"b": True, "c": None})]),
        ("a(b=word)", [Term("a", {"b": "word"})]),
        ("a(b='two words', c=-1)", [Term("a", {"b": "two words", "c": -1})]),
        ("mine.trick(b=[1, 2])", [Term("mine.trick", {"b": [1, 2]})]),
    ],
)
def test_an_expression_is_read_as_names_with_settings(expression, terms):
    assert parse(expression) == terms


@pytest.mark.parametrize(
    "expression", ["", "a +", "a - b", "a(1)", "a(*b)", "1", "'a'", "a b", "a(b=c.d)", "f(x)(y=1)"]
)
def test_what_is_no_expression_is_refused_with_the_words_that_were_given(expression):
    with pytest.raises(UserError) as told:
        parse(expression)
    assert repr(expression)[1:-1] in str(told.value)
    assert "write" in str(told.value) or "is not a name" in str(told.value)


# Rooms


@pytest.mark.parametrize(
    ("room", "some"),
    [
        ("methods", {"alibi", "rope", "kerple", "dape_v2", "stable_mask", "differential", "learned"}),
        ("kernels", {"reference", "chunked", "sdpa"}),
        ("data", {"python_library", "text_file", "hugging_face"}),
        ("evaluation", {"perplexity"}),
    ],
)
def test_a_room_lists_its_things_sorted_and_each_is_found(room, some):
    names = plugins.names(room)
    assert names == sorted(names)
    assert some <= set(names)
    assert "base" not in names and "nope" not in names
    for name in names:
        thing = plugins.find(room, name)
        assert thing.__module__ == f"lookfar.{room}.{name}"
        assert thing.__name__.lower() == name.replace("_", "")


def test_the_public_face_lists_methods():
    assert lookfar.names("methods") == plugins.names("methods")


@pytest.mark.parametrize(
    ("room", "name", "answer"),
    [
        ("methods", "alibbi", "No method is named 'alibbi'. Did you mean 'alibi'?"),
        ("kernels", "chunk", "No kernel is named 'chunk'. Did you mean 'chunked'?"),
        ("data", "textfile", "No source of text is named 'textfile'. Did you mean 'text_file'?"),
        ("evaluation", "perplexitty", "No measurement is named 'perplexitty'. Did you mean 'perplexity'?"),
        ("methods", "base", "No method is named 'base'."),
        ("kernels", "dispatch", "No kernel is named 'dispatch'."),  # a file of the room that is no thing
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest(room, name, answer):
    with pytest.raises(UserError) as told:
        plugins.find(room, name)
    assert str(told.value).startswith(answer)


def test_a_word_near_to_none_is_answered_with_all():
    assert nearest("xyz", ["b", "a"]) == "Known: a, b."
    assert nearest("xyz", []) == "None is known."


# Settings


def thing(site=None, *, count: int = 3, kind: str = "log", exact: bool = True):
    """Something with settings."""


def test_settings_are_the_keyword_only_parameters():
    assert plugins.settings(thing) == {"count": int, "kind": str, "exact": bool}
    assert plugins.defaults(thing) == {"count": 3, "kind": "log", "exact": True}


@pytest.mark.parametrize(
    ("settings", "answer"),
    [
        ({"cuont": 1}, "'x' has no setting 'cuont'. Did you mean 'count'?"),
        ({"site": 1}, "'x' has no setting 'site'."),
        ({"count": "many"}, "x(count=many) is not possible: Input should be a valid integer"),
        ({"count": True}, "x(count=true) is not possible"),
        ({"count": 1.5}, "x(count=1.5) is not possible"),
        ({"exact": 7}, "x(exact=7) is not possible"),
    ],
)
def test_a_setting_that_is_wrong_is_told_with_its_value(settings, answer):
    with pytest.raises(UserError) as told:
        plugins.check(thing, Term("x", settings))
    assert str(told.value).startswith(answer)


def test_a_thing_without_settings_says_so():
    with pytest.raises(UserError, match=r"'nothing' has no setting 'a'\. It has none\."):
        plugins.check(lambda: None, Term("nothing", {"a": 1}))


def test_checked_settings_have_the_type_of_their_parameter():
    checked = plugins.check(thing, Term("x", {"count": 2.0, "exact": False}))
    assert checked == {"count": 2, "exact": False}
    assert isinstance(checked["count"], int)


# Modules of the user's own

OWN = """
from lookfar.data.base import Document, Source


class {name}(Source):
    def __init__(self, *, path=None):
        self.path = path

    def documents(self, split):
        yield Document("one", "text")
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    package = tmp_path / "corpora"
    package.mkdir()
    (package / "poems.py").write_text(OWN.format(name="Poems"))
    (package / "none.py").write_text("import json\nfrom lookfar.data.text_file import TextFile\n")
    (package / "two.py").write_text(OWN.format(name="One") + OWN.format(name="Two"))
    (package / "hidden.py").write_text(OWN.format(name="_Hidden"))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "corpora"]:
        del sys.modules[name]


def test_a_dotted_name_is_the_users_own_module(own):
    assert plugins.find("data", "corpora.poems").__name__ == "Poems"
    built = plugins.build("data", Term("corpora.poems", {"path": "here"}))
    assert built.path == "here"
    assert "corpora.poems" not in plugins.names("data")


@pytest.mark.parametrize(("module", "count"), [("none", 0), ("two", 2), ("hidden", 0)])
def test_a_module_must_define_exactly_one_thing(own, module, count):
    with pytest.raises(UserError, match=f"must define exactly one public source of text; it defines {count}"):
        plugins.find("data", f"corpora.{module}")


@pytest.mark.parametrize(
    "name", ["corpora.missing", "nowhere.at.all", ".poems", "..poems", "corpora.", "corpora..poems", "."]
)
def test_a_module_that_is_not_there_is_told(own, name):
    with pytest.raises(UserError, match="cannot be imported"):
        plugins.find("data", name)


def test_nothing_of_the_users_is_imported_by_reading_an_expression(own):
    assert parse("corpora.poems(path=x)") == [Term("corpora.poems", {"path": "x"})]
    assert "corpora.poems" not in sys.modules
