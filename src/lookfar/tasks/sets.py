"""Endless examples for training, and others for measuring: no example is ever in both."""

from collections.abc import Sequence
from hashlib import blake2b
from random import Random

from lookfar.errors import UserError
from lookfar.tasks.base import Example, Task

PATIENCE = 1000  # draws without a new example, after which there is taken to be none
SURE = 100  # of them for each example that is held out, on average
LEAST = 0.001  # part that can be held out: to find what is rarer would take millions of draws


class Split:
    """The examples of a task, divided by length, and within the trained lengths by a hash of their input.

    The inputs whose hash falls into `held_out` (a part of 1) are never trained on, under any seed, and only they are
    measured at the trained lengths; at all other lengths nothing is trained on, so any example is measured. Where a
    length has few problems, few are held out, perhaps none: such a length cannot be measured, and `measured` says so
    by giving fewer examples than were asked for, or none.

    Attributes:
        lengths: those that are trained on, each as often as it stands there; by default all of `task.trained` that
            the task has problems of.

    Raises:
        UserError: there is no length to train on, or `held_out` is not possible.
    """

    def __init__(self, task: Task, lengths: Sequence[int] | None = None, *, held_out: float = 0.1) -> None:
        if not LEAST <= held_out < 1:
            raise UserError(f"held_out ({held_out}) must be {LEAST} or more, and less than 1; a tenth is usual.")
        if lengths is not None and not lengths:
            raise UserError("A split needs at least one length to train on.")
        for each in lengths or ():
            task.example(each, Random(0))  # refuses a length that there is not
        self.task = task
        self.lengths = tuple(existing(task, task.trained) if lengths is None else lengths)
        if not self.lengths:
            raise UserError(f"None of the lengths to train on by default is left: {refusal(task, task.trained[-1])}")
        self.held_out = held_out

    def trained(self, seed: int, index: int, draw: int = 0) -> Example:
        """Example number `index` of the training stream of a seed, which has no end and needs no state.

        Another `draw` is another example in its place.

        Raises:
            UserError: no problem of the drawn length was found that is not held out.
        """
        random = Random(f"trained:{seed}:{index}" + f":{draw}" * bool(draw))
        return self.drawn(random.choice(self.lengths), random)

    def drawn(self, length: int, random: Random) -> Example:
        """One problem of a length that may be trained on.

        Raises:
            UserError: none was found that is not held out.
        """
        for _ in range(PATIENCE):
            if not self.holds_out(example := self.task.example(length, random)):
                return example
        raise UserError(f"No problem of length {length} is left to train on; {self.held_out} of all are held out.")

    def measured(self, length: int, count: int) -> list[Example]:
        """Up to `count` different examples of a length, none of which is trained on.

        They are the same for every seed of training, and the first of them are the same for every `count`. There are
        fewer where the length has no more: where `PATIENCE` draws in a row bring nothing new, or as many more as less
        is held out.
        """
        random, found, missed = Random(f"measured:{length}"), {}, 0
        trained = length in self.lengths
        patience = max(PATIENCE, round(SURE / self.held_out)) if trained else PATIENCE
        while len(found) < count and missed < patience:
            example = self.task.example(length, random)
            new = example.input not in found and (not trained or self.holds_out(example))
            missed = 0 if new else missed + 1
            if new:
                found[example.input] = example
        return list(found.values())

    def holds_out(self, example: Example) -> bool:
        """Whether an example of a trained length is kept from training."""
        number = int.from_bytes(blake2b(example.input.encode(), digest_size=8).digest())
        return number < self.held_out * 2**64


def buckets(task: Task, times: int = 10, lengths: Sequence[int] | None = None) -> list[int]:
    """The lengths at which to measure: all trained and tested ones, then multiples of the longest trained one.

    They end at `times` the longest trained length. A length of which the task has no problem is left out.

    Args:
        lengths: those that are trained on; of its own lengths the task then gives the longer ones, up to that end.
            None: the task's own, and all that it tests.
    """
    return existing(task, expected(task, times, lengths))


def expected(task: Task, times: int = 10, lengths: Sequence[int] | None = None) -> list[int]:
    """The lengths of `buckets`, with those that the task has no problem of."""
    trained = sorted(set(task.trained if lengths is None else lengths))
    longest = trained[-1]
    if lengths is None:
        known = [*trained, *task.tested]
    else:
        own = sorted({*task.trained, *task.tested})
        known = [*trained, *(each for each in own if longest < each <= times * longest)]
    return [*known, *range((max(known) // longest + 1) * longest, times * longest + 1, longest)]


def existing(task: Task, lengths: Sequence[int]) -> list[int]:
    """Those of the lengths that the task has problems of."""
    return [each for each in lengths if refusal(task, each) is None]


def lost(task: Task, lengths: Sequence[int]) -> list[int]:
    """Those of the lengths that the settings of a task took away: it has problems of them without settings."""
    missing = [each for each in lengths if refusal(task, each) is not None]
    return existing(type(task)(), missing) if missing else []


def refusal(task: Task, length: int) -> str | None:
    """Why the task has no problem of a length; None where it has one."""
    try:
        task.example(length, Random(0))
    except UserError as reason:
        return str(reason)
    return None
