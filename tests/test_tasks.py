"""Every task gives problems of exactly the length asked for; the right answer is found again, and no other is right."""

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import tracemalloc
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lookfar import cli, plugins
from lookfar.errors import UserError
from lookfar.tasks.addition import Addition
from lookfar.tasks.copy import Copy
from lookfar.tasks.counting import Counting
from lookfar.tasks.dyck import BRACKETS, Dyck
from lookfar.tasks.encoding import correct, encode, vocabulary_of
from lookfar.tasks.flip_flop import FlipFlop
from lookfar.tasks.lego import Lego
from lookfar.tasks.multi_query_recall import MultiQueryRecall
from lookfar.tasks.needle import FILLER, Needle
from lookfar.tasks.parity import Parity
from lookfar.tasks.passkey import Passkey
from lookfar.tasks.polynomial import Polynomial
from lookfar.tasks.reverse import Reverse
from lookfar.tasks.sets import buckets
from lookfar.tasks.sort import ORDERED, Sort
from lookfar.tasks.summation import Summation
from lookfar.tasks.symbols import pieces

NAMES = plugins.names("tasks")
VARIANTS = [
    *NAMES,
    *(f"copy(variant={each})" for each in ("mixed_twice", "repeated", "repeated_twice", "replaced")),
    *(f"reverse(variant={each})" for each in ("twice", "and_back")),
    "addition(order=reversed)",
    "addition(order=reversed_answer, padded=true)",
    "addition(hints=true)",
    "addition(order=reversed, padded=true, hints=true)",
    "sort(digits=multi)",
    "lego(shuffled=true, variables=80)",
    "counting(modulo=3)",
    "dyck(kinds=2, depth=3)",
    "flip_flop(ignored=0)",
    "flip_flop(ignored=1)",
    "multi_query_recall(queries=1)",
    "needle(needles=1, depth=1)",
    "passkey(depth=0)",
]

# How long an example of our own tasks is, seen from its text alone
MEASURES = {
    "addition": lambda text: max(sum(map(str.isdigit, part.split())) for part in text[len("Compute ") :].split("+")),
    "copy": lambda text: len(text.partition("in " if text.startswith("Replace") else "Copy: ")[2].split()) - 1,
    "counting": lambda text: text.count(",") + 1,
    "dyck": lambda text: len(text.split()) - 2,
    "flip_flop": lambda text: sum(text.count(each) for each in "wir"),
    "lego": lambda text: text.count("="),
    "multi_query_recall": lambda text: text.count("v") - 1,
    "needle": lambda text: len(pieces(text.removesuffix(" "))),
    "parity": lambda text: text.count(",") + 1,
    "passkey": lambda text: len(pieces(text.removesuffix(" "))),
    "polynomial": lambda text: text.count("x **"),
    "reverse": lambda text: len(text.split()) - 2,
    "sort": lambda text: text.count(",") + 1,
    "summation": lambda text: text.count("+") + 1,
}


@cache
def build(expression):
    (term,) = plugins.parse(expression)
    return plugins.build("tasks", term)


@cache
def lengths_of(expression):
    """Some lengths of a task: the shortest, some that are trained and tested, and ten times the longest trained."""
    task = build(expression)
    far = 10 * max(task.trained)
    found = [*task.trained, *task.tested, far]
    return [each for each in (found[0], found[1], max(task.trained), max(task.tested), far) if exists(task, each)]


def exists(task, length):
    try:
        return bool(task.example(length, Random(0)))
    except UserError:
        return False


@cache
def examples(expression, count=6):
    task = build(expression)
    return [task.example(length, Random(each)) for length in lengths_of(expression) for each in range(count)]


# Laws of every task


@pytest.mark.parametrize("expression", VARIANTS)
def test_every_example_survives_and_needs_no_symbol_that_is_not_told(expression):
    task = build(expression)
    vocabulary = vocabulary_of(task)
    for example in examples(expression):
        tokens = encode(task, example, vocabulary).tokens
        assert vocabulary.decode(tokens) == example.input + example.target
        assert task.answer(example.target) == example.answer
        assert correct(task, example, f"  {example.target}  ")


@pytest.mark.parametrize("expression", VARIANTS)
def test_an_example_has_exactly_its_length(expression):
    task, measure = build(expression), MEASURES.get(expression.partition("(")[0])
    if measure is None:
        pytest.skip("has tests of its own")
    for length in lengths_of(expression):
        for each in range(4):
            assert measure(task.example(length, Random(each)).input) == length


@pytest.mark.parametrize("name", [name for name in NAMES if name in MEASURES])
def test_lengths_reach_ten_times_the_trained(name):
    task = build("lego(variables=80)" if name == "lego" else name)
    assert buckets(task)[-1] == 10 * max(task.trained)
    assert set(task.trained) | set(task.tested) <= set(buckets(task))
    assert not set(task.trained) & set(task.tested)


@pytest.mark.parametrize("expression", VARIANTS)
def test_the_same_random_state_gives_the_same_example(expression):
    length = lengths_of(expression)[-1]
    drawn = [build.__wrapped__(expression).example(length, Random(7)) for _ in range(2)]
    assert drawn[0] == drawn[1] != build(expression).example(length, Random(8))


@pytest.mark.parametrize("expression", VARIANTS)
def test_other_answers_are_wrong(expression):
    task = build(expression)
    for example in examples(expression, 2):
        assert not correct(task, example, "")
        cut = pieces(example.target)
        digits = [place for place, piece in enumerate(cut) if piece.strip() in (*"0123456789", "Yes", "No")]
        place = digits[-1] if digits and "answer" in example.target else 0 if len(cut) < 9 else -3
        for other in (*"0123456789", "Yes", "No"):
            changed = [*cut]
            changed[place] = cut[place].replace(cut[place].strip(), other)
            assert correct(task, example, "".join(changed)) == (other == cut[place].strip())


@pytest.mark.parametrize("expression", VARIANTS)
def test_an_answer_follows_from_its_input_alone(expression):
    task, found = build(expression), {}
    for seed in range(200):
        example = task.example(task.trained[0], Random(seed))
        assert found.setdefault(example.input, example) == example


@pytest.mark.parametrize("name", NAMES)
def test_a_length_that_is_too_short_is_refused(name):
    for length in (0, -3):
        with pytest.raises(UserError, match=f"{length}"):
            build(name).example(length, Random(0))


@pytest.mark.parametrize("name", [name for name in NAMES if build(name).chance > 0.01])
def test_a_constant_guess_has_its_chance(name):
    task, random = build(name), Random(0)
    answers = [task.example(max(task.tested), random).answer for _ in range(2000)]
    best = max(answers.count(each) for each in set(answers)) / len(answers)
    assert task.chance - 0.01 < best < task.chance + 0.03


@pytest.mark.parametrize(
    ("expression", "answer"),
    [
        ("lego(variables=1)", "at least 2"),
        ("counting(modulo=1)", "at least 2"),
        ("dyck(kinds=5)", "2 to 4 kinds"),
        ("dyck(depth=2)", "at least 3"),
        ("flip_flop(ignored=2)", "0 to 1"),
        ("multi_query_recall(keys=0)", r"keys \(0\)"),
        ("needle(needles=99)", "1 to 21 names"),
        ("needle(size=0)", "at least 1 digit"),
        ("needle(depth=2)", "0 to 1"),
        ("passkey(size=0)", "at least 1 digit"),
        ("passkey(depth=-1)", "0 to 1"),
        ("addition(order=backwards)", "'plain', 'reversed' or 'reversed_answer'"),
    ],
)
def test_a_setting_that_is_not_possible_is_refused(expression, answer):
    with pytest.raises(UserError, match=answer):
        build(expression)


@pytest.mark.parametrize(
    ("expression", "length", "answer"),
    [
        ("lego", 27, r"lego\(variables=27\)"),
        ("addition(hints=true)", 256, "256 hints"),
        ("multi_query_recall", 161, "raise `keys`"),
        ("passkey", 25, "its shortest is 26"),
        ("needle", 46, "its shortest is 47"),
    ],
)
def test_a_length_beyond_the_symbols_is_refused(expression, length, answer):
    with pytest.raises(UserError, match=answer):
        build(expression).example(length, Random(0))


# The texts, by hand


def test_texts_of_copy():
    assert text(Copy().problem(["a", "7", "%"])) == "Copy: a 7 % [SEP] |a 7 %"
    assert text(Copy(variant="mixed_twice").problem(["a", "7"])) == "Copy: a 7 [SEP] |a 7 [NEXT] a 7"
    assert text(Copy(variant="repeated").problem(["a", "a"])) == "Copy: a a [SEP] |a a"
    assert text(Copy(variant="repeated_twice").problem(["a", "a"])) == "Copy: a a [SEP] |a a a a"
    assert text(Copy(variant="replaced").problem(["6", "6", "6"], ">")) == "Replace 6 with > in 6 6 6 [SEP] |> > >"


def test_texts_of_reverse():
    assert text(Reverse().problem(["a", "7", "%"])) == "Reverse: a 7 % [SEP] |% 7 a"
    assert text(Reverse(variant="twice").problem(["a", "7"])) == "Reverse: a 7 [SEP] |7 a [NEXT] 7 a"
    assert text(Reverse(variant="and_back").problem(["a", "7"])) == "Reverse: a 7 [SEP] |7 a [NEXT] a 7"


def test_texts_of_addition():
    assert text(Addition().problem("53", "9")) == "Compute 5 3 + 9 ? |The answer is 6 2."
    assert text(Addition(order="reversed").problem("53", "9")) == "Compute 3 5 + 9 ? |The answer is 2 6."
    assert text(Addition(order="reversed_answer").problem("53", "9")) == "Compute 5 3 + 9 ? |The answer is 2 6."
    assert text(Addition(padded=True).problem("53", "9")) == "Compute 5 3 + 0 9 ? |The answer is 0 6 2."
    hinted = "Compute h5 5 h6 3 + h6 9 ? |The answer is h5 6 h6 2."
    assert text(Addition(hints=True).problem("53", "9", 4)) == hinted
    hinted = "Compute h6 3 h5 5 + h6 9 h5 0 ? |The answer is h6 2 h5 6 h4 0."
    assert text(Addition(order="reversed", padded=True, hints=True).problem("53", "9", 4)) == hinted


def test_texts_of_the_other_tasks():
    asked = Polynomial().problem(-2, [(3, 2), (-1, 0)])
    assert text(asked) == "Evaluate at x = - 2 in 3 * x ** 2 + - 1 * x ** 0 ? |The answer is 1."
    assert text(Summation().problem([3, 4, 1])) == "Compute: 3 + 4 + 1 .[SEP] |The answer is 8 ."
    bits = "Is the number of 1's even in the sequence [ 1, 0, 1, 1 ] ? |The answer is No."
    assert text(Parity().problem([1, 0, 1, 1])) == bits
    assert text(Sort().problem(["c", "7", "B"])) == (
        "Sort the following list [ c, 7, B ]. |The sorted list is [ 7, c, B ]."
    )
    assert text(Sort(digits="multi").problem(["99", "1024", "12"])) == (
        "Sort the following list [ 9 9, 1 0 2 4, 1 2 ]. |The sorted list is [ 1 2, 9 9, 1 0 2 4 ]."
    )
    chain = Lego().problem("abc", "--+", 1)
    assert text(chain) == "If a = -1, b = - a, c = + b. Then, what is the value of b? |The answer is +1."
    mixed = Lego().problem("abc", "--+", 2, [2, 0, 1]).input
    assert mixed == "If c = + b, a = -1, b = - a. Then, what is the value of c? "
    assert text(Counting().problem(["a", "b", "a"], "a")) == "How many a are in [ a, b, a ] ? |The answer is 2."
    assert text(Counting(modulo=2).problem(["a", "b", "a"], "a")).endswith("|The answer is 0.")
    assert text(Dyck().problem("([]{}")) == "Close: ( [ ] { } [SEP] |)"
    assert text(FlipFlop().problem("wirwi", "10010")) == "w 1 i 0 r 1 w 1 i 0 r |1"
    recall = MultiQueryRecall().problem({"k1": "v5", "k9": "v2", "k4": "v5"}, ["k4", "k9"])
    assert text(recall) == "Given k1 v5 k9 v2 k4 v5 recall k4 k9 [SEP] |v5 v2"
    hidden = Needle().problem(["river", "stone", "window"], [(2, "mu", "31"), (0, "pi", "4")])
    assert text(hidden) == (
        "The number of pi is 4. river stone The number of mu is 3 1. window What is the number of mu ? "
        "|The answer is 3 1."
    )
    assert Passkey().problem("31", 2, 1).input == (
        "Somewhere in this text a key is hidden. Remember it. The waves The key is 3 1. come What is the key ? "
    )


def text(example):
    return f"{example.input}|{example.target}"


@given(first=st.integers(0, 10**30), second=st.integers(0, 10**30))
def test_a_sum_is_the_sum(first, second):
    for task in (Addition(), Addition(order="reversed", padded=True), Addition(order="reversed_answer", hints=True)):
        assert task.problem(str(first), str(second)).answer == str(first + second)


@given(x=st.integers(-2, 2), terms=st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 3)), min_size=1))
def test_a_polynomial_has_its_value(x, terms):
    value = sum(coefficient * x**degree for coefficient, degree in terms) % 10
    assert Polynomial().problem(x, terms).answer == str(value)


@given(st.lists(st.integers(1, 9), min_size=1))
def test_a_sum_of_digits_is_that_modulo_10(terms):
    assert Summation().problem(terms).answer == str(sum(terms) % 10)


@given(st.lists(st.integers(0, 1), min_size=1))
def test_parity_is_that_of_the_ones(bits):
    assert Parity().problem(bits).answer == ("Yes" if bits.count(1) % 2 == 0 else "No")


@given(st.lists(st.sampled_from(ORDERED), min_size=1))
def test_a_sorted_list_is_sorted(items):
    assert Sort().problem(items).answer == ", ".join(sorted(items, key=ORDERED.index))


@given(seed=st.integers(0, 10**6), length=st.integers(3, 60), depth=st.integers(3, 6), kinds=st.integers(2, 4))
def test_brackets_are_nested_and_the_last_one_closes(seed, length, depth, kinds):
    example = Dyck(kinds=kinds, depth=depth).example(length, Random(seed))
    ends, still_open = dict(BRACKETS[:kinds]), []
    written = example.input.split()[1:-1]
    for each in written:
        if each in ends:
            still_open.append(ends[each])
        else:
            assert still_open.pop() == each
        assert len(still_open) <= depth
    assert written[-1] in ends.values()
    assert example.answer == still_open[-1]


@given(seed=st.integers(0, 10**6), length=st.integers(2, 40), ignored=st.sampled_from((0.0, 0.5, 1.0)))
def test_a_flip_flop_reads_what_was_written_last(seed, length, ignored):
    example, stored = FlipFlop(ignored=ignored).example(length, Random(seed)), None
    cut = example.input.split()
    for instruction, bit in zip(cut[:-1:2], cut[1::2], strict=True):
        stored = bit if instruction == "w" else stored
        assert instruction != "r" or bit == stored
    assert cut[0] == "w" and cut[-1] == "r" and example.answer == stored


@given(seed=st.integers(0, 10**6), length=st.integers(1, 60))
def test_recall_gives_the_value_beside_each_key(seed, length):
    example = MultiQueryRecall().example(length, Random(seed))
    cut = example.input.split()
    told, asked = cut[1 : cut.index("recall")], cut[cut.index("recall") + 1 : -1]
    pairs = dict(zip(told[::2], told[1::2], strict=True))
    assert len(pairs) == length and len(set(asked)) == len(asked) == min(4, length)
    assert example.answer.split() == [pairs[key] for key in asked]


@given(seed=st.integers(0, 10**6), length=st.integers(47, 300), depth=st.sampled_from((None, 0.0, 0.5, 1.0)))
def test_the_needle_that_is_asked_for_stands_at_its_depth(seed, length, depth):
    example = Needle(depth=depth).example(length, Random(seed))
    name = example.input.split()[-2]
    told = f"The number of {name} is {' '.join(example.answer)}."
    assert example.input.count(told) == 1 and example.input.count("The number of ") == 4
    before = sum(word in FILLER for word in example.input.partition(told)[0].split())
    assert depth is None or before == round(depth * (length - 47))


@given(length=st.integers(26, 400), seed=st.integers(0, 10**6))
def test_a_passkey_at_the_end_is_told_last(length, seed):
    first, last = (Passkey(depth=depth).example(length, Random(seed)) for depth in (0.0, 1.0))
    told = f"The key is {' '.join(first.answer)}."
    assert f"Remember it. {told}" in first.input and last.input.endswith(f"{told} What is the key ? ")
    assert len(pieces(first.input)) == len(pieces(last.input))


# Facts of the published study


def test_addition_has_64_bins_to_train_on_and_192_to_test():
    task = Addition()
    trained, tested = (
        [each for length in lengths for each in task.bins(length)] for lengths in (task.trained, task.tested)
    )
    assert (len(set(trained)), len(trained)) == (64, 64)
    assert (len(set(tested)), len(tested)) == (192, 192)
    assert set(trained) == {(one, other) for one in range(1, 9) for other in range(1, 9)}
    drawn = {tuple(len(part.split()) for part in operands(task.example(3, Random(seed)))) for seed in range(200)}
    assert drawn == set(task.bins(3))


def operands(example):
    return example.input.removeprefix("Compute").removesuffix("? ").split("+")


def test_numbers_of_one_digit_include_zero_and_longer_ones_do_not_begin_with_it():
    found = [operands(Addition().example(length, Random(seed))) for length in (1, 3) for seed in range(400)]
    numbers = [number.strip() for pair in found for number in pair]
    assert {number for number in numbers if len(number) == 1} == set("0123456789")
    assert not any(number.startswith("0") for number in numbers if len(number) > 1)


@pytest.mark.parametrize(("length", "places"), [(4, {2, 3}), (5, {3, 4}), (9, {5, 6, 7, 8})])
def test_lego_asks_for_the_second_half_of_the_chain(length, places):
    found = set()
    for seed in range(100):
        clauses, _, question = Lego().example(length, Random(seed)).input.partition(". Then")
        chain = [clause.split(" =")[0] for clause in clauses.removeprefix("If ").split(", ")]
        found.add(chain.index(question.removesuffix("? ").split()[-1]))
    assert found == places == set(Lego().asked(length))


@pytest.mark.parametrize("shuffled", [False, True])
def test_values_of_lego_follow_from_its_clauses(shuffled):
    for seed in range(50):
        example = Lego(shuffled=shuffled).example(9, Random(seed))
        clauses, _, question = example.input.partition(". Then")
        told = dict(clause.split(" = ") for clause in clauses.removeprefix("If ").split(", "))
        asked, sign = question.removesuffix("? ").split()[-1], 1
        while told[asked] not in ("+1", "-1"):
            turn, asked = told[asked].split()
            sign *= -1 if turn == "-" else 1
        assert int(example.answer) == sign * int(told[asked])


def test_ranges_of_the_published_tasks():
    drawn = [Summation().example(9, Random(seed)).input for seed in range(100)]
    assert {each for text in drawn for each in text if each.isdigit()} == set("123456789")
    numbers = [Sort(digits="multi").example(9, Random(seed)).answer.split(", ") for seed in range(300)]
    assert {len(number.split()) for each in numbers for number in each} == {2, 3, 4}
    polynomials = [Polynomial().example(8, Random(seed)).input.split(" in ")[1][:-3] for seed in range(100)]
    terms = {term.replace("- ", "-") for each in polynomials for term in each.split(" + ")}
    assert terms == {f"{coefficient} * x ** {degree}" for coefficient in range(-3, 4) for degree in range(4)}


# The command


def command(monkeypatch, capsys, *words):
    """The exit code of `lookfar tasks`, and what it printed on stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["lookfar", "tasks", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    out, err = capsys.readouterr()
    return left.value.code or 0, out, err


def test_the_command_lists_every_task(monkeypatch, capsys):
    code, out, _ = command(monkeypatch, capsys)
    rows = {line.split()[0]: line for line in out.splitlines()[1:]}
    assert code == 0 and list(rows) == NAMES
    assert rows["lego"].split() == ["lego", "4-8", "9-16", "0.5", "shuffled=false,", "variables=26"]
    assert "variant=mixed|mixed_twice|repeated|repeated_twice|replaced" in rows["copy"]


def test_the_command_prints_examples(monkeypatch, capsys):
    code, out, _ = command(monkeypatch, capsys, "addition", "--length", 5, "--count", 4, "--scratchpad", "icovr")
    assert code == 0 and out.count("Compute ") == out.count(". Thus,  The answer is ") == 4
    _, again, _ = command(monkeypatch, capsys, "addition", "--length", 5, "--count", 4, "--scratchpad", "icovr")
    _, other, _ = command(monkeypatch, capsys, "addition", "--length", 5, "--count", 4, "--seed", 1)
    assert again == out and other != out


@pytest.mark.parametrize("name", NAMES)
def test_the_command_prints_json(name, monkeypatch, capsys):
    code, out, err = command(monkeypatch, capsys, name, "--json", "--count", 2)
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and not err and len(rows) == 2
    assert [build(name).answer(row["output"]) for row in rows] == [row["answer"] for row in rows]
    assert {row["length"] for row in rows} == {build(name).trained[-1]}


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["adition"], "Did you mean 'addition'?"),
        (["symbols"], "No task is named 'symbols'"),
        (["addition + copy"], "names 2 tasks"),
        (["copy", "--scratchpad", "icovr"], "A task without steps has no scratchpad"),
        (["lego", "--scratchpad", "icovr"], "no variables (v); try the scratchpad 'icor'"),
        (["parity", "--scratchpad", "ix"], "'ix' is no format of a scratchpad"),
        (["parity", "--length", "0"], "no problem of length 0"),
        (["parity", "--all"], "has no end"),
        (["parity", "--all", "--length", "3"], "leave settings and other options out"),
        (["--all"], "Which task?"),
        (["--length", "3"], "Which task?"),
        (["--count", "5"], "Which task?"),
        (["--seed", "0"], "Which task?"),
        (["scan", "--all", "--count", "2"], "leave settings and other options out"),
        (["scan", "--all", "--seed", "0"], "leave settings and other options out"),
        (["parity", "--length", "5001", "--scratchpad", "co"], "ask for 5000 or less"),
    ],
)
def test_a_mistake_is_one_sentence(words, answer, monkeypatch, capsys):
    code, out, err = command(monkeypatch, capsys, *words)
    assert code == 2 and not out
    assert err.startswith("lookfar: ") and answer in err and len(err.strip().splitlines()) == 1


def test_a_seed_below_0_is_refused(monkeypatch, capsys):
    code, out, err = command(monkeypatch, capsys, "parity", "--seed", -1)
    assert code == 2 and not out and "--seed" in err


@pytest.mark.parametrize("name", ["addition", "parity", "polynomial", "sort", "summation"])
def test_steps_that_nobody_asks_for_are_not_worked_out(name, monkeypatch):
    module = sys.modules[f"lookfar.tasks.{name}"]
    worked, steps = [], module._steps
    monkeypatch.setattr(module, "_steps", lambda *given: worked.append(given) or steps(*given))
    drawn, again = (build(name).example(30, Random(0)) for _ in range(2))
    encode(build(name), drawn, vocabulary_of(build(name)))
    assert not worked
    assert len(drawn.steps) >= 30 and drawn.steps[0] == next(iter(drawn.steps))
    assert drawn == again and hash(drawn) == hash(again) and len(worked) == 2


def test_a_sum_of_100000_digits_is_drawn_without_all_its_bins():
    tracemalloc.start()
    example = Addition().example(100_000, Random(3))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(example.answer) >= 100_000 and peak < 40e6
    for length in (1, 2, 7):
        bins = Addition().bins(length)
        assert len(set(bins)) == 2 * length - 1
        for seed in range(20):
            one, other = Random(seed).choice(bins)
            assert [len(part.split()) for part in operands(Addition().example(length, Random(seed)))] == [one, other]


def test_all_problems_of_a_task_that_ends_are_lines_of_json(monkeypatch, capsys, tmp_path):
    (tmp_path / "one_of_two.py").write_text(
        "from lookfar.tasks.parity import Parity as Base\n"
        "class OneOfTwo(Base):\n"
        "    def all(self):\n"
        "        return iter([('0', 'even'), ('turn left', 'I_TURN I_LEFT')])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "mine", type(sys)("mine"))
    sys.modules["mine"].__path__ = [str(tmp_path)]
    code, out, err = command(monkeypatch, capsys, "mine.one_of_two", "--all")
    assert (code, err) == (0, "")
    assert out == '{"input": "0", "output": "even"}\n{"input": "turn left", "output": "I_TURN I_LEFT"}\n'


def test_a_pipe_that_closes_early_is_no_error():
    words = [sys.executable, "-m", "lookfar", "tasks", "parity", "--count", "20000", "--json"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ) as process:
        assert json.loads(process.stdout.readline())["output"]
        process.stdout.close()
        assert process.stderr.read() == ""


@pytest.mark.parametrize("expression", VARIANTS)
def test_symbols_are_told_once_and_a_vocabulary_is_a_few_hundred(expression):
    symbols = list(build(expression).symbols)
    assert len(symbols) == len(set(symbols))
    assert expression == "pcfg" or len(vocabulary_of(build(expression))) < 600


# The page


PAGE = (Path(__file__).parents[1] / "docs" / "tasks.md").read_text(encoding="utf-8")
BLOCKS = [block for text in re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL) for block in text.split("$ ")[1:]]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.partition("\n")[0])
def test_the_page_shows_what_the_command_prints(block, monkeypatch, capsys):
    line, _, shown = block.partition("\n")
    code, out, _ = command(monkeypatch, capsys, *shlex.split(line)[2:])
    assert code == 0 and [each.rstrip() for each in out.splitlines()] == shown.splitlines()


@pytest.mark.parametrize("name", NAMES)
def test_the_page_has_a_row_of_every_task(name, monkeypatch, capsys):
    _, out, _ = command(monkeypatch, capsys)
    row = re.search(rf"^{name} .*$", out, re.MULTILINE)[0]
    cells = r" \| ".join(map(re.escape, re.split(r"\s\s+", row)[1:4]))
    assert re.search(rf"^\| `{name}` \| .* \| {cells} \| .+ \|$", PAGE, re.MULTILINE)


@pytest.mark.parametrize(("terms", "chance"), [(1, 0.271), (9, 0.12), (16, 0.104)])
def test_the_best_constant_guess_of_a_polynomial_is_right_as_often_as_its_page_says(terms, chance):
    """By adding up every coefficient and degree, term by term, at every x."""
    answers = np.zeros(10)
    for x in range(-2, 3):
        of_term, total = np.zeros(10), np.eye(10)[0]
        for coefficient, degree in itertools.product(range(-3, 4), range(4)):
            of_term[coefficient * x**degree % 10] += 1 / 28
        for _ in range(terms):
            total = sum(np.roll(total, digit) * part for digit, part in enumerate(of_term))
        answers += total / 5
    assert answers.max() == pytest.approx(chance, abs=5e-4)
