"""Turns examples into tokens, and what a model has written into right or wrong."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64

from lookfar.errors import UserError
from lookfar.tasks.base import Example, Task
from lookfar.tasks.scratchpad import Scratchpad, conclusion
from lookfar.tasks.symbols import BOS, EOS, Vocabulary, pieces


@dataclass(frozen=True)
class Encoded:
    """An example as tokens: BOS, input, target, EOS. The model writes target and EOS, and only they are scored."""

    tokens: Int64[np.ndarray, "t"]
    written: Bool[np.ndarray, "t"]


def vocabulary_of(task: Task, scratchpad: Scratchpad | None = None) -> Vocabulary:
    """The vocabulary of a task, and of a scratchpad where one is written."""
    return Vocabulary([*task.symbols, *(scratchpad.symbols if scratchpad else ())])


def encode(
    task: Task,
    example: Example,
    vocabulary: Vocabulary,
    *,
    scratchpad: Scratchpad | None = None,
    bos: bool = True,
    context: int | None = None,
    checked: bool = True,
) -> Encoded:
    """The tokens of an example. The space before the target belongs to the target, as to every other symbol.

    What is not `checked` is only encoded: whether its answer survives is left to those of its kind that are.

    Raises:
        UserError: a symbol is unknown, the answer does not survive (what is decoded must score 1), or the tokens, with
            BOS and EOS, are more than `context`: nothing is ever cut off.
    """
    target = example.target if scratchpad is None else scratchpad.write(example)
    asked = example.input.removesuffix(" ")
    told = example.input[len(asked) :] + target
    if pieces(asked) + pieces(told) != pieces(asked + told):
        raise UserError(f"The input {example.input!r} runs into its target {target!r}; end it with a space.")
    prompt, solution = vocabulary.encode(asked), vocabulary.encode(told)
    tokens = np.concatenate([np.full(int(bos), BOS), prompt, solution, [EOS]])
    if context is not None and len(tokens) > context:
        raise UserError(f"An example has {len(tokens)} tokens, more than the context ({context}); it is never cut off.")
    written = np.arange(len(tokens)) >= int(bos) + len(prompt)
    if not checked:
        return Encoded(tokens, written)
    decoded = vocabulary.decode(solution)
    if vocabulary.decode(tokens) != asked + told or not correct(task, example, decoded, scratchpad):
        raise UserError(f"The answer {example.answer!r} is not found again in {decoded!r}; the example is refused.")
    if scratchpad is not None and scratchpad.score(example, decoded)["steps"] < 1:
        raise UserError(f"The steps of {example.input!r} are not found again in {decoded!r}; the example is refused.")
    return Encoded(tokens, written)


def correct(task: Task, example: Example, written: str, scratchpad: Scratchpad | None = None) -> bool:
    """Whether a model has written the answer of an example; under a scratchpad only what stands after it counts."""
    return task.answer(written if scratchpad is None else conclusion(written)) == example.answer
