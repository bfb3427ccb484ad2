"""Greedy decoding through the cache: lookfar beside `generate` of transformers' Llama and of x-transformers."""

import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from lookfar.config import ModelConfig
from lookfar.model.decoder import Decoder
from lookfar.model.generate import Sampling, generate

LAYERS, WIDTH, HEADS, VOCABULARY, PROMPT, TOKENS = 6, 384, 6, 256, 512, 256
BATCHES = (1, 8)
SCHEMES = (
    "rope",
    "alibi",
    "stable_mask",
    "rope + stable_mask",
    "differential_v2",
    "rope + differential_v2",
    "dape_v2",
    "cope",
)
PEERS = ("transformers Llama (dynamic cache)", "transformers Llama (static cache)", "x-transformers (flash, rotary)")
Writes = Callable[[Tensor, int], Any]  # a prompt, and how many tokens to write


def run(repeats: int) -> list[dict[str, Any]]:
    """Tokens per second of all sequences together after the first token, and ratios to rope and to the faster peer."""
    torch.manual_seed(0)
    rows = []
    writers = {
        **{f"lookfar {scheme}": _lookfar(scheme) for scheme in SCHEMES},
        **_llamas(),
        PEERS[2]: _x_transformers(),
    }
    for batch in BATCHES:
        prompt = torch.randint(0, VOCABULARY, (batch, PROMPT), generator=torch.Generator().manual_seed(0))
        times = _times(writers, prompt, max(3, repeats // 2))
        peer = min(times[name] for name in PEERS)
        rows += [
            {
                "model": name,
                "batch": batch,
                "tokens_per_second": batch * (TOKENS - 1) / taken,
                "speed_over_faster_peer": peer / taken,
                "time_over_rope": taken / times["lookfar rope"],
                "prompt": PROMPT,
                "tokens": TOKENS,
                "layers": LAYERS,
                "width": WIDTH,
            }
            for name, taken in times.items()
        ]
    return rows


def _times(writers: dict[str, Writes], prompt: Tensor, repeats: int) -> dict[str, float]:
    """Seconds from the first written token to the last: a whole call less one that writes a single token; medians."""
    times: dict[str, list[float]] = {name: [] for name in writers}
    for turn in range(repeats + 1):
        for name, write in writers.items():
            whole, first = _seconds(write, prompt, TOKENS), _seconds(write, prompt, 1)
            if turn:
                times[name].append(whole - first)
    return {name: median(each) for name, each in times.items()}


def _seconds(write: Writes, prompt: Tensor, tokens: int) -> float:
    started = time.perf_counter()
    with torch.inference_mode():
        write(prompt, tokens)
    return time.perf_counter() - started


def _config(scheme: str) -> ModelConfig:
    return ModelConfig(
        vocabulary=VOCABULARY, width=WIDTH, layers=LAYERS, heads=HEADS, context=PROMPT, scheme=scheme, device="cpu"
    )


def _lookfar(scheme: str) -> Writes:
    model = Decoder(_config(scheme)).eval()
    greedy = Sampling(temperature=0.0)
    return lambda prompt, tokens: generate(model, prompt.tolist(), tokens=tokens, sampling=greedy)


def _llamas() -> dict[str, Writes]:
    none = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    model = peers.llama(_config("rope"), longest=PROMPT + TOKENS, **none).eval()

    def writes(cache: str) -> Writes:
        def write(prompt: Tensor, tokens: int) -> Any:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it says that no end of text is known
                return model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=tokens,
                    do_sample=False,
                    cache_implementation=cache,
                )

        return write

    return {PEERS[0]: writes("dynamic"), PEERS[1]: writes("static")}


def _x_transformers() -> Writes:
    from x_transformers import AutoregressiveWrapper

    model = peers.x_transformers(_config("rope"), longest=PROMPT + TOKENS)
    wrapped = AutoregressiveWrapper(model).eval()
    return lambda prompt, tokens: wrapped.generate(prompt, tokens, temperature=0.0, cache_kv=True)
