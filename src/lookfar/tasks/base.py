"""What a task is: a synthetic problem with a length, whose right answer is known."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random


@dataclass(frozen=True)
class Step:
    """One step of a scratchpad; a part that the task does not have is None."""

    input: str | None = None  # what of the problem is consumed now
    computation: str | None = None  # the local calculation, spelled out
    output: str | None = None  # what comes of it
    variables: tuple[str, ...] | None = None  # the state after the step
    remaining: str | None = None  # what is left of the problem


class LaterSteps:
    """Steps that are worked out when they are first asked for: those of a long problem take far more room than it."""

    def __init__(self, work: Callable[[], Iterable[Step]]) -> None:
        self._work = work

    @cached_property
    def _all(self) -> tuple[Step, ...]:
        return tuple(self._work())

    def __iter__(self) -> Iterator[Step]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def __getitem__(self, place: int) -> Step:
        return self._all[place]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (tuple, LaterSteps)) and self._all == tuple(other)

    def __hash__(self) -> int:
        return hash(self._all)


@dataclass(frozen=True)
class Example:
    """A problem and its solution: a model reads `input` and writes `target`, in which `answer` is the final answer."""

    input: str
    target: str
    answer: str
    steps: tuple[Step, ...] | LaterSteps = ()


class Task(ABC):
    """A problem of any length, generated without network or outside tokenizer.

    Settings are keyword parameters, all of them with a default.
    """

    trained: range  # the lengths that are trained on by default
    tested: range  # the longer ones that are measured by default
    chance: float = 0.0  # accuracy of the best constant guess, at the longer lengths

    @property
    @abstractmethod
    def symbols(self) -> Sequence[str]:
        """Every piece that the task can write, without spaces: its vocabulary, in a fixed order."""

    @abstractmethod
    def example(self, length: int, random: Random) -> Example:
        """One problem of exactly this length; the same state of `random` gives the same problem.

        Raises:
            UserError: the task has no problem of this length.
        """

    @abstractmethod
    def answer(self, target: str) -> str | None:
        """The final answer in what a model has written, or None where there is none."""
