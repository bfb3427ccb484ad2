"""Sliding evaluation at stride 1: lookfar's evaluator beside one window per forward pass with all its logits."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.measure import seconds
from lookfar.config import ModelConfig
from lookfar.data.spelling import spell
from lookfar.evaluation.base import Text
from lookfar.evaluation.perplexity import Perplexity
from lookfar.evaluation.protocols import find
from lookfar.model.decoder import Decoder

LAYERS, WIDTH, HEADS, LENGTH, WINDOWS = 4, 256, 4, 512, 32
VOCABULARIES = (256, 50_257)
SCHEMES = ("rope", "alibi")
NEAR = 1e-5  # the losses of both ways, at most so far apart


def run(repeats: int) -> list[dict[str, Any]]:
    """Tokens per second of both ways on the same last tokens of a text, and their ratio; their losses agree."""
    rows = []
    for vocabulary in VOCABULARIES:
        for scheme in SCHEMES:
            model, text = _model(vocabulary, scheme), _text(vocabulary)
            batched, singly = _batched(model, text), _singly(model, text)
            apart = abs(batched() - singly())
            if apart > NEAR:
                raise AssertionError(f"{scheme}: the losses are {apart:.2g} apart, more than {NEAR}.")
            times = seconds({"batched": batched, "singly": singly}, max(3, repeats // 2))
            rows.append(
                {
                    "scheme": scheme,
                    "vocabulary": vocabulary,
                    "tokens_per_second": WINDOWS / times["batched"],
                    "one_window_per_pass": WINDOWS / times["singly"],
                    "speed_over_one_window_per_pass": times["singly"] / times["batched"],
                    "loss_apart": apart,
                    "length": LENGTH,
                    "layers": LAYERS,
                    "width": WIDTH,
                }
            )
    return rows


def _model(vocabulary: int, scheme: str) -> Decoder:
    torch.manual_seed(0)
    sizes = {"vocabulary": vocabulary, "width": WIDTH, "layers": LAYERS, "heads": HEADS, "context": LENGTH}
    return Decoder(ModelConfig(**sizes, scheme=scheme, device="cpu")).eval()


def _text(vocabulary: int) -> Text:
    """A text whose one document has so many tokens that `WINDOWS` whole windows follow the first token of it."""
    tokens = np.random.default_rng(0).integers(0, vocabulary, LENGTH + WINDOWS).astype(np.uint16)
    return Text(tokens, spell([b"x"] * vocabulary), "noise")


def _batched(model: Decoder, text: Text) -> Callable[[], float]:
    """The last tokens of the text, each after a window of the length: sliding by one without its first window."""
    protocol = find(f"last(k={WINDOWS}, of=documents)")

    def measure() -> float:
        rows = Perplexity().measure(model, text, length=LENGTH, protocol=protocol, progress=lambda what, part: None)
        assert rows[0]["count"] == rows[0]["windows"] == WINDOWS
        return rows[0]["value"]

    return measure


def _singly(model: Decoder, text: Text) -> Callable[[], float]:
    tokens = torch.from_numpy(np.asarray(text.tokens).astype(np.int64))

    @torch.inference_mode()
    def measure() -> float:
        losses = []
        for start in range(WINDOWS):
            logits = model(tokens[start : start + LENGTH][None])
            losses.append(float(F.cross_entropy(logits[0, -1:], tokens[start + LENGTH :][:1])))
        return sum(losses) / len(losses)

    return measure
