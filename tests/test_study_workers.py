"""Who does the runs of a study changes nothing of them: this process, several, or a Ray cluster, however they die."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from lookfar import config, files
from lookfar.config import Study
from lookfar.errors import UserError
from lookfar.study import on_ray, workers
from lookfar.study.runner import run_study
from lookfar.study.work import do
from lookfar.training import checkpoint, folder
from lookfar.training.train import Interrupted
from test_study import Watching

OF_TIME = ("training_seconds", "tokens_per_second")
UPDATES = 300  # a second or so: enough to be killed in
PATIENCE = 300  # seconds; a machine may be busy with other tests


@pytest.fixture(scope="module")
def a_study(tmp_path_factory):
    book = tmp_path_factory.mktemp("book") / "book.txt"
    book.write_text("to be or not to be that is the question\n" * 60)

    def build(*overrides):
        content = {
            "model": {"width": 16, "layers": 1, "heads": 2, "context": 8, "device": "cpu", "dropout": 0.1},
            "data": {"source": "text_file", "path": str(book)},
            "training": {"updates": UPDATES, "batch": 2, "checkpoint_every": 100, "precision": "float32"},
            "evaluation": {"lengths": [8, 16], "tokens": 64, "protocols": ["non_overlapping"]},
            "study": {"schemes": ["rope", "alibi"], "seeds": [3]},
        }
        return config.build(content, overrides, Study)

    return build


@pytest.fixture(scope="module")
def whole(a_study, tmp_path_factory):
    """What the runs give when they are done here, one after another."""
    place = tmp_path_factory.mktemp("whole")
    assert run_study(a_study(), place, Watching()) == {}
    return contents(place)


def contents(place, updates=UPDATES):
    """The rows of a study that are not about time, and the weights of its runs."""
    rows = [row for row in files.read_lines(place / "rows.jsonl") if row["metric"] not in OF_TIME]
    last = sorted(place.glob(f"*/checkpoints/{updates}/model.safetensors"))
    return rows, [(file.parts[-4], file.read_bytes()) for file in last]


@pytest.fixture
def started(monkeypatch):
    """The processes that were started."""
    found, start = [], subprocess.Popen
    monkeypatch.setattr(workers.subprocess, "Popen", lambda *a, **k: found.append(start(*a, **k)) or found[-1])
    yield found
    assert all(process.poll() is not None for process in found)


def kill_first(name, started, times=1):
    """A watch that kills the process of a run when it has told its first update, so many times."""
    left = [times]

    def act(told, event):
        if (told, event["event"]) == (name, "update") and left[0]:
            left[0] -= 1
            (mine,) = (process for process in started if process.poll() is None and _does(process, name))
            mine.kill()

    return act


def _does(process, name):
    """Whether a process holds the folder of a run open."""
    for link in Path(f"/proc/{process.pid}/fd").iterdir():
        with suppress(OSError):  # it was closed in between
            if f"/{name}/" in str(link.readlink()):
                return True
    return False


def test_two_workers_give_the_rows_of_one(a_study, whole, started, tmp_path):
    watching = Watching()
    assert run_study(a_study(), tmp_path, watching, workers=2) == {}
    assert contents(tmp_path) == whole
    assert len(started) == 2 and started[0].returncode == started[1].returncode == 0
    kinds = {event["event"] for events in watching.events.values() for event in events}
    assert {"start", "update", "evaluation"} <= kinds
    assert run_study(a_study(), tmp_path, Watching(), workers=2) == {} and contents(tmp_path) == whole
    assert len(started) == 2  # to see that all is done needs no process


def test_a_worker_that_is_killed_is_begun_again_once(a_study, whole, started, tmp_path):
    assert run_study(a_study(), tmp_path, Watching(kill_first("alibi-s3", started)), workers=2) == {}
    assert sorted(process.returncode for process in started) == [-9, 0, 0]
    assert contents(tmp_path) == whole


@pytest.mark.long
def test_a_worker_that_is_killed_twice_fails_and_costs_no_other(a_study, whole, started, tmp_path):
    failed = run_study(a_study(), tmp_path, Watching(kill_first("rope-s3", started, times=2)), workers=1)
    assert failed == {"rope-s3": "Its process died twice (signal 9)."}
    assert [process.returncode for process in started] == [-9, -9, 0]
    assert run_study(a_study(), tmp_path, Watching()) == {}  # another way goes on with it
    assert contents(tmp_path) == whole


def test_a_signal_stops_all_workers_after_they_have_saved(a_study, whole, started, tmp_path):
    told = []

    def stop(name, event):
        if event["event"] == "update" and not told:  # a second signal would not wait for what is saved
            told.append(name)
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="what its runs did is saved") as stopped:
        run_study(
            a_study("training.updates=100000", "training.checkpoint_every=none"),
            tmp_path / "long",
            Watching(stop),
            workers=2,
        )
    assert stopped.value.signal == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is before
    assert (tmp_path / "long" / "study.toml").exists() and not (tmp_path / "long" / "rows.jsonl").exists()
    assert list((tmp_path / "long").glob("*/checkpoints/*/hashes.json"))


CHILD = """
import sys
from contextlib import nullcontext
from pathlib import Path
from lookfar import config
from lookfar.study.runner import run_study

def tell(event):
    if event["event"] == "update":
        print("training", flush=True)

study = config.read(Path(sys.argv[1]), (), config.Study)
run_study(study, Path(sys.argv[2]), lambda title: nullcontext(tell), workers=1)
"""


@pytest.mark.long
def test_workers_save_and_leave_when_the_study_is_killed_and_another_goes_on(a_study, whole, tmp_path):
    (tmp_path / "recipe.toml").write_text(config.write_toml(a_study().model_dump()))
    words = [sys.executable, "-c", CHILD, str(tmp_path / "recipe.toml"), str(tmp_path / "study")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "training\n"
        child.kill()

    def left():
        with suppress(UserError), folder.claim(tmp_path / "study" / "rope-s3"):
            return True

    assert in_time(left), "the worker has left"
    assert run_study(a_study(), tmp_path / "study", Watching()) == {}
    assert contents(tmp_path / "study") == whole


def test_a_mistake_in_a_worker_is_told_as_it_is_here(a_study, tmp_path):
    failed = run_study(
        a_study("training.rate=1e30", "training.clip=none", "study.schemes=['rope']"), tmp_path, Watching(), workers=1
    )
    assert "is nan" in failed["rope-s3"] or "is inf" in failed["rope-s3"]


def test_each_worker_has_its_share_of_the_processors_and_a_gpu_of_its_own(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(workers.os, "cpu_count", lambda: 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    found = [workers._environment(place, 3) for place in range(3)]
    assert [each["OMP_NUM_THREADS"] for each in found] == ["2", "2", "2"]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in found] == ["2", "5", "2"]


# Ray


def test_a_study_on_ray_without_ray_says_what_to_install(a_study, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r'pip install "lookfar\[cluster\]"'):
        run_study(a_study(), tmp_path, Watching(), on="ray")


class Cluster:
    """What is used of Ray; a task is done when it is waited for, that of a run in `deaths` is lost."""

    def __init__(self, deaths=()):
        self.deaths, self.options, self.open = deaths, [], False
        self.exceptions = SimpleNamespace(RayTaskError=KeyError, RayError=ConnectionError)

    def init(self, **options):
        self.open = True

    def shutdown(self):
        self.open = False

    def is_initialized(self):
        return self.open

    def cluster_resources(self):
        return {"CPU": 6.0}

    def nodes(self):
        return [{"Alive": True, "Resources": {"CPU": 2.0}}, {"Alive": True, "Resources": {"CPU": 4.0}}]

    def remote(self, **options):
        self.options.append(options)
        return lambda function: SimpleNamespace(remote=lambda *words: partial(function, *words))

    def wait(self, tasks, num_returns):
        return tasks[:num_returns], tasks[num_returns:]

    def get(self, task):
        if Path(task.args[0]["folder"]).name in self.deaths:
            raise self.exceptions.RayError
        return task()


def test_what_is_asked_of_ray_gives_the_same_rows(a_study, whole, tmp_path, monkeypatch):
    cluster = Cluster(deaths=["alibi-s3"])
    monkeypatch.setitem(sys.modules, "ray", cluster)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    failed = run_study(a_study(), tmp_path, Watching(), workers=3, on="ray")
    assert failed == {"alibi-s3": "Its worker died twice (ConnectionError)."} and not cluster.open
    assert cluster.options == [{"num_cpus": 2, "max_retries": 1}]
    cluster.deaths = ()
    assert run_study(a_study(), tmp_path, Watching(), on="ray") == {}
    assert contents(tmp_path) == whole


def test_a_cluster_that_shows_no_processor_yet_has_a_place(a_study, tmp_path, monkeypatch):
    cluster = Cluster(deaths=["rope-s3"])
    cluster.cluster_resources = lambda: {"CPU": 0.0}
    monkeypatch.setitem(sys.modules, "ray", cluster)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with on_ray.connected(None, Watching()) as pool:
        assert pool.places == 1
    died = "Its worker died twice (ConnectionError)."
    assert run_study(a_study("study.schemes=['rope']"), tmp_path, Watching(), on="ray") == {"rope-s3": died}
    assert (tmp_path / "rope-s3" / "error.txt").read_text() == f"{died}\n"


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
def test_a_cluster_that_does_not_answer_is_told_at_once(a_study, tmp_path, monkeypatch, address):
    cluster = Cluster()
    monkeypatch.setitem(sys.modules, "ray", cluster)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=r"No Ray cluster answers at RAY_ADDRESS='.*:1'; correct it, or unset it"):
        run_study(a_study(), tmp_path, Watching(), on="ray")
    assert not list(tmp_path.glob("*/run.toml"))


@contextmanager
def a_cluster(monkeypatch, *processors):
    """Ray's own cluster of several nodes in this machine, where RAY_ADDRESS finds it."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": processors[0]})
    try:
        nodes = [cluster.add_node(num_cpus=each) for each in processors[1:]]
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        yield cluster, nodes
    finally:
        cluster.shutdown()


@contextmanager
def meanwhile(act):
    """Do something in a thread while something else is done; what it raises is raised."""
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(act)
        yield
        future.result(PATIENCE)


def in_time(condition):
    """What a condition gives as soon as it gives something, or a failure after `PATIENCE`."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.01)
    raise TimeoutError("what a test waits for does not come")


def workers_in(place):
    """The processes, other than this one, that hold this folder or a file in it open."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it is gone, or another user's
            if any(str(link.readlink()).startswith(f"{place}/") for link in (process / "fd").iterdir()):
                found.append(int(process.name))
    return [each for each in found if each != os.getpid()]


def saved(place):
    """Whether a run has saved and goes on."""
    return list(place.glob("checkpoints/*/hashes.json")) and "finished" not in checkpoint.read_manifest(place)


def task(marks, act):
    """A task in place of ours: at all that is told of its run once it has saved, `act` is called with its name and try.

    Ray carries a function inside a function to workers that do not know this file. A file at `marks` counts tries.
    """

    def work(content, place):
        def watch(event):
            if list(run.glob("checkpoints/*/hashes.json")):
                act(run.name, tries)

        run = Path(content["folder"])
        with (marks / run.name).open("a") as file:
            file.write("x")
        tries = len((marks / run.name).read_text())
        on_ray.do = lambda job, told: do(job, watch)
        return on_ray._work(content, place)

    marks.mkdir()
    return work


@pytest.mark.long
def test_a_node_that_is_killed_in_the_midst_of_a_run_costs_nothing(a_study, whole, tmp_path, monkeypatch):
    place, marks, names = tmp_path / "study", tmp_path / "marks", ["rope-s3", "alibi-s3"]
    of_node = []

    def wait(name, tries):
        while not (marks / "on").exists():
            time.sleep(0.01)

    def kill():
        try:
            in_time(lambda: all(saved(place / name) for name in names))
            before = {name: workers_in(place / name) for name in names}
            cluster.remove_node(other, allow_graceful=False)
            left = in_time(lambda: [name for name in names if not set(before[name]) & set(workers_in(place / name))])
            of_node.extend(left)
        finally:
            (marks / "on").touch()

    monkeypatch.setattr(on_ray, "_work", task(marks, wait))
    with a_cluster(monkeypatch, 1, 1) as (cluster, [other]), meanwhile(kill):  # each node has room for one run
        assert run_study(a_study(), place, Watching(), on="ray") == {}
    assert len(of_node) == 1
    assert contents(place) == whole


@pytest.mark.long
def test_a_local_cluster_is_started_and_a_worker_that_dies_is_begun_again_once(a_study, whole, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    place, marks = tmp_path / "study", tmp_path / "marks"

    def die(name, tries):
        if name == "rope-s3" or tries == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(on_ray, "_work", task(marks, die))
    before = signal.getsignal(signal.SIGTERM)
    failed = run_study(a_study(), place, Watching(), on="ray")
    assert failed == {"rope-s3": "Its worker died twice (WorkerCrashedError)."}
    assert {mark.name: mark.read_text() for mark in marks.iterdir()} == {"alibi-s3": "xx", "rope-s3": "xx"}
    assert not ray.is_initialized() and signal.getsignal(signal.SIGTERM) is before
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert run_study(a_study(), place, Watching()) == {}
    assert contents(place) == whole


class Broken:
    """A job that arrives at a worker as nothing, and leaves a mark there."""

    def __init__(self, tries):
        self.tries = tries

    def __reduce__(self):
        return exec, (f"with open({str(self.tries)!r}, 'a') as file: file.write('x')",)


@pytest.mark.long
def test_a_run_that_fails_on_ray_is_told_as_it_is_here_and_not_begun_again(a_study, tmp_path, monkeypatch):
    with a_cluster(monkeypatch, 1):
        overrides = ("training.rate=1e30", "training.clip=none", "study.schemes=['rope']")
        failed = run_study(a_study(*overrides), tmp_path / "far", Watching(), on="ray")
        assert "is nan" in failed["rope-s3"] or "is inf" in failed["rope-s3"]
        tries = tmp_path / "tries"
        monkeypatch.setattr("lookfar.study.work.Job.to_plain", lambda job: Broken(tries))
        failed = run_study(a_study("study.schemes=['rope']"), tmp_path / "broken", Watching(), on="ray")
    assert failed == {"rope-s3": "TypeError: 'NoneType' object is not subscriptable"}
    assert tries.read_text() == "x"


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_what_runs_on_ray_after_it_has_saved(a_study, tmp_path, monkeypatch, number):
    endless = a_study("training.updates=1000000", "training.checkpoint_every=none")

    def stop():
        in_time(lambda: (tmp_path / "rope-s3" / "log.jsonl").exists())
        os.kill(os.getpid(), number)

    with a_cluster(monkeypatch, 1), meanwhile(stop), pytest.raises(Interrupted, match="is saved") as stopped:
        run_study(endless, tmp_path, Watching(), on="ray")
    assert stopped.value.signal == number
    assert list(tmp_path.glob("rope-s3/checkpoints/*/hashes.json"))
    assert not (tmp_path / "alibi-s3").exists()  # it had not begun
