"""Weights laid out for a CPU: in decoding a few rows meet a whole matrix and reading it is all the work.

Where many rows meet it, as in evaluation, the layout still saves a tenth of the products.
"""

import copy
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lookfar.model.decoder import Decoder

OF_HEADS = ("query_norm", "key_norm")  # norms that may be asked in another type
LARGEST = 1 << 28  # parameters of a model that is packed: for a while there is a second copy of them
Kind = TypeVar("Kind", bound=nn.Module)


class Packed(nn.Module):
    """A linear layer without gradients, its weight in the layout that oneDNN reads fastest for so many rows."""

    def __init__(self, weight: Float[Tensor, "o i"], rows: int) -> None:
        super().__init__()
        self.weight = weight
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        assert not torch.is_grad_enabled(), "a packed weight has no gradient"
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


class Norm(nn.Module):
    """RMSNorm in five steps: torch's own takes three times as long for a few rows."""

    def __init__(self, norm: nn.RMSNorm) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps or torch.finfo(torch.float32).eps

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight


def pack(model: Decoder, rows: int) -> Decoder:
    """The same model for `rows` tokens at a time, without gradients; the model itself where nothing is to be won.

    It is made for one text and thrown away: it does not follow when weights change, and is never moved, saved or
    trained. All else is shared with the model.
    """
    count = sum(each.numel() for each in model.parameters())
    weight = model.embedding.weight
    suits = weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    suits = suits and all(type(each) is nn.Parameter for each in model.parameters())  # no shards of several processes
    if not suits or count > LARGEST or torch.is_autocast_enabled("cpu"):
        return model
    twin = _twin(model, rows)
    twin._modules["head"] = Packed(weight if model.head is None else model.head.weight, rows)
    return twin


def _twin(module: Kind, rows: int) -> Kind:
    twin = copy.copy(module)
    twin._modules = {name: _replaced(name, child, rows) for name, child in module._modules.items()}
    return twin


def _replaced(name: str, module: nn.Module | None, rows: int) -> nn.Module | None:
    if type(module) is nn.Linear and module.bias is None and not (module._forward_hooks or module._forward_pre_hooks):
        return Packed(module.weight, rows)
    if type(module) is nn.RMSNorm and name not in OF_HEADS and not (module._forward_hooks or module._forward_pre_hooks):
        return Norm(module)
    return None if module is None else _twin(module, rows)
