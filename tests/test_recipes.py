"""Recipes: each one is read and checked, has the size that it states, and trains at that size and for real."""

import random
from pathlib import Path

import pytest
import torch

from lookfar import config, files
from lookfar.model.decoder import Decoder
from lookfar.study.grid import expand
from lookfar.training import objectives, optimizers
from lookfar.training.check import check
from lookfar.training.problems import problems_of
from lookfar.training.train import count_parameters, train

RECIPES = Path(__file__).parents[1] / "recipes"
PUBLISHED = {  # millions of parameters that the paper names, and what the recipe has
    "wikitext103_alibi": (247, 246.4),
    "wikitext103_stable_mask_71m": (71, 70.3),
    "wikitext103_stable_mask_160m": (160, 162.1),
    "arxiv_dape_125m": (125, 162.2),  # the paper counts one matrix of the vocabulary, of 38.6 million
    "differential_830m": (830, 833.6),
}
META = torch.device("meta")


def recipe(name, *overrides):
    return config.read(RECIPES / f"{name}.toml", overrides)


def full_size(run):
    """The model of a run at its real size, without data."""
    with META:
        return Decoder(run.model.model_copy(update={"vocabulary": run.data.vocabulary, "device": "meta"})).train()


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    file = tmp_path_factory.mktemp("book") / "book.txt"
    words = random.Random(0).choices(["to", "be", "or", "not", "that", "is", "the", "question"], k=6000)
    file.write_text("".join(" ".join(words[start : start + 9]) + "\n" for start in range(0, 6000, 9)))
    return file


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_is_checked_whole(name):
    run = recipe(name)
    check(run)
    assert run.data.source == "hugging_face" and run.model.context <= min(run.lengths)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_has_the_size_that_it_states(name):
    published, stated = PUBLISHED[name]
    run = recipe(name)
    count = count_parameters(full_size(run)) / 1e6
    assert count == pytest.approx(stated, abs=0.05)
    once = count - run.data.vocabulary * run.model.width / 1e6
    assert (once if name == "arxiv_dape_125m" else count) == pytest.approx(published, rel=0.02)
    assert f"{round(stated)} million" in " ".join((RECIPES / f"{name}.toml").read_text().replace("#", " ").split())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_trains_two_updates_at_its_real_size_without_data(name):
    run = recipe(name)
    model = full_size(run)
    optimizer = optimizers.build(model, run.training)
    for group in optimizer.param_groups:
        group["fused"] = False  # the fused step has no form without data
    objective = objectives.find(run.training.objective, run.model)
    for _ in range(2):
        with META:
            lines = torch.zeros(1, run.model.context + 1, dtype=torch.long)
            loss = objective(model, lines, None, torch.zeros(1, run.model.context))
            loss.backward()
            assert all(each.grad is not None and each.grad.shape == each.shape for each in model.parameters())
            optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_trains_two_updates_for_real_when_small(name, book, tmp_path):
    width = 4 * recipe(name).model.heads
    small = f"model.width={width}", "model.hidden=32", "model.layers=2", "model.context=16", "training.batch=4"
    text = "data.source=text_file", f"data.path={book}", "data.tokenizer=bytes", "evaluation.lengths=[16]"
    short = "training.updates=2", "training.warmup=1", "model.device=cpu", 'evaluation.protocols=["non_overlapping"]'
    train(recipe(name, *small, *text, *short), tmp_path)
    lines = [line for line in files.read_lines(tmp_path / "log.jsonl") if "loss" in line]
    assert len(lines) == 2 and all(0 < line["loss"] < 7 and line["norm"] > 0 < line["rate"] for line in lines[:1])


@pytest.mark.parametrize(
    ("name", "runs"),
    [
        ("length_small", 60),
        ("scratchpad_small", 8),
        pytest.param("length_paper", 255, marks=pytest.mark.long),
        ("schedules", 24),
        ("demo", 8),
    ],
)
def test_every_run_of_a_study_could_be_trained(name, runs):
    planned = expand(config.read(RECIPES / f"{name}.toml", (), config.Study))
    assert len({each.name for each in planned}) == len(planned) == runs


@pytest.mark.long
def test_the_published_length_study_has_its_models_its_lengths_and_its_tasks():
    planned = expand(config.read(RECIPES / "length_paper.toml", (), config.Study))
    run = next(each.run for each in planned if each.run.model.scheme == "nope")
    with META:
        model = Decoder(run.model.model_copy(update={"vocabulary": 32_100, "device": "meta"}))
    assert count_parameters(model) == 109_607_040 - 384  # without a table of T5's that NoPE never reads
    problems = {each.run.task.name: problems_of(each.run.task) for each in planned}
    assert len(problems) == 17
    assert {name.partition("(")[0] for name in problems} == {
        *("copy", "reverse", "addition", "polynomial", "sort", "summation", "parity", "lego", "scan", "pcfg")
    }
    assert problems["addition"].longest_trained == 8 and problems["copy(variant=mixed)"].longest_trained == 20
    assert run.training.warmup == 0.06 * run.training.updates


@pytest.mark.parametrize("name", ["length_small", "scratchpad_small"])
def test_a_small_length_study_is_small(name):
    planned = expand(config.read(RECIPES / f"{name}.toml", (), config.Study))
    for run in (each.run for each in planned):
        vocabulary = len(problems_of(run.task).vocabulary)
        with META:
            model = Decoder(run.model.model_copy(update={"vocabulary": vocabulary, "device": "meta"}))
        assert count_parameters(model) <= 5_000_000
