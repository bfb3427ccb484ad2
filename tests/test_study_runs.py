"""A study of runs with budgets measures each, lets branches wait for their trunk, and chooses rates by validation."""

import math
import random
import shutil

import pytest

from lookfar import config, files
from lookfar.config import Study
from lookfar.errors import UserError
from lookfar.study.report import write_report
from lookfar.study.runner import run_study
from lookfar.training import checkpoint
from lookfar.training.run import run_whole
from test_study import Watching

RUNS = [
    {"name": "short", "label": "WSD", "training": {"updates": 10, "schedule": "wsd(decay=0.2)", "branch": "long@8"}},
    {
        "name": "long",
        "label": "WSD",
        "training": {"updates": 20, "schedule": "wsd(decay=0.2)", "checkpoint_every": 8, "keep": 3},
    },
    {"name": "wsd_s", "training": {"updates": 20, "schedule": "wsd_s(budgets=[10, 20], decay=0.2, shape=sqrt)"}},
]


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    choice, place = random.Random(0), tmp_path_factory.mktemp("book") / "book.txt"
    place.write_text("".join("".join(choice.choices("abcdef ", k=20)) + "\n" for _ in range(60)))
    return place


@pytest.fixture(scope="module")
def a_study(book):
    def build(*overrides, **study):
        content = {
            "model": {"width": 16, "layers": 1, "heads": 2, "context": 8, "device": "cpu"},
            "data": {"source": "text_file", "path": str(book)},
            "training": {"updates": 6, "batch": 2, "warmup": 2, "precision": "float32"},
            "evaluation": {"lengths": [8, 16], "tokens": 64, "protocols": ["non_overlapping"]},
            "study": study,
        }
        return config.build(content, overrides, Study)

    return build


def losses(place, name=None):
    """Held-out losses at the trained length by run and update."""
    rows = files.read_lines(place / "rows.jsonl")
    found = [
        row for row in rows if row["metric"] == "loss" and row["length"] == 8 and row["run"] == (name or row["run"])
    ]
    return {(row["run"], row["update"]): row["value"] for row in found}


# Budgets and branches


@pytest.fixture(scope="module")
def first(a_study, tmp_path_factory):
    place = tmp_path_factory.mktemp("first") / "study"
    assert run_study(a_study(runs=RUNS), place, Watching()) == {}
    return place


@pytest.fixture
def done(first, tmp_path):
    """A copy of the study of these runs."""
    return shutil.copytree(first, tmp_path / "study")


def test_every_budget_is_measured_once_and_says_what_it_cost(done):
    assert set(losses(done)) == {("short-s0", 10), ("long-s0", 20), ("wsd_s-s0", 10), ("wsd_s-s0", 20)}
    rows = [row for row in files.read_lines(done / "rows.jsonl") if row["metric"] == "perplexity"]
    told = {(row["label"], row["update"], row["spent"]) for row in rows}
    assert told == {("WSD", 10, 10), ("WSD", 20, 22), ("wsd_s", 10, 10), ("wsd_s", 20, 20)}
    assert len(rows) == 4 * 2


def test_a_branch_is_trained_from_its_trunk_to_the_model_that_one_run_has_there(done):
    assert losses(done)["short-s0", 10] == losses(done)["wsd_s-s0", 10]
    assert [line["update"] for line in files.read_lines(done / "short-s0" / "log.jsonl") if "loss" in line] == [9, 10]


def test_a_budget_has_the_rows_of_a_run_that_ends_there(a_study, done, tmp_path):
    run_whole(
        a_study("training.updates=10", "training.schedule=wsd_s(budgets=[10], decay=0.2, shape=sqrt)"), tmp_path / "ten"
    )
    assert losses(tmp_path / "ten") == {("ten", 10): losses(done)["wsd_s-s0", 10]}


def test_a_study_can_be_moved_and_asked_again_and_nothing_is_done(a_study, done, tmp_path):
    before = (done / "rows.jsonl").read_bytes()
    watching = Watching()
    assert run_study(a_study(runs=RUNS), done.rename(tmp_path / "elsewhere"), watching) == {}
    assert watching.trained() == {} and watching.measured() == []
    assert (tmp_path / "elsewhere" / "rows.jsonl").read_bytes() == before


def test_rows_that_are_known_need_no_checkpoint(a_study, done):
    for update in checkpoint.updates(done / "wsd_s-s0")[:-1]:
        (done / "wsd_s-s0" / "checkpoints" / str(update) / "model.safetensors").unlink()
    assert run_study(a_study(runs=RUNS), done, Watching()) == {}


def test_a_branch_waits_for_its_trunk_and_fails_with_it(a_study, tmp_path):
    def fail(name, event):
        if name == "long-s0" and event["event"] == "update":
            raise ArithmeticError("the sums are wrong")

    watching = Watching(fail)
    failed = run_study(a_study(runs=RUNS), tmp_path, watching)
    assert list(watching.events) == ["long-s0", "wsd_s-s0"]
    assert failed["short-s0"] == "long-s0, which it branches off, failed."
    watching = Watching()
    assert run_study(a_study(runs=RUNS), tmp_path, watching) == {}
    assert watching.trained()["short-s0"] == [9, 10]


def test_the_speed_of_a_branch_counts_what_it_did(done):
    rows = {(row["run"], row["metric"]): row["value"] for row in files.read_lines(done / "rows.jsonl")}
    tokens = {
        name: rows[name, "tokens_per_second"] * rows[name, "training_seconds"] for name in ("short-s0", "long-s0")
    }
    assert tokens == pytest.approx({"short-s0": 2 * 2 * 8, "long-s0": 20 * 2 * 8})


def test_the_report_draws_costs_rates_and_a_panel_for_each_budget(done):
    page = write_report([done]).read_text(encoding="utf-8")
    assert "non-overlapping after 10 updates" in page and "non-overlapping after 20 updates" in page
    assert "What each budget costs" in page and "Learning rates" in page and "Not complete" not in page
    for name in ("budgets", "rates", "perplexity", "loss"):
        svg = (done / "figures" / f"{name}.svg").read_text()
        assert "WSD" in svg and "wsd_s" in svg and 'aria-roledescription="line mark"' in svg


def test_gathered_rows_of_budgets_are_enough_for_the_report(done, tmp_path):
    (tmp_path / "rows.jsonl").write_text((done / "rows.jsonl").read_text())
    page = write_report([tmp_path]).read_text(encoding="utf-8")
    assert "What each budget costs" in page and "non-overlapping after 10 updates" in page


# Rates by validation


CHOICE = {"schemes": ["rope", "alibi"], "choose_rate": [1e-9, 1e-2], "choose_updates": 5}


def test_the_final_seeds_are_trained_at_the_rate_that_validation_chose(a_study, tmp_path):
    study = a_study(**CHOICE, seeds=[0, 1])
    assert run_study(study, tmp_path, Watching()) == {}
    for name in ("rope-s0", "rope-s1", "alibi-s0", "alibi-s1"):
        assert config.read_toml(tmp_path / name / "run.toml")["training"]["rate"] == 1e-2
    rows = files.read_lines(tmp_path / "rows.jsonl")
    tried = {
        (row["scheme"], row["candidate"], row["seed"], row["update"])
        for row in rows
        if "candidate" in row and "update" in row
    }
    assert tried == {(scheme, rate, 1000, 5) for scheme in ("rope", "alibi") for rate in (1e-9, 1e-2)}
    assert {row["chosen_rate"] for row in rows if "candidate" not in row} == {1e-2}
    watching = Watching()
    assert run_study(study, tmp_path, watching) == {} and watching.trained() == {}
    page = write_report([tmp_path]).read_text(encoding="utf-8")
    assert "Rates chosen" in page and "2 schemes, 4 runs" in page and "trial" not in page.partition("<script>")[0]


def test_a_rate_that_diverges_is_an_answer_and_no_failure(a_study, tmp_path, monkeypatch):
    def explode(model, lines, update, run, processes, accumulation):
        loss = accumulate(model, lines, update, run, processes, accumulation)
        return math.nan if run.training.rate == 1e-2 else loss

    from lookfar.training import train

    accumulate = train._accumulate
    monkeypatch.setattr(train, "_accumulate", explode)
    assert run_study(a_study(**CHOICE), tmp_path, Watching()) == {}
    assert config.read_toml(tmp_path / "alibi-s0" / "run.toml")["training"]["rate"] == 1e-9
    assert "0.01: diverged" in write_report([tmp_path]).read_text(encoding="utf-8")


def test_a_trial_that_fails_leaves_the_rate_open_until_it_has_ended(a_study, tmp_path):
    def fill(name, event):
        if name == "rope-rate=0.01-trial" and event["event"] == "update":
            raise OSError(28, "No space left on device")

    study = a_study("study.schemes=['rope']", **CHOICE)
    failed = run_study(study, tmp_path, Watching(fill))
    assert list(failed) == ["rope-rate=0.01-trial", "rope-s0"]
    assert failed["rope-s0"] == "rope-rate=0.01-trial, its trial of a rate, failed."
    assert not (tmp_path / "rope-s0").exists()  # else at the other rate, for ever
    assert run_study(study, tmp_path, Watching()) == {}
    assert config.read_toml(tmp_path / "rope-s0" / "run.toml")["training"]["rate"] == 1e-2


def test_a_seed_can_join_a_study_that_chose_its_rates(a_study, tmp_path):
    told = {**CHOICE, "schemes": ["rope"]}
    assert run_study(a_study(**told), tmp_path, Watching()) == {}
    watching = Watching()
    assert run_study(a_study(**told, seeds=[0, 1]), tmp_path, watching) == {}
    assert list(watching.trained()) == ["rope-s1"]


def test_trials_of_another_seed_are_refused_with_the_setting_that_keeps_them(a_study, tmp_path):
    told = {**CHOICE, "schemes": ["rope"]}
    assert run_study(a_study(**told, choose_seed=1), tmp_path, Watching()) == {}
    with pytest.raises(UserError, match=r"rope-rate=1e-09-trial .* seed 1, not 1000; set study.choose_seed=1, or"):
        run_study(a_study(**told), tmp_path, Watching())
    watching = Watching()
    assert run_study(a_study(**told, choose_seed=1), tmp_path, watching) == {} and watching.trained() == {}


def test_a_final_run_that_diverges_is_a_failure(a_study, tmp_path, monkeypatch):
    monkeypatch.setattr("lookfar.training.train._accumulate", lambda *rest: math.nan)
    assert "The loss of update 1 is nan" in run_study(a_study(schemes=["rope"]), tmp_path, Watching())["rope-s0"]
