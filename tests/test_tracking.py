"""Trackers take the numbers of the log, are missed politely, and never stop a run."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from lookfar import config, files
from lookfar.errors import UserError
from lookfar.training import checkpoint
from lookfar.training.tracking import MODULES, TRACKERS
from lookfar.training.train import train


@pytest.fixture
def a_run(tmp_path):
    (tmp_path / "book.txt").write_text("to be or not to be, that is the question. " * 90)
    content = {
        "model": {"width": 16, "layers": 1, "heads": 2, "context": 8, "device": "cpu"},
        "data": {"source": "text_file", "path": str(tmp_path / "book.txt")},
        "training": {"batch": 4, "updates": 3, "schedule": "constant", "warmup": 1, "evaluate_every": 2},
    }
    return lambda *overrides: config.build(content, overrides)


@pytest.fixture(params=TRACKERS)
def tracker(request, monkeypatch):
    """A tracker's name, what it was called with, and where it is to fail."""
    calls, failing = [], set()

    def called(name):
        def call(*given, **settings):
            calls.append((name, given, settings))
            if name in failing:
                raise ConnectionError("no route\nto host")
            return session

        return call

    session = SimpleNamespace(**{name: called(name) for name in ("log", "add_scalar", "close", "finish")})
    module = ModuleType(MODULES[request.param])
    vars(module).update(init=called("init"), SummaryWriter=called("init"), log=session.log, finish=session.finish)
    monkeypatch.setitem(sys.modules, MODULES[request.param], module)
    return request.param, calls, failing


def numbers(calls):
    """What was told, as `{update: {key: value}}`."""
    told = {}
    for name, given, settings in calls:
        if name == "add_scalar":
            told.setdefault(given[2], {})[given[0]] = given[1]
        if name == "log":
            told.setdefault(settings["step"], {}).update(given[0])
    return told


def weights(place):
    return (place / "checkpoints" / "3" / checkpoint.WEIGHTS).read_bytes()


def test_a_tracker_takes_the_numbers_of_the_log_and_changes_nothing(tracker, a_run, tmp_path):
    name, calls, _ = tracker
    train(a_run(), tmp_path / "without")
    assert not calls
    train(a_run(f"training.tracking={name}"), tmp_path / "with")
    logged = {}
    for line in files.read_lines(tmp_path / "with" / "log.jsonl"):
        logged.setdefault(line.pop("update"), {}).update(line)
    assert numbers(calls) == logged and "valid_loss" in logged[2]
    assert calls[0][0] == "init" and calls[-1][0] in ("finish", "close")
    assert weights(tmp_path / "with") == weights(tmp_path / "without")
    if name != "tensorboard":
        settings = calls[0][2]
        assert (settings["project"], settings["name"]) == ("lookfar", "with")
        assert settings["config"]["training"]["batch"] == 4 and "mode" not in settings  # the environment says offline


def test_a_run_may_go_on_with_another_tracker_and_a_finished_one_opens_none(tracker, a_run, tmp_path):
    name, calls, _ = tracker
    train(a_run("training.updates=1"), tmp_path)
    train(a_run(f"training.tracking={name}"), tmp_path)
    assert set(numbers(calls)) == {2, 3}
    calls.clear()
    train(a_run(f"training.tracking={name}"), tmp_path)
    assert not calls


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_told_of_once_and_stops_nothing(tracker, a_run, tmp_path, where):
    name, calls, failing = tracker
    failing.add({"log": "add_scalar", "finish": "close"}.get(where, where) if name == "tensorboard" else where)
    with pytest.warns(UserWarning) as told:
        train(a_run(f"training.tracking={name}"), tmp_path)
    assert [str(each.message) for each in told] == [f"The tracker {name} failed and is left alone: no route."]
    assert [each[0] for each in calls].count(next(iter(failing))) == 1
    assert max(checkpoint.updates(tmp_path)) == 3
    assert len([line for line in files.read_lines(tmp_path / "log.jsonl") if "loss" in line]) == 3


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_told_at_the_door(name, a_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, MODULES[name], None)
    with pytest.raises(UserError, match=r'pip install "lookfar\[track\]"') as told:
        train(a_run(f"training.tracking={name}"), tmp_path / "run")
    assert f"training.tracking='{name}'" in str(told.value)
    assert not (tmp_path / "run").exists()
