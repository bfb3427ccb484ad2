"""Other ways to the same attention: torch's own with a dense bias, FlexAttention, and modules of x-transformers."""

import importlib.util
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from lookfar.attention.scheme import Scheme
from lookfar.methods.alibi import Alibi
from lookfar.methods.base import DistanceBias, ScoreBias
from lookfar.methods.kerple import FLOOR, Kerple
from lookfar.methods.t5 import T5
from lookfar.sight import Sight

Attends = Callable[[Tensor, Tensor, Tensor], Tensor]  # queries, keys and values, before they are encoded
Rival = Callable[[Scheme, Sight], tuple[Attends, list[nn.Parameter]]]
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def plain(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Torch's fused attention: causal, or one query that sees all keys."""
    return F.scaled_dot_product_attention(queries, keys, values, is_causal=queries.shape[2] > 1)


def names(scheme: Scheme, device: str, step: str) -> list[str]:
    """The rivals that compute this scheme on this device in this pass."""
    if scheme.maps or scheme.sinks or scheme.merges or scheme.encodings:
        return []
    bias = scheme.biases[0] if scheme.biases else None
    found = ["sdpa dense bias"] if bias is not None else []
    compiles = device == "cuda" or (step == "forward" and shutil.which("g++") is not None)  # no backward on a CPU
    if compiles and step != "decode" and not (isinstance(bias, ScoreBias) and not isinstance(bias, DistanceBias)):
        found.append("FlexAttention")
    theirs = isinstance(bias, T5) or (isinstance(bias, Alibi) and not bias.learned)
    if theirs and importlib.util.find_spec("x_transformers") is not None:
        found.append("x-transformers")
    return found


def dense_bias(scheme: Scheme, sight: Sight) -> tuple[Attends, list[nn.Parameter]]:
    """The bias of every pair as the mask of `scaled_dot_product_attention`."""
    hidden = ~sight.visible()

    def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        bias = scheme.bias(sight)
        assert bias is not None, "only schemes with a bias have this rival"
        mask = bias.masked_fill(hidden, -torch.inf).to(queries.dtype).expand(queries.shape[0], -1, -1, -1)
        return F.scaled_dot_product_attention(queries, keys, values, mask)

    return attend, [*scheme.parameters()]


def flex(scheme: Scheme, sight: Sight) -> tuple[Attends, list[nn.Parameter]]:
    """FlexAttention with the formula of the bias as its score_mod, compiled: never the full square in silence."""
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    device = sight.query_positions.device
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, sight.queries, sight.keys, device=str(device))

    def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        score_mod = _score_mod(scheme.biases[0]) if scheme.biases else None
        outputs = compiled(queries, keys, values, score_mod=score_mod, block_mask=mask)
        assert isinstance(outputs, Tensor)
        return outputs

    return attend, [*scheme.parameters()]


def x_transformers(scheme: Scheme, sight: Sight) -> tuple[Attends, list[nn.Parameter]]:
    """Attention of x-transformers on torch's fused kernel, with its own module for the bias."""
    from x_transformers.attend import Attend
    from x_transformers.x_transformers import AlibiPositionalBias, RelativePositionBias

    heads, device = scheme.heads.score_heads, sight.query_positions.device
    bias: Any = (
        RelativePositionBias(scale=1.0, causal=True, heads=heads)
        if isinstance(scheme.biases[0], T5)
        else AlibiPositionalBias(heads)
    ).to(device)
    fused = Attend(causal=True, heads=heads, flash=True).to(device)

    def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        added = bias(sight.queries, sight.keys).to(queries.dtype)
        return fused(queries, keys, values, attn_bias=added)[0]

    return attend, [*bias.parameters()]


RIVALS: dict[str, Rival] = {"sdpa dense bias": dense_bias, "FlexAttention": flex, "x-transformers": x_transformers}


def _score_mod(bias: ScoreBias) -> ScoreMod:
    """The formula of a bias, as one would write it for FlexAttention."""
    if isinstance(bias, Alibi):
        slopes = bias.slopes[0].clone()  # the compiler drops the gradient of a captured view
        return lambda score, b, h, q, k: score - slopes[h] * (q - k)
    if isinstance(bias, Kerple):
        amplitude, rate = FLOOR + F.softplus(bias.amplitude), FLOOR + F.softplus(bias.rate)
        return lambda score, b, h, q, k: score - amplitude[h] * torch.log1p(rate[h] * (q - k).abs())
    assert isinstance(bias, T5), f"no formula of {type(bias).__name__} is written here"
    table, exact, growth = bias.table, bias.buckets // 2, bias.buckets - bias.buckets // 2
    ratio = torch.log(torch.tensor(bias.farthest / exact)).item()

    def bucketed(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        distance = (q - k).clamp(min=0)
        far = exact + (torch.log(distance.clamp(min=exact) / exact) / ratio * growth).to(torch.int32)
        return score + table[torch.where(distance < exact, distance, far.clamp(max=exact + growth - 1)), h]

    return bucketed
