"""A study trains every scheme with every seed once, in the order told, and ends alike however often it is stopped."""

import os
import random
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from lookfar import cli, config, files
from lookfar.config import Study
from lookfar.errors import UserError
from lookfar.study.grid import slug
from lookfar.study.runner import run_study
from lookfar.training import checkpoint
from lookfar.training.run import run_whole
from lookfar.training.train import Diverged, Interrupted

NAMES = ["rope-s3", "rope-s1", "alibi-s3", "alibi-s1"]  # neither schemes nor seeds in alphabetical order


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The recipe of two schemes and two seeds."""
    place, choice = tmp_path_factory.mktemp("recipe"), random.Random(0)
    (place / "book.txt").write_text("".join("".join(choice.choices("abcdef ", k=20)) + "\n" for _ in range(60)))
    (place / "small.toml").write_text(f"""
        [model]
        width = 16
        layers = 1
        heads = 2
        context = 8
        dropout = 0.2
        device = "cpu"
        [data]
        source = "text_file"
        path = "{place / "book.txt"}"
        [training]
        updates = 4
        batch = 2
        checkpoint_every = 2
        precision = "float32"
        [evaluation]
        lengths = [8, 16]
        tokens = 32
        [study]
        schemes = ["rope", "alibi"]
        seeds = [3, 1]
    """)
    return place / "small.toml"


@pytest.fixture
def a_study(recipe):
    """The study, with overrides such as `study.seeds=[0]`."""
    return lambda *overrides: config.read(recipe, overrides, Study)


@pytest.fixture(autouse=True, scope="module")
def clock():
    """A clock that stands still, so that rows about time are the same bytes too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lookfar.training.train.time", SimpleNamespace(monotonic=lambda: 0.0))
        yield


class Watching:
    """Notes what each run tells, and calls `act` with the name of the run and the event."""

    def __init__(self, act=lambda name, event: None):
        self.act, self.titles, self.events = act, [], {}

    @contextmanager
    def __call__(self, title):
        name = title.split()[1].rstrip(":")
        self.titles.append(title)
        self.events[name] = []

        def watch(event):
            self.events[name].append(event)
            self.act(name, event)

        yield watch

    def trained(self):
        """The updates of each run."""
        updates = {
            name: [e["update"] for e in events if e["event"] == "update"] for name, events in self.events.items()
        }
        return {name: found for name, found in updates.items() if found}

    def measured(self):
        return [name for name, events in self.events.items() if any(e["event"] == "evaluation" for e in events)]


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """The folder of the study that was never interrupted."""
    place = tmp_path_factory.mktemp("whole") / "study"
    assert run_study(config.read(recipe, (), Study), place, Watching()) == {}
    return place


def contents(place):
    """What a study leaves: its rows and recipe, and the weights, log, rows and recipe of each run, in bytes."""
    kept = "rows.jsonl", "study.toml", "*/run.toml", "*/rows.jsonl", "*/log.jsonl", "*/checkpoints/4/model.safetensors"
    return {str(file.relative_to(place)): file.read_bytes() for kind in kept for file in sorted(place.glob(kind))}


def assert_same_end(place, whole):
    found, expected = contents(place), contents(whole)
    assert found.keys() == expected.keys() and len(found) == 2 + 4 * len(NAMES)
    assert [name for name in found if found[name] != expected[name]] == []


# Order


def test_every_scheme_is_trained_once_with_every_seed_in_the_order_told(a_study, tmp_path, whole):
    watching = Watching()
    assert run_study(a_study(), tmp_path / "study", watching) == {}
    assert watching.titles == [f"[{number}/4] {name}: " for number, name in enumerate(NAMES, start=1)]
    assert watching.trained() == {name: [1, 2, 3, 4] for name in NAMES}
    assert watching.measured() == NAMES
    assert sorted(each.name for each in (tmp_path / "study").iterdir() if each.is_dir()) == sorted(NAMES)
    assert_same_end(tmp_path / "study", whole)


def test_the_rows_of_all_runs_are_the_rows_of_the_study(whole):
    assert (whole / "rows.jsonl").read_bytes() == b"".join((whole / name / "rows.jsonl").read_bytes() for name in NAMES)
    rows = files.read_lines(whole / "rows.jsonl")
    about = [(row["run"], row["scheme"], row["seed"]) for row in rows]
    assert list(dict.fromkeys(about)) == [(name, name[:-3], int(name[-1])) for name in NAMES]
    perplexities = [row["value"] for row in rows if row["metric"] == "perplexity"]
    assert len(perplexities) == len(NAMES) * 2 * 2 and len(set(perplexities)) > 8  # the runs are not one run


def test_a_run_of_a_study_is_the_run_that_is_trained_alone(recipe, tmp_path, whole):
    content, name = config.read_toml(recipe), "alibi-s3"
    del content["study"]
    run_whole(config.build(content, ["model.scheme=alibi", "training.seed=3"]), tmp_path / name)
    for file in ("run.toml", "rows.jsonl", "log.jsonl", "checkpoints/4/model.safetensors"):
        assert (tmp_path / name / file).read_bytes() == (whole / name / file).read_bytes(), file


def test_a_study_is_rebuilt_from_its_folder(a_study, whole):
    assert config.read(whole / "study.toml", (), Study) == a_study()


def test_a_scheme_names_a_folder_in_one_way():
    assert slug("kerple + dape_v2(kernel=3)") == slug("kerple+dape_v2( kernel = 3 )") == "kerple+dape_v2-kernel=3"
    assert slug("nope + alibi") == slug("alibi") == "alibi"


@pytest.mark.parametrize("twice", ['study.schemes=["alibi", "rope", " alibi + nope"]', "study.seeds=[1, 0, 1]"])
def test_a_run_that_is_told_twice_is_refused(a_study, tmp_path, twice):
    with pytest.raises(UserError, match=r"(alibi|rope)-s[13] twice"):
        run_study(a_study(twice), tmp_path / "study", Watching())
    assert not (tmp_path / "study").exists()


# Stopped and gone on with


def interrupt(name, event):
    raise KeyboardInterrupt


def signalled(name, event):
    os.kill(os.getpid(), signal.SIGINT)


STOPS = {
    "while the second run trains": ("rope-s1", "update", 3, signalled, Interrupted),
    "twice, while the second run trains": ("rope-s1", "update", 3, interrupt, KeyboardInterrupt),
    "before the first update of the third run": ("alibi-s3", "start", 0, interrupt, KeyboardInterrupt),
    "while the first run is measured": ("rope-s3", "evaluation", None, interrupt, KeyboardInterrupt),
    "while the last run is measured": ("alibi-s1", "evaluation", None, interrupt, KeyboardInterrupt),
}


@pytest.mark.parametrize("stop", STOPS)
def test_an_interrupted_study_goes_on_where_it_was_and_ends_the_same(a_study, tmp_path, whole, stop):
    where, kind, update, act, error = STOPS[stop]

    def at(name, event):
        if (name, event["event"], event.get("update")) == (where, kind, update):
            act(name, event)

    first, second = Watching(at), Watching()
    with pytest.raises(error):
        run_study(a_study(), tmp_path, first)
    assert list(first.events) == NAMES[: NAMES.index(where) + 1]
    assert not (tmp_path / "rows.jsonl").exists()
    assert run_study(a_study(), tmp_path, second) == {}
    assert_same_end(tmp_path, whole)
    for name in NAMES[: NAMES.index(where)]:
        assert {event["event"] for event in second.events[name]} <= {"start", "data"}, name
    if act is signalled:
        assert second.trained()[where] == [4]  # what was done is saved


def test_a_study_that_is_asked_to_stop_in_the_last_update_of_a_run_begins_no_other(a_study, tmp_path):
    def at(name, event):
        if (name, event["event"], event.get("update")) == ("rope-s3", "update", 4):
            os.kill(os.getpid(), signal.SIGINT)

    watching = Watching(at)
    with pytest.raises((Interrupted, KeyboardInterrupt)):
        run_study(a_study(), tmp_path, watching)
    assert list(watching.events) == ["rope-s3"]


CHILD = """
import sys
from contextlib import nullcontext
from pathlib import Path
from time import sleep
from types import SimpleNamespace
from lookfar import config
from lookfar.study.runner import run_study
from lookfar.training import checkpoint, train

train.time = SimpleNamespace(monotonic=lambda: 0.0)

def wait(event):
    if event["event"] == "update" and event["update"] == 3:
        while checkpoint.read_manifest(Path(sys.argv[2]) / "rope-s1").get("last") != 2:
            sleep(0.01)  # it is written beside the next update
        print("in the middle", flush=True)
        sys.stdin.read()

run_study(
    config.read(Path(sys.argv[1]), (), config.Study),
    Path(sys.argv[2]),
    lambda title: nullcontext(wait if "rope-s1" in title else lambda event: None),
)
"""


def test_a_study_holds_its_folder_until_it_is_killed_and_then_another_goes_on(recipe, a_study, tmp_path, whole):
    words = [sys.executable, "-c", CHILD, str(recipe), str(tmp_path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout.readline() == "in the middle\n"
            before, second = contents(tmp_path), Watching()
            with pytest.raises(UserError, match=r"Another process works in .*; wait for it, or choose another folder"):
                run_study(a_study("study.seeds=[5]"), tmp_path, second)
            assert second.titles == [] and contents(tmp_path) == before
        finally:
            child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    assert checkpoint.updates(tmp_path / "rope-s1") == [2]
    third = Watching()
    assert run_study(a_study(), tmp_path, third) == {}
    assert third.trained() == {"rope-s1": [3, 4], "alibi-s3": [1, 2, 3, 4], "alibi-s1": [1, 2, 3, 4]}
    assert_same_end(tmp_path, whole)


# Asked again


def test_a_finished_study_that_is_asked_again_trains_and_measures_nothing(a_study, tmp_path):
    run_study(a_study("study.seeds=[3]"), tmp_path, Watching())
    before, checkpoints = contents(tmp_path), [f.stat().st_mtime_ns for f in sorted(tmp_path.rglob("*.safetensors"))]
    watching = Watching()
    assert run_study(a_study("study.seeds=[3]"), tmp_path, watching) == {}
    assert list(watching.events) == ["rope-s3", "alibi-s3"]
    assert watching.trained() == {} and watching.measured() == []
    assert contents(tmp_path) == before
    assert [f.stat().st_mtime_ns for f in sorted(tmp_path.rglob("*.safetensors"))] == checkpoints


def test_schemes_and_seeds_may_join_a_study_later(a_study, tmp_path, whole):
    run_study(a_study('study.schemes=["alibi"]', "study.seeds=[1]"), tmp_path, Watching())
    watching = Watching()
    assert run_study(a_study(), tmp_path, watching) == {}
    assert list(watching.trained()) == ["rope-s3", "rope-s1", "alibi-s3"]
    assert_same_end(tmp_path, whole)


def test_a_changed_recipe_in_the_same_folder_is_refused_with_the_key(a_study, tmp_path):
    run_study(a_study("study.seeds=[3]"), tmp_path, Watching())
    before, watching = contents(tmp_path), Watching()
    told = _refusal(a_study("study.seeds=[3]", "training.rate=0.5"), tmp_path, watching)
    assert "rope-s3 holds a run with other settings: training.rate (0.001 -> 0.5)" in told
    assert watching.trained() == {} and watching.measured() == []
    after = contents(tmp_path)
    assert [name for name in before if name != "study.toml" and after[name] != before[name]] == []


def test_a_changed_recipe_begins_none_of_the_runs_that_are_left(a_study, tmp_path):
    run_study(a_study("study.seeds=[3]"), tmp_path, Watching())
    before, watching = contents(tmp_path), Watching()
    assert "training.rate (0.001 -> 0.5)" in _refusal(a_study("training.rate=0.5"), tmp_path, watching)
    assert watching.trained() == {}
    assert contents(tmp_path) == before  # study.toml too says what was trained


def _refusal(study, place, watching):
    """What a study is refused with, at the door or run by run."""
    try:
        return " ".join(run_study(study, place, watching).values())
    except UserError as error:
        return str(error)


def test_runs_that_are_not_of_the_study_are_told(a_study, tmp_path):
    run_study(a_study('study.schemes=["rope"]'), tmp_path, Watching())
    watching = Watching()
    run_study(a_study('study.schemes=["alibi"]', "study.seeds=[3]", "training.rate=0.01"), tmp_path, watching)
    assert [title for title in watching.titles if "folder" in title] == ["[0/1] folder: "]
    assert watching.events["folder"][0]["text"] == (
        f"{tmp_path} holds runs that are not of this study, and its report shows them: rope-s1, rope-s3"
    )


# Mistakes and failures


def everything(place):
    return {file: file.read_bytes() for file in sorted(place.rglob("*")) if file.is_file()}


def test_a_study_leaves_the_folder_of_a_run_as_it_is(a_study, recipe, tmp_path):
    content = config.read_toml(recipe)
    del content["study"]
    run_whole(config.build(content), tmp_path)
    before, watching = everything(tmp_path), Watching()
    with pytest.raises(UserError, match="holds a run, whose rows a study would replace; choose another folder"):
        run_study(a_study(), tmp_path, watching)
    assert everything(tmp_path) == before and watching.titles == []


def test_a_run_leaves_the_folder_of_a_study_as_it_is(recipe, tmp_path, whole):
    place, content = shutil.copytree(whole, tmp_path / "study"), config.read_toml(recipe)
    del content["study"]
    before = everything(place)
    with pytest.raises(UserError, match="holds a study, whose rows a run would remove; choose another folder"):
        run_whole(config.build(content), place)
    assert everything(place) == before


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ('study.schemes=["rope", "alibbi"]', "Did you mean 'alibi'"),
        ('study.schemes=["rope", "rope(bsae=3)"]', "Did you mean 'base'"),
        ('study.schemes=["rope", "sinusoidal + learned"]', "cannot be combined"),
        ('study.schemes=["rope", "learned"]', "model.positions=16"),  # measured beyond its table
        ('study.schemes=["rope", "differential(depth=)"]', "differential"),
    ],
)
def test_a_scheme_that_cannot_be_built_is_refused_before_anything_is_trained(a_study, tmp_path, wrong, told):
    watching = Watching()
    with pytest.raises(UserError) as refused:
        run_study(a_study(wrong), tmp_path / "study", watching)
    assert told in str(refused.value)
    assert watching.titles == [] and not (tmp_path / "study").exists()


def test_a_run_that_fails_costs_no_other_and_is_tried_again(a_study, tmp_path, whole):
    def fail(name, event):
        if (name, event["event"], event.get("update")) == ("rope-s1", "update", 3):
            raise ArithmeticError("the sums are wrong")

    first, second = Watching(fail), Watching()
    failed = run_study(a_study(), tmp_path, first)
    assert failed == {"rope-s1": "ArithmeticError: the sums are wrong (see rope-s1/error.txt)"}
    assert list(first.events) == NAMES
    lines = (tmp_path / "rope-s1" / "error.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("Traceback") and lines[-1] == "ArithmeticError: the sums are wrong"
    assert {row["run"] for row in files.read_lines(tmp_path / "rows.jsonl")} == {*NAMES} - {"rope-s1"}
    assert run_study(a_study(), tmp_path, second) == {}
    assert second.trained() == {"rope-s1": [3, 4]}
    assert not (tmp_path / "rope-s1" / "error.txt").exists()
    assert_same_end(tmp_path, whole)


def failing(what):
    """A watch that raises in the first update of the first run."""

    def fail(name, event):
        if name == "rope-s3" and event["event"] == "update":
            raise what

    return Watching(fail)


def test_the_reason_in_the_folder_is_that_of_the_last_attempt(a_study, tmp_path):
    study, error = a_study("study.seeds=[3]"), tmp_path / "rope-s3" / "error.txt"
    run_study(study, tmp_path, failing(ArithmeticError("the sums are wrong")))
    assert "the sums are wrong" in error.read_text()
    assert run_study(study, tmp_path, failing(Diverged("The loss is nan."))) == {"rope-s3": "The loss is nan."}
    assert error.read_text() == "The loss is nan.\n"
    with pytest.raises(KeyboardInterrupt):
        run_study(study, tmp_path, failing(KeyboardInterrupt()))
    assert not error.exists()


def test_a_full_disk_costs_no_reason_and_no_other_run(a_study, tmp_path, monkeypatch):
    write = files.write

    def full(file, content):
        if file.name == "error.txt":
            raise OSError(28, "No space left on device")
        write(file, content)

    monkeypatch.setattr(files, "write", full)
    watching = failing(OSError(28, "No space left on device"))
    failed = run_study(a_study("study.seeds=[3]"), tmp_path, watching)
    assert failed == {"rope-s3": "OSError: [Errno 28] No space left on device"}
    assert list(watching.events) == ["rope-s3", "alibi-s3"]


def test_a_process_that_dies_twice_leaves_its_reason(a_study, tmp_path, monkeypatch):
    monkeypatch.setattr("lookfar.study.workers.sys.executable", shutil.which("false"))
    failed = run_study(a_study('study.schemes=["rope"]', "study.seeds=[3]"), tmp_path, Watching(), workers=1)
    assert failed == {"rope-s3": "Its process died twice (exit code 1)."}
    assert (tmp_path / "rope-s3" / "error.txt").read_text() == "Its process died twice (exit code 1).\n"


# The command


def command(monkeypatch, capsys, *words):
    """The exit code of `lookfar study`, and what it printed on stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["lookfar", "study", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    out, err = capsys.readouterr()
    return left.value.code or 0, out, err


def test_a_study_ends_with_its_report(recipe, tmp_path, monkeypatch, capsys):
    words = recipe, "--folder", tmp_path, "--set", "study.seeds=[3]", "--set", "study.title=Two of them"
    code, out, err = command(monkeypatch, capsys, *words)
    assert code == 0 and out == f"The report is {tmp_path / 'report.html'}\n"
    assert "[1/2] rope-s3: training" in err and "[2/2] alibi-s3: training" in err
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<h1>Two of them</h1>" in page and "2 schemes, 2 runs, trained at 8 tokens and measured up to 16" in page
    assert "Not complete" not in page
    for name in ("perplexity", "loss"):
        drawn = " ".join(ElementTree.parse(tmp_path / "figures" / f"{name}.svg").getroot().itertext())
        assert "rope" in drawn and "alibi" in drawn
        assert (tmp_path / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")


def test_an_interrupted_study_says_how_to_go_on_and_the_same_command_does(recipe, tmp_path, monkeypatch, capsys):
    def stop(name, event):
        if (name, event["event"], event.get("update")) == ("alibi-s3", "update", 2):
            os.kill(os.getpid(), signal.SIGTERM)

    words = recipe, "--folder", tmp_path, "--set", "study.seeds=[3]"
    with monkeypatch.context() as patch:
        patch.setattr("lookfar.cli.progress.watching", Watching(stop))
        code, out, err = command(monkeypatch, capsys, *words)
    assert code == 128 + signal.SIGTERM and out == ""
    assert err == "Interrupted after 2 updates; all of them are saved. The same command goes on from there.\n"
    assert not (tmp_path / "report.html").exists()
    code, out, err = command(monkeypatch, capsys, *words)
    assert code == 0 and "[1/2] rope-s3: already trained" in err and "[2/2] alibi-s3: resuming at update 2" in err
    assert (tmp_path / "report.html").exists()


def test_a_run_that_failed_is_told_after_the_report_and_on_it(recipe, tmp_path, monkeypatch, capsys):
    def fail(name, event):
        if name == "rope-s3" and event["event"] == "start":
            raise ArithmeticError("the sums are wrong")

    monkeypatch.setattr("lookfar.cli.progress.watching", Watching(fail))
    code, out, err = command(monkeypatch, capsys, recipe, "--folder", tmp_path, "--set", "study.seeds=[3]")
    assert code == 1 and "The report is" in out
    assert err == "failed: rope-s3: ArithmeticError: the sums are wrong (see rope-s3/error.txt)\n"
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "rope-s3 (rope, seed 3): failed (ArithmeticError: the sums are wrong)" in page
