"""Perplexity and bits per byte over a held-out stream, at any length, in a named protocol."""

import math
import warnings
from collections.abc import Iterator
from itertools import groupby

import numpy as np
import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from lookfar.errors import UserError
from lookfar.evaluation.base import Measurement, Progress, Row, Text
from lookfar.evaluation.protocols import Protocol, Window
from lookfar.model.decoder import Decoder
from lookfar.model.numbering import find

TOGETHER = 1 << 12  # tokens of the windows that are read at once
LOGITS = 1 << 20  # entries of the logits that are held at once


class Perplexity(Measurement):
    """Token-weighted: the exponential of the mean loss over all scored tokens, never a mean over windows."""

    def __init__(self, *, numbering: str = "consecutive") -> None:
        self.numbering = numbering  # of the tokens of a window

    def measure(self, model: Decoder, text: Text, *, length: int, protocol: Protocol, progress: Progress) -> list[Row]:
        """Rows of `loss` (nats per token), `perplexity` (per token) and `bits_per_byte`, each with the tokens scored.

        Raises:
            UserError: a length below 1 or beyond what the model can number, or fewer than two tokens of text.
        """
        if length < 1:
            raise UserError(f"A length of {length} tokens cannot be evaluated; it must be at least 1.")
        if model.farthest is not None and length > model.farthest:
            raise UserError(
                f"Length {length} lies beyond the learned table of {model.farthest} positions; "
                f"evaluate at most {model.farthest}, or train with model.positions={length}."
            )
        predicted = len(text.tokens) - 1
        if predicted < 1:
            raise UserError(f"{text.label} has {len(text.tokens)} tokens; at least two are needed to predict one.")
        windows = protocol.windows(predicted, length)
        if all(window.inputs < length for window in windows):
            warnings.warn(
                f"Length {length} exceeds the held-out text of {sum(window.scored for window in windows)} predicted "
                "tokens; no window is that long.",
                stacklevel=2,
            )
        number = find(self.numbering, model.config.context)
        random = torch.Generator().manual_seed(0)
        loss, scored_bytes, count = 0.0, 0, sum(window.scored for window in windows)
        done = 0
        for inputs, targets, scored in _batches(text, windows):
            positions = number(inputs.shape[0], inputs.shape[1], random)
            loss += float(_losses(model, inputs, targets, scored, positions).sum())
            scored_bytes += int(text.lengths[targets[:, -scored:].numpy()].sum())
            done += targets[:, -scored:].numel()
            progress(f"{protocol.name} at {length}", done / count)
        row = {"data": text.label, "protocol": protocol.name, "length": length}
        if self.numbering != "consecutive":
            row["numbering"] = self.numbering
        values = {
            "loss": loss / count,
            "perplexity": _exp(loss / count),
            "bits_per_byte": loss / math.log(2) / scored_bytes if scored_bytes else math.nan,
        }
        return [
            {**row, "metric": metric, "value": value, "count": count, "unit": text.unit, "windows": len(windows)}
            for metric, value in values.items()
        ]


def _batches(text: Text, windows: list[Window]) -> Iterator[tuple[Int[Tensor, "b t"], Int[Tensor, "b t"], int]]:
    """Windows of one shape together: their inputs, the targets of all inputs, and how many of those are scored."""
    for (inputs, scored), alike in groupby(windows, key=lambda window: (window.inputs, window.scored)):
        starts = np.array([window.start for window in alike])
        for some in np.array_split(starts, math.ceil(len(starts) * inputs / TOGETHER)):
            if some.size:
                places = torch.from_numpy(text.tokens[some[:, None] + np.arange(inputs + 1)].astype(np.int64))
                yield places[:, :-1], places[:, 1:], scored


def _losses(
    model: Decoder,
    inputs: Int[Tensor, "b t"],
    targets: Int[Tensor, "b t"],
    scored: int,
    positions: Num[Tensor, "#b t"] | None,
) -> Float[Tensor, " n"]:
    """The loss of the last `scored` targets of each window, in nats; logits are made a piece at a time."""
    device = model.embedding.weight.device
    with torch.inference_mode():
        positions = None if positions is None else positions.to(device)
        states = model.states(inputs.to(device), positions=positions)[:, -scored:].flatten(0, 1)
        wanted = targets[:, -scored:].flatten().to(device)
        rows = max(1, LOGITS // model.embedding.num_embeddings)
        with torch.autocast(device.type, enabled=False):
            weight = model.embedding.weight.dtype
            pieces = zip(states.to(weight).split(rows), wanted.split(rows), strict=True)
            losses = [_loss(model.logits(each).float(), goal) for each, goal in pieces]
    return torch.cat(losses).double()


def _loss(logits: Float[Tensor, "n vocabulary"], wanted: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Cross-entropy in nats, in the place of the logits: a second tensor of their size would be made for each piece."""
    chosen = logits.gather(1, wanted[:, None])[:, 0]
    top = logits.amax(-1)
    return logits.sub_(top[:, None]).exp_().sum(-1).log_() + top - chosen


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
