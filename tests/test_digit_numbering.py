"""Numbering the tokens of a run by their digits: in training, in answers that are written, and at the door."""

import sys

import numpy as np
import pytest
import torch

from lookfar import cli, config, files
from lookfar.config import ModelConfig
from lookfar.errors import UserError
from lookfar.evaluation import accuracy
from lookfar.model.decoder import Decoder
from lookfar.model.generate import Sampling, generate
from lookfar.tasks.digits import abacus, coupled
from lookfar.tasks.numbering import find
from lookfar.tasks.problems import Problems
from lookfar.training.check import check
from lookfar.training.run import run_whole
from lookfar.training.train import train
from tolerance import assert_near

ANSWER_BACKWARDS = "addition(order=reversed_answer, padded=true)"
BACKWARDS = "addition(order=reversed, padded=true)"


@pytest.fixture
def a_run():
    """A small run on additions, with overrides."""

    def build(*overrides):
        content = {
            "model": {"width": 16, "layers": 1, "heads": 2, "context": 40, "scheme": "rope", "device": "cpu"},
            "task": {"name": BACKWARDS, "lengths": [1, 2, 3], "examples": 4},
            "training": {"updates": 4, "batch": 6, "precision": "float32", "numbering": "abacus(largest=20)"},
            "evaluation": {"lengths": [2, 5]},
        }
        return config.build(content, overrides)

    return build


def a_model(problems, scheme, **settings):
    torch.manual_seed(0)
    size = {"width": 16, "layers": 2, "heads": 2, "context": 40, "dtype": "float64", "device": "cpu"}
    model = Decoder(ModelConfig(vocabulary=len(problems.vocabulary), scheme=scheme, **size, **settings)).eval()
    for each in model.parameters():  # far from the small weights of the start, so that positions matter
        torch.nn.init.normal_(each, std=0.5)
    return model


def pieces_of(problems, tokens):
    return [problems.vocabulary.pieces[token] for token in tokens]


@pytest.mark.parametrize("chance", [0.0, 0.3, 0.999])
def test_trained_problems_are_moved_up_to_the_largest_number_and_measured_ones_are_not(chance):
    problems = Problems(BACKWARDS, lengths=[4])
    tokens = problems.measured(4, 1)[0].encoded.tokens
    pieces = pieces_of(problems, tokens)
    of_abacus, of_coupling = find("abacus(largest=20)", problems), find("coupled(largest=20)", problems)
    assert (of_abacus.measured(tokens) == abacus(pieces)).all() and abacus(pieces).max() == 5
    moved = int(chance * 16)
    assert (of_abacus.trained(tokens, chance) == abacus(pieces, offset=moved)).all()
    plain = coupled(pieces, reversed_operands=True)
    assert (of_coupling.measured(tokens) == plain).all() and plain.max() == 6
    moved = int(chance * 15)
    expected = coupled(pieces, start=1 + moved, reversed_operands=True)
    assert (of_coupling.trained(tokens, chance) == expected).all()
    assert of_abacus.trained(tokens, 0.999).max() == of_coupling.trained(tokens, 0.999).max() == 20


@pytest.mark.parametrize("task", [BACKWARDS, ANSWER_BACKWARDS, "addition(order=reversed)"])
def test_a_sum_reaches_one_more_than_its_digits_by_abacus_and_two_more_coupled(task):
    problems = Problems(task, lengths=[9])
    assert find("abacus(largest=100)", problems).reach([9, 14]) == 15
    assert find("coupled(largest=100)", problems).reach([9, 14]) == 16


def test_a_run_may_be_measured_up_to_the_largest_number(a_run):
    check(a_run("training.numbering=abacus(largest=6)"))
    check(a_run("training.numbering=coupled(largest=7)"))


def test_operands_that_are_not_reversed_are_coupled_by_their_units():
    problems = Problems(ANSWER_BACKWARDS, lengths=[3])
    tokens = problems.measured(3, 1)[0].encoded.tokens
    found = find("coupled(largest=20)", problems).measured(tokens)
    assert (found == coupled(pieces_of(problems, tokens))).all()
    assert found[[2, 3, 4]].tolist() == [2, 3, 4]  # after BOS and `Compute`


@pytest.mark.parametrize("way", ["abacus(largest=20)", pytest.param("coupled(largest=20)", marks=pytest.mark.long)])
def test_training_shows_the_numbers_of_the_function(a_run, tmp_path, monkeypatch, way):
    given, states = [], Decoder.states

    def note(self, tokens, **settings):
        given.append((self.training, tokens, settings["positions"]))
        return states(self, tokens, **settings)

    monkeypatch.setattr(Decoder, "states", note)
    run = a_run(f"training.numbering={way}")
    train(run, tmp_path)
    problems = Problems(BACKWARDS, lengths=[1, 2, 3])
    moved = set()
    for training, tokens, positions in given:
        assert training and positions.shape == tokens.shape
        for line, numbers in zip(tokens.tolist(), positions.tolist(), strict=True):
            pieces = pieces_of(problems, line)
            of_one = abacus if way.startswith("abacus") else coupled
            settings = {} if of_one is abacus else {"reversed_operands": True}
            least = min(each for each in numbers if each) - 1
            move = {"offset": least} if of_one is abacus else {"start": 1 + least}
            assert numbers == of_one(pieces, **move, **settings).tolist()
            moved.add(least)
    assert len(moved) > 10 and max(moved) > 12


def test_pieces_of_a_batch_have_the_numbers_of_the_whole(a_run, tmp_path):
    double = "model.dtype=float64", "training.updates=2"
    whole = train(a_run(*double), tmp_path / "whole").state_dict()
    pieces = train(a_run(*double, "training.accumulation=3"), tmp_path / "pieces").state_dict()
    for name, each in whole.items():
        assert_near(each, pieces[name])


@pytest.mark.parametrize("scheme", ["rope", "learned", "kerple + dape_v2", "t5"])
@pytest.mark.parametrize("way", ["abacus(largest=20)", "coupled(largest=20)"])
def test_answers_are_numbered_as_they_come_with_a_cache_as_without(scheme, way):
    problems = Problems(ANSWER_BACKWARDS, lengths=[2])
    model = a_model(problems, scheme)
    numbers = find(way, problems, model.farthest)
    prompts = [each.encoded.tokens[~each.encoded.written].tolist() for each in problems.measured(1, 2)]
    prompts += [each.encoded.tokens[~each.encoded.written].tolist() for each in problems.measured(3, 2)]
    written = generate(model, prompts, tokens=9, sampling=Sampling(temperature=0.0), positions=numbers.measured)
    digits = {token for token, piece in enumerate(problems.vocabulary.pieces) if piece.strip().isdigit()}
    for prompt, found in zip(prompts, written, strict=True):
        text = [*prompt]
        for _ in range(9):
            positions = torch.from_numpy(numbers.measured(text))[None]
            text.append(int(model(torch.tensor([text]), positions=positions)[0, -1].argmax()))
        assert text[len(prompt) :] == found
    assert digits & {token for found in written for token in found}, "some digits are written"
    plain = generate(model, prompts, tokens=9, sampling=Sampling(temperature=0.0))
    assert plain != written, "numbers matter"


def test_a_number_that_outgrows_a_learned_table_stays_at_its_end():
    problems = Problems(BACKWARDS, lengths=[2])
    numbers = find("abacus(largest=5)", problems, 6)
    tokens = problems.vocabulary.encode("Compute 1 2 3 4 5 6 7 8")
    assert numbers.measured(tokens).tolist() == [0, 1, 2, 3, 4, 5, 5, 5, 5]


def test_the_loss_and_the_answers_of_a_model_are_of_its_numbers(monkeypatch):
    problems = Problems(BACKWARDS, lengths=[2])
    model = a_model(problems, "learned")
    numbers = find("abacus(largest=20)", problems, model.farthest)
    found, _ = accuracy.loss(model, problems, count=3, numbers=numbers)
    losses = []
    for each in problems.measured(2, 3):
        tokens = torch.from_numpy(each.encoded.tokens)[None]
        positions = torch.from_numpy(abacus(pieces_of(problems, each.encoded.tokens[:-1])))[None]
        logits = model(tokens[:, :-1], positions=positions)[0].detach()
        asked = torch.from_numpy(each.encoded.written)[1:]
        losses.append(float(torch.nn.functional.cross_entropy(logits[asked], tokens[0, 1:][asked])))
    assert found == pytest.approx(np.mean(losses), rel=1e-6)
    assert found != pytest.approx(accuracy.loss(model, problems, count=3)[0], rel=1e-3)

    def written(model, prompts, *, positions, **settings):
        assert positions == numbers.measured
        return [each.encoded.tokens[each.encoded.written].tolist() for each in problems.measured(2, 3)]

    monkeypatch.setattr(accuracy, "generate", written)
    rows = accuracy.measure(model, problems, length=2, count=3, numbers=numbers)
    assert next(row["value"] for row in rows if row["metric"] == "accuracy") == 1


def test_a_run_with_digits_numbered_is_measured_and_writes(a_run, tmp_path, monkeypatch, capsys):
    run_whole(a_run("model.scheme=learned"), tmp_path)
    rows = files.read_lines(tmp_path / "rows.jsonl")
    assert {row["length"] for row in rows if row["metric"] == "accuracy"} == {2, 5}
    words = ["generate", str(tmp_path), "--prompt", "Compute 1 2 + 3 4 ?", "--tokens", "5", "--temperature", "0"]
    monkeypatch.setattr(sys, "argv", ["lookfar", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert capsys.readouterr().out.startswith("Compute 1 2 + 3 4 ?")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["task.name=none", "task.lengths=none", "task.examples=100"], "numbers the digits of a task; name one"),
        (
            ["task.name=dyck", "task.lengths=[3]", "evaluation.lengths=[3]"],
            "'abacus' numbers digits, and dyck has none",
        ),
        (["task.name=addition(hints=true)", "model.context=90"], "leave the hints of the task out"),
        (["training.numbering=abacus"], "'abacus' needs largest: write it as abacus(largest=100)"),
        (["training.numbering=abacus(largest=0)"], "largest=0"),
        (["training.numbering=abacus(largest=3)"], "set training.numbering='abacus(largest=4)' or more"),
        (
            ["training.numbering=abacus(largest=5)"],
            "is measured on numbers that reach 6, and no training meets those beyond largest=5; "
            "set training.numbering='abacus(largest=6)'",
        ),
        (["training.numbering=coupled(largest=6)"], "set training.numbering='coupled(largest=7)', or list shorter"),
        (["training.numbering=coupled(largest=9)", "task.name=addition"], "choose task.name='addition(order="),
        (["training.numbering=coupled(largest=9)", "task.name=parity", "task.lengths=[6]"], "'coupled' numbers add"),
        (
            ["training.numbering=coupled(largest=9)", "task.scratchpad=co", "model.context=200"],
            "without a scratchpad",
        ),
        (["model.scheme=learned", "training.numbering=abacus(largest=40)"], "training.numbering reach 41"),
        (["evaluation.numbering=abacus(largest=9)"], "leave evaluation.numbering out"),
    ],
)
def test_digits_that_cannot_be_numbered_so_are_told_at_the_door(a_run, overrides, sentence):
    with pytest.raises(UserError) as told:
        check(a_run(*overrides))
    assert sentence in str(told.value)


def test_a_text_is_not_measured_by_its_digits():
    content = {"model": {"width": 16, "heads": 2}, "evaluation": {"numbering": "coupled(largest=9)"}}
    with pytest.raises(UserError, match="numbers the digits of a task"):
        check(config.build(content))
