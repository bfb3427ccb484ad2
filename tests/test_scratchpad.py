"""Scratchpads are written in all 32 formats, read back, and scored part by part."""

import re
from itertools import combinations
from random import Random
from time import perf_counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lookfar import plugins
from lookfar.errors import UserError
from lookfar.tasks.addition import Addition
from lookfar.tasks.base import Step
from lookfar.tasks.copy import Copy
from lookfar.tasks.encoding import correct, encode, vocabulary_of
from lookfar.tasks.lego import Lego
from lookfar.tasks.parity import Parity
from lookfar.tasks.polynomial import Polynomial
from lookfar.tasks.scratchpad import Scratchpad, conclusion
from lookfar.tasks.sort import Sort
from lookfar.tasks.summation import Summation

FORMATS = ["".join(parts) for count in range(6) for parts in combinations("icovr", count)]
TASKS = {
    "addition": Addition(),
    "hinted": Addition(order="reversed", padded=True, hints=True),
    "parity": Parity(),
    "summation": Summation(),
    "polynomial": Polynomial(),
    "sort": Sort(),
    "sort of numbers": Sort(digits="multi"),
    "lego": Lego(),
    "shuffled lego": Lego(shuffled=True),
}
WITHOUT_VARIABLES = ("sort", "sort of numbers", "lego", "shuffled lego")
FULL = Scratchpad("icovr")

SUM = (  # of 53 and 9
    "in 3, 9 comp 3 + 9 + carry = 12 + 0 = 12 out 2 [ carry: 1 ] re 5 +  # "
    "in 5, 0 comp 5 + 0 + carry = 5 + 1 = 6 out 6 [ carry: 0 ] re  + "
)


def steps_of(example, parts="icovr"):
    return Scratchpad(parts).write(example).removeprefix("Thinking step by step:  ").partition(" . Thus, ")[0]


def test_there_are_32_formats():
    assert len(set(FORMATS)) == 32


@pytest.mark.parametrize("name", TASKS)
def test_every_scratchpad_is_read_back_in_every_format(name):
    task = TASKS[name]
    for parts in FORMATS:
        pad = Scratchpad(parts)
        for length in (task.trained[0], task.trained[-1], task.tested[-1]):
            example = task.example(length, Random(f"{parts}{length}"))
            if "v" in parts and name in WITHOUT_VARIABLES:
                with pytest.raises(
                    UserError, match=rf"no variables \(v\); try the scratchpad '{parts.replace('v', '')}'"
                ):
                    pad.write(example)
                continue
            written = pad.write(example)
            assert pad.score(example, written) == dict.fromkeys((*pad.names, "steps"), 1.0) | {"failed": 0.0}
            assert correct(task, example, written, pad)
            encode(task, example, vocabulary_of(task, pad), scratchpad=pad)


# The texts, by hand


def test_the_sum_of_53_and_9():
    whole = f"Thinking step by step:  {SUM} . Thus,  The answer is 6 2."
    assert FULL.write(Addition().problem("53", "9")) == whole


def test_a_carry_that_is_left_is_a_step():
    *_, last = steps_of(Addition().problem("99", "1")).split(" # ")
    assert len(Addition().problem("99", "1").steps) == 3
    assert last == "in 0, 0 comp 0 + 0 + carry = 0 + 1 = 1 out 1 [ carry: 0 ] re  + "


@pytest.mark.parametrize(
    ("parts", "first"),
    [
        ("co", "comp 3 + 9 + carry = 12 + 0 = 12 out 2"),
        ("icor", "in 3, 9 comp 3 + 9 + carry = 12 + 0 = 12 out 2 re 5 + "),
        ("v", "[ carry: 1 ]"),
        ("", ""),
    ],
)
def test_a_part_that_is_left_out_leaves_no_mark(parts, first):
    assert steps_of(Addition().problem("53", "9"), parts).split(" # ")[0] == first


def test_steps_of_parity():
    assert steps_of(Parity().problem([1, 1])) == (
        "in 1 comp 1 ** par = 1 ** 0 out 1 [ par: 1 ] re [ 1 ] # in 1 comp 1 ** par = 1 ** 1 out 0 [ par: 0 ] re [  ]"
    )


def test_steps_of_a_sum_of_digits():
    assert steps_of(Summation().problem([7, 5, 1])) == (
        "in 7 comp 7 + sum = 7 + 0 = out 7 [ sum: 7 = 7 ] re 5 + 1 # "
        "in 5 comp 5 + sum = 5 + 7 = out 1 2 [ sum: 1 2 = 2 ] re 1 # "
        "in 1 comp 1 + sum = 1 + 2 = out 3 [ sum: 3 = 3 ] re "
    )


def test_steps_of_a_polynomial():
    assert steps_of(Polynomial().problem(-2, [(3, 2), (-1, 0)])) == (
        "in 3 * x ** 2 comp 3 * - 2 ** 2 = 3 * 4 out 1 2 [ sum: 0 + 1 2 = 2 ] re - 1 * x ** 0 # "
        "in - 1 * x ** 0 comp - 1 * - 2 ** 0 = - 1 * 1 out - 1 [ sum: 2 + - 1 = 1 ] re "
    )


def test_steps_of_sorting_exchange_the_head_for_the_least():
    assert steps_of(Sort().problem(["c", "b", "a"]), "icor") == (
        "in c comp The minimum of the unsorted portion out a re [ b, c ] # "
        "in b comp The minimum of the unsorted portion out b re [ c ] # "
        "in c comp The minimum of the unsorted portion out c re [  ]"
    )
    assert (
        steps_of(Sort(digits="multi").problem(["99", "12"]), "ior")
        == "in 9 9 out 1 2 re [ 9 9 ] # in 9 9 out 9 9 re [  ]"
    )


def test_steps_of_lego_end_at_the_variable_that_is_asked_for():
    assert steps_of(Lego().problem("qtcf", "--+-", 2, [2, 3, 0, 1]), "icor") == (
        "in q comp  out -1 re c = + t, f = - c, t = - q # "
        "in t comp - q = - -1 out +1 re c = + t, f = - c # "
        "in c comp + t = + +1 out +1 re f = - c"
    )


# Scores


def test_each_part_is_scored_by_itself():
    example = Addition().problem("53", "9")
    written = FULL.write(example).replace("out 6", "out 7").replace("carry: 1", "carry: 0")
    assert FULL.score(example, written) == {
        "input": 1, "computation": 1, "output": 0.5, "variables": 0.5, "remaining": 1, "steps": 0, "failed": 0,
    }  # fmt: skip
    assert correct(Addition(), example, written, FULL)


def test_spaces_do_not_matter():
    example = Addition().problem("53", "9")
    assert FULL.score(example, " ".join(FULL.write(example).split()))["steps"] == 1


def test_steps_too_many_or_too_few_score_nothing():
    example, other = Addition().problem("53", "9"), Addition().problem("99", "1")
    scores = FULL.score(example, FULL.write(other))
    assert scores["failed"] == 0 and not any(scores.values())


def test_a_step_that_cannot_be_read_fails_all():
    example = Addition().problem("53", "9")
    scores = FULL.score(example, FULL.write(example).replace("comp 5", "compute 5").replace("out 6", "6"))
    assert scores == dict.fromkeys(scores, 0.0) | {"failed": 0.5}
    assert FULL.read(f"Thinking step by step: nothing # {SUM.partition(' # ')[2]} . Thus, x.")[0] is None


def test_what_fails_is_a_part_of_1_however_many_steps_are_written():
    example = Addition().problem("53", "9")
    nothing = " # ".join(["nothing"] * 9)
    assert FULL.score(example, f"Thinking step by step: {nothing} . Thus, x")["failed"] == 1
    assert FULL.score(example, f"Thinking step by step: {nothing} # {SUM} . Thus, x")["failed"] == 9 / 11
    assert FULL.score(example, "Thinking step by step: nothing . Thus, x")["failed"] == 0.5


def test_marks_that_are_repeated_are_read_at_once():
    step = "in 1 " + "comp 1 out 1 [ 1 ] " * 300
    start = perf_counter()
    assert FULL.read(f"Thinking step by step: {step} . Thus, x") == [None]
    assert perf_counter() - start < 5  # one try after another would take minutes


def by_expression(parts, step):
    """The parts of a step by a regular expression that tries all places, as the marks are defined."""
    marks = {"i": ("in", ""), "c": ("comp", ""), "o": ("out", ""), "v": (r"\[", r"\]"), "r": ("re", "")}
    pattern = "".join(rf"{marks[each][0]}(.*?){marks[each][1]}\s*" for each in "icovr" if each in parts)
    found = re.fullmatch(pattern, step.strip())
    return None if found is None else [" ".join(each.split()) for each in found.groups()]


@given(
    st.sampled_from(FORMATS),
    st.lists(st.sampled_from(["in", "comp", "out", "[", "]", "re", " ", "  ", "1", "core", ","]), max_size=14),
)
def test_every_step_is_read_as_by_an_expression_that_tries_all_places(parts, cut):
    for step in ("".join(cut), " ".join(cut), f"in 1 comp 1 out 2 [ 3 ] re {' '.join(cut)}"):
        (found,) = Scratchpad(parts).read(f"Thinking step by step: {step} . Thus, x")
        values = None
        if found is not None:
            each = [getattr(found, name) for name in Scratchpad(parts).names]
            values = [", ".join(one) if isinstance(one, tuple) else one for one in each]
        expected = by_expression(parts, step)
        if expected is not None and "v" in parts:
            place = Scratchpad(parts).names.index("variables")
            expected[place] = ", ".join(one.strip() for one in expected[place].split(","))
        assert values == expected


@pytest.mark.parametrize("written", ["", "The answer is 6 2.", f"Thinking step by step: {SUM}", f"{SUM} . Thus, x"])
def test_no_scratchpad_scores_nothing(written):
    example = Addition().problem("53", "9")
    assert FULL.score(example, written) == dict.fromkeys((*FULL.names, "steps"), 0.0) | {"failed": 1.0}
    assert not correct(Addition(), example, written, FULL)


def test_only_what_stands_after_the_steps_is_the_answer():
    example = Addition().problem("53", "9")
    right, wrong = FULL.write(example), FULL.write(example).replace("is 6 2", "is 6 3")
    assert conclusion(right) == "The answer is 6 2."
    assert correct(Addition(), example, right, FULL)
    assert not correct(Addition(), example, wrong, FULL)
    assert not correct(Addition(), example, f"The answer is 6 2. {wrong}", FULL)


def test_what_is_read_are_the_parts():
    step, _ = FULL.read(FULL.write(Addition().problem("53", "9")))
    assert step == Step("3, 9", "3 + 9 + carry = 12 + 0 = 12", "2", ("carry: 1",), "5 +")
    assert Scratchpad("o").read("Thinking step by step: out 7 . Thus, x") == [Step(output="7")]


# Refusals


@pytest.mark.parametrize("parts", ["x", "ii", "icovri", "I"])
def test_a_format_that_there_is_not_is_refused(parts):
    with pytest.raises(UserError, match="at most once"):
        Scratchpad(parts)


def test_letters_may_stand_in_any_order():
    assert Scratchpad("rvoci").parts == "icovr"


def test_a_task_without_steps_has_no_scratchpad():
    for name in plugins.names("tasks"):
        task = plugins.find("tasks", name)()
        example = task.example(task.trained[-1], Random(0))
        if not example.steps:
            with pytest.raises(UserError, match="leave the scratchpad out"):
                FULL.write(example)
    assert not Copy().problem(["a"]).steps
