"""Trackers: other places that are fed with the log of a run, each imported only when it is set.

A tracker is a function of the run's folder and the run; it gives what takes a line, and what ends it.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from lookfar.config import Run
from lookfar.errors import UserError

PROJECT = "lookfar"
Numbers = Mapping[str, float]
Tracker = tuple[Callable[[int, Numbers], None], Callable[[], None]]  # takes an update's numbers; ends


def wandb(folder: Path, run: Run) -> Tracker:
    """Weights & Biases: each start is a run in the group of its folder. `WANDB_MODE=offline` keeps all there."""
    library = import_module("wandb")
    place = {"project": PROJECT, "name": folder.name, "group": folder.name, "dir": str(folder)}
    session = library.init(**place, config=run.model_dump())
    return lambda update, numbers: session.log(dict(numbers), step=update), session.finish


def tensorboard(folder: Path, run: Run) -> Tracker:
    """TensorBoard: `tensorboard --logdir FOLDER/tensorboard`."""
    writer = import_module("torch.utils.tensorboard").SummaryWriter(str(folder / "tensorboard"))

    def take(update: int, numbers: Numbers) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, update)

    return take, writer.close


def trackio(folder: Path, run: Run) -> Tracker:
    """Trackio, which keeps all on this computer: `trackio show`."""
    library = import_module("trackio")
    library.init(project=PROJECT, name=folder.name, config=run.model_dump(), resume="allow")
    return lambda update, numbers: library.log(dict(numbers), step=update), library.finish


TRACKERS: dict[str, Callable[[Path, Run], Tracker]] = {each.__name__: each for each in (wandb, tensorboard, trackio)}
MODULES = {"wandb": "wandb", "tensorboard": "torch.utils.tensorboard", "trackio": "trackio"}


def check(name: str | None) -> None:
    """Raise a `UserError` where the package of a tracker is not installed."""
    try:
        if name is not None:
            import_module(MODULES[name])
    except ImportError as error:
        raise UserError(
            f"training.tracking='{name}' needs a package that is not installed ({error}); "
            f'pip install "lookfar[track]", or set training.tracking=none.'
        ) from error


class Tracking:
    """Feeds a tracker, or nothing; one that fails is told of once and left alone: it never stops a run."""

    def __init__(self, folder: Path, run: Run) -> None:
        self.folder, self.run, self.name = folder, run, run.training.tracking
        self.tracker: Tracker | None = None

    def take(self, line: dict[str, Any]) -> None:
        """A line of the log: its numbers, at its update. The first one opens the tracker."""
        numbers = {key: value for key, value in line.items() if key != "update" and isinstance(value, int | float)}
        with self._left_alone_on_failure():
            if self.name is not None and numbers:
                self.tracker = self.tracker or TRACKERS[self.name](self.folder, self.run)
                self.tracker[0](line["update"], numbers)

    def close(self) -> None:
        """Say that no more comes."""
        with self._left_alone_on_failure():
            if self.tracker is not None:
                self.tracker[1]()

    @contextmanager
    def _left_alone_on_failure(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of a service, a disk, a version: training goes on
            told = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            warnings.warn(f"The tracker {self.name} failed and is left alone: {told}.", stacklevel=4)
            self.name = self.tracker = None
