"""SCAN is exact: every command, every action, every number of the published split."""

from collections import Counter
from random import Random

import pytest

from lookfar import plugins
from lookfar.errors import UserError
from lookfar.tasks.scan import Scan, interpret

TRAINED = {
    1: 6, 2: 88, 3: 398, 4: 860, 5: 1184, 6: 1178, 7: 1104, 8: 1450, 9: 1256, 10: 1696, 11: 1072, 12: 1578, 13: 432,
    14: 848, 15: 688, 16: 304, 17: 512, 18: 784, 19: 448, 20: 464, 21: 64, 22: 576, 24: 336, 25: 448,
}  # fmt: skip
TESTED = {26: 512, 27: 448, 28: 448, 30: 576, 32: 448, 33: 256, 36: 64, 40: 256, 48: 128}


@pytest.fixture(scope="module")
def pairs():
    return [(command, actions.split()) for command, actions in Scan().all()]


def test_there_are_20_910_different_commands(pairs):
    assert len(pairs) == len({command for command, _ in pairs}) == 20_910


def test_every_length_has_its_published_number_of_commands(pairs):
    found = Counter(len(actions) for _, actions in pairs)
    assert found == TRAINED | TESTED
    assert sum(found[length] for length in Scan.trained) == 17_774
    assert sum(found[length] for length in Scan.tested) == 3_136
    assert Scan().lengths == tuple(TRAINED | TESTED)


def test_the_length_split_of_its_authors_comes_out_too(pairs):
    assert sum(len(actions) > 22 for _, actions in pairs) == 3_920


def test_what_is_joined_is_what_was_apart(pairs):
    alone = {command: actions for command, actions in pairs if not {"and", "after"} & set(command.split())}
    assert len(alone) == 102
    for one, first in alone.items():
        for other, second in alone.items():
            assert interpret(f"{one} and {other}") == first + second == interpret(f"{other} after {one}")


@pytest.mark.parametrize(
    ("command", "actions"),
    [
        ("walk", "I_WALK"),
        ("turn left", "I_TURN_LEFT"),
        ("look right", "I_TURN_RIGHT I_LOOK"),
        ("turn opposite right", "I_TURN_RIGHT I_TURN_RIGHT"),
        ("jump opposite left", "I_TURN_LEFT I_TURN_LEFT I_JUMP"),
        ("turn around left", "I_TURN_LEFT I_TURN_LEFT I_TURN_LEFT I_TURN_LEFT"),
        ("run around right", "I_TURN_RIGHT I_RUN I_TURN_RIGHT I_RUN I_TURN_RIGHT I_RUN I_TURN_RIGHT I_RUN"),
        ("run twice", "I_RUN I_RUN"),
        ("look left thrice", "I_TURN_LEFT I_LOOK I_TURN_LEFT I_LOOK I_TURN_LEFT I_LOOK"),
        ("walk and jump left", "I_WALK I_TURN_LEFT I_JUMP"),
        ("walk after turn right", "I_TURN_RIGHT I_WALK"),
        ("look after walk twice", "I_WALK I_WALK I_LOOK"),
        ("jump thrice after turn opposite left twice", "I_TURN_LEFT " * 4 + "I_JUMP I_JUMP I_JUMP"),
    ],
)
def test_a_command_means_its_actions(command, actions):
    assert interpret(command) == actions.split()


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        ("jmp twice", "'jmp'. Did you mean 'jump'?"),
        ("", "must be a verb"),
        ("turn", "turn with a direction"),
        ("walk twice twice", "at most one of twice and thrice"),
        ("walk once", "'once'"),
        ("walk left right", "at most one direction"),
        ("walk opposite", "left or right"),
        ("opposite left", "must be a verb"),
        ("walk and", "must be a verb"),
        ("walk and run after jump", "joins 3 phrases; two is the most"),
    ],
)
def test_what_is_no_command_is_refused_with_the_reason(command, answer):
    with pytest.raises(UserError, match="is not a command of SCAN") as refused:
        interpret(command)
    assert answer in str(refused.value)


def test_the_text_is_that_of_the_published_study():
    each = Scan().example(2, Random(3))
    command = each.input.removeprefix("Solve: ").removesuffix("[SEP] ")
    assert each.input == f"Solve: {command}[SEP] "
    short = {"I_TURN_LEFT": "Left", "I_TURN_RIGHT": "Right"}
    assert each.target.split() == [short.get(name, name[2:].title()) for name in interpret(command)]
    assert Scan(prefix="", short=False).example(2, Random(3)).input == f"{command}[SEP] "
    assert Scan(prefix="", short=False).example(2, Random(3)).target.split() == interpret(command)


def test_the_first_example_of_a_seed_stays_what_it_is():
    each = Scan().example(6, Random(0))
    assert (each.input, each.target) == (
        "Solve: jump right and look left twice[SEP] ",
        "Right Jump Left Look Left Look",
    )


@pytest.mark.parametrize("task", [Scan(), Scan(prefix="Please do: ", short=False)])
def test_symbols_are_every_word_of_every_text_and_no_more(task):
    texts = [task.example(length, Random(seed)) for length in task.lengths for seed in range(40)]
    words = {word for each in texts for word in f"{each.input} {each.target}".replace("[SEP]", " [SEP] ").split()}
    assert words == set(task.symbols) and len(words) == len(task.symbols)


def test_examples_have_their_length_and_their_answer():
    for length in Scan().lengths:
        each = Scan().example(length, Random(length))
        assert len(each.target.split()) == length
        assert Scan().answer(each.target) == each.answer == Scan().answer(f" {each.target} ")
    assert Scan().answer("  ") is None


def test_every_command_of_a_length_is_as_likely_as_any_other():
    random = Random(0)
    drawn = Counter(Scan().example(1, random).input for _ in range(6000))
    assert len(drawn) == 6 and all(abs(count - 1000) < 5 * 29 for count in drawn.values())  # 29: standard deviation
    assert Scan().example(24, Random(5)) == Scan().example(24, Random(5)) != Scan().example(24, Random(6))


@pytest.mark.parametrize(("length", "near"), [(23, "22 and 24"), (41, "40 and 48"), (0, "1"), (49, "48"), (-3, "1")])
def test_a_length_without_commands_is_refused_and_near_ones_are_named(length, near):
    with pytest.raises(UserError, match=rf"no command of {length} actions; .* has: {near}\.$"):
        Scan().example(length, Random(0))


def test_it_is_found_by_its_name():
    task = plugins.build("tasks", plugins.parse("scan(short=false)")[0])
    assert task.example(1, Random(0)).target.startswith("I_")
