"""Does jobs here, one after another, or in processes of their own, several at a time on this machine."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import torch

from lookfar.study.work import Job, do, leave_reason
from lookfar.training.log import Watch
from lookfar.training.train import Interrupted

Watching = Callable[[str], AbstractContextManager[Watch]]


class Stopped(Interrupted):
    """A study was asked to stop; its runs have saved what they did."""

    def __init__(self, number: int) -> None:
        Exception.__init__(self, "Interrupted; what its runs did is saved.")
        self.update, self.signal = 0, number


class Here:
    """Does each job in this process when its end is waited for."""

    places = 1

    def __init__(self, watching: Watching) -> None:
        self.watching = watching
        self.job: Job | None = None

    def start(self, job: Job) -> None:
        """Take the job."""
        self.job = job

    def ended(self) -> tuple[str, str | None]:
        """Do it."""
        job, self.job = self.job, None
        assert job is not None
        with self.watching(job.title) as watch:
            return job.name, do(job, watch)


class Workers:
    """Does each job in a process of its own; one that dies without an answer is begun again once, where it saved.

    A signal to stop is passed on, once, and the processes save before they leave. Should this process be killed, they
    notice and do the same.
    """

    def __init__(self, places: int, watching: Watching) -> None:
        self.places, self.watching = places, watching
        self.told: queue.Queue[tuple[_Worker, str | None]] = queue.Queue()
        self.workers: list[_Worker] = []
        self.asked: int | None = None  # the signal to stop

    def start(self, job: Job) -> None:
        """Start a process for the job."""
        free = set(range(self.places)) - {worker.place for worker in self.workers}
        self._begin(job, min(free), again=False)

    def ended(self) -> tuple[str, str | None]:
        """Wait until a job ends.

        Raises:
            Stopped: a signal came; no process is left.
        """
        while True:
            if self.asked and not self.workers:
                raise Stopped(self.asked)
            worker, line = self.told.get()
            event = {} if line is None else json.loads(line)
            if line is not None and "ended" not in event:
                worker.watch(event)
                continue
            if line is not None:
                worker.answer = event["ended"]
                continue
            code = worker.close()
            self.workers.remove(worker)
            if worker.answer is not None:
                return worker.job.name, worker.answer or None
            if self.asked:
                continue
            death = f"signal {-code}" if code < 0 else f"exit code {code}"
            if worker.again:
                return worker.job.name, leave_reason(worker.job.folder, f"Its process died twice ({death}).")
            self._begin(worker.job, worker.place, again=True, note=f"its process died ({death}); it is begun again")

    def stop(self, number: int, frame: Any = None) -> None:
        """Ask all processes to save and leave; a second time, to leave at once."""
        self.asked = self.asked or number
        for worker in self.workers:
            worker.stop()

    def _begin(self, job: Job, place: int, *, again: bool, note: str | None = None) -> None:
        if self.asked:
            return
        worker = _Worker(job, place, again, self.places, self.watching, self.told)
        self.workers.append(worker)
        if note:
            worker.watch({"event": "note", "text": note})
        if self.asked and not worker.asked:  # while the process was started
            worker.stop()


class _Worker:
    """A process with one job, and what it has told so far."""

    def __init__(
        self,
        job: Job,
        place: int,
        again: bool,
        places: int,
        watching: Watching,
        told: "queue.Queue[tuple[_Worker, str | None]]",
    ) -> None:
        self.job, self.place, self.again = job, place, again
        self.answer: str | None = None  # why the job failed; empty: it did not
        self.asked = False  # to stop
        self.watched = watching(job.title)
        self.watch = self.watched.__enter__()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lookfar.study.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=_environment(place, places),
            start_new_session=True,  # a terminal's Ctrl-C comes here alone, and is passed on
        )
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it died at once, and its end will be told
            self.process.stdin.write(json.dumps(job.to_plain()) + "\n")
            self.process.stdin.flush()
        self.reader = threading.Thread(target=self._read, args=(told,), daemon=True)
        self.reader.start()

    def stop(self) -> None:
        """Ask the process to save and leave."""
        self.asked = True
        self.process.send_signal(signal.SIGTERM)

    def close(self) -> int:
        """Put away what belongs to a process that has ended; the answer is its exit code."""
        self.watched.__exit__(None, None, None)
        self.reader.join()
        code = self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # what it never read
                    pipe.close()
        return code

    def _read(self, told: "queue.Queue[tuple[_Worker, str | None]]") -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.endswith("\n"):  # a process that is killed may leave half a line
                told.put((self, line))
        told.put((self, None))


@contextmanager
def working(places: int, watching: Watching) -> Iterator[Workers]:
    """Processes for jobs; when this is left for any reason, they have saved and left."""
    workers, before = Workers(places, watching), {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, workers.stop)
    except ValueError:  # only the main thread hears signals
        before.clear()
    try:
        yield workers
    finally:
        if workers.workers:
            workers.stop(signal.SIGTERM)
        for worker in workers.workers:
            worker.close()
        for number, handler in before.items():
            signal.signal(number, handler)


def _environment(place: int, places: int) -> dict[str, str]:
    """What a process finds: its share of the processors, one GPU where there are some, and the modules of this one."""
    found = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // places)), **os.environ}
    found["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)  # noqa: PTH109  # as sys.path is
    gpus = [each for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each]
    gpus = gpus or [str(index) for index in range(torch.cuda.device_count())]
    return {**found, "CUDA_VISIBLE_DEVICES": gpus[place % len(gpus)]} if gpus else found
