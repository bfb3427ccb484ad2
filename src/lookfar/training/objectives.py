"""What a model is trained to do, by name: `next_token`, `slots(anchors=16)`."""

from collections.abc import Callable
from functools import partial
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor
from torch.nn import functional as F

from lookfar import plugins
from lookfar.config import Count, ModelConfig
from lookfar.errors import UserError, nearest
from lookfar.model.decoder import Decoder

Positions = Num[Tensor, "#b t"]
Documents = Int[Tensor, "b l"]  # of each token of a line: none is predicted from another document
Scored = Bool[Tensor, "b l"]  # which tokens of a line count as targets; None: all but the first
Objective = Callable[..., Float[Tensor, ""]]  # of a decoder, lines, positions, chances, documents, what is scored


def next_token(
    model: Decoder,
    lines: Int[Tensor, "b l"],
    positions: Positions | None,
    chance: Float[Tensor, "b t"],
    documents: Documents | None = None,
    scored: Scored | None = None,
) -> Float[Tensor, ""]:
    """Every token but the first of a line, from those before it."""
    logits = model(lines[:, :-1], positions=positions, documents=None if documents is None else documents[:, :-1])
    return _loss(logits, lines, documents, scored)


def slots(
    model: Decoder,
    lines: Int[Tensor, "b l"],
    positions: Positions | None,
    chance: Float[Tensor, "b t"],
    documents: Documents | None = None,
    scored: None = None,
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
    inputs = None if documents is None else documents[:, :-1]
    text, states = model.slot_states(lines[:, :-1], ends=ends, positions=positions, documents=inputs)
    places = ends[:, :, None] + torch.arange(states.shape[2], device=ends.device)  # b a s: the token that is asked for
    known, asked = places <= context, places.clamp(max=context).flatten(1)
    if documents is not None:
        known &= documents.gather(1, asked).view_as(places) == documents.gather(1, ends - 1)[:, :, None]
    targets = lines.gather(1, asked)
    losses = F.cross_entropy(model.logits(states).flatten(0, 2).float(), targets.flatten(), reduction="none")
    weights = decay ** torch.arange(states.shape[2], device=ends.device) * known  # b a s
    losses = losses.view_as(weights) * weights
    loss = (losses.sum((1, 2)) / weights.sum((1, 2)).clamp(min=1e-9)).mean()
    if next_token == 0:
        return loss
    return loss + next_token * _loss(model.logits(text), lines, documents)


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
    return partial(objective, **checked)


def _loss(
    logits: Float[Tensor, "b t v"], lines: Int[Tensor, "b l"], documents: Documents | None, scored: Scored | None = None
) -> Float[Tensor, ""]:
    """The mean over lines of the mean over the tokens of each that are scored and continue their document."""
    if documents is None and scored is None:
        return F.cross_entropy(logits.flatten(0, 1).float(), lines[:, 1:].flatten())
    targets = lines[:, 1:]
    if documents is not None:
        targets = targets.masked_fill(documents[:, 1:] != documents[:, :-1], -100)
    if scored is not None:
        targets = targets.masked_fill(~scored[:, 1:], -100)
    losses = F.cross_entropy(logits.transpose(1, 2).float(), targets, reduction="none")
    return (losses.sum(1) / (targets >= 0).sum(1).clamp(min=1)).mean()
