"""Out of memory: a run stops with advice, or goes on in smaller pieces and ends as if it had begun in them."""

import json

import pytest
import torch

from lookfar import config
from lookfar.errors import UserError
from lookfar.training import checkpoint, objectives
from lookfar.training.train import train


@pytest.fixture
def a_run(tmp_path):
    (tmp_path / "book.txt").write_text("to be or not to be, that is the question. " * 90)
    content = {
        "model": {"width": 16, "layers": 1, "heads": 2, "context": 8, "dropout": 0.2, "device": "cpu"},
        "data": {"source": "text_file", "path": str(tmp_path / "book.txt")},
        "training": {"batch": 12, "updates": 4, "precision": "float32", "schedule": "constant", "warmup": 1},
    }
    return lambda *overrides: config.build(content, overrides)


@pytest.fixture
def memory(monkeypatch):
    """How many lines memory holds at once, from which call on; and the sizes of the pieces that were asked for."""
    found, limit, asked = objectives.next_token, {"lines": 99, "calls": 0}, []

    def limited(model, lines, *rest):
        asked.append(len(lines))
        loss = found(model, lines, *rest)  # draws of the generators are made before the failure
        if len(lines) > limit["lines"] and len(asked) > limit["calls"]:
            loss.backward()
            raise limit.get("error", torch.OutOfMemoryError("CUDA out of memory."))
        return loss

    monkeypatch.setitem(objectives.OBJECTIVES, "next_token", limited)
    monkeypatch.setattr(objectives, "next_token", limited)
    return limit, asked


def weights(place):
    return (place / "checkpoints" / str(max(checkpoint.updates(place))) / checkpoint.WEIGHTS).read_bytes()


def lines(place):
    return [json.loads(line) for line in (place / "log.jsonl").read_text().splitlines()]


def error_of_the_cpu():
    """What torch raises for more than any computer has."""
    with pytest.raises(RuntimeError) as told:
        torch.empty(2**50)
    return told.value


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("x"), MemoryError(), error_of_the_cpu()], ids=type)
def test_pieces_are_halved_and_the_weights_are_those_of_that_accumulation(a_run, memory, tmp_path, error):
    limit, asked = memory
    train(a_run("training.accumulation=4"), tmp_path / "small")
    asked.clear()
    limit.update(lines=3, error=error)
    events = []
    train(a_run("training.on_out_of_memory=halve"), tmp_path / "halved", events.append)
    assert asked == [12, 6] + [3] * 16
    assert weights(tmp_path / "halved") == weights(tmp_path / "small")
    notes = [line for line in lines(tmp_path / "halved") if "note" in line]
    assert [(note["update"], note["accumulation"]) for note in notes] == [(1, 2), (1, 4)]
    assert [event["text"] for event in events if event["event"] == "note"] == [note["note"] for note in notes]
    assert notes[0]["note"] == "Update 1 ran out of memory; from it on a batch is computed in 2 pieces."


def test_a_count_that_does_not_divide_the_batch_is_passed_over(a_run, memory, tmp_path):
    memory[0]["lines"] = 2
    train(a_run("training.on_out_of_memory=halve", "training.updates=1", "training.accumulation=4"), tmp_path)
    assert memory[1] == [3] + [1] * 12  # 8 pieces of 12 lines there are not


def test_a_failure_within_an_update_begins_it_again(a_run, memory, tmp_path):
    limit, asked = memory
    train(a_run("training.accumulation=2", "training.updates=3"), tmp_path / "small")
    asked.clear()
    limit.update(lines=3, calls=5)  # in the second piece of the third update
    train(a_run("training.accumulation=2", "training.updates=3", "training.on_out_of_memory=halve"), tmp_path / "late")
    assert asked == [6] * 6 + [3] * 4
    small, late = ([line["loss"] for line in lines(tmp_path / name) if "loss" in line] for name in ("small", "late"))
    assert small[:2] == late[:2] and len(late) == 3


def test_a_run_that_goes_on_keeps_the_smaller_pieces(a_run, memory, tmp_path):
    limit, asked = memory
    limit.update(lines=6)
    halve = "training.on_out_of_memory=halve"
    train(a_run(halve), tmp_path / "whole")
    train(a_run(halve, "training.updates=2"), tmp_path / "parts")
    limit["lines"] = 99
    asked.clear()
    train(a_run("training.updates=4"), tmp_path / "parts")  # and the setting may change
    assert asked == [6] * 4
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_without_the_setting_the_advice_names_it(a_run, memory, tmp_path):
    memory[0]["lines"] = 4
    with pytest.raises(
        UserError, match=r"Update 1 ran out of memory at 12 × 8 tokens.*='halve'.*accumulation=2"
    ) as told:
        train(a_run(), tmp_path)
    assert isinstance(told.value.__cause__, torch.OutOfMemoryError)
    train(a_run("training.on_out_of_memory=halve"), tmp_path)  # as advised, in the same folder


def test_one_line_that_does_not_fit_and_other_errors_are_not_tried_again(a_run, memory, tmp_path):
    limit, asked = memory
    limit["lines"] = 0
    with pytest.raises(UserError, match=r"at 1 × 8 tokens at once, which is one line; take a shorter model\.context"):
        train(a_run("training.on_out_of_memory=halve"), tmp_path / "line")
    assert asked == [12, 6, 3, 1]
    limit["error"] = RuntimeError("shapes do not fit")
    with pytest.raises(RuntimeError, match="shapes"):
        train(a_run("training.on_out_of_memory=halve"), tmp_path / "other")
