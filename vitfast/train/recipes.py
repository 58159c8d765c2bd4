"""How a model is trained: optimiser, learning rate over time, what decays."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["Recipe", "cosine_schedule", "make_optimizer", "parameter_groups"]

# Tables of learned positions. Decay would pull the attention towards uniform, which is no simpler than any other.
POSITION_TABLES = ("pos_embedding", "relative_position_bias_table")


@dataclass(frozen=True)
class Recipe:
    """The settings of a training run.

    Attributes:
        epochs: passes over the training images.
        batch_size: images of a step.
        lr: the largest learning rate, reached after the warm-up.
        optimizer: ``"adamw"``, or ``"sgd"`` with Nesterov momentum 0.9.
        weight_decay: of the weights that `parameter_groups` lets decay.
        warmup_epochs: epochs over which the learning rate rises linearly.
        label_smoothing: share of the target spread evenly over all classes.
    """

    epochs: int
    batch_size: int = 64
    lr: float = 2e-3
    optimizer: str = "adamw"
    weight_decay: float = 0.05
    warmup_epochs: float = 1
    label_smoothing: float = 0.0


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups for an optimiser: what decays, and what does not.

    Biases, the scales of norms (all of one dimension) and tables of learned positions do not decay.
    """
    decay, keep = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        exempt = parameter.dim() <= 1 or any(part in POSITION_TABLES for part in name.split("."))
        (keep if exempt else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": keep, "weight_decay": 0.0}]


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The optimiser of the recipe over the `parameter_groups` of the model."""
    groups = parameter_groups(model, recipe.weight_decay)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=0.9, nesterov=True)
    raise ValueError(f"optimizer must be 'adamw' or 'sgd'; got {recipe.optimizer!r}")


def cosine_schedule(optimizer: torch.optim.Optimizer, steps: int, warmup_steps: int) -> LambdaLR:
    r"""Learning rates of ``steps`` steps, as multiples of the optimiser's own: linear up, then half a cosine down to 0.

    Step t = 0, 1, ... has the factor :math:`(t + 1) / w` while t < w = ``warmup_steps``, and then
    :math:`\frac12 (1 + \cos(\pi \frac{t - w}{T - w}))` with T = ``steps``.

    Source: Loshchilov & Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017, without restarts.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(steps - warmup_steps, 1)
        return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))

    return LambdaLR(optimizer, factor)
