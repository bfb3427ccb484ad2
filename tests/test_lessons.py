"""Training on tasks, and measuring exact answers."""

import hashlib
import os
import re
import signal
from contextlib import nullcontext

import numpy as np
import pytest
import torch

import lookfar
from lookfar import cli, config, files
from lookfar.config import ModelConfig
from lookfar.errors import UserError
from lookfar.evaluation import accuracy
from lookfar.model.decoder import Decoder
from lookfar.model.generate import generate
from lookfar.study.report import write_report
from lookfar.study.runner import run_study
from lookfar.study.statistics import compare
from lookfar.tasks.problems import Problems
from lookfar.tasks.symbols import EOS, PADDING
from lookfar.training import checkpoint, objectives
from lookfar.training.export import export
from lookfar.training.problems import Lesson, ProblemLines, inputs_of, padded, tokenizer_of
from lookfar.training.run import run_whole
from lookfar.training.train import Interrupted, train
from tolerance import assert_near


@pytest.fixture
def a_run():
    """A small run on a task, with overrides."""

    def build(*overrides):
        content = {
            "model": {"width": 16, "layers": 1, "heads": 2, "context": 64, "scheme": "alibi", "device": "cpu"},
            "task": {"name": "copy", "lengths": [2, 3, 5], "examples": 5},
            "training": {"updates": 6, "batch": 4, "precision": "float32", "evaluate_every": 2},
            "evaluation": {"lengths": [2, 3, 7]},
        }
        return config.build(content, overrides)

    return build


def a_model(problems, scheme="rope", **settings):
    torch.manual_seed(0)
    size = {"width": 16, "layers": 1, "heads": 2, "context": 64, "dtype": "float64", "device": "cpu"}
    return Decoder(ModelConfig(vocabulary=len(problems.vocabulary), scheme=scheme, **size, **settings)).eval()


def bytes_of(place):
    last = max(checkpoint.updates(place))
    return hashlib.sha256((place / "checkpoints" / str(last) / "model.safetensors").read_bytes()).hexdigest()


# Lines


def test_a_line_does_not_depend_on_the_batch_it_comes_in():
    lines = Lesson(config.TaskConfig(name="addition")).lines(context=80, seed=3)
    whole, scored = lines.batch(10, 6), lines.scored(10, 6)
    for line in range(6):
        alone, of_it = lines.batch(10 + line, 1)[0], lines.scored(10 + line, 1)[0]
        assert (whole[line, : len(alone)] == alone).all() and (whole[line, len(alone) :] == PADDING).all()
        assert (scored[line, : len(alone)] == of_it).all() and not scored[line, len(alone) :].any()
    assert (whole != Lesson(config.TaskConfig(name="addition")).lines(context=80, seed=4).batch(10, 6)[:, :1]).any()


def test_only_what_the_model_writes_is_scored():
    lesson = Lesson(config.TaskConfig(name="copy", lengths=(4,)))
    lines = lesson.lines(context=40, seed=0)
    for tokens, scored in zip(lines.batch(0, 5), lines.scored(0, 5), strict=True):
        text = lesson.tokenizer.decode(tokens[scored])
        assert tokens[scored][-1] == EOS and text.split() == lesson.tokenizer.decode(tokens[~scored]).split()[1:5]


def test_padding_and_prompts_have_no_part_in_the_loss():
    problems = Problems("reverse", lengths=[3, 6])
    lines, model = ProblemLines(problems, context=40, seed=0), a_model(problems)
    tokens, scored = torch.from_numpy(lines.batch(0, 4)), torch.from_numpy(lines.scored(0, 4))
    chance = torch.rand(4, tokens.shape[1] - 1)
    loss = objectives.next_token(model, tokens, None, chance, None, scored)
    each = []
    for line, mask in zip(tokens, scored, strict=True):
        logits = model(line[None, :-1])[0]
        wanted = line[1:][mask[1:]]
        each.append(torch.nn.functional.cross_entropy(logits[mask[1:]], wanted).float())
    assert_near(loss, torch.stack(each).mean())
    wider = padded([np.append(line.numpy(), [7] * 9) for line in tokens], PADDING)
    more = torch.cat([scored, torch.zeros(4, 9, dtype=torch.bool)], dim=1)
    assert_near(objectives.next_token(model, torch.from_numpy(wider), None, chance, None, more), loss)


# Training


def test_training_on_a_task_goes_on_exactly(a_run, tmp_path):
    def stop(event):
        if event["event"] == "update" and event["update"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    train(a_run(), tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(a_run(), tmp_path / "stopped", stop)
    train(a_run(), tmp_path / "stopped")
    assert bytes_of(tmp_path / "whole") == bytes_of(tmp_path / "stopped")


def test_pieces_of_a_batch_of_problems_have_the_gradients_of_the_whole(a_run, tmp_path):
    double = "model.dtype=float64", "training.evaluate_every=none"
    whole = train(a_run(*double), tmp_path / "whole").state_dict()
    pieces = train(a_run(*double, "training.accumulation=4"), tmp_path / "pieces").state_dict()
    for name, each in whole.items():
        assert_near(each, pieces[name])


@pytest.mark.parametrize("numbering", ["consecutive", "randomized(largest=200)"])
def test_a_model_learns_to_answer(a_run, tmp_path, numbering):
    run = a_run(
        "task.name=summation",
        "task.lengths=[2, 3]",
        "evaluation.lengths=[2, 3]",
        "training.updates=80",
        "training.batch=16",
        "training.rate=1e-2",
        "model.width=32",
        f"training.numbering={numbering}",
        "training.evaluate_every=none",
    )
    rows = run_whole(run, tmp_path)
    found = {row["length"]: row for row in rows if row["metric"] == "first_wrong"}
    assert found[2]["value"] > 0.45 < found[3]["value"]  # `The answer is` at the least
    before = train(run.model_copy(update={"training": run.training.model_copy(update={"updates": 0})}), tmp_path / "0")
    assert accuracy.loss(lookfar.load(tmp_path), Problems("summation", lengths=[2, 3]), count=20)[0] < 1
    assert accuracy.loss(before, Problems("summation", lengths=[2, 3]), count=20)[0] > 2


def test_rows_tell_the_last_and_the_best_checkpoint(a_run, tmp_path):
    rows = [row for row in run_whole(a_run(), tmp_path) if row["protocol"] == "greedy"]
    keys = {(row["checkpoint"], row["length"], row["metric"]) for row in rows}
    assert keys == {(c, n, m) for c in ("last", "best") for n in (2, 3, 7) for m in ("accuracy", "first_wrong")}
    assert {row["length"]: row["split"] for row in rows} == {2: "held_out", 3: "held_out", 7: "longer"}
    assert {row["trained"] for row in rows} == {5} and {row["count"] for row in rows} == {5}


def test_the_best_checkpoint_is_measured_by_its_own_weights(a_run, tmp_path, monkeypatch):
    run = a_run("training.checkpoint_every=2", "training.keep=9")
    train(run, tmp_path)
    checkpoint.note_best(tmp_path, 2, -1.0)
    measured, real = [], accuracy.measure

    def note(model, *arguments, **settings):
        measured.append(model.state_dict()["embedding.weight"].clone())
        return real(model, *arguments, **settings)

    monkeypatch.setattr(accuracy, "measure", note)
    run_whole(run, tmp_path)
    assert len(measured) == 6
    assert torch.equal(measured[0], lookfar.load(tmp_path).embedding.weight)
    assert torch.equal(measured[-1], lookfar.load(tmp_path, which=2).embedding.weight)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("task.name=addtion", "No task is named 'addtion'. Did you mean 'addition'?"),
        ("task.name=none", "task.name is missing"),
        ("task.lengths=[0]", "task.lengths"),
        ("task.scratchpad=xy", "no format of a scratchpad"),
        ("task.scratchpad=icovr", "A task without steps has no scratchpad"),
        ("model.context=9", "set model.context=1"),
        ("evaluation.numbering=interpolated", "leave evaluation.numbering out"),
        ("task.name=copy + reverse", "names 2 tasks"),
    ],
)
def test_a_run_that_cannot_be_trained_on_its_task_is_refused_in_a_sentence(a_run, tmp_path, override, sentence):
    with pytest.raises(UserError) as told:
        train(a_run(override), tmp_path / "run")
    assert sentence in str(told.value)
    assert not (tmp_path / "run").exists()


def test_slots_are_of_texts(a_run, tmp_path):
    with pytest.raises(UserError, match=r"leave model\.slots out"):
        train(a_run("model.slots=2", "training.objective=slots"), tmp_path / "run")


def test_the_inputs_of_a_problem_are_its_document():
    scored = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]], dtype=torch.bool)
    assert inputs_of(scored).tolist() == [[0, 0, 0, 0], [0, 0, -1, -1]]


@pytest.mark.parametrize(("task", "documents"), [("summation", "joined"), ("none", "isolated")])
def test_short_problems_and_documents_meet_the_largest_numbers(a_run, tmp_path, monkeypatch, task, documents):
    book, met = tmp_path / "book", []
    book.mkdir()
    for place in range(60):
        (book / f"{place}.txt").write_text("a few words " + "abc"[place % 3])
    place = {"name": task, "lengths": "none", "examples": 100}
    content = a_run("model.context=200", "training.updates=3", "training.evaluate_every=none").model_dump()
    content |= {"data": {"source": "text_file", "path": str(book), "documents": documents}, "task": place}
    content["training"]["numbering"] = "randomized(largest=2000)"
    content["evaluation"]["lengths"] = [9]
    states = Decoder.states

    def note(self, tokens, **settings):
        met.append(settings["positions"])
        return states(self, tokens, **settings)

    monkeypatch.setattr(Decoder, "states", note)
    train(config.build(content), tmp_path / "run")
    assert max(int(each.max()) for each in met) > 1500
    assert all(each.shape[0] == 4 for each in met)


def test_a_branch_goes_on_with_its_task(a_run, tmp_path):
    train(a_run("training.schedule=constant"), tmp_path / "trunk")
    branch = "training.schedule=constant", "training.updates=8", f"training.branch={tmp_path / 'trunk'}@6"
    train(a_run(*branch, "task.examples=9"), tmp_path / "more")
    with pytest.raises(UserError, match=r"leave \[task\] as it is"):
        train(a_run(*branch, "task.held_out=0.5"), tmp_path / "other")


def test_problems_that_are_too_long_are_drawn_anew_and_never_cut():
    problems = Problems("polynomial", lengths=[8])
    longest = max(len(problems.trained(0, line).tokens) for line in range(300))
    lines = [problems.trained(0, line, context=longest - 6) for line in range(300)]
    assert max(len(each.tokens) for each in lines) == longest - 5
    assert all(each.tokens[-1] == EOS and each.written[-1] for each in lines)
    with pytest.raises(UserError, match="fits into 9 tokens"):
        problems.trained(0, 0, context=9)


def test_the_weights_of_a_task_are_exported(a_run, tmp_path):
    train(a_run(), tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "run" / "tokenizer.json").read_bytes()


# Measuring


def answers(monkeypatch, write):
    """A model that writes `write(problem)` after each problem, in tokens."""

    def written(model, problems, numbers):
        return [write(each) for each in problems]

    monkeypatch.setattr(accuracy, "_written", written)


def right(problem):
    return problem.encoded.tokens[problem.encoded.written].tolist()


def measured(problems, length=4, count=6, model=None):
    rows = accuracy.measure(model or a_model(problems), problems, length=length, count=count)
    return {row["metric"]: row["value"] for row in rows}


@pytest.mark.parametrize("scratchpad", [None, "icovr"])
def test_right_answers_score_one_and_wrong_ones_nothing(monkeypatch, scratchpad):
    problems = Problems("addition", scratchpad=scratchpad)
    answers(monkeypatch, right)
    assert set(measured(problems).values()) <= {1.0, 0.0} and measured(problems)["accuracy"] == 1
    answers(monkeypatch, lambda problem: [*right(problem), *right(problem)])  # what follows EOS does not count
    assert measured(problems)["accuracy"] == measured(problems)["first_wrong"] == 1
    answers(monkeypatch, lambda problem: right(problem)[:-3])
    assert measured(problems)["accuracy"] == 0 < measured(problems)["first_wrong"] < 1
    answers(monkeypatch, lambda problem: [EOS])
    assert measured(problems)["accuracy"] == measured(problems)["first_wrong"] == 0


def test_the_first_wrong_token_is_found(monkeypatch):
    problems = Problems("copy", lengths=[4])
    answers(monkeypatch, lambda problem: [*right(problem)[:2], -1, *right(problem)[3:]])
    problem = problems.measured(4, 1)[0]
    assert measured(problems, count=1)["first_wrong"] == pytest.approx(2 / len(right(problem)))


def test_a_right_answer_after_wrong_steps_counts_as_an_answer(monkeypatch):
    problems = Problems("parity", scratchpad="icovr", lengths=[9])
    answers(monkeypatch, lambda problem: problems.vocabulary.encode(f" . Thus, {problem.example.target}").tolist())
    found = measured(problems, length=9)
    assert found["accuracy"] == 1 and found["scratchpad_steps"] == 0 and found["scratchpad_failed"] == 1


@pytest.mark.parametrize("scheme", ["nope", "learned", "t5", "dape_v2", "rope + differential"])
def test_what_a_model_writes_in_batches_is_what_it_writes_alone(scheme):
    problems = Problems("addition", lengths=[1, 2, 3])
    settings = {"positions": 96} if scheme == "learned" else {}
    model = a_model(problems, scheme, **settings)
    some = problems.measured(3, 7)
    together = accuracy._written(model, some)
    for problem, tokens in zip(some, together, strict=True):
        (alone,) = accuracy._written(model, [problem])
        shared = min(len(alone), len(tokens))
        assert alone[:shared] == tokens[:shared]


def test_the_held_out_loss_is_that_of_each_problem_alone():
    problems = Problems("reverse", lengths=[3, 5])
    model, losses = a_model(problems), []
    for length in (3, 5):
        for problem in problems.measured(length, 3):
            tokens = torch.from_numpy(problem.encoded.tokens)
            mask = torch.from_numpy(problem.encoded.written)[1:]
            logits = model(tokens[None, :-1])[0].float()
            losses.append(torch.nn.functional.cross_entropy(logits[mask], tokens[1:][mask]).item())
    assert accuracy.loss(model, problems, count=3) == (pytest.approx(float(np.mean(losses)), rel=1e-6), 6)


def test_problems_beyond_a_learned_table_are_told():
    problems = Problems("copy", lengths=[4])
    model = a_model(problems, "learned", positions=70)
    with pytest.raises(UserError, match=r"beyond the learned table of 70 positions.*model\.positions="):
        accuracy.measure(model, problems, length=60, count=2)


def test_a_right_solution_may_end_with_a_learned_table(monkeypatch):
    """The table has as many positions as the message above recommends; EOS is written and never read."""
    problems = Problems("copy", lengths=[4])
    (problem,) = problems.measured(60, 1)
    model = a_model(problems, "learned", positions=len(problem.encoded.tokens) - 1)

    def perfect(model, prompts, *, tokens, stop, **others):
        (written,) = generate(model, prompts, tokens=tokens, **others)
        return [right(problem)[: len(written)]]

    monkeypatch.setattr(accuracy, "generate", perfect)
    assert measured(problems, length=60, count=1, model=model) == {"accuracy": 1, "first_wrong": 1}


def test_a_length_without_held_out_problems_gives_no_rows(monkeypatch):
    problems = Problems("summation", lengths=[2])
    monkeypatch.setattr(problems.split, "measured", lambda length, count: [])
    assert accuracy.measure(a_model(problems), problems, length=2, count=5) == []


# Studies


def test_a_study_of_tasks_chooses_rates_and_skips_what_is_done(a_run, tmp_path):
    study = config.build(
        {
            **a_run("training.updates=2", "evaluation.lengths=[2, 7]").model_dump(),
            "study": {"schemes": ["nope", "alibi"], "choose_rate": [1e-3, 1e30], "runs": [{"name": "copy"}]},
        },
        (),
        config.Study,
    )
    assert run_study(study, tmp_path, lambda title: nullcontext(lambda event: None)) == {}
    rows = files.read_lines(tmp_path / "nope-copy-s0" / "rows.jsonl")
    assert {row["chosen_rate"] for row in rows} == {1e-3}
    assert {(row["length"], row["checkpoint"]) for row in rows if row["metric"] == "accuracy"} >= {(7, "last")}
    events = []
    run_study(study, tmp_path, lambda title: nullcontext(events.append))
    assert [event for event in events if event["event"] in ("update", "evaluation")] == []
    page = write_report([tmp_path]).read_text()
    assert "2 schemes" in page and "1 task" in page and (tmp_path / "figures" / "accuracy.svg").exists()


def answered(folder, scheme, values, data="copy", seed=0, **settings):
    """The folder of a run that has answered, by length."""
    folder.mkdir(parents=True)
    about = {"run": folder.name, "scheme": scheme, "seed": seed, "data": data, "context": 64, "protocol": "greedy"}
    of_length = {"metric": "accuracy", "count": 9, "trained": 5, "checkpoint": "last"}
    files.write_lines(
        folder / "rows.jsonl",
        [
            {**about, **of_length, "length": n, "value": v, "split": "longer" if n > 5 else "held_out"}
            for n, v in values.items()
        ],
    )
    content = config.write_toml({"model": {"width": 8}, "training": settings, "task": {"name": data}})
    (folder / "run.toml").write_text(content)


def test_what_cannot_be_ranked_is_told_and_the_rest_is_drawn(tmp_path):
    answered(tmp_path / "a", "nope", {3: 1.0, 7: 0.5})
    answered(tmp_path / "b", "rope", {3: 1.0, 7: 0.5, 9: 0.1})
    page = write_report([tmp_path]).read_text()
    assert "Not ranked: " in page and "not measured at length 9" in page
    assert (tmp_path / "figures" / "accuracy.svg").exists() and not (tmp_path / "figures" / "ranking.svg").exists()


def against(page):
    """The lines of the table of schemes against the best: the exact numbers of each cell."""
    found = re.search(r'colspan="\d"><span>against .*?</figure>', page, re.DOTALL)
    assert found, "there is no such table"
    lines = re.findall(r'<tr data-series="(.*?)">(.*?)</tr>', found[0])
    return {scheme: re.findall(r'title="(.*?)"', cells) for scheme, cells in lines}, found[0]


def test_schemes_are_compared_with_the_best_in_pairs(tmp_path):
    """Values of both lengths by scheme, task and seed; what was trained on has no part in it."""
    values = {
        ("nope", "copy"): [(0.9, 0.5), (0.8, 0.6)],
        ("nope", "sort"): [(0.7, 0.3), (0.9, 0.2)],
        ("rope", "copy"): [(0.5, 0.0), (0.9, 0.6)],
        ("rope", "sort"): [(0.1, 0.3), (0.2, 0.1)],
        ("<t5>", "copy"): [(0.4, 0.1), (0.3, 0.1)],
        ("<t5>", "sort"): [(0.0, 0.1), (0.3, 0.0)],
    }
    for (scheme, data), seeds in values.items():
        for seed, (near, far) in enumerate(seeds):
            place = tmp_path / f"{scheme}-{data}-{seed}"
            answered(place, scheme, {3: 0.01 * len(scheme), 7: near, 9: far}, data=data, seed=seed)
    page = write_report([tmp_path]).read_text()
    lines, whole = against(page)
    assert set(lines) == {"rope", "&lt;t5&gt;"} and "<span>against nope</span>" in whole
    rows = [row for folder in tmp_path.glob("*-*-*") for row in files.read_lines(folder / "rows.jsonl")]
    for scheme, name in (("rope", "rope"), ("<t5>", "&lt;t5&gt;")):
        found = compare(rows, scheme, "nope")
        wanted = [
            found.difference.value,
            found.difference.interval,
            found.p_value,
            found.wins,
            found.losses,
            found.ties,
        ]
        told = [
            ", ".join(f"{each:.6g}" for each in (value if isinstance(value, tuple) else (value,))) for value in wanted
        ]
        assert lines[name] == told
    assert lines["rope"][0] == "-0.275" and lines["rope"][3:] == ["1", "5", "2"]
    assert "−0.275" in whole and "over 8 pairs" in whole and "With 2 seeds p is never below 0.5." in whole


def test_one_seed_has_neither_interval_nor_p(tmp_path):
    answered(tmp_path / "a", "nope", {3: 1.0, 7: 0.5, 9: 0.25})
    answered(tmp_path / "b", "rope", {3: 1.0, 7: 0.25, 9: 0.25})
    lines, whole = against(write_report([tmp_path]).read_text())
    assert lines == {"rope": ["-0.125", "0", "1", "1"]}
    assert "A single seed has neither" in whole and "95% interval" not in whole


def test_pairs_without_a_number_are_told(tmp_path):
    for seed in (0, 1):
        answered(tmp_path / f"nope-{seed}", "nope", {7: 0.5, 8: 0.5, 9: 0.5}, seed=seed)
        answered(tmp_path / f"alibi-{seed}", "alibi", {7: 0.25, 8: 0.25, 9: 0.25}, seed=seed)
    answered(tmp_path / "rope-0", "rope", {7: 0.25, 8: 0.25, 9: 0.25})
    answered(tmp_path / "rope-1", "rope", {7: 0.25}, seed=1)
    lines, whole = against(write_report([tmp_path]).read_text())
    assert lines["rope"][-3:] == ["0", "4", "0"] and lines["alibi"][-3:] == ["0", "6", "0"]
    assert "over 4 to 6 pairs" in whole
    assert "Pairs left out because one of the two has no number: rope 2." in whole


def test_one_scheme_is_compared_with_nothing(tmp_path):
    for seed in (0, 1):
        answered(tmp_path / f"nope-{seed}", "nope", {3: 1.0, 7: 0.5}, seed=seed)
    page = write_report([tmp_path]).read_text()
    assert "Accuracy against length" in page and "Against the best" not in page and "<span>against" not in page


@pytest.mark.parametrize("studies", [("one", "one"), ("one", "two")])
def test_runs_of_a_scheme_that_differ_have_curves_of_their_own(tmp_path, studies):
    for place, rate in zip(studies, (1e-3, 3e-3), strict=True):
        for data in ("copy", "sort"):
            answered(tmp_path / place / f"{data}-{rate}", "nope", {3: 1.0, 7: rate}, data=data, rate=rate)
    page = write_report([tmp_path / each for each in dict.fromkeys(studies)]).read_text()
    assert 'data-series="nope · rate=0.001"' in page and 'data-series="nope · rate=0.003"' in page
    assert "Not ranked" not in page


def test_the_same_run_of_two_studies_has_two_curves(tmp_path):
    for place in ("one", "two"):
        answered(tmp_path / place / "copy", "nope", {3: 1.0, 7: 0.5}, rate=1e-3)
    page = write_report([tmp_path / "one", tmp_path / "two"]).read_text()
    assert 'data-series="nope · one"' in page and 'data-series="nope · two"' in page


# The command


@pytest.fixture
def command(monkeypatch, capsys):
    """`lookfar` with these words: what it prints."""

    def run(*words):
        monkeypatch.setattr("sys.argv", ["lookfar", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert not left.value.code
        return capsys.readouterr().out

    return run


def test_the_command_trains_measures_and_writes(tmp_path, command):
    recipe = tmp_path / "copy.toml"
    recipe.write_text(
        '[model]\nwidth=16\nlayers=1\nheads=2\ncontext=64\ndevice="cpu"\n[task]\nname="copy"\nlengths=[2,3]\n'
        "examples=4\n[training]\nupdates=2\nbatch=4\n[evaluation]\nlengths=[2,3]\n"
    )
    place = tmp_path / "run"
    assert "accuracy on copy" in command("train", recipe, "--folder", place)
    before = files.read_lines(place / "rows.jsonl")
    command("evaluate", place, "--lengths", "4")
    after = files.read_lines(place / "rows.jsonl")
    assert {row["length"] for row in after if row["protocol"] == "greedy"} == {2, 3, 4}
    assert [row for row in after if row["length"] != 4] == before
    assert command("generate", place, "--prompt", "Copy: a b", "--tokens", "3").startswith("Copy: a b")
    tokenizer = tokenizer_of(place)
    assert tokenizer.decode(tokenizer.encode("Copy: a b")) == "Copy: a b"


def test_a_run_of_a_task_is_measured_on_nothing_else(a_run, tmp_path):
    from lookfar.training.evaluate import evaluate_run

    train(a_run(), tmp_path)
    with pytest.raises(UserError, match="was trained on a task"):
        evaluate_run(tmp_path, tokens=5)


def test_the_task_is_kept_in_the_recipe_and_may_not_change(a_run, tmp_path):
    train(a_run(), tmp_path)
    run, _ = lookfar.training.folder.read(tmp_path)
    assert run.task == a_run().task
    with pytest.raises(UserError, match=r"task\.bos \(True -> False\)"):
        train(replace_task(a_run(), bos=False), tmp_path)


def replace_task(run, **changes):
    return run.model_copy(update={"task": run.task.model_copy(update=changes)})
