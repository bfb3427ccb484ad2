"""What a run reads that is trained on a task: problems, in place of the lines of a text."""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from random import Random

import numpy as np
import torch
from jaxtyping import Bool, Int, Int64, Integer
from torch import Tensor

from lookfar.config import EvaluationConfig, Run, TaskConfig
from lookfar.data.tokenizers import Tokenizer, Tokens, load_tokenizer
from lookfar.errors import UserError
from lookfar.tasks.base import Task
from lookfar.tasks.encoding import Encoded
from lookfar.tasks.numbering import DigitPositions, find
from lookfar.tasks.problems import Problems
from lookfar.tasks.sets import existing, expected, lost, refusal
from lookfar.tasks.symbols import EOS, PADDING, Vocabulary
from lookfar.training import folder as run_folder
from lookfar.training import schedules

FACTOR = 2  # of the longest length in task.lengths: how far a run is measured by default


class SymbolTokenizer(Tokenizer):
    """The vocabulary of a task as a tokenizer."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        content = json.dumps({"type": "symbols", "pieces": vocabulary.pieces})
        super().__init__(separator=EOS, spelled=[each.encode() for each in vocabulary.pieces], content=content)
        self.symbols = vocabulary

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """The tokens of several texts."""
        return [self.symbols.encode(text).astype(self.dtype) for text in texts]

    def decode(self, tokens: Sequence[int] | Integer[np.ndarray, "_"]) -> str:
        """The text of tokens."""
        return self.symbols.decode(tokens)


class Lesson:
    """A task as training takes it, in the place of a corpus."""

    def __init__(self, config: TaskConfig) -> None:
        self.problems = problems_of(config)
        self.tokenizer = SymbolTokenizer(self.problems.vocabulary)
        self.label = self.problems.label

    def lines(self, *, context: int, seed: int) -> "ProblemLines":
        """The training lines, which never end and of which any can be looked up."""
        return ProblemLines(self.problems, context=context, seed=seed)


class ProblemLines:
    """Problems as training lines, each filled up with padding to the longest of its batch.

    Line i is a function of the seed and i: to go on needs the count of lines served and nothing else.
    """

    def __init__(self, problems: Problems, *, context: int, seed: int) -> None:
        self.problems, self.context, self.seed = problems, context, seed
        self._encoded = lru_cache(maxsize=1)(self._encode)

    def batch(self, first: int, count: int) -> Int64[np.ndarray, "count l"]:
        """The tokens of the lines number first to first + count."""
        return padded([each.tokens for each in self._encoded(first, count)], PADDING)

    def scored(self, first: int, count: int) -> Bool[np.ndarray, "count l"]:
        """Which of those tokens the model is to write."""
        return padded([each.written for each in self._encoded(first, count)], False)

    def documents(self, first: int, count: int) -> None:
        """Each line is one document; nothing that counts sees the padding after it."""

    def _encode(self, first: int, count: int) -> list[Encoded]:
        lines = range(first, first + count)
        return [self.problems.trained(self.seed, line, context=self.context) for line in lines]


def problems_of(config: TaskConfig) -> Problems:
    """The problems of a configuration.

    Raises:
        UserError: no such task, length or scratchpad.
    """
    assert config.name is not None
    return _problems(config.name, config.lengths, config.scratchpad, config.bos, config.held_out, config.examples)


@lru_cache(maxsize=64)  # a study asks for the same again and again
def _problems(
    name: str, lengths: tuple[int, ...] | None, scratchpad: str | None, bos: bool, held_out: float, examples: int
) -> Problems:
    return Problems(name, lengths=lengths, scratchpad=scratchpad, bos=bos, held_out=held_out, examples=examples)


def check(run: Run) -> None:
    """Raise a `UserError` where a run cannot be trained on its task."""
    problems = problems_of(run.task)
    if run.model.slots is not None:
        raise UserError("A task is written token by token; leave model.slots out.")
    unused = [
        key
        for key in ("protocols", "tokens", "split", "by_position")
        if getattr(run.evaluation, key) != getattr(EvaluationConfig(), key)
    ]
    if unused:
        raise UserError(f"evaluation.{unused[0]} is of texts; a task is measured by its answers. Leave it out.")
    if len(schedules.ends(run.training)) > 1:
        raise UserError("A task is measured at the end of a run alone; give the schedule one budget.")
    if run.evaluation.numbering != "consecutive":
        raise UserError("Answers are written token by token, numbered as they come; leave evaluation.numbering out.")
    _check_lengths(run, problems)
    longest = most_tokens(problems, sorted(set(problems.split.lengths))[-3:])
    if longest - 1 > run.model.context:
        raise UserError(
            f"{problems.label} of length {problems.longest_trained} has problems of {longest} tokens; "
            f"set model.context={longest - 1} or more, or train on shorter ones by task.lengths."
        )


def _check_lengths(run: Run, problems: Problems) -> None:
    """Raise where a length cannot be measured, or is missing from those that a run has by default."""
    task = problems.task
    for length in run.evaluation.lengths or ():
        task.example(length, Random(0))  # refuses a length that there is not
        if not problems.measured(length, 1):
            raise UserError(
                f"{problems.label} has no problem of length {length} that is not trained on; "
                "leave it out of evaluation.lengths."
            )
    if run.task.lengths is None:
        _refuse_lost(task, task.trained, "task.lengths")
    if run.evaluation.lengths is None:
        _refuse_lost(task, _by_default(run, problems), "evaluation.lengths")
    trained = set(problems.split.lengths)
    for length in trained:
        problems.split.drawn(length, Random(0))  # refuses one whose problems are all held out
    if not any(problems.measured(length, 1) for length in trained):
        raise UserError(
            f"{problems.label} has too few problems of its trained lengths to hold any out; "
            "train on longer ones too by task.lengths, or set task.held_out higher."
        )


def _refuse_lost(task: Task, wanted: Sequence[int], key: str) -> None:
    """Raise where the settings of a task take lengths from those that it has by default."""
    if missing := lost(task, wanted):
        raise UserError(f"{refusal(task, missing[-1])} Or state {key}, such as {key}={existing(task, wanted)}.")


def digits(run: Run) -> DigitPositions | None:
    """The numbers of the digits of a run's problems, or None where it does not number them.

    Raises:
        UserError: the task does not suit them, or trains or measures longer numbers than they have.
    """
    found = find(run.training.numbering, problems_of(run.task))
    if found is None:
        return None
    label, name = found.problems.label, run.training.numbering.partition("(")[0]
    if (needed := found.reach(sorted(set(found.problems.split.lengths))[-3:])) > found.largest:
        raise UserError(
            f"{label} is trained on numbers that reach {needed}, beyond largest={found.largest}; "
            f"set training.numbering='{name}(largest={needed})' or more."
        )
    if (needed := found.reach(lengths(run, found.problems)[-3:])) > found.largest:
        raise UserError(
            f"{label} is measured on numbers that reach {needed}, and no training meets those beyond "
            f"largest={found.largest}; set training.numbering='{name}(largest={needed})', "
            "or list shorter ones in evaluation.lengths."
        )
    return found


def most_tokens(problems: Problems, lengths: Sequence[int]) -> int:
    """The most tokens that a few problems of these lengths have; a length without any that measure has none."""
    return max((problems.tokens(length) for length in lengths if problems.measured(length, 1)), default=0)


def lengths(run: Run, problems: Problems) -> list[int]:
    """The lengths that a run is measured at, in order.

    By default all that its task trains and tests; where `task.lengths` are stated, these and longer ones to twice the
    longest of them. Those of which no problem is held out, as of the six commands of one action in SCAN, are left out.
    """
    if run.evaluation.lengths is not None:
        return sorted(set(run.evaluation.lengths))
    return [each for each in existing(problems.task, _by_default(run, problems)) if problems.measured(each, 1)]


def _by_default(run: Run, problems: Problems) -> list[int]:
    """The lengths to measure where none are stated, with those that the task has no problem of."""
    return expected(problems.task, 1 if run.task.lengths is None else FACTOR, run.task.lengths)


def inputs_of(scored: Bool[Tensor, "b l"]) -> Int[Tensor, "b t"]:
    """The inputs of each problem as its document, 0; -1 for the padding after them. The last token is no input."""
    place = torch.arange(scored.shape[1], device=scored.device)
    last = (scored * place).amax(1, keepdim=True)
    return torch.where(place[:-1] < last, 0, -1)


def tokenizer_of(folder: Path) -> Tokenizer:
    """The tokenizer of a run, which for a task is made of its symbols."""
    run, _ = run_folder.read(folder)
    return load_tokenizer(folder) if run.task.name is None else Lesson(run.task).tokenizer


def padded(rows: Sequence[np.ndarray], fill: int | bool) -> np.ndarray:
    """Rows of unequal length as one array, filled up on the right."""
    found = np.full((len(rows), max(map(len, rows))), fill, dtype=rows[0].dtype)
    for row, each in zip(found, rows, strict=True):
        row[: len(each)] = each
    return found
