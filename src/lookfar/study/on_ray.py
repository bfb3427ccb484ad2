"""Does jobs on a Ray cluster: that of RAY_ADDRESS, or a local one. Its machines share the study's folder."""

import logging
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lookfar.errors import UserError
from lookfar.study.work import Job, do, from_plain, leave_reason
from lookfar.study.workers import Stopped, Watching
from lookfar.training import folder as run_folder
from lookfar.training.train import Interrupted

OURS = {  # of Ray, unless the user says otherwise
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent
    "RAY_task_oom_retries": "1",  # by default a task that does not fit is begun again for ever
}
PATIENCE = 30.0  # seconds in which a worker that has lost its machine must have left the folder of its run


class OnRay:
    """Each job is a task with processors, or a GPU, of its own; where a machine dies, it is begun again once."""

    def __init__(self, ray: Any, places: int | None, watching: Watching) -> None:
        there = ray.cluster_resources()
        gpus, processors = int(there.get("GPU", 0)), int(there.get("CPU", 1))
        self.ray, self.watching = ray, watching
        self.places = max(1, places or gpus or processors)  # a cluster that grows may show none yet
        most = max(int(node["Resources"].get("CPU", 1)) for node in ray.nodes() if node["Alive"])
        share = 1 if places is None else max(1, min(most, processors // places))
        options = {"num_cpus": share, "max_retries": 1, **({"num_gpus": 1} if gpus else {})}
        self.work = ray.remote(**options)(_work)
        self.running: dict[Any, Job] = {}

    def start(self, job: Job) -> None:
        """Send the job."""
        job = Job(job.title, job.folder.resolve(), job.run, job.notes)
        self._tell(job, "sent to the cluster")
        self.running[self.work.remote(job.to_plain(), str(Path.cwd()))] = job

    def ended(self) -> tuple[str, str | None]:
        """Wait until a job ends."""
        (first, *_), _ = self.ray.wait(list(self.running), num_returns=1)
        job = self.running.pop(first)
        try:
            reason = self.ray.get(first)
        except self.ray.exceptions.RayTaskError as error:  # it lived, and raised
            reason = leave_reason(job.folder, f"{type(error.cause).__name__}: {error.cause}")
        except self.ray.exceptions.RayError as error:
            reason = leave_reason(job.folder, f"Its worker died twice ({type(error).__name__}).")
        self._tell(job, reason or "done")
        return job.name, reason

    def stop(self) -> None:
        """Ask all tasks to save and leave, and wait until they have."""
        for reference in self.running:
            self.ray.cancel(reference, recursive=False)  # as Ctrl-C in the task
        if self.running:
            self.ray.wait(list(self.running), num_returns=len(self.running))

    def _tell(self, job: Job, text: str) -> None:
        with self.watching(job.title) as watch:
            watch({"event": "note", "text": text})


@contextmanager
def connected(places: int | None, watching: Watching) -> Iterator[OnRay]:
    """The cluster; it is left as it was found.

    Raises:
        UserError: Ray is not installed, or no cluster answers.
        Stopped: a signal came, and the runs have saved what they did.
    """
    ray = imported()
    own = not ray.is_initialized()
    try:
        if own:
            _join(ray)
        with _asked_to_stop() as asked:
            pool = OnRay(ray, places, watching)
            try:
                yield pool
            except KeyboardInterrupt:
                pool.stop()
                raise Stopped(asked[0] if asked else signal.SIGINT) from None
    finally:
        if own:
            ray.shutdown()


def imported() -> Any:
    """The library, or a `UserError` that says how to install it."""
    for name, value in OURS.items():  # some are read when the library is
        os.environ.setdefault(name, value)
    try:
        return import_module("ray")
    except ImportError as error:
        raise UserError('Ray is not installed; install it with: pip install "lookfar[cluster]".') from error


def _join(ray: Any) -> None:
    """Join the cluster of RAY_ADDRESS, or start one of this machine."""
    address = os.environ.get("RAY_ADDRESS", "")
    before = signal.getsignal(signal.SIGTERM)
    try:
        _knock(address)
        ray.init(log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
    except OSError as error:  # of the network
        raise UserError(f"No Ray cluster answers at RAY_ADDRESS={address!r}; correct it, or unset it.") from error
    finally:
        with suppress(ValueError):  # only the main thread hears signals
            signal.signal(signal.SIGTERM, before)  # Ray takes it for itself


def _knock(address: str) -> None:
    """Raise an `OSError` where nobody listens: Ray would ask again for a quarter of an hour."""
    place = urlsplit(address if "//" in address else f"//{address}")
    if place.hostname and place.port:  # not a word such as `auto`
        socket.create_connection((place.hostname, place.port), timeout=10).close()


@contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """Let SIGTERM interrupt as Ctrl-C does; collects the signals that came."""
    asked: list[int] = []
    before: dict[int, Any] = {}

    def interrupt(number: int, frame: Any) -> None:
        asked.append(number)
        raise KeyboardInterrupt

    with suppress(ValueError):
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, interrupt)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _work(content: dict[str, Any], place: str) -> str | None:
    """The task; it works where the study was started, if that folder is there."""
    if Path(place).is_dir():
        os.chdir(place)  # paths of a recipe are relative to it
    job = from_plain(content)
    _wait_until_free(job.folder)
    try:
        return do(job, lambda event: None)
    except Interrupted as stop:
        return str(stop)


def _wait_until_free(folder: Path) -> None:
    """Let a worker that had the run before, and whose machine is taken for dead, leave; whoever stays is told of."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            with run_folder.claim(folder):
                return
        except UserError:
            time.sleep(0.5)
