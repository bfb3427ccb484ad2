"""Kills small runs again and again, and looks whether anything was lost: `make soak`.

    python tests/soak.py --kills 200 --seed 0

Every kill is a SIGKILL from outside: some updates after a start has written its first line of the log, or while a
checkpoint is being written. A run that has come to its end in spite of that must have the weights, the log and the
folder of a run that was left alone.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a process with threads cannot be forked

from lookfar import config, files
from lookfar.config import Run
from lookfar.training import checkpoint
from lookfar.training.train import train

UPDATES = 60
DELAY = 0.004  # seconds, about an update of this size
RECIPE = """
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
path = "{book}"
[training]
updates = {updates}
batch = 6
accumulation = 2
schedule = "wsd"
checkpoint_every = 1
evaluate_every = 4
precision = "float32"
"""


@dataclass
class Child:
    """A process that trains, and the lines in which it says what it has done."""

    process: int
    lines: int  # end of a pipe

    def next(self) -> int | None:
        """The next number that it says: where it starts, then every update that is logged; None: it has ended."""
        said = b""
        while not said.endswith(b"\n"):
            part = os.read(self.lines, 1)
            if not part:
                return None
            said += part
        return int(said)

    def end(self) -> None:
        """Kill it, where it still lives."""
        os.kill(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)
        os.close(self.lines)


def start(run: Run, place: Path) -> Child:
    """Train in a process of its own, from the last checkpoint on."""
    reading, writing = os.pipe()
    process = os.fork()
    if process:
        os.close(writing)
        return Child(process, reading)
    os.close(reading)

    def tell(event: dict[str, object]) -> None:
        if event["event"] in ("start", "update"):
            os.write(writing, f"{event['update']}\n".encode())

    try:
        train(run, place, tell)
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        os._exit(1)
    os._exit(0)


def in_a_save(place: Path) -> bool:
    """Whether a checkpoint is half-written."""
    return any((place / "checkpoints").glob(".*"))


def kill_after_updates(child: Child, chance: random.Random) -> bool:
    """Kill it in the update after its first logged one, or up to three later; False: it came to its end before."""
    for _ in range(1 + chance.randrange(4)):
        if child.next() is None:
            return False
    time.sleep(chance.random() * DELAY)
    return True


def kill_in_save(child: Child, place: Path, chance: random.Random) -> bool:
    """Kill it while it writes one of its first checkpoints; False: it came to its end before."""
    for _ in range(1 + chance.randrange(3)):
        if child.next() is None:
            return False
    end = time.monotonic() + 10
    while not in_a_save(place):
        if time.monotonic() > end or os.waitid(os.P_PID, child.process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return False
    time.sleep(chance.random() * DELAY)
    return True


def harass(run: Run, place: Path, chance: random.Random, kills: int) -> tuple[int, int]:
    """Train to the end through at most so many kills: how many there were, and how many of them inside a save."""
    done = inside = 0
    while True:
        saved = checkpoint.newest(place) or 0  # a damaged one would be a warning, and so an error
        child = start(run, place)
        began = child.next()
        assert began == saved, f"{place}: checkpoint {saved} was there, and training began at {began}"
        if done == kills:
            while child.next() is not None:
                pass
            alive = False
        elif chance.random() < 0.5:
            alive = kill_after_updates(child, chance)
        else:
            alive = kill_in_save(child, place, chance)
        child.end()
        done += alive
        inside += alive and in_a_save(place)
        now = checkpoint.newest(place) or 0
        assert now >= saved, f"{place}: checkpoint {saved} was there, and the newest is {now}"
        if not alive and checkpoint.read_manifest(place).get("finished") == run.training.updates:
            return done, inside


def end_of(place: Path) -> dict[str, object]:
    """What a finished run has left: the hash of its weights, its log, its manifest, its files."""
    last = place / "checkpoints" / str(checkpoint.newest(place))
    log = [{**line, "seconds": 0} for line in files.read_lines(place / "log.jsonl")]
    return {
        "weights": files.digest(last / checkpoint.WEIGHTS),
        "log": log,
        "manifest": checkpoint.read_manifest(place),
        "files": sorted(str(each.relative_to(place)) for each in place.glob("**/*")),
    }


def soak(kills: int, seed: int, folder: Path) -> None:
    """Kill as often as asked, over as many runs as that takes, and say what came of it."""
    warnings.simplefilter("error")
    chance = random.Random(seed)
    book = folder / "book.txt"
    book.write_text("".join("".join(chance.choices("abcdef ", k=20)) + "\n" for _ in range(13)))
    (folder / "small.toml").write_text(RECIPE.format(book=book, updates=UPDATES))
    run = config.read(folder / "small.toml")
    train(run, folder / "alone")
    expected = end_of(folder / "alone")
    print(f"left alone: weights {str(expected['weights'])[:16]}", flush=True)
    total = inside = runs = 0
    while total < kills:
        runs += 1
        place = folder / f"run{runs}"
        done, of_them = harass(run, place, chance, kills - total)
        total, inside = total + done, inside + of_them
        ended = end_of(place)
        for what, wanted in expected.items():
            assert ended[what] == wanted, f"{place}: {what}: {ended[what]}; of the run that was left alone: {wanted}"
        print(f"run {runs}: {done} kills, {of_them} inside a save; weights {str(ended['weights'])[:16]}", flush=True)
    print(f"{total} kills, {inside} of them inside a save, over {runs} runs of {UPDATES} updates: nothing was lost.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        soak(asked.kills, asked.seed, Path(place))
