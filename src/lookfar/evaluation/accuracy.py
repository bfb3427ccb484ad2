"""Exact answers to problems of a length: what a model writes after them, greedily, is read and scored."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from lookfar.errors import UserError
from lookfar.evaluation.base import Progress, Row
from lookfar.model.decoder import Decoder
from lookfar.model.generate import Sampling, generate
from lookfar.tasks.numbering import DigitPositions
from lookfar.tasks.problems import Problem, Problems
from lookfar.tasks.symbols import EOS, SPECIAL

TOGETHER = 1 << 14  # tokens of the problems that are written at once
ROOM = 8  # tokens that a model may write beyond the longest right solution, for an answer that is put otherwise


def measure(
    model: Decoder,
    problems: Problems,
    *,
    length: int,
    count: int,
    numbers: DigitPositions | None = None,
    progress: Progress = lambda what, part: None,
) -> list[Row]:
    """Flat rows of one length: `{data, protocol, length, metric, value, count, split, trained, …}`.

    `accuracy`: the final answers that are right, whatever stands around them. `first_wrong`: how far solutions are
    right, the part of their tokens before the first wrong one. Under a scratchpad, a row for each of its parts.
    Problems of a length that is trained on are those that are held out, and there may be fewer than `count`, or none,
    and then no rows. Tokens are numbered 0, 1, 2, … or by `numbers`, as they come.

    Raises:
        UserError: the problems need more positions than the model has.
    """
    found = problems.measured(length, count)
    if not found:
        return []
    scores: dict[str, list[float]] = {}
    done = 0
    for some in _batches(found):
        for problem, tokens in zip(some, _written(model, some, numbers), strict=True):
            for metric, value in _scores(problems, problem, tokens).items():
                scores.setdefault(metric, []).append(value)
        done += len(some)
        progress(f"{problems.label} at {length}", done / len(found))
    row = {
        "data": problems.name,
        "protocol": "greedy",
        "length": length,
        "split": _split(problems, length),
        "trained": problems.longest_trained,
        "scratchpad": None if problems.scratchpad is None else problems.scratchpad.parts,
        "chance": problems.task.chance,
    }
    return [
        {**row, "metric": metric, "value": float(np.mean(values)), "count": len(values)}
        for metric, values in scores.items()
    ]


def _split(problems: Problems, length: int) -> str:
    if length in problems.split.lengths:
        return "held_out"
    return "longer" if length > problems.longest_trained else "other"


def loss(model: Decoder, problems: Problems, *, count: int, numbers: DigitPositions | None = None) -> tuple[float, int]:
    """The mean loss in nats of held-out solutions of the trained lengths, `count` of each at most, and of how many."""
    total, lines = 0.0, 0
    device = model.embedding.weight.device
    for length in sorted(set(problems.split.lengths)):
        for some in _batches(problems.measured(length, count)):
            longest = max(len(each.encoded.tokens) for each in some)
            tokens = torch.zeros(len(some), longest, dtype=torch.long)
            targets = torch.full((len(some), longest), -100)
            positions = None if numbers is None else torch.zeros(len(some), longest - 1, dtype=torch.long)
            for row, each in enumerate(some):
                own = torch.from_numpy(each.encoded.tokens)
                tokens[row, : len(own)] = own
                targets[row, : len(own)] = own.masked_fill(~torch.from_numpy(each.encoded.written), -100)
                if numbers is not None and positions is not None:
                    positions[row, : len(own) - 1] = torch.from_numpy(numbers.measured(each.encoded.tokens[:-1]))
            with torch.inference_mode():
                numbered = None if positions is None else positions.to(device)
                logits = model(tokens[:, :-1].to(device), positions=numbered).float().transpose(1, 2)
                wanted = targets[:, 1:].to(device)
                losses = nn.functional.cross_entropy(logits, wanted, reduction="none").sum(1)
                total += float((losses / (wanted >= 0).sum(1)).sum())
            lines += len(some)
    if lines == 0:
        raise UserError(f"{problems.label} has too few problems to hold any out; train on longer ones.")
    return total / lines, lines


def _batches(problems: Sequence[Problem]) -> list[list[Problem]]:
    """Problems of similar length together, so that little is written in vain."""
    ordered = sorted(problems, key=lambda each: len(each.encoded.tokens))
    together = max(1, TOGETHER // len(ordered[-1].encoded.tokens)) if ordered else 1
    return [ordered[start : start + together] for start in range(0, len(ordered), together)]


def _written(model: Decoder, problems: Sequence[Problem], numbers: DigitPositions | None = None) -> list[list[int]]:
    """The tokens that a model writes after each problem, to its EOS."""
    longest = max(int(each.encoded.written.sum()) for each in problems)
    prompts = [each.encoded.tokens[~each.encoded.written].tolist() for each in problems]
    if model.farthest is None or numbers is not None:  # which keep within the table
        return _write(model, prompts, longest + ROOM, numbers)
    needed = max(len(each.encoded.tokens) for each in problems) - 1  # the last token is no input
    if needed > model.farthest:
        raise UserError(
            f"Problems of {needed} tokens lie beyond the learned table of {model.farthest} positions; "
            f"measure shorter ones, or train with model.positions={needed}."
        )
    found: list[list[int]] = [[] for _ in prompts]
    for size in set(map(len, prompts)):  # each to the end of the table
        alike = [place for place, prompt in enumerate(prompts) if len(prompt) == size]
        room = min(longest + ROOM, model.farthest - size + 1)  # the last one needs no position
        for place, tokens in zip(alike, _write(model, [prompts[each] for each in alike], room), strict=True):
            found[place] = tokens
    return found


def _write(
    model: Decoder, prompts: Sequence[list[int]], room: int, numbers: DigitPositions | None = None
) -> list[list[int]]:
    return generate(
        model,
        prompts,
        tokens=room,
        sampling=Sampling(temperature=0.0),
        stop=lambda tokens: tokens[-1] == EOS,
        positions=None if numbers is None else numbers.measured,
    )


def _scores(problems: Problems, problem: Problem, tokens: list[int]) -> dict[str, float]:
    end = next((place for place, token in enumerate(tokens) if token < len(SPECIAL)), len(tokens))
    written = problems.vocabulary.decode(tokens[:end])
    right = problem.encoded.tokens[problem.encoded.written].tolist()
    same = next((place for place, token in enumerate(right) if tokens[place : place + 1] != [token]), len(right))
    scores = {"accuracy": float(problems.correct(problem, written)), "first_wrong": same / len(right)}
    if problems.scratchpad is not None:
        of_steps = problems.scratchpad.score(problem.example, written)
        scores |= {f"scratchpad_{name}": value for name, value in of_steps.items()}
    return scores
