"""Divides a model and its optimizer among processes, layer by layer, and puts the model together again.

What methods learn stays whole on every process, in the type it has: it is small, and tables of positions must stay
float32. FSDP2 (`fully_shard`) divides all else; each layer is gathered while it computes.
"""

import math
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from lookfar.methods.base import Method
from lookfar.model.decoder import Decoder


def shard(model: Decoder) -> None:
    """Leave to this process its part of every weight; the process group must be there."""
    mesh = init_device_mesh(model.embedding.weight.device.type, (distributed.get_world_size(),))
    whole = {each for method in model.modules() if isinstance(method, Method) for each in method.parameters()}
    for block in model.blocks:
        fully_shard(block, mesh=mesh, ignored_params=whole)
    fully_shard(model, mesh=mesh, ignored_params=whole)
    register_fsdp_forward_method(model, "slot_states")


def sharded(model: nn.Module) -> bool:
    """Whether the model is divided."""
    return isinstance(model, FSDPModule)


def divide_again(model: nn.Module) -> None:
    """Divide again what a measurement has gathered; a whole model stays whole."""
    if isinstance(model, FSDPModule):
        model.reshard()


def gather_ends(model: nn.Module) -> None:
    """Gather what no layer gathers, embedding and head, for calls that are not training."""
    if isinstance(model, FSDPModule):
        model.unshard()


def clip(model: nn.Module, largest: float) -> float:
    """Shorten the gradients to this norm; the answer is the norm that they had, of all shards together."""
    if not sharded(model):
        return float(torch.nn.utils.clip_grad_norm_(model.parameters(), largest))
    gradients = [each.grad for each in model.parameters() if each.grad is not None]
    parts = [each for each in gradients if isinstance(each, DTensor)]
    whole = [each for each in gradients if not isinstance(each, DTensor)]
    of_parts, of_whole = torch.nn.utils.get_total_norm(parts), torch.nn.utils.get_total_norm(whole)
    norm = math.hypot(float(_full(of_parts)), float(of_whole))
    if largest / (norm + 1e-6) < 1:
        for each in gradients:
            (each.to_local() if isinstance(each, DTensor) else each).mul_(largest / (norm + 1e-6))
    return norm


def gathered(model: Decoder) -> Decoder:
    """The whole model, on every process; all must ask. A whole model is its own answer."""
    if not sharded(model):
        return model
    divide_again(model)
    with torch.random.fork_rng():  # drawing the first weights leaves no trace
        whole = Decoder(model.config).eval()
    places = dict(whole.named_parameters())
    with torch.no_grad():
        for name, each in model.named_parameters():
            places[name].copy_(_full(each))  # one at a time: there is never room for two copies of all
    return whole


class ShardedAdamW:
    """AdamW over shards, whose state is numbered as one process alone has it."""

    def __init__(self, plain: torch.optim.Optimizer, **settings: Any) -> None:
        self.plain = plain  # has the groups and the numbers of one process, and the state; it never steps
        groups = [
            {**group, "params": alike}
            for group in plain.param_groups
            for kind in (True, False)  # a fused step takes shards or whole tensors
            if (alike := [each for each in group["params"] if isinstance(each, DTensor) == kind])
        ]
        self.steps = torch.optim.AdamW(groups, **settings)
        self.steps.state = plain.state

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups that step."""
        return self.steps.param_groups

    def step(self) -> None:
        """Take a step with every shard."""
        self.steps.step()

    def zero_grad(self) -> None:
        """Forget all gradients."""
        self.steps.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """The state, with this process's shards."""
        for group in self.plain.param_groups:
            group["lr"] = self.steps.param_groups[0]["lr"]
        return self.plain.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take this process's part of a state, whole or divided already."""
        numbered = [each for group in self.plain.param_groups for each in group["params"]]
        parts = {
            number: {key: _part(value, numbered[number]) for key, value in values.items()}
            for number, values in state["state"].items()
        }
        self.plain.load_state_dict({"state": parts, "param_groups": state["param_groups"]})
        self.steps.state = self.plain.state


def _full(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _part(value: Tensor, like: Tensor) -> Tensor:
    """The shard of a whole tensor that belongs to that of a parameter; counts of steps are no shards."""
    if not isinstance(like, DTensor) or isinstance(value, DTensor) or value.shape != like.shape:
        return value
    mesh, placements = like.device_mesh, like.placements
    return distribute_tensor(value, mesh, placements, src_data_rank=None).clone()  # not a view of the whole
