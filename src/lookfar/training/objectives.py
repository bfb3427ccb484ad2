"""What a model is trained to do, by name: `next_token`, `slots(anchors=16)`."""

from collections.abc import Callable
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le
from jaxtyping import Float, Int, Num
from torch import Tensor
from torch.nn import functional as F

from lookfar import plugins
from lookfar.config import Count, ModelConfig
from lookfar.errors import UserError, nearest
from lookfar.model.decoder import Decoder

Positions = Num[Tensor, "#b t"]
Objective = Callable[[Decoder, Int[Tensor, "b l"], Positions | None, Float[Tensor, "b t"]], Float[Tensor, ""]]


def next_token(
    model: Decoder, lines: Int[Tensor, "b l"], positions: Positions | None, chance: Float[Tensor, "b t"]
) -> Float[Tensor, ""]:
    """Every token but the first of a line, from those before it."""
    logits = model(lines[:, :-1], positions=positions)
    return F.cross_entropy(logits.flatten(0, 1).float(), lines[:, 1:].flatten())


def slots(
    model: Decoder,
    lines: Int[Tensor, "b l"],
    positions: Positions | None,
    chance: Float[Tensor, "b t"],
    *,
    anchors: Count = 16,
    decay: Annotated[float, Gt(0), Le(1)] = 1.0,
    next_token: Annotated[float, Ge(0)] = 1.0,
) -> Float[Tensor, ""]:
    """The tokens after some places of a line, all slots of a place at once, and every next token beside them.

    Slot n weighs decay^n, so that the first counts most where decay is below 1; `next_token` weighs the ordinary loss
    of the text, 0 leaves it out. Places are drawn anew for each line; the loss is a mean over the tokens of a line,
    then over lines, so it does not depend on how a batch is divided.
    """
    context = lines.shape[1] - 1
    ends = 1 + chance.topk(min(anchors, context), dim=1).indices.sort(dim=1).values  # b a
    text, states = model.slot_states(lines[:, :-1], ends=ends, positions=positions)
    places = ends[:, :, None] + torch.arange(states.shape[2], device=ends.device)  # b a s: the token that is asked for
    known = places <= context
    targets = lines.gather(1, places.clamp(max=context).flatten(1))
    losses = F.cross_entropy(model.logits(states).flatten(0, 2).float(), targets.flatten(), reduction="none")
    weights = decay ** torch.arange(states.shape[2], device=ends.device) * known  # b a s
    losses = losses.view_as(weights) * weights
    loss = (losses.sum((1, 2)) / weights.sum((1, 2))).mean()
    if next_token == 0:
        return loss
    return loss + next_token * F.cross_entropy(model.logits(text).flatten(0, 1).float(), lines[:, 1:].flatten())


OBJECTIVES: dict[str, Callable[..., Float[Tensor, ""]]] = {each.__name__: each for each in (next_token, slots)}


def find(expression: str, model: ModelConfig) -> Objective:
    """The objective of an expression, for a model of that configuration."""
    terms = plugins.parse(expression)
    if len(terms) != 1 or terms[0].name not in OBJECTIVES:
        raise UserError(f"No objective is called {expression!r}. {nearest(terms[0].name, list(OBJECTIVES))}")
    objective, checked = OBJECTIVES[terms[0].name], plugins.check(OBJECTIVES[terms[0].name], terms[0])
    if objective is slots and model.slots is None:
        raise UserError("training.objective 'slots' needs a model with slots: set model.slots=4.")
    if objective is next_token and model.slots is not None:
        raise UserError(
            f"model.slots={model.slots} would never be trained: set training.objective='slots', or leave slots out."
        )
    return lambda decoder, lines, positions, chance: objective(decoder, lines, positions, chance, **checked)
