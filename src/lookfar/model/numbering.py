"""The ways to number tokens by name: `consecutive`, `randomized(largest=2048)`, `interpolated`."""

from collections.abc import Callable
from inspect import Parameter
from typing import Annotated

import torch
from annotated_types import Ge
from jaxtyping import Num
from torch import Tensor

from lookfar import batch, plugins
from lookfar.errors import UserError, nearest

Count = Annotated[int, Ge(1)]
Numbering = Callable[[int, int, torch.Generator], Num[Tensor, "#b t"] | None]  # lines, tokens, random -> positions


def consecutive(lines: int, tokens: int, random: torch.Generator, context: int) -> None:
    """0, 1, 2, …"""


def randomized(lines: int, tokens: int, random: torch.Generator, context: int, *, largest: Count) -> Num[Tensor, "b t"]:
    """An ordered sample of 0 … largest - 1 for each line."""
    return batch.randomized(lines, tokens, largest=largest, generator=random)


def interpolated(lines: int, tokens: int, random: torch.Generator, context: int) -> Num[Tensor, "1 t"]:
    """0, c, 2c, … so that no position is beyond the trained context."""
    return batch.interpolated(tokens, context=context)


WAYS: dict[str, Callable[..., Num[Tensor, "#b t"] | None]] = {
    each.__name__: each for each in (consecutive, randomized, interpolated)
}


def find(expression: str, context: int) -> Numbering:
    """The way of an expression, for a model that is trained at `context` tokens."""
    terms = plugins.parse(expression)
    if len(terms) != 1 or terms[0].name not in WAYS:
        raise UserError(f"No way to number tokens is called {expression!r}. {nearest(terms[0].name, list(WAYS))}")
    way, checked = WAYS[terms[0].name], plugins.check(WAYS[terms[0].name], terms[0])
    missing = [key for key, value in plugins.defaults(way).items() if value is Parameter.empty and key not in checked]
    if missing:
        raise UserError(f"{terms[0].name!r} needs {missing[0]}: write it as {terms[0].name}({missing[0]}=2048).")
    return lambda lines, tokens, random: way(lines, tokens, random, context, **checked)
