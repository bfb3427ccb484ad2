"""A profile shows where time goes and changes no weight."""

import json
import sys

import pytest

from lookfar import cli, config
from lookfar.training import checkpoint
from lookfar.training.train import train


@pytest.fixture
def a_run(tmp_path):
    (tmp_path / "book.txt").write_text("to be or not to be, that is the question. " * 90)
    content = {
        "model": {"width": 16, "layers": 1, "heads": 2, "context": 8, "dropout": 0.2, "device": "cpu"},
        "data": {"source": "text_file", "path": str(tmp_path / "book.txt")},
        "training": {"batch": 4, "updates": 7, "schedule": "constant", "warmup": 1},
    }
    return lambda *overrides: config.build(content, overrides)


def weights(place):
    return (place / "checkpoints" / "7" / checkpoint.WEIGHTS).read_bytes()


def test_three_updates_are_traced_and_the_weights_are_the_same(a_run, tmp_path):
    train(a_run(), tmp_path / "without")
    events = []
    train(a_run(), tmp_path / "with", events.append, profile=True)
    assert weights(tmp_path / "with") == weights(tmp_path / "without")
    trace = json.loads((tmp_path / "with" / "profile.json").read_text())["traceEvents"]
    steps = {each["name"] for each in trace if str(each.get("name", "")).startswith("ProfilerStep")}
    assert steps == {"ProfilerStep#2", "ProfilerStep#3", "ProfilerStep#4"}  # counted from 0
    assert sum(each.get("name") == "Optimizer.step#AdamW.step" for each in trace) == 3
    told = [event["text"].splitlines() for event in events if event["event"] == "note"]
    assert len(told) == 1 and told[0][0].split() == ["ms", "part", "calls", "operator"] and len(told[0]) == 12
    times = [float(line.split()[0]) for line in told[0][1:11]]
    assert times == sorted(times, reverse=True) and str(tmp_path / "with" / "profile.json") in told[0][-1]
    assert not list((tmp_path / "with").glob(".profile*")) and not (tmp_path / "without" / "profile.json").exists()


def test_the_command_shows_the_costliest_operators(a_run, tmp_path, monkeypatch, capsys):
    content = {**a_run().model_dump(), "evaluation": {"lengths": [8], "tokens": 64}}
    (tmp_path / "recipe.toml").write_text(config.write_toml(content))
    words = ["lookfar", "train", str(tmp_path / "recipe.toml"), "--folder", str(tmp_path / "run"), "--profile"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert not left.value.code and "aten::mm" in capsys.readouterr().err
    assert (tmp_path / "run" / "profile.json").exists()


@pytest.mark.parametrize(("done", "traced"), [(7, False), (5, False), (3, True)])
def test_updates_of_this_start_are_counted(a_run, tmp_path, done, traced):
    events = []
    train(a_run(f"training.updates={done}"), tmp_path)
    train(a_run(), tmp_path, events.append, profile=True)
    assert (tmp_path / "profile.json").exists() == traced
    notes = [event["text"] for event in events if event["event"] == "note"]
    assert len(notes) == 1 and ("Nothing was profiled" in notes[0]) != traced
