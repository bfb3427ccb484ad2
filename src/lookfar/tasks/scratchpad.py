"""Writes the steps of a solution before its answer, in any of 32 formats, reads them back and scores them."""

import re
from collections.abc import Sequence
from itertools import pairwise

from lookfar.errors import UserError
from lookfar.tasks.base import Example, Step
from lookfar.tasks.symbols import words

PARTS = {"i": "input", "c": "computation", "o": "output", "v": "variables", "r": "remaining"}
_MARKS = {
    "input": ("in", ""),
    "computation": ("comp", ""),
    "output": ("out", ""),
    "variables": ("[", " ]"),
    "remaining": ("re", ""),
}
_START, _BETWEEN, _END = "Thinking step by step: ", " # ", ". Thus, "


class Scratchpad:
    """The unified scratchpad: each step has up to five parts, named by letters, and any of them can be left out.

    `i` what of the problem is consumed, `c` the calculation, `o` its output, `v` the state after it, `r` what remains:
    `icovr` is the full format, `co` the minimal one. Source: Kazemnejad et al., 2023, arXiv 2305.19466, with the marks
    of their runs.

    Attributes:
        parts: the letters of the format, in their order.
        names: the parts that they stand for.
        symbols: every piece that a scratchpad adds to the symbols of a task.
    """

    def __init__(self, parts: str = "icovr") -> None:
        if set(parts) - set(PARTS) or len(set(parts)) != len(parts):
            raise UserError(f"{parts!r} is no format of a scratchpad; write each of the letters icovr at most once.")
        self.parts = "".join(each for each in PARTS if each in parts)
        self.symbols: Sequence[str] = words(
            _START, _BETWEEN, _END, ",", *(mark for pair in _MARKS.values() for mark in pair)
        )
        self.names = [PARTS[each] for each in self.parts]
        marks = [[re.escape(mark.strip()) for mark in _MARKS[name]] for name in self.names]
        ends, starts = [r"\A", *(end for _, end in marks)], [*(start for start, _ in marks), r"\Z"]
        self._borders = [
            re.compile(rf"{end}\s*{start}" if end else start) for end, start in zip(ends, starts, strict=True)
        ]

    def write(self, example: Example) -> str:
        """What a model writes for an example: its steps and then its target.

        Raises:
            UserError: the example has no steps, or they have not all parts of this format.
        """
        if not example.steps:
            raise UserError("A task without steps has no scratchpad; leave the scratchpad out.")
        return f"{_START} {_BETWEEN.join(map(self._write, example.steps))} {_END} {example.target}"

    def read(self, written: str) -> list[Step | None]:
        """The steps of a written scratchpad, with single spaces; None for each that cannot be read."""
        _, start, rest = written.partition(_START.strip())
        steps, end, _ = rest.partition(_END.strip())
        return [self._read(each) for each in steps.split(_BETWEEN.strip())] if start and end else []

    def score(self, example: Example, written: str) -> dict[str, float]:
        """How much of the steps of an example was written, as parts of 1.

        `input`, `computation`, … for each part of the format: the steps that have it right; `steps`: those that have
        all parts right. All are 0 where the number of steps differs or one of them cannot be read. `failed`: the
        written steps that cannot be read, to all that are written or to those of the example, whichever are more; 1
        where there is no scratchpad.
        """
        found, gold = self.read(written), [self._read(self._write(each)) for each in example.steps]
        failed = sum(each is None for each in found) / max(len(found), len(gold)) if found else 1.0
        if failed or len(found) != len(gold):
            return dict.fromkeys((*self.names, "steps"), 0.0) | {"failed": failed}
        pairs = list(zip(found, gold, strict=True))
        scores = {name: sum(getattr(one, name) == getattr(other, name) for one, other in pairs) for name in self.names}
        scores["steps"] = sum(one == other for one, other in pairs)
        return {name: count / len(gold) for name, count in scores.items()} | {"failed": failed}

    def _write(self, step: Step) -> str:
        written = []
        for letter, name in zip(self.parts, self.names, strict=True):
            value = getattr(step, name)
            if value is None:
                rest = self.parts.replace(letter, "")
                raise UserError(f"The steps of this task have no {name} ({letter}); try the scratchpad {rest!r}.")
            start, end = _MARKS[name]
            written.append(f"{start} {', '.join(value) if name == 'variables' else value}{end}")
        return " ".join(written)

    def _read(self, step: str) -> Step | None:
        step, spans, place = step.strip(), [], 0
        for border in self._borders:  # each at its first place after the one before: nothing is tried twice
            found = border.search(step, place)
            if found is None:
                return None
            spans.append(found.span())
            place = found.end()
        values = [step[end:start] for (_, end), (start, _) in pairwise(spans)]
        parts = {name: " ".join(value.split()) for name, value in zip(self.names, values, strict=True)}
        variables = tuple(each.strip() for each in parts.pop("variables").split(",")) if "variables" in parts else None
        return Step(**parts, variables=variables)


def conclusion(written: str) -> str:
    """What stands after a scratchpad: the only place where the final answer is looked for."""
    return written.partition(_END.strip())[2].strip()
