"""A run may begin at a checkpoint of another, or with its weights alone."""

import json
import warnings

import pytest
import torch

import lookfar
from lookfar import cli, files
from lookfar.config import write_toml
from lookfar.errors import UserError
from lookfar.training import checkpoint
from lookfar.training.train import Interrupted, train
from test_resume import stop_at
from test_training import a_run, book, log, weights  # noqa: F401  # fixtures work by their names

STABLE = ("training.schedule=wsd(decay=0.25)", "training.warmup=2", "training.updates=12")
EVERY = ("training.checkpoint_every=1", "training.keep=99")


@pytest.fixture
def whole(a_run, tmp_path):  # noqa: F811
    """A run of 12 updates, with a checkpoint after each."""
    train(a_run(*STABLE, *EVERY), tmp_path / "whole")
    return tmp_path / "whole"


def state(place, update):
    return torch.load(place / "checkpoints" / str(update) / "state.pt", weights_only=True)


def test_a_branch_with_nothing_changed_is_the_run_itself(a_run, whole, tmp_path):  # noqa: F811
    train(a_run(*STABLE, f"training.branch={whole}@5"), tmp_path / "branch")
    assert weights(tmp_path / "branch") == weights(whole)
    assert [line["update"] for line in log(tmp_path / "branch")] == list(range(6, 13))
    assert [line["loss"] for line in log(tmp_path / "branch")] == [line["loss"] for line in log(whole)][5:]


def test_a_branch_before_the_decay_ends_as_a_run_of_its_length(a_run, whole, tmp_path):  # noqa: F811
    longer = ("training.schedule=wsd(decay=0.25)", "training.warmup=2", "training.updates=16")
    train(a_run(*longer), tmp_path / "straight")
    train(a_run(*longer, f"training.branch={whole}@9"), tmp_path / "branch")
    assert weights(tmp_path / "branch") == weights(tmp_path / "straight")


def test_a_branch_after_the_decay_goes_on_at_the_rate_it_is_told(a_run, whole, tmp_path):  # noqa: F811
    train(
        a_run("training.schedule=constant", "training.warmup=0", "training.updates=14", f"training.branch={whole}@12"),
        tmp_path / "on",
    )
    assert [line["rate"] for line in log(tmp_path / "on")] == [1e-3, 1e-3]


def test_the_optimizer_of_a_branch_is_kept_or_forgotten(a_run, whole, tmp_path):  # noqa: F811
    for name, more in (("kept", []), ("fresh", ["training.reset_optimizer=true"])):
        train(a_run(*STABLE, "training.updates=6", *more, f"training.branch={whole}@5"), tmp_path / name)
    steps = [next(iter(state(tmp_path / name, 6)["optimizer"]["state"].values()))["step"] for name in ("kept", "fresh")]
    assert [float(each) for each in steps] == [6, 1]
    assert weights(tmp_path / "kept") != weights(tmp_path / "fresh")


def test_a_branch_that_is_interrupted_goes_on_as_if_it_were_not(a_run, whole, tmp_path):  # noqa: F811
    told = (*STABLE, f"training.branch={whole}@5")
    with pytest.raises(Interrupted):
        train(a_run(*told), tmp_path / "branch", stop_at(8))
    train(a_run(*told), tmp_path / "branch")
    assert weights(tmp_path / "branch") == weights(whole)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.schedule=cosine"], "A branch cannot go on by 'cosine'"),
        (["training.schedule=linear"], "A branch cannot go on by 'linear'"),
        (["training.updates=5"], "5 updates are done"),
        (["model.width=32"], "has its model"),
        (["data.path=pyproject.toml"], "goes on in its text"),
        (["training.branch=WHOLE@77"], r"has no checkpoint of update 77; it has: \[1, 2,"),
        (["training.branch=WHOLE@last"], "names no update; write it as"),
        (["training.branch=nowhere@3"], "nowhere is not a run's folder"),
        (["training.weights=WHOLE"], "two ways to start"),
        (["training.branch=none", "training.reset_optimizer=true"], "reset_optimizer is of a branch"),
    ],
    ids=str,
)
def test_a_branch_that_cannot_be_is_told_and_nothing_is_written(a_run, whole, tmp_path, overrides, message):  # noqa: F811
    told = [each.replace("WHOLE", str(whole)) for each in overrides]
    with pytest.raises(UserError, match=message):
        train(a_run(*STABLE, f"training.branch={whole}@5", *told), tmp_path / "branch")
    assert not (tmp_path / "branch" / "run.toml").exists()


def test_a_damaged_checkpoint_is_no_start(a_run, whole, tmp_path):  # noqa: F811
    (whole / "checkpoints" / "5" / "model.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="damaged"):
        train(a_run(*STABLE, f"training.branch={whole}@5"), tmp_path / "branch")


def test_every_budget_keeps_its_checkpoint(a_run, tmp_path):  # noqa: F811
    train(
        a_run("training.schedule=wsd_s(budgets=[4, 8, 12], decay=0.25)", "training.updates=12", "training.warmup=1"),
        tmp_path,
    )
    assert checkpoint.updates(tmp_path) == [4, 8, 12]


# Weights alone


def test_weights_alone_start_a_new_run_on_another_text(a_run, whole, tmp_path):  # noqa: F811
    other = tmp_path / "other.txt"
    other.write_text("quite another text than before\n" * 200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # all of them fit
        train(a_run(f"training.weights={whole}", f"data.path={other}", "training.updates=0"), tmp_path / "tuned")
    assert weights(tmp_path / "tuned") == weights(whole)
    train(a_run(f"training.weights={whole}@3", "training.updates=0"), tmp_path / "early")
    assert weights(tmp_path / "early") == checkpoint_hash(whole, 3)


def checkpoint_hash(place, update):
    return json.loads((place / "checkpoints" / str(update) / "hashes.json").read_text())["model.safetensors"]


def test_what_does_not_fit_is_named(a_run, whole, tmp_path):  # noqa: F811
    with pytest.warns(UserWarning, match=r"fresh: blocks.0.attention.scheme.methods.0.amplitude") as told:
        train(a_run(f"training.weights={whole}", "model.scheme=kerple", "training.updates=0"), tmp_path / "kerple")
    assert "not taken" not in str(told[0].message)
    tuned, before = lookfar.load(tmp_path / "kerple"), lookfar.load(whole)
    assert torch.equal(tuned.embedding.weight, before.embedding.weight)
    with pytest.warns(UserWarning, match=r"not taken: blocks.0.attention.scheme"):
        train(a_run(f"training.weights={tmp_path / 'kerple'}", "training.updates=0"), tmp_path / "alibi")
    with pytest.raises(UserError, match="No weight of"):
        train(a_run(f"training.weights={whole}", "model.width=32", "model.vocabulary=300"), tmp_path / "wide")


def test_the_command_branches_and_tunes(a_run, whole, tmp_path, monkeypatch, capsys):  # noqa: F811
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(write_toml(a_run(*STABLE).model_dump()))
    for name, more in (("branch", ["--from", f"{whole}@5", "--reset-optimizer"]), ("tuned", ["--weights", whole])):
        arguments = ["lookfar", "train", recipe, "--folder", tmp_path / name, *more]
        monkeypatch.setattr("sys.argv", list(map(str, arguments)))
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == 0, capsys.readouterr().err
    assert len(files.read_lines(tmp_path / "branch" / "log.jsonl")) == 7
    assert len(files.read_lines(tmp_path / "tuned" / "log.jsonl")) == 12


def test_a_branch_has_the_settings_of_its_own_recipe(a_run, whole, tmp_path):  # noqa: F811
    settings = f"training.branch={whole}@5", *STABLE, "training.weight_decay=0", "training.betas=[0.5, 0.6]"
    train(a_run(*settings), tmp_path / "branch")
    state = torch.load(tmp_path / "branch" / "checkpoints" / "12" / "state.pt", weights_only=True)
    assert {(group["weight_decay"], tuple(group["betas"])) for group in state["optimizer"]["param_groups"]} == {
        (0.0, (0.5, 0.6))
    }


def test_a_branch_by_another_optimizer_forgets_the_state_or_is_told(a_run, whole, tmp_path):  # noqa: F811
    settings = f"training.branch={whole}@5", *STABLE, "training.optimizer=muon"
    with pytest.raises(UserError, match="--reset-optimizer"):
        train(a_run(*settings), tmp_path / "branch")
    assert not (tmp_path / "branch").exists()
    train(a_run(*settings, "training.reset_optimizer=true"), tmp_path / "branch")


def test_budgets_that_a_branch_has_passed_are_refused(a_run, whole, tmp_path):  # noqa: F811
    settings = f"training.branch={whole}@5", "training.schedule=wsd_s(budgets=[4, 12])"
    with pytest.raises(UserError, match="Budgets of 4 updates lie before the branch"):
        train(a_run(*settings), tmp_path / "branch")


def test_a_best_checkpoint_that_is_lost_is_forgotten(a_run, tmp_path):  # noqa: F811
    settings = "training.evaluate_every=3", "training.checkpoint_every=3", "training.keep=1"
    train(a_run(*settings), tmp_path)
    best = checkpoint.read_manifest(tmp_path)["best"]
    (tmp_path / "checkpoints" / str(best) / "model.safetensors").write_bytes(b"")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(a_run(*settings), tmp_path)
    assert checkpoint.read_manifest(tmp_path)["best"] in checkpoint.updates(tmp_path)
