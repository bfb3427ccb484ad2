"""A run that is interrupted in any way goes on from its last whole checkpoint and ends as if nothing had happened."""

import errno
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

import lookfar
from lookfar import config, files
from lookfar.cli.progress import watching
from lookfar.data.packing import Lines
from lookfar.errors import UserError
from lookfar.training import checkpoint
from lookfar.training.evaluate import evaluate_run
from lookfar.training.run import run_whole
from lookfar.training.train import Interrupted, train

UPDATES = 12


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe of a small run that draws random numbers and passes two ends of its text."""
    place = tmp_path_factory.mktemp("recipe")
    choice = random.Random(0)
    text = "".join("".join(choice.choices("abcdef ", k=20)) + "\n" for _ in range(13))  # 28 training lines
    (place / "book.txt").write_text(text)
    (place / "small.toml").write_text(f"""
        [model]
        width = 16
        layers = 1
        heads = 2
        context = 8
        scheme = "kerple"
        dropout = 0.2
        device = "cpu"
        [data]
        source = "text_file"
        path = "{place / "book.txt"}"
        [training]
        updates = {UPDATES}
        batch = 6
        checkpoint_every = 3
        keep = 2
        [evaluation]
        lengths = [8]
        tokens = 12
    """)
    return place / "small.toml"


@pytest.fixture
def a_run(recipe):
    return lambda *overrides: config.read(recipe, overrides)


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """The folder of the run that was never interrupted."""
    place = tmp_path_factory.mktemp("whole") / "run"
    run_whole(config.read(recipe), place)
    return place


def weights(place, update=UPDATES):
    return hashlib.sha256((place / "checkpoints" / str(update) / "model.safetensors").read_bytes()).hexdigest()


def losses(place):
    return {line["update"]: line["loss"] for line in files.read_lines(place / "log.jsonl")}


def assert_same_end(place, whole):
    """Weights, optimizer and log are those of the run that was never interrupted."""
    assert weights(place) == weights(whole)
    log = files.read_lines(place / "log.jsonl")
    assert [line["update"] for line in log] == list(range(1, UPDATES + 1))
    assert losses(place) == losses(whole)
    rates = [[line["rate"] for line in files.read_lines(each / "log.jsonl")] for each in (place, whole)]
    assert rates[0] == rates[1]
    assert all(each.name.isdigit() for each in (place / "checkpoints").iterdir())
    assert json.loads((place / "manifest.json").read_text()) == {"finished": UPDATES, "last": UPDATES}


def stop_at(update, number=signal.SIGINT):
    """A watcher that sends a signal to this process once an update is done."""

    def watch(event):
        if event["event"] == "update" and event["update"] == update:
            os.kill(os.getpid(), number)

    return watch


def started(events):
    return [event["update"] for event in events if event["event"] == "start"]


# Signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("update", [1, 5, 6, UPDATES - 1])
def test_a_run_that_was_asked_to_stop_saves_and_goes_on(a_run, tmp_path, whole, update, number):
    with pytest.raises(Interrupted, match=f"Interrupted after {update} updates; all of them are saved") as stop:
        train(a_run(), tmp_path, stop_at(update, number))
    assert (stop.value.update, stop.value.signal) == (update, number)
    assert max(checkpoint.updates(tmp_path)) == update
    assert list(losses(tmp_path)) == list(range(1, update + 1))
    events = []
    train(a_run(), tmp_path, events.append)
    assert started(events) == [update]
    assert_same_end(tmp_path, whole)


def test_a_run_may_be_interrupted_again_and_again(a_run, tmp_path, whole):
    for update in (1, 2, 3, 7, 8, 11):
        with pytest.raises(Interrupted):
            train(a_run(), tmp_path, stop_at(update))
    train(a_run(), tmp_path)
    assert_same_end(tmp_path, whole)


def test_a_signal_at_the_last_update_lets_the_run_end_and_nothing_follow(a_run, tmp_path, whole):
    with pytest.raises(Interrupted):
        train(a_run(), tmp_path, stop_at(UPDATES))
    assert_same_end(tmp_path, whole)


@pytest.fixture
def heard():
    """SIGINT as in a terminal: a job in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
def test_a_second_signal_acts_at_once(a_run, tmp_path, whole):
    def impatient(event):
        if event["event"] == "update" and event["update"] == 5:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)  # two signals that come at once are one
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)

    with pytest.raises(KeyboardInterrupt):
        train(a_run(), tmp_path, impatient)
    assert checkpoint.updates(tmp_path) == [3]
    train(a_run(), tmp_path)
    assert_same_end(tmp_path, whole)


def test_handlers_of_signals_are_given_back(a_run, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for place, watch in ((tmp_path / "one", None), (tmp_path / "two", stop_at(2)), (tmp_path / "two", None)):
        with suppress(Interrupted):
            train(a_run(), place, watch or (lambda event: None))
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_going_on_is_said(a_run, tmp_path, capsys):
    with pytest.raises(Interrupted), watching() as watch:
        train(a_run(), tmp_path, lambda event: (watch(event), stop_at(5)(event)))
    assert "resuming" not in capsys.readouterr().err
    with watching() as watch:
        train(a_run(), tmp_path, watch)
    assert "resuming at update 5:" in capsys.readouterr().err
    with watching() as watch:
        train(a_run(), tmp_path, watch)
    assert "already trained" in capsys.readouterr().err


def command(recipe, place, *overrides):
    settings = [part for each in overrides for part in ("--set", each)]
    return [sys.executable, "-m", "lookfar", "train", str(recipe), "--folder", str(place), *settings]


def wait_for_updates(place, count, seconds=60.0):
    """Until the log of a run has this many lines."""
    log, end = place / "log.jsonl", time.monotonic() + seconds
    while not (log.exists() and log.read_bytes().count(b"\n") >= count):
        assert time.monotonic() < end, "no update was logged"
        time.sleep(0.005)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_saves_leaves_with_the_code_of_the_signal_and_goes_on(recipe, tmp_path, number, code):
    place, many = tmp_path / "run", ("training.updates=3000", "training.checkpoint_every=none")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command(recipe, place, *many), **pipes) as ran:
        wait_for_updates(place, 3)
        ran.send_signal(number)
        output, told = ran.communicate(timeout=60)
    assert ran.returncode == code
    (update,) = checkpoint.updates(place)
    assert 3 <= update < 3000
    assert f"Interrupted after {update} updates; all of them are saved. The same command goes on from there." in told
    assert "Traceback" not in told and output == ""
    events = []
    with pytest.raises(Interrupted):
        run_whole(config.read(recipe, many), place, lambda event: (events.append(event), stop_at(update + 20)(event)))
    assert started(events) == [update]
    straight = tmp_path / "straight"
    with pytest.raises(Interrupted):
        run_whole(config.read(recipe, many), straight, stop_at(update + 20))
    assert weights(place, update + 20) == weights(straight, update + 20)
    assert losses(place) == losses(straight)


# Crashes


class Crash(BaseException):
    """Stands for a process that is killed: nothing catches it."""


DECAYS = "training.schedule=wsd(decay=0.4)", "training.accumulation=2", "training.checkpoint_every=1"


@pytest.fixture(scope="module")
def whole_in_pieces(recipe, tmp_path_factory):
    """The folder of a run of two pieces an update, and of a decay at its end, that was never interrupted."""
    place = tmp_path_factory.mktemp("pieces") / "run"
    train(config.read(recipe, DECAYS), place)
    return place


@pytest.mark.parametrize("piece", [0, 1, 2, 3, 8, 9, 10, 18, 19, 23])  # the first epoch ends in piece 9
def test_a_run_that_breaks_off_at_any_piece_of_a_batch_ends_in_the_same_bytes(
    a_run, tmp_path, monkeypatch, whole_in_pieces, piece
):
    serve, served = Lines.batch, []

    def break_off(self, first, count):
        served.append(first)
        if len(served) == piece + 1:
            raise Crash
        return serve(self, first, count)

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(Lines, "batch", break_off)
        train(a_run(*DECAYS), tmp_path)
    assert (checkpoint.newest(tmp_path) or 0) == piece // 2
    train(a_run(*DECAYS), tmp_path)
    assert_same_end(tmp_path, whole_in_pieces)


def soak(kills, seed):
    """`make soak`, with so many kills."""
    script = Path(__file__).with_name("soak.py")
    asked = [sys.executable, script, "--kills", kills, "--seed", seed]
    ran = subprocess.run(list(map(str, asked)), capture_output=True, text=True, check=False, timeout=200)
    assert ran.returncode == 0, ran.stderr
    assert f"{kills} kills, " in ran.stdout and "nothing was lost" in ran.stdout


def test_a_run_survives_being_killed_at_random_moments():
    soak(kills=8, seed=0)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 4))
def test_a_run_survives_being_killed_often(seed):
    soak(kills=40, seed=seed)


def test_the_best_is_remembered_by_a_run_that_was_killed_before_it_noted_it(a_run, tmp_path, monkeypatch):
    def killed(*arguments):
        raise Crash

    settings = "training.evaluate_every=3", "training.keep=1"
    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(checkpoint, "note_best", killed)
        train(a_run(*settings), tmp_path / "killed")
    assert "best" not in checkpoint.read_manifest(tmp_path / "killed")
    train(a_run(*settings), tmp_path / "killed")
    train(a_run(*settings), tmp_path / "alone")
    assert checkpoint.read_manifest(tmp_path / "killed") == checkpoint.read_manifest(tmp_path / "alone")
    assert checkpoint.updates(tmp_path / "killed") == checkpoint.updates(tmp_path / "alone")


def test_what_a_killed_thinning_left_is_removed_when_the_run_goes_on(a_run, tmp_path, whole):
    def killed(*arguments):
        raise Crash

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        patch.setattr(checkpoint, "thin", lambda *arguments: checkpoint.updates(tmp_path)[-1] < UPDATES or killed())
        train(a_run(), tmp_path)
    assert checkpoint.updates(tmp_path) == [3, 6, 9, 12]
    train(a_run(), tmp_path)
    assert_same_end(tmp_path, whole)
    assert checkpoint.updates(tmp_path) == [9, 12]


def wait_for_checkpoint(place, update):
    """Return once a checkpoint is published and told in the manifest."""
    end = time.monotonic() + 60
    while checkpoint.read_manifest(place).get("last") != update:
        assert time.monotonic() < end
        time.sleep(0.01)


STEPS = [
    (checkpoint, "save_file"),
    (checkpoint.torch, "save"),
    (checkpoint.files, "digest"),
    (checkpoint.files, "sync"),
    (checkpoint.files, "sync_folder"),
    (checkpoint.files, "write"),
    (Path, "rename"),
    (Path, "replace"),
    (Path, "write_text"),
    (shutil, "rmtree"),
]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("owner", "step"), STEPS, ids=[f"{owner.__name__}.{step}" for owner, step in STEPS])
def test_a_crash_at_any_step_of_saving_loses_nothing_earlier(a_run, tmp_path, monkeypatch, whole, owner, step, after):
    """The run is killed right before or after a step of the checkpoint of update 6."""
    original, armed = getattr(owner, step), []

    def fatal(*arguments, **settings):
        if armed and not after:
            raise Crash
        result = original(*arguments, **settings)
        if armed:
            raise Crash
        return result

    def arm(event):
        if event["event"] == "update" and event["update"] == 6:  # it is saved while the next are computed
            wait_for_checkpoint(tmp_path, 3)
            armed[:] = [True]

    monkeypatch.setattr(owner, step, fatal)
    if step == "rmtree":  # only then is something removed
        with pytest.raises(Crash):
            train(a_run("training.keep=1"), tmp_path, arm)
    else:
        with pytest.raises(Crash):
            train(a_run(), tmp_path, arm)
    monkeypatch.undo()
    assert checkpoint.newest(tmp_path) in (3, 6)
    lookfar.load(tmp_path)
    train(a_run(), tmp_path)
    if step == "rmtree":
        assert weights(tmp_path) == weights(whole)
    else:
        assert_same_end(tmp_path, whole)


def full(*arguments, **settings):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("owner", "step"), [(checkpoint, "save_file"), (checkpoint.torch, "save"), (checkpoint.files, "sync")]
)
def test_a_full_disk_is_told_and_harms_no_earlier_checkpoint(a_run, tmp_path, monkeypatch, whole, owner, step):
    def fill(event):
        if event["event"] == "update" and event["update"] == 6:
            wait_for_checkpoint(tmp_path, 3)
            monkeypatch.setattr(owner, step, full)

    with pytest.raises(UserError, match=r"checkpoint of update 6 could not be written.*No space left.*Make room"):
        train(a_run(), tmp_path, fill)
    monkeypatch.undo()
    assert [each.name for each in (tmp_path / "checkpoints").iterdir()] == ["3"]
    assert checkpoint.newest(tmp_path) == 3
    train(a_run(), tmp_path)
    assert_same_end(tmp_path, whole)


def test_a_file_that_may_not_grow_is_told_in_one_sentence(recipe, tmp_path):
    """The system refuses the write itself, as it does on a full disk."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))

    place = tmp_path / "run"
    ran = subprocess.run(
        command(recipe, place), preexec_fn=limit, capture_output=True, text=True, check=False, timeout=60
    )
    assert ran.returncode == 2
    assert "Traceback" not in ran.stderr
    (sentence,) = [line for line in ran.stderr.splitlines() if line.startswith("lookfar: ")]
    assert "The checkpoint of update 3 could not be written" in sentence
    assert list((place / "checkpoints").iterdir()) == []


# Damage


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "a flipped bit": flip,
    "a file cut short": lambda file: file.write_bytes(file.read_bytes()[:-7]),
    "an empty file": lambda file: file.write_bytes(b""),
    "a missing file": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["model.safetensors", "state.pt", "hashes.json"])
def test_a_damaged_checkpoint_is_named_and_passed_over(a_run, tmp_path, whole, file, damage):
    with pytest.raises(Interrupted):
        train(a_run(), tmp_path, stop_at(8))
    DAMAGES[damage](tmp_path / "checkpoints" / "8" / file)
    with pytest.warns(UserWarning, match=r"checkpoints/8 is damaged: .*It is passed over"):
        loaded = lookfar.load(tmp_path)
    earlier = lookfar.load(tmp_path, which=6)
    assert all(map(torch.equal, loaded.parameters(), earlier.parameters()))
    with pytest.raises(UserError, match=r"checkpoints/8 is damaged"):
        lookfar.load(tmp_path, which=8)
    events = []
    with pytest.warns(UserWarning, match=r"checkpoints/8 is damaged: .*It is passed over"):
        train(a_run(), tmp_path, events.append)
    assert started(events) == [6]
    assert_same_end(tmp_path, whole)


def test_a_damaged_last_checkpoint_of_a_finished_run_is_made_again(a_run, tmp_path, whole):
    shutil.copytree(whole, tmp_path / "run")
    flip(tmp_path / "run" / "checkpoints" / "12" / "model.safetensors")
    with pytest.warns(UserWarning, match="checkpoints/12 is damaged"):
        run_whole(a_run(), tmp_path / "run")
    assert_same_end(tmp_path / "run", whole)


def test_a_damaged_checkpoint_never_counts_among_those_that_are_kept(a_run, tmp_path, whole):
    with pytest.raises(Interrupted):
        train(a_run(), tmp_path, stop_at(8))
    flip(tmp_path / "checkpoints" / "8" / "state.pt")
    with pytest.warns(UserWarning, match="checkpoints/8 is damaged"), pytest.raises(Interrupted, match="after 7"):
        train(a_run("training.keep=1"), tmp_path, stop_at(7))
    assert checkpoint.newest(tmp_path) == 7, "all of them are saved, as was said"
    train(a_run(), tmp_path)
    assert weights(tmp_path) == weights(whole)


def test_a_run_whose_checkpoints_are_all_damaged_begins_anew(a_run, tmp_path, whole):
    with pytest.raises(Interrupted):
        train(a_run(), tmp_path, stop_at(8))
    for place in (tmp_path / "checkpoints").iterdir():
        flip(place / "state.pt")
    events = []
    with pytest.warns(UserWarning, match="is damaged") as told:
        train(a_run(), tmp_path, events.append)
    assert len(told) == 2 and started(events) == [0]
    assert_same_end(tmp_path, whole)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"last": 99}'])
def test_a_lost_manifest_does_not_matter(a_run, tmp_path, whole, content):
    with pytest.raises(Interrupted):
        train(a_run(), tmp_path, stop_at(8))
    (tmp_path / "manifest.json").write_bytes(content)
    lookfar.load(tmp_path)
    train(a_run(), tmp_path)
    assert_same_end(tmp_path, whole)


@pytest.mark.parametrize("half", ['{"update": 9, "lo', '{"upd\xff', "{"])
def test_a_half_written_last_line_of_the_log_is_passed_over(a_run, tmp_path, whole, half):
    with pytest.raises(Interrupted):
        train(a_run(), tmp_path, stop_at(8))
    with (tmp_path / "log.jsonl").open("ab") as log:
        log.write(half.encode("latin-1"))
    train(a_run(), tmp_path)
    assert_same_end(tmp_path, whole)


def test_lines_of_updates_that_were_not_saved_are_forgotten(a_run, tmp_path, whole):
    def crash(event):
        if event["event"] == "update" and event["update"] == 8:
            raise Crash

    with pytest.raises(Crash):
        train(a_run(), tmp_path, crash)
    assert list(losses(tmp_path)) == list(range(1, 9))
    with pytest.raises(Interrupted):
        train(a_run(), tmp_path, stop_at(7))
    assert list(losses(tmp_path)) == list(range(1, 8))
    train(a_run(), tmp_path)
    assert_same_end(tmp_path, whole)


# Order of the data


def test_text_is_served_over_two_ends_as_without_an_interruption(a_run, tmp_path, monkeypatch):
    served, size = [], 28
    batch = Lines.batch

    def noted(lines, first, count):
        assert len(lines) == size
        served.extend(lines.place(np.arange(first, first + count)).tolist())
        return batch(lines, first, count)

    monkeypatch.setattr(Lines, "batch", noted)
    train(a_run(), tmp_path / "whole")
    straight, served[:] = list(served), []
    for update in (4, 5, 9, 10):  # the ends lie in updates 5 and 10
        with pytest.raises(Interrupted):
            train(a_run(), tmp_path / "parts", stop_at(update))
    train(a_run(), tmp_path / "parts")
    assert served == straight
    assert len(straight) == UPDATES * 6 > 2 * size
    assert sorted(straight[:size]) == sorted(straight[size : 2 * size]) == list(range(size))
    assert straight[:size] != straight[size : 2 * size]


# Recipes


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("training.rate=0.002", r"training\.rate \(0\.001 -> 0\.002\)"),
        ("training.updates=13", r"training\.updates \(12 -> 13\)"),
        ("training.seed=1", r"training\.seed \(0 -> 1\)"),
        ("training.accumulation=2", r"training\.accumulation \(1 -> 2\)"),
        ("model.scheme=alibi", r"model\.scheme \(kerple -> alibi\)"),
        ("model.width=32", r"model\.width \(16 -> 32\)"),
        ("data.tokenizer=bpe", r"data\.tokenizer \(bytes -> bpe\)"),
    ],
)
def test_a_changed_recipe_is_refused_with_its_key(a_run, tmp_path, change, told):
    with pytest.raises(Interrupted):
        train(a_run(), tmp_path, stop_at(4))
    before = {file: file.read_bytes() for file in sorted(tmp_path.rglob("*")) if file.is_file()}
    with pytest.raises(UserError, match=rf"holds a run with other settings: .*{told}.*Restore them, or choose another"):
        train(a_run(change), tmp_path)
    assert before == {file: file.read_bytes() for file in sorted(tmp_path.rglob("*")) if file.is_file()}


def test_every_key_that_changed_is_named(a_run, tmp_path):
    with pytest.raises(Interrupted):
        train(a_run(), tmp_path, stop_at(1))
    with pytest.raises(UserError, match=r"model\.layers \(1 -> 2\), training\.batch \(6 -> 8\)"):
        train(a_run("model.layers=2", "training.batch=8"), tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        ["evaluation.lengths=[4]", "evaluation.tokens=8", 'evaluation.protocols=["sliding"]', "evaluation.split=test"],
        ["training.checkpoint_every=none"],
        ["training.evaluate_every=2"],
    ],
)
def test_what_does_not_change_the_model_may_change(a_run, tmp_path, whole, changes):
    with pytest.raises(Interrupted):
        train(a_run(), tmp_path, stop_at(4))
    train(a_run(*changes), tmp_path)
    assert weights(tmp_path) == weights(whole)


def test_the_folder_tells_the_recipe_that_was_used_last(a_run, tmp_path):
    with pytest.raises(Interrupted):
        train(a_run(), tmp_path, stop_at(4))
    train(a_run("evaluation.lengths=[4]"), tmp_path)
    assert config.read_toml(tmp_path / "run.toml")["evaluation"]["lengths"] == [4]


def test_a_text_that_changed_is_refused(recipe, tmp_path):
    other = tmp_path / "book.txt"
    other.write_text((recipe.parent / "book.txt").read_text())
    run = config.read(recipe, [f"data.path={other}"])
    with pytest.raises(Interrupted):
        train(run, tmp_path / "run", stop_at(4))
    other.write_text(other.read_text().upper())
    with pytest.raises(UserError, match=r"was trained on text_file:book\.txt@\w+; the text is now text_file:book"):
        train(run, tmp_path / "run")


def test_a_broken_recipe_in_the_folder_is_told(a_run, tmp_path):
    with pytest.raises(Interrupted):
        train(a_run(), tmp_path, stop_at(4))
    (tmp_path / "run.toml").write_text("[model")
    with pytest.raises(UserError, match=r"run\.toml is not valid TOML"):
        train(a_run(), tmp_path)


# Measuring


def test_a_run_that_was_measured_on_the_way_is_measured_at_its_end(a_run, tmp_path, whole):
    with pytest.raises(Interrupted):
        run_whole(a_run(), tmp_path, stop_at(2))
    half = evaluate_run(tmp_path)
    rows = run_whole(a_run(), tmp_path)
    measured = [[row["value"] for row in each if row["protocol"] != "training"] for each in (half, rows)]
    assert measured[0] != measured[1]
    end = files.read_lines(whole / "rows.jsonl")
    assert measured[1] == [row["value"] for row in end if row["protocol"] != "training"]
