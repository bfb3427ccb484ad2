"""Perplexity and bits per byte over a held-out stream, at any length, in a named protocol."""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, Int64, Num
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from lookfar.errors import UserError
from lookfar.evaluation.base import Measurement, Model, Progress, Row, Text
from lookfar.evaluation.protocols import Protocol, Window
from lookfar.evaluation.tally import Tally
from lookfar.model.decoder import Decoder
from lookfar.model.numbering import find
from lookfar.model.packed import pack

TOGETHER = {"cpu": 1 << 12, "cuda": 1 << 16}  # tokens of the windows that are read at once: what caches hold
LOGITS = 1 << 20  # entries of the logits that are held at once


@dataclass(frozen=True)
class Batch:
    """Windows of one shape: what they read, what follows it, and which of that is scored."""

    tokens: Int64[np.ndarray, "b t1"]  # the inputs of a window, and the token after them
    starts: Int64[np.ndarray, "b"]
    scored: int  # of the last tokens
    step: int | None  # from each start to the next, where windows overlap

    @property
    def places(self) -> Int64[np.ndarray, "b n"]:
        """Where in the stream the scored tokens are."""
        end = self.starts[:, None] + self.tokens.shape[1]
        return end + np.arange(-self.scored, 0)


class Perplexity(Measurement):
    """Token-weighted: the exponential of the mean loss over all scored tokens, never a mean over windows."""

    def __init__(self, *, numbering: str = "consecutive", by_position: bool = False) -> None:
        self.numbering = numbering  # of the tokens of a window
        self.by_position = by_position  # whether the loss is also told by place in the window

    def measure(self, model: Model, text: Text, *, length: int, protocol: Protocol, progress: Progress) -> list[Row]:
        """Rows of `loss` (nats per token), `perplexity` (per token), `bits_per_byte` and `word_perplexity`.

        Each has the tokens scored, the number of windows and of documents that these lie in, and, of two documents or
        more, the 95% interval `low` to `high` over documents drawn again. With `by_position`, rows of `loss_at` follow:
        the loss of tokens that follow `from` to `to` tokens of their window.

        Raises:
            UserError: a length below 1 or beyond what the model can number, a text in which nothing is to be scored,
                or one that has no token to begin with.
        """
        windows = self._windows(model, text, length, protocol)
        number = find(self.numbering, model.context)
        random = torch.Generator().manual_seed(0)
        tally = Tally(text, length, sum(window.scored for window in windows))
        together = TOGETHER.get(model.device.type, TOGETHER["cpu"])
        if isinstance(model, Decoder):
            model = pack(model, together)
        for batch in _batches(text, windows, together):
            inputs = torch.from_numpy(batch.tokens[:, :-1])
            if protocol.bos and text.bos is not None:
                inputs = torch.cat([torch.full((len(inputs), 1), text.bos), inputs], dim=1)
            positions = number(inputs.shape[0], inputs.shape[1], random)
            step = None if protocol.bos else batch.step
            targets = torch.from_numpy(batch.tokens[:, -batch.scored :])
            losses = _losses(model, inputs, targets, positions, step)
            tally.add(batch.tokens, batch.places, losses)
            progress(f"{protocol.name} at {length}", tally.done)
        row = {"data": text.label, "protocol": protocol.name, "length": length}
        if self.numbering != "consecutive":
            row["numbering"] = self.numbering
        about = {"unit": text.unit, "windows": len(windows), "first": "bos" if protocol.bos else "context"}
        found = [*tally.rows(), *(tally.by_position() if self.by_position else ())]
        return [{**row, **each, **about} for each in found]

    def _windows(self, model: Model, text: Text, length: int, protocol: Protocol) -> list[Window]:
        """The windows to read, refused where there can be none."""
        if length < 1:
            raise UserError(f"A length of {length} tokens cannot be evaluated; it must be at least 1.")
        if model.farthest is not None and length + protocol.bos > model.farthest:
            raise UserError(
                f"Length {length} lies beyond the learned table of {model.farthest} positions; "
                f"evaluate at most {model.farthest - protocol.bos}, or train with "
                f"model.positions={length + protocol.bos}."
            )
        if protocol.bos and text.bos is None:
            raise UserError(f"The tokenizer of {text.label} has no token that begins a text; measure without bos=true.")
        predicted = len(text.tokens) - 1
        if predicted < 1:
            raise UserError(f"{text.label} has {len(text.tokens)} tokens; at least two are needed to predict one.")
        windows = protocol.windows(predicted, length, text.starts.tolist())
        if not windows:
            raise UserError(f"No part of {text.label} is long enough for {protocol.name} at length {length}.")
        if all(window.inputs < length for window in windows):
            warnings.warn(
                f"Length {length} exceeds the held-out text of {min(predicted, protocol.tokens or predicted)} "
                "predicted tokens; no window is that long.",
                stacklevel=3,
            )
        return windows


def _batches(text: Text, windows: list[Window], together: int) -> Iterator[Batch]:
    """Windows of one shape together. What several of them read is fetched once."""
    for (inputs, scored), alike in groupby(windows, key=lambda window: (window.inputs, window.scored)):
        starts = np.array([window.start for window in alike])
        for some in np.array_split(starts, math.ceil(len(starts) * inputs / together)):
            if some.size:
                steps = np.unique(np.diff(some))
                if steps.size and steps.max() > inputs:
                    tokens = np.stack([text.tokens[start : start + inputs + 1] for start in some])
                else:
                    stretch = np.asarray(text.tokens[some[0] : some[-1] + inputs + 1])
                    tokens = sliding_window_view(stretch, inputs + 1)[some - some[0]]
                step = int(steps[0]) if steps.size == 1 and steps[0] < inputs else None
                yield Batch(tokens.astype(np.int64), some, scored, step)


def _losses(
    model: Model,
    inputs: Int[Tensor, "b t"],
    targets: Int[Tensor, "b n"],
    positions: Num[Tensor, "#b t"] | None,
    step: int | None,
) -> Float64[np.ndarray, "b n"]:
    """The loss of the targets, which follow the last inputs, in nats; logits are made a piece at a time."""
    device = model.device
    with torch.inference_mode():
        positions = None if positions is None else positions.to(device)
        scored = targets.shape[1]
        states = model.states(inputs.to(device), positions=positions, last=scored, step=step).flatten(0, 1)
        wanted = targets.flatten().to(device)
        rows = max(1, LOGITS // model.vocabulary)
        with torch.autocast(device.type, enabled=False):
            pieces = zip(states.to(model.dtype).split(rows), wanted.split(rows), strict=True)
            losses = [_loss(model.logits(each), goal) for each, goal in pieces]
    return torch.cat(losses).double().view_as(targets).cpu().numpy()


def _loss(logits: Float[Tensor, "n vocabulary"], wanted: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Cross-entropy in nats, in the place of the logits: a second tensor of their size would be made for each piece."""
    logits = logits.float()
    chosen = logits.gather(1, wanted[:, None])[:, 0]
    top = logits.amax(-1)
    return logits.sub_(top[:, None]).exp_().sum(-1).log_() + top - chosen
