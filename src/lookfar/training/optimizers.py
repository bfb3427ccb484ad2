"""Optimizers and what they decay: the weights of Linear and Conv, nothing else."""

import torch
from torch import nn

from lookfar.config import TrainingConfig


def adamw(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW, fused (Loshchilov and Hutter, 2019, arXiv 1711.05101)."""
    decayed = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)}
    parameters = [each for each in model.parameters() if each.requires_grad]
    groups = [
        {"params": [each for each in parameters if id(each) in decayed], "weight_decay": config.weight_decay},
        {"params": [each for each in parameters if id(each) not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.rate, betas=config.betas, fused=True
    )
