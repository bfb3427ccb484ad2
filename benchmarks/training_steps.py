"""Whole training steps: lookfar beside Llama of transformers and x-transformers, at the same sizes and optimizer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import peers
from benchmarks.measure import seconds
from lookfar.config import ModelConfig
from lookfar.model.decoder import Decoder

LAYERS, WIDTH, HEADS, VOCABULARY, TOKENS = 4, 256, 4, 256, 8192
LENGTHS = (128, 512)
SCHEMES = ("nope", "rope", "alibi", "t5", "kerple", "rope + stable_mask", "rope + differential")


def run(repeats: int) -> list[dict[str, Any]]:
    """Tokens per second of each model at each length, and the ratio to `nope` in the same run."""
    return [row for length in LENGTHS for row in _at(length, repeats)]


def _at(length: int, repeats: int) -> list[dict[str, Any]]:
    batch = TOKENS // length
    models: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {}
    for scheme in SCHEMES:
        model = Decoder(_config(scheme, length))
        models[f"lookfar {scheme}"] = model, model
    llama = peers.llama(_config("rope", length), longest=length, use_cache=False)
    models["transformers Llama (sdpa)"] = llama, lambda tokens: llama(tokens).logits
    other = peers.x_transformers(_config("rope", length), longest=length)
    models["x-transformers (flash, rotary)"] = other, other
    tokens = torch.randint(0, VOCABULARY, (batch, length + 1), generator=torch.Generator().manual_seed(0))
    steps = {name: _step(model, forward, tokens) for name, (model, forward) in models.items()}
    times = seconds(steps, repeats)
    return [
        {
            "model": name,
            "parameters": sum(each.numel() for each in models[name][0].parameters()),
            "tokens_per_second": TOKENS / time,
            "speed_over_llama": times["transformers Llama (sdpa)"] / time,
            "speed_over_x_transformers": times["x-transformers (flash, rotary)"] / time,
            "time_over_nope": time / times["lookfar nope"],
            "length": length,
            "batch": batch,
            "layers": LAYERS,
            "width": WIDTH,
        }
        for name, time in times.items()
    ]


def _config(scheme: str, length: int) -> ModelConfig:
    return ModelConfig(
        vocabulary=VOCABULARY, width=WIDTH, layers=LAYERS, heads=HEADS, context=length, scheme=scheme, device="cpu"
    )


def _step(model: nn.Module, forward: Callable[[Tensor], Tensor], tokens: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            logits = forward(tokens[:, :-1])
        F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
