"""Examples become tokens without loss, and none is both trained on and measured; digits are numbered by their place."""

import subprocess
import sys
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lookfar import config, plugins
from lookfar.errors import UserError
from lookfar.tasks.addition import Addition
from lookfar.tasks.base import Example, Task
from lookfar.tasks.copy import Copy
from lookfar.tasks.digits import abacus, coupled
from lookfar.tasks.encoding import encode, vocabulary_of
from lookfar.tasks.lego import Lego
from lookfar.tasks.parity import Parity
from lookfar.tasks.problems import Problems
from lookfar.tasks.scratchpad import Scratchpad
from lookfar.tasks.sets import Split, buckets
from lookfar.tasks.sort import ORDERED
from lookfar.tasks.summation import Summation
from lookfar.tasks.symbols import BOS, EOS, PADDING, SYMBOLS, Vocabulary, pieces, words
from lookfar.training.problems import check, lengths, problems_of

NAMES = plugins.names("tasks")


def build(name):
    return plugins.find("tasks", name)()


# Symbols


def test_there_are_100_symbols_and_every_one_survives():
    assert len(SYMBOLS) == len(set(SYMBOLS)) == 100 and len(ORDERED) == 50
    vocabulary = Vocabulary(SYMBOLS)
    for symbol in SYMBOLS:
        line = " ".join([symbol] * 10)
        assert len(vocabulary.encode(line)) == 10
        assert vocabulary.decode(vocabulary.encode(line)) == line


def test_a_space_belongs_to_the_piece_after_it():
    assert pieces("The answer is 6 2.") == ["The", " answer", " is", " 6", " 2", "."]
    assert pieces("x  53 [SEP] A12 h7, ") == ["x", " ", " 5", "3", " [SEP]", " A12", " h7", ",", " "]
    assert words("a: b, a") == ("a", ":", "b", ",")


@given(st.text(st.characters(exclude_categories=("Zs", "Zl", "Zp", "Cc"), include_characters=" ")))
def test_pieces_joined_are_the_text(text):
    assert "".join(pieces(text)) == text


def test_whitespace_that_is_no_space_is_refused():
    with pytest.raises(UserError, match=r"'\\n' cannot be a symbol"):
        pieces("a\nb")


@given(st.lists(st.sampled_from((*SYMBOLS, " ")), max_size=30), st.sampled_from(("", " ")))
def test_a_text_of_known_symbols_survives(cut, between):
    text = between.join(cut)
    vocabulary = Vocabulary([*SYMBOLS, *words(text)])
    tokens = vocabulary.encode(text)
    assert tokens.dtype == np.int64 and vocabulary.decode(tokens) == text
    assert "".join(vocabulary.pieces[token] for token in tokens) == text


def test_an_unknown_symbol_is_named():
    with pytest.raises(UserError, match=r"no symbol 'answr'\. Did you mean 'answer'\?"):
        Vocabulary(["answer", "is"]).encode("answer answr is")
    with pytest.raises(UserError, match="no symbol 'padding'"):
        Vocabulary(["<", ">"]).encode("<padding>")


def test_special_tokens_come_first_and_are_no_text():
    vocabulary = Vocabulary(["a", "b"])
    assert (PADDING, BOS, EOS) == (0, 1, 2) and len(vocabulary) == 8
    assert vocabulary.decode([BOS, *vocabulary.encode("a b").tolist(), EOS, PADDING]) == "a b"


# Encoding


def test_the_target_and_the_end_are_written_by_the_model():
    example = Addition().problem("53", "9")
    vocabulary = vocabulary_of(Addition())
    encoded = encode(Addition(), example, vocabulary)
    assert encoded.tokens[0] == BOS and encoded.tokens[-1] == EOS
    assert vocabulary.decode(encoded.tokens[~encoded.written]) == "Compute 5 3 + 9 ?"
    assert vocabulary.decode(encoded.tokens[encoded.written]) == " The answer is 6 2."
    assert encoded.written.sum() == 6 + 1


def test_a_symbol_is_the_same_token_first_in_the_target_and_later():
    encoded = encode(Copy(), Copy().problem(["a", "a", "a"]), vocabulary_of(Copy()))
    assert len(set(encoded.tokens[encoded.written])) == 2


def test_bos_can_be_left_out():
    example, vocabulary = Addition().problem("53", "9"), vocabulary_of(Addition())
    with_bos, without = (encode(Addition(), example, vocabulary, bos=bos) for bos in (True, False))
    assert with_bos.tokens[1:].tolist() == without.tokens.tolist()
    assert with_bos.written[1:].tolist() == without.written.tolist()


def test_what_is_too_long_is_refused_and_never_cut_off():
    example, vocabulary = Addition().problem("53", "9"), vocabulary_of(Addition())
    assert len(encode(Addition(), example, vocabulary, context=14).tokens) == 14
    with pytest.raises(UserError, match=r"14 tokens, more than the context \(13\)"):
        encode(Addition(), example, vocabulary, context=13)


@pytest.mark.parametrize(
    ("example", "answer"),
    [
        (Example("Compute 5 3 + 9 ? ", "The answer is 6 2.", "63"), "'63' is not found again"),
        (Example("Compute 5 3 + 9 ? ", "The answer is 6 2", "62"), "'62' is not found again"),
        (Example("Compute 5 3 + 9 ? ", "The answer is sixty.", "62"), "no symbol 'sixty'"),
        (Example("Compute 5 3 + 9 Comp", "ute The answer is 6 2.", "62"), "runs into its target"),
    ],
)
def test_an_example_that_does_not_survive_is_refused(example, answer):
    vocabulary = Vocabulary([*Addition().symbols, "Comp", "ute"])
    with pytest.raises(UserError, match=answer):
        encode(Addition(), example, vocabulary)


def test_steps_that_do_not_survive_are_refused():
    good = Parity().problem([1, 1])
    broken = [type(each)(each.input, each.computation, "0 # 1", each.variables, each.remaining) for each in good.steps]
    example = Example(good.input, good.target, good.answer, tuple(broken))
    pad = Scratchpad("io")
    with pytest.raises(UserError, match=r"steps of .*not found again"):
        encode(Parity(), example, vocabulary_of(Parity(), pad), scratchpad=pad)


# Sets


@pytest.mark.parametrize("name", NAMES)
def test_no_example_is_both_trained_on_and_measured(name):
    split = Split(build(name))
    trained = {split.trained(seed, index).input for seed in range(2) for index in range(150)}
    for length in (split.lengths[0], split.lengths[-1], split.task.tested[-1]):
        measured = [example.input for example in split.measured(length, 30)]
        assert len(measured) == len(set(measured)) and not trained & set(measured)
        assert measured or length == split.lengths[0]
        assert measured[:7] == [example.input for example in split.measured(length, 7)]


def test_small_spaces_are_divided_completely():
    """Of all 112 strings of 4 to 6 bits each is either trained on or measured."""
    split = Split(Parity(), [4, 5, 6])
    trained = {split.trained(0, index).input for index in range(2500)}
    measured = {example.input for length in range(4, 7) for example in split.measured(length, 10**6)}
    assert not trained & measured and len(trained | measured) == 112
    assert 0.03 < len(measured) / 112 < 0.15


def test_an_example_of_the_stream_is_known_by_its_number():
    split = Split(Summation())
    assert split.trained(3, 41) == Split(Summation()).trained(3, 41)
    assert len({split.trained(seed, index).input for seed in range(5) for index in range(20)}) > 85
    code = "from lookfar.tasks.sets import Split; from lookfar.tasks.summation import Summation as S; "
    code += "print(Split(S()).trained(3, 41).input)"
    for seed in "12":
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert done.stdout.removesuffix("\n") == split.trained(3, 41).input, done.stderr


def test_lengths_are_trained_on_as_often_as_they_are_named():
    split = Split(Summation(), [2, 5, 5, 5])
    found = [split.trained(0, index).input.count("+") + 1 for index in range(400)]
    assert set(found) == {2, 5} and 0.68 < found.count(5) / 400 < 0.82


def test_all_problems_are_measured_at_lengths_that_are_not_trained_on():
    assert len(Split(Parity(), [8]).measured(4, 100)) == 16
    assert len(Split(Parity(), [4, 8]).measured(4, 100)) < 8


class OneOfEach(Task):
    """One problem of each even length."""

    trained = range(2, 9)
    tested = range(9, 12)
    symbols = ("a",)

    def example(self, length, random):
        if length % 2:
            raise UserError(f"No problem has the odd length {length}.")
        return Example(f"{' '.join('a' * length)} ", "a", "a")

    def answer(self, target):
        return target.strip()


def test_a_length_without_problems_is_left_out_or_refused():
    assert Split(OneOfEach()).lengths == (2, 4, 6, 8)
    assert buckets(OneOfEach(), 5) == [2, 4, 6, 8, 10, 16, 24, 32, 40]
    with pytest.raises(UserError, match="odd length 3"):
        Split(OneOfEach(), [2, 3])


def test_a_length_of_one_problem_is_trained_on_or_measured_and_the_other_is_said():
    split = Split(OneOfEach(), range(2, 62, 2))
    for length in split.lengths:
        example = OneOfEach().example(length, Random(0))
        alone = Split(OneOfEach(), [length])
        if split.holds_out(example):
            assert alone.measured(length, 5) == [example]
            with pytest.raises(UserError, match=f"No problem of length {length} is left to train on"):
                alone.trained(0, 0)
        else:
            assert alone.measured(length, 5) == [] and alone.trained(0, 0) == example
    assert 0 < sum(bool(Split(OneOfEach(), [length]).measured(length, 1)) for length in split.lengths) < 15


@pytest.mark.parametrize(("lengths", "part"), [([], 0.1), ([2], 0.0), ([2], 1e-4), ([2], 1.0)])
def test_a_split_that_leaves_nothing_is_refused(lengths, part):
    with pytest.raises(UserError):
        Split(Summation(), lengths, held_out=part)


def test_a_task_without_any_of_its_lengths_is_refused():
    with pytest.raises(UserError, match=r"None of the lengths .* take lego\(variables=8\)"):
        Split(Lego(variables=3))


@pytest.mark.parametrize("part", [0.003, 0.1])
def test_however_little_is_held_out_as_many_are_measured(part):
    split = Split(Copy(), [5], held_out=part)
    found = split.measured(5, 30)
    assert len(found) == 30 and all(map(split.holds_out, found))


def test_buckets_reach_ten_times_the_trained_lengths():
    assert buckets(Addition()) == [*range(1, 17), 24, 32, 40, 48, 56, 64, 72, 80]
    assert buckets(Addition(), 2) == list(range(1, 17))


def test_buckets_follow_the_lengths_that_are_trained_on():
    assert buckets(Addition(), 3, [22, 20, 21, 20]) == [20, 21, 22, 44, 66]
    assert buckets(Copy(), 2, [10, 3]) == [3, *range(10, 21)]
    assert buckets(Copy(), 3, [15]) == [*range(15, 41), 45]
    assert buckets(build("scan"), 2, [22, 24]) == [22, 24, 25, 26, 27, 28, 30, 32, 33, 36, 40, 48]


# Runs at the door


def a_run(*overrides):
    content = {"model": {"width": 16, "heads": 2, "context": 400}, "task": {"name": "addition"}}
    return config.build(content, overrides)


def measured_lengths(*overrides):
    run = a_run(*overrides)
    check(run)
    return lengths(run, problems_of(run.task))


def test_a_run_is_measured_at_the_lengths_it_is_trained_on_and_at_longer_ones():
    assert measured_lengths("task.lengths=[20,21,22]") == [20, 21, 22, 44]
    assert measured_lengths("task.name=copy", "task.lengths=[4,2]") == [2, 4, 5, 6, 7, 8]
    assert measured_lengths("task.lengths=[20]", "evaluation.lengths=[9,3]") == [3, 9]


@pytest.mark.parametrize("name", [each for each in NAMES if each != "needle"])
def test_by_default_a_run_is_measured_at_all_lengths_of_its_task(name):
    run, task = a_run(f"task.name={name}"), build(name)
    of_scan = {*task.lengths} - {1} if name == "scan" else ()  # no command of one action is held out
    found = [each for each in (*task.trained, *task.tested) if name != "scan" or each in of_scan]
    assert lengths(run, problems_of(run.task)) == found


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["task.name=lego(variables=3)"], "None of the lengths to train on by default is left"),
        (["task.name=multi_query_recall(keys=3)"], "has 3 keys and no problem of length 16; raise `keys`"),
        (["task.name=passkey(size=300)"], "passkey has no problem of length 256; its shortest is 3"),
        (
            ["task.name=lego(variables=6)"],
            "for length 8 take lego(variables=8). Or state task.lengths, such as task.le",
        ),
        (["task.name=lego(variables=9)"], "take lego(variables=16). Or state evaluation.lengths, such as evaluation."),
        (["task.name=lego(variables=6)", "task.lengths=[4,5]"], "take lego(variables=10). Or state evaluation.le"),
        (
            ["task.name=passkey(size=50)"],
            "its shortest is 71. Or state task.lengths, such as task.lengths=[96, 128, 160, 192, 224, 256].",
        ),
        (["task.name=scan", "task.lengths=[1]", "evaluation.lengths=[4]"], "too few problems of its trained lengths"),
        (["task.name=parity", "task.lengths=[1,2]", "evaluation.lengths=[4]"], "or set task.held_out higher"),
        (["task.name=scan", "evaluation.lengths=[1,4]"], "of length 1 that is not trained on; leave it out of eval"),
        (
            ["task.name=parity", "task.lengths=[1,8]", "task.held_out=0.999"],
            "is left to train on; 0.999 of all are held out",
        ),
        (["task.held_out=0.0001"], "held_out (0.0001) must be 0.001 or more"),
    ],
)
def test_lengths_without_problems_are_told_at_the_door(overrides, sentence):
    with pytest.raises(UserError) as told:
        check(a_run(*overrides))
    assert sentence in str(told.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["task.name=lego(variables=6)", "task.lengths=[4,5]", "evaluation.lengths=[4,5,6]"],
        ["task.name=scan"],
        ["task.name=scan", "task.lengths=[1,2,3]"],
    ],
)
def test_lengths_that_are_stated_or_that_no_setting_took_away_are_no_reason_to_refuse(overrides):
    check(a_run(*overrides))


def test_the_longest_of_all_problems_that_are_measured_is_looked_for(monkeypatch):
    monkeypatch.setattr("lookfar.tasks.problems.SAMPLE", 3)
    few, many = (Problems("polynomial", lengths=[8], examples=count) for count in (1, 200))
    sizes = [len(each.encoded.tokens) for each in many.measured(8, 200)]
    assert few.tokens(8) == max(sizes[:3]) < max(sizes) == many.tokens(8)
    assert problems_of(config.TaskConfig(name="copy", examples=999)).examples == 999


# Digits


def test_abacus_counts_digits_as_they_are_written():
    cut = pieces("Compute 3 5 + 9 ? The answer is 2 6.")
    assert abacus(cut).tolist() == [0, 1, 2, 0, 1, 0, 0, 0, 0, 1, 2, 0]
    assert abacus(cut, offset=40).tolist() == [0, 41, 42, 0, 41, 0, 0, 0, 0, 41, 42, 0]


def test_coupled_positions_of_the_paper():
    cut = pieces("6 5 3 + 0 4 9 = 2 0 7 0")
    assert coupled(cut).tolist() == [2, 3, 4, 5, 2, 3, 4, 5, 4, 3, 2, 1]
    assert coupled(cut, start=7).tolist() == [8, 9, 10, 11, 8, 9, 10, 11, 10, 9, 8, 7]


def test_coupled_positions_of_the_task():
    cut = ["", *pieces("Compute 5 3 + 9 ? The answer is 2 6."), ""]
    assert coupled(cut).tolist() == [0, 0, 2, 3, 4, 3, 4, 4, 4, 4, 3, 2, 0, 0]
    cut = pieces("Compute 3 5 + 9 ? The answer is 2 6.")
    assert coupled(cut, reversed_operands=True).tolist() == [0, 3, 2, 4, 3, 4, 4, 4, 4, 3, 2, 0]
    assert coupled(pieces("1 + 2 = 3 4 5 6")).tolist() == [2, 3, 2, 3, 2, 1, 0, 0]
    assert coupled(["x", "y"]).tolist() == [0, 0] and len(coupled([])) == len(abacus([])) == 0


@given(first=st.integers(0, 10**12), second=st.integers(0, 10**12), padded=st.booleans(), start=st.integers(1, 90))
def test_digits_of_one_significance_have_one_position(first, second, padded, start):
    task = Addition(order="reversed_answer", padded=padded)
    example = task.problem(str(first), str(second))
    cut = pieces(example.input + example.target)
    positions = coupled(cut, start=start)
    digits = [(piece.strip(), int(at)) for piece, at in zip(cut, positions, strict=True) if piece.strip().isdigit()]
    width = max(len(str(first)), len(str(second)))
    units = start + width
    written = [sum(int(digit) * 10 ** (units - at) for digit, at in digits)]
    assert written == [2 * (first + second)]
    told = len(pieces(example.input.removesuffix(" ")))
    assert coupled(cut[: told + 4], start=start).tolist() == positions[: told + 4].tolist()


@given(number=st.integers(0, 10**12), other=st.integers(0, 10**12))
def test_abacus_positions_are_significances_of_reversed_numbers(number, other):
    example = Addition(order="reversed").problem(str(number), str(other))
    cut = pieces(example.input + example.target)
    places = abacus(cut)
    total = sum(int(cut[token]) * 10 ** (int(places[token]) - 1) for token in np.flatnonzero(places))
    assert total == 2 * (number + other)


@pytest.mark.parametrize("name", NAMES)
def test_every_task_is_encoded_at_its_trained_lengths(name):
    task, random = build(name), Random(0)
    vocabulary = vocabulary_of(task)
    for length in Split(task).lengths[:30]:
        example = task.example(length, random)
        encoded = encode(task, example, vocabulary)
        assert encoded.tokens.max() < len(vocabulary) and PADDING not in encoded.tokens
