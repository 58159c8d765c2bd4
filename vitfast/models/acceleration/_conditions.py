"""Conditions that the adapters share."""

from __future__ import annotations

from torch import nn


def has_hooks(module: nn.Module) -> bool:
    """Whether a hook is registered on the module or on a part of it."""
    return any(
        part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
        for part in module.modules()
    )


def is_idle(dropout: nn.Module) -> bool:
    """Whether a module for the dropout of attention weights does nothing now, and nobody looks at what it is given."""
    return type(dropout) is nn.Dropout and not (dropout.training and dropout.p > 0) and not has_hooks(dropout)
