"""Optimizers by name, and what they decay: the weights of Linear and Conv, nothing else."""

from typing import Any

import torch
from torch import nn

from lookfar.config import TrainingConfig
from lookfar.methods.base import Method
from lookfar.training.distributed_checkpoint import StoredOptimizer
from lookfar.training.sharding import ShardedAdamW, sharded


class Together:
    """Several optimizers, each with parameters of its own, used as one."""

    def __init__(self, optimizers: dict[str, torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all."""
        return [group for each in self.optimizers.values() for group in each.param_groups]

    def step(self) -> None:
        """Take a step with each."""
        for each in self.optimizers.values():
            each.step()

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for each in self.optimizers.values():
            each.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """The state of each, by its name."""
        return {name: each.state_dict() for name, each in self.optimizers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the state of each."""
        for name, each in self.optimizers.items():
            each.load_state_dict(state[name])


Optimizer = torch.optim.Optimizer | Together | ShardedAdamW


def adamw(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer | ShardedAdamW:
    """AdamW, fused (Loshchilov and Hutter, 2019, arXiv 1711.05101)."""
    plain = _adamw(model, _learned(model), config)
    return ShardedAdamW(plain, fused=True) if sharded(model) else plain


def muon(model: nn.Module, config: TrainingConfig) -> Together:
    """Muon for the matrices between hidden states, AdamW for all else.

    Jordan et al., 2024; steps of AdamW's size, so that one rate serves both (Liu et al., 2025, arXiv 2502.16982).
    """
    hidden = _hidden(model)
    matrices = [each for each in _learned(model) if id(each) in hidden]
    rest = [each for each in _learned(model) if id(each) not in hidden]
    orthogonal = torch.optim.Muon(
        matrices, lr=config.rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return Together({"muon": orthogonal, "adamw": _adamw(model, rest, config)})


def build(model: nn.Module, config: TrainingConfig) -> Optimizer:
    """The configured optimizer over all that a model learns."""
    return {"adamw": adamw, "muon": muon}[config.optimizer](model, config)


def go_on(optimizer: Optimizer, state: dict[str, Any] | StoredOptimizer) -> None:
    """Take up a state, whole or stored in shards; settings stay those of the recipe."""
    if isinstance(state, StoredOptimizer):
        groups = (optimizer.plain if isinstance(optimizer, ShardedAdamW) else optimizer).param_groups
        state = state.read([each for group in groups for each in group["params"]])
    groups = [*optimizer.param_groups, *(optimizer.plain.param_groups if isinstance(optimizer, ShardedAdamW) else [])]
    own = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    optimizer.load_state_dict(state)
    groups = [*optimizer.param_groups, *(optimizer.plain.param_groups if isinstance(optimizer, ShardedAdamW) else [])]
    for group, settings in zip(groups, own, strict=True):
        group.update(settings)


def _adamw(model: nn.Module, parameters: list[nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    decayed = _decayed(model)
    groups = [
        {"params": [each for each in parameters if id(each) in decayed], "weight_decay": config.weight_decay},
        {"params": [each for each in parameters if id(each) not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.rate, betas=config.betas, fused=True
    )


def _learned(model: nn.Module) -> list[nn.Parameter]:
    return [each for each in model.parameters() if each.requires_grad]


def _decayed(model: nn.Module) -> set[int]:
    """Weights of Linear and Conv: not norms, biases, embeddings or the vectors and tables of methods."""
    return {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)}


def _hidden(model: nn.Module) -> set[int]:
    """Weights of Linear that lead from hidden states to hidden states: not the head, not those inside methods."""
    linear = {id(each.weight) for each in model.modules() if isinstance(each, nn.Linear)}
    inside = {id(each) for method in model.modules() if isinstance(method, Method) for each in method.parameters()}
    head = getattr(model, "head", None)
    return linear - inside - ({id(head.weight)} if isinstance(head, nn.Linear) else set())
