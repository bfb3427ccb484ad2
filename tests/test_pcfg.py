"""PCFG SET: what each function does, published problems, and the statistics of those that are drawn."""

from collections import Counter
from random import Random
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lookfar import plugins
from lookfar.errors import UserError
from lookfar.tasks import pcfg
from lookfar.tasks.pcfg import BINARY, FUNCTIONS, SYMBOLS, UNARY, Pcfg, evaluate
from lookfar.tasks.problems import Problems
from lookfar.tasks.sets import Split

STRINGS = st.lists(st.sampled_from(SYMBOLS), min_size=1, max_size=6)


def parts(each):
    """The words of an example's expression."""
    return each.input.removeprefix("Solve: ").removesuffix("[SEP] ").split()


@pytest.mark.parametrize(
    ("expression", "made"),
    [
        ("copy A1 B2 C3", "A1 B2 C3"),
        ("reverse A1 B2 C3", "C3 B2 A1"),
        ("shift A1 B2 C3", "B2 C3 A1"),
        ("echo A1 B2 C3", "A1 B2 C3 C3"),
        ("swap_first_last A1 B2 C3 D4", "D4 B2 C3 A1"),
        ("repeat A1 B2 C3", "A1 B2 C3 A1 B2 C3"),
        ("append A1 B2 , C3 D4", "A1 B2 C3 D4"),
        ("prepend A1 B2 , C3 D4", "C3 D4 A1 B2"),
        ("remove_first A1 B2 , C3 D4", "C3 D4"),
        ("remove_second A1 B2 , C3 D4", "A1 B2"),
        ("Z20", "Z20"),
        ("swap_first_last A1", "A1"),
        ("shift echo A1", "A1 A1"),
    ],
)
def test_a_function_does_what_it_says(expression, made):
    assert evaluate(expression) == made


@pytest.mark.parametrize(
    ("expression", "made"),
    [
        (
            "echo append copy Q10 E4 S15 P7 , shift remove_second K15 D8 M9 W5 , H12 Q5 G10 J6 J10",
            "Q10 E4 S15 P7 D8 M9 W5 K15 K15",
        ),
        ("reverse shift append V12 P3 R9 J8 , repeat K19 C16 P13", "V12 P13 C16 K19 P13 C16 K19 J8 R9 P3"),
        ("copy reverse repeat swap_first_last D13 N5 K13 J14 G16", "D13 J14 K13 N5 G16 D13 J14 K13 N5 G16"),
        (
            "remove_first remove_first remove_first remove_second copy R20 O20 N1 Z8 , P2 G13 H16 O1 , S18 X6 Y15 V6 "
            "X1 , J17 D15 K1 , R1 R1 Y10 N6 K12",
            "R1 R1 Y10 N6 K12",
        ),
        ("swap_first_last shift prepend B2 L18 N20 Z5 J20 , L9 U20 J3 S7 C18", "L9 J3 S7 C18 B2 L18 N20 Z5 J20 U20"),
        ("shift echo shift swap_first_last M14 F6 T15 B7 U8", "T15 B7 M14 U8 U8 F6"),
        (
            "append remove_second O15 H6 , remove_second A17 W18 M18 U18 U20 , swap_first_last remove_first X10 S20 Y7 "
            "Z14 Z16 , R7 C12 D3 W20 O8 , remove_first K3 Z18 L19 A13 , E9 K1",
            "O15 H6 E9 K1",
        ),
        (
            "echo repeat swap_first_last append T12 M11 J9 , append reverse K5 U9 A2 , shift I12 P6 Y8",
            "I12 M11 J9 A2 U9 K5 P6 Y8 T12 I12 M11 J9 A2 U9 K5 P6 Y8 T12 T12",
        ),
        (
            "prepend prepend O6 M5 B4 M16 , reverse shift remove_second R14 O4 E7 B10 I16 , U6 M10 R6 , copy echo copy "
            "repeat J12 J12 N13 X9 O20",
            "J12 J12 N13 X9 O20 J12 J12 N13 X9 O20 O20 R14 I16 B10 E7 O4 O6 M5 B4 M16",
        ),
        (
            "remove_first prepend remove_second X18 M20 , F7 D12 K3 J15 , append R20 P11 V6 U7 E20 , append U20 G17 G7 "
            "T4 , F3 V5 , W19 U2 F8",
            "W19 U2 F8",
        ),
        ("remove_second repeat shift reverse R8 X3 X12 , repeat reverse W1 V2 D5 F18", "X3 R8 X12 X3 R8 X12"),
        (
            "prepend N5 V15 P6 L10 , prepend N19 V9 G10 H5 , remove_first swap_first_last V11 I5 T4 B18 , reverse T1 "
            "G14",
            "G14 T1 N19 V9 G10 H5 N5 V15 P6 L10",
        ),
        (
            "swap_first_last copy reverse echo remove_first D19 M10 I12 , append Q8 V19 K6 E13 V13 , reverse copy M18 "
            "U16 Y6 C19",
            "Q8 M18 U16 Y6 C19 V13 E13 K6 V19 M18",
        ),
        (
            "append X6 Z11 T16 H9 , reverse remove_second Q13 Y2 C11 , repeat repeat prepend append L8 P13 X1 , D8 U1 "
            "V18 , remove_second V10 J5 I8 , copy I10 K18 J18 C4",
            "X6 Z11 T16 H9 C11 Y2 Q13",
        ),
        (
            "reverse append prepend shift echo reverse Q10 D9 C11 I18 G19 , repeat reverse H6 B15 L1 , prepend C12 O15 "
            "S5 , E8 T8 X12 W6",
            "S5 O15 C12 W6 X12 T8 E8 G19 Q10 Q10 D9 C11 I18 H6 B15 L1 H6 B15 L1",
        ),
        (
            "echo swap_first_last prepend swap_first_last reverse repeat remove_first C7 M17 Q7 , B17 T5 W20 , echo "
            "repeat H2 K14 G17 B4 W5",
            "W20 K14 G17 B4 W5 H2 K14 G17 B4 W5 W5 B17 T5 B17 W20 T5 H2 H2",
        ),
        (
            "echo shift echo remove_second swap_first_last remove_second A11 T5 R2 , prepend B6 F4 D18 M2 M15 , "
            "remove_second W15 P9 Y17 , W19 R8 G12 F17 , repeat H17 Y13 C4 L14",
            "T5 A11 A11 R2 R2",
        ),
        (
            "shift repeat append prepend append copy remove_first N4 K12 S2 C10 W14 , J15 X18 M3 , O15 X14 X11 A8 , "
            "P19 B2 Q2 , shift swap_first_last Z10 C14 X2",
            "B2 Q2 J15 X18 M3 O15 X14 X11 A8 C14 Z10 X2 P19 B2 Q2 J15 X18 M3 O15 X14 X11 A8 C14 Z10 X2 P19",
        ),
        (
            "shift remove_first append append D16 O9 I18 , remove_second H6 B1 S3 Z4 , remove_first S2 U17 , shift "
            "append append Y1 Y4 W12 C7 , J16 P6 , D20 N13 I18 O9 , R13 U18 D8 Y11 J5 , B14 N7",
            "N7 B14",
        ),
        (
            "swap_first_last prepend reverse prepend K18 L17 Q19 , shift W14 X16 M3 U19 , reverse shift remove_second "
            "I6 X9 B1 , swap_first_last J8 T16 Y19 P15 A9",
            "X16 B1 X9 Q19 L17 K18 W14 U19 M3 I6",
        ),
    ],
)
def test_published_problems_have_their_published_solutions(expression, made):
    assert evaluate(expression) == made


@given(x=STRINGS, y=STRINGS)
def test_functions_obey_their_laws(x, y):
    first, second = " ".join(x), " ".join(y)
    assert evaluate(f"reverse reverse {first}") == evaluate(f"copy {first}") == first
    assert evaluate(f"swap_first_last swap_first_last {first}") == first
    assert evaluate("shift " * len(x) + first) == first
    assert evaluate(f"repeat {first}") == evaluate(f"append {first} , {first}")
    assert evaluate(f"append {first} , {second}") == evaluate(f"prepend {second} , {first}")
    assert evaluate(f"reverse append {first} , {second}") == evaluate(f"append reverse {second} , reverse {first}")
    assert evaluate(f"append remove_second {first} , {second} , remove_first {first} , {second}") == f"{first} {second}"


def test_depth_has_no_limit():
    assert evaluate("reverse " * 100_001 + "A1 B2") == "B2 A1"
    assert evaluate("remove_first A1 , " * 50_000 + "B2") == "B2"
    assert evaluate("remove_second " * 50_000 + "B2" + " , A1" * 50_000) == "B2"


@pytest.mark.parametrize(
    ("expression", "answer"),
    [
        ("", "The expression is empty"),
        ("copy", "'copy', word 1 of the expression (… copy …), has no argument."),
        ("append copy , A1", "'copy', word 2 of the expression (… append copy , A1 …), has no argument."),
        ("echo append A1 B2", "'append', word 2 of the expression (… echo append A1 B2 …), needs two arguments"),
        ("append A1 ,", "',', word 3 of the expression (… append A1 , …), has nothing behind it."),
        ("append A1 , , B2", "',', word 3"),
        ("A1 copy B2", "'copy', word 2 of the expression (… A1 copy B2 …), follows a symbol; a comma must be between"),
        ("append A1 , B2 , C3", "',', word 5 of the expression (… , B2 , C3 …), parts what no function takes together"),
        (", A1", "',', word 1"),
        ("append append A1 , B2", "'append', word 1 of the expression (… append append A1 …), needs two arguments"),
        (
            "revers A1",
            "'revers', word 1 of the expression (… revers A1 …), is neither a function nor a symbol. Did you",
        ),
        ("copy A21", "'A21', word 2"),
        ("copy A1,B2", "'A1,B2', word 2"),
    ],
)
def test_what_is_malformed_is_refused_at_its_place(expression, answer):
    with pytest.raises(UserError) as refused:
        evaluate(expression)
    assert answer in str(refused.value)


@pytest.mark.parametrize("length", [1, 2, 5, 8, 13, 35])
def test_an_example_has_its_functions_and_its_solution(length):
    for seed in range(30):
        each = Pcfg().example(length, Random(seed))
        assert sum(word in FUNCTIONS for word in parts(each)) == length
        assert evaluate(" ".join(parts(each))) == each.target == each.answer == Pcfg().answer(each.target + " ")
        assert each == Pcfg().example(length, Random(seed))
    assert Pcfg().answer(" ") is None


def test_the_first_example_of_a_seed_stays_what_it_is():
    each = Pcfg().example(4, Random(0))
    expression = "remove_first echo prepend shift Q2 G11 X14 Z12 V2 , N3 H7 T14 , H18 M8 P4 X13"
    assert (each.input, each.target) == (f"Solve: {expression}[SEP] ", "H18 M8 P4 X13")


def test_drawn_problems_have_the_published_statistics():
    """Unary functions 11.1%, binary ones 8.3% each; strings of 2 to 5 symbols 17, 29, 28 and 27%; uniform symbols."""
    random = Random(1)
    found = [parts(Pcfg().example(12, random)) for _ in range(2000)]
    names = Counter(word for each in found for word in each if word in FUNCTIONS)
    assert all(abs(names[name] / 24_000 - 1 / 9) < 0.01 for name in UNARY)
    assert all(abs(names[name] / 24_000 - 1 / 12) < 0.01 for name in BINARY)

    strings = Counter()
    for each in found:
        text = " ".join("|" if word in FUNCTIONS or word == "," else word for word in each)
        strings.update(len(piece.split()) for piece in text.split("|") if piece.strip())
    assert strings.keys() == {2, 3, 4, 5}
    for size, share in {2: 0.17, 3: 0.29, 4: 0.28, 5: 0.27}.items():
        assert abs(strings[size] / strings.total() - share / 1.01) < 0.02

    symbols = Counter(word for each in found for word in each if word in SYMBOLS)
    usual = symbols.total() / 520
    assert len(symbols) == 520 and all(abs(count - usual) < 5 * usual**0.5 for count in symbols.values())


def test_lengths_of_texts_are_near_those_published():
    """9 to 35 functions, as often as in the published test set, have sources of 32.9 words and targets of 15.4."""
    published = {9: 3232, 10: 2296, 11: 1738, 12: 1175, 13: 811, 14: 631, 15: 411, 16: 271, 17: 225, 18: 154, 20: 171}
    random, task = Random(2), Pcfg(longest=736)
    found = [task.example(length, random) for length, count in published.items() for _ in range(count // 4)]
    assert abs(fmean(len(parts(each)) for each in found) - 32.9) < 1
    assert abs(fmean(len(each.target.split()) for each in found) - 15.4) < 1


def test_every_shape_of_a_tree_is_equally_likely():
    """Two unary and one binary function make six trees: the binary one first (3), second (2) or last (1)."""

    def shape(each):
        words = ("2" if word in BINARY else "1" if word in UNARY else word for word in parts(each))
        return "".join(word for word in words if word in "12,")

    random = Random(3)
    shapes = Counter(shape(Pcfg().example(3, random)) for _ in range(12_000))
    mixed = {each: count for each, count in shapes.items() if sorted(each.replace(",", "")) == ["1", "1", "2"]}
    assert mixed.keys() == {"112,", "121,", "12,1", "211,", "21,1", "2,11"}
    usual = sum(mixed.values()) / 6
    assert all(abs(count - usual) < 5 * usual**0.5 for count in mixed.values())


def test_no_target_is_longer_than_longest():
    task = Pcfg(longest=10)
    targets = [len(task.example(6, Random(seed)).target.split()) for seed in range(300)]
    assert max(targets) == 10
    assert any(len(Pcfg().example(6, Random(seed)).target.split()) > 10 for seed in range(300))


def test_what_is_impossible_is_refused():
    with pytest.raises(UserError, match="expression of 0 functions is not possible"):
        Pcfg().example(0, Random(0))
    with pytest.raises(UserError, match=r"longest \(9\) must be 10 or more"):
        Pcfg(longest=9)
    with pytest.raises(UserError, match=r"None of 1,000 expressions of 300 functions stays within longest \(10\)"):
        Pcfg(longest=10).example(300, Random(0))


def test_symbols_are_every_word_of_every_text():
    task = plugins.build("tasks", plugins.parse("pcfg(prefix='Solve: ')")[0])
    assert len(SYMBOLS) == len(set(SYMBOLS)) == 520
    assert len(task.symbols) == len(set(task.symbols)) == 520 + 10 + 3
    for seed in range(20):
        each = task.example(8, Random(seed))
        assert set(f"{each.input} {each.target}".replace("[SEP]", " [SEP] ").split()) <= set(task.symbols)


# Files


def written(folder, **changed):
    """Files of a few problems: 60 of one function, 40 of two, and 30 of three and five of five to test."""
    random, task = Random(5), Pcfg(prefix="")
    for part, counts in {"train": {1: 60, 2: 40}, "test": {3: 30, 5: 5}}.items():
        drawn = [task.example(length, random) for length, count in counts.items() for _ in range(count)]
        lines = {"src": [" ".join(parts(each)) for each in drawn], "tgt": [each.target for each in drawn]}
        for end, those in lines.items():
            (folder / f"{part}.{end}").write_text("\n".join(those) + "\n", encoding="utf-8")
    for name, text in changed.items():
        (folder / name.replace("_", ".")).write_text(text, encoding="utf-8")
    return str(folder)


def lines_of(folder, part):
    source, target = ((folder / f"{part}.{end}").read_text(encoding="utf-8").splitlines() for end in ("src", "tgt"))
    return set(zip(source, target, strict=True))


def test_problems_of_files_are_theirs_and_no_others(tmp_path):
    task = Pcfg(folder=written(tmp_path))
    assert (task.trained, task.tested) == (range(1, 3), range(3, 4)), "none of them is without problems"
    random, found = Random(0), {}
    for length in (1, 2, 3, 5):
        drawn = [task.example(length, random) for _ in range(1000)]
        assert all(sum(word in FUNCTIONS for word in parts(each)) == length for each in drawn)
        assert all(each.answer == each.target and each.input.startswith("Solve: ") for each in drawn)
        found[length] = {(" ".join(parts(each)), each.target) for each in drawn}
    assert found[1] | found[2] == lines_of(tmp_path, "train") and found[3] | found[5] == lines_of(tmp_path, "test")


def test_nothing_of_files_that_is_tested_is_trained_on(tmp_path):
    split = Split(Pcfg(folder=written(tmp_path)), held_out=0.2)
    assert split.lengths == (1, 2)
    trained = {split.trained(0, index).input for index in range(2000)}
    held_out = {each.input for length in (1, 2) for each in split.measured(length, 100)}
    assert held_out and not trained & held_out and len(trained | held_out) == 100
    assert [len(split.measured(length, 100)) for length in (3, 5)] == [30, 5]
    assert not trained & {each.input for length in (3, 5) for each in split.measured(length, 100)}


def test_files_are_named_in_an_expression_and_read_once(tmp_path, monkeypatch):
    expression = f"pcfg(folder={written(tmp_path)!r})"
    first = Problems(expression).measured(5, 9)
    monkeypatch.setattr(pcfg, "_lines", None)
    assert len(first) == 5
    assert [each.example for each in Problems(expression).measured(5, 9)] == [each.example for each in first]


def test_spaces_between_the_words_of_a_file_do_not_matter(tmp_path):
    task = Pcfg(folder=written(tmp_path, test_src=" append  A1 , echo copy B2 \r\n", test_tgt="A1  B2 B2 \r\n"))
    assert task.example(3, Random(0)).input == "Solve: append A1 , echo copy B2[SEP] "
    assert task.example(3, Random(0)).target == "A1 B2 B2"


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"train_tgt": "A1\n"}, r"train\.src has 100 lines and .*train\.tgt 1; each needs its solution"),
        (
            {"test_src": "copy copy copy A1\necho\n", "test_tgt": "A1\nA1\n"},
            r"test\.src, line 2: 'echo', word 1 .* argument",
        ),
        ({"test_src": "copy copy copy A1\n\n", "test_tgt": "A1\n\n"}, r"test\.src, line 2: The expression is empty"),
        (
            {"train_src": "copy A1\nreverse A1 B2\n", "train_tgt": "A1\nA1 B2\n"},
            r"train\.tgt, line 2: 'reverse A1 B2' makes 'B2 A1', not 'A1 B2'",
        ),
        ({"test_src": ""}, r"test\.src is empty"),
        ({"test_src": "copy copy A1", "test_tgt": "A1"}, "up to 2 functions, and test.src 2 and more"),
    ],
)
def test_files_that_are_not_right_are_told(tmp_path, changed, told):
    folder = written(tmp_path, **changed)
    with pytest.raises(UserError, match=told):
        Pcfg(folder=folder)


def test_what_files_do_not_have_is_told(tmp_path):
    folder = written(tmp_path)
    for length, near in ((4, "3 and 5"), (0, "1"), (6, "5")):
        with pytest.raises(UserError, match=f"no expression of {length} functions; .*: {near}\\."):
            Pcfg(folder=folder).example(length, Random(0))
    with pytest.raises(UserError, match="Leave it or folder out"):
        Pcfg(folder=folder, longest=50)
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match=r"There is no folder .*nowhere; .*productivity"):
        Pcfg(folder=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"train\.src cannot be read: No such file"):
        Pcfg(folder=str(tmp_path / "other"))
    (tmp_path / "train.src").write_bytes(b"copy \xff")
    pcfg._read.cache_clear()
    with pytest.raises(UserError, match=r"train\.src cannot be read: it is not UTF-8"):
        Pcfg(folder=folder)
