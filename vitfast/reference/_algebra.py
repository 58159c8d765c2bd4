"""Algebra of tangents, in which None stands for zero, and the derivatives of softmax."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def without_autocast(function: Callable) -> Callable:
    """Decorates a function whose first argument is a tensor: autocast does not change the dtypes it computes in.

    The kernels compute in the dtype of their arguments, and so do the formulas that stand in for them.
    """

    @functools.wraps(function)
    def plain(first: Tensor, *args, **kwargs):
        kind = first.device.type
        if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
            return function(first, *args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return function(first, *args, **kwargs)

    return plain


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a + b."""
    if a is None or b is None:
        return b if a is None else a
    return a + b


def matmul(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """A b."""
    return None if a is None or b is None else a @ b


def transposed(x: Tensor | None) -> Tensor | None:
    """The matrices of x, transposed."""
    return None if x is None else x.mT


def scaled(scale: float, x: Tensor | None) -> Tensor | None:
    """Scale * x."""
    return None if x is None else scale * x


def softmax_backward(probabilities: Tensor, x: Tensor) -> Tensor:
    """The Jacobian of softmax over the last dimension, which is symmetric, applied to x."""
    return probabilities * (x - (probabilities * x).sum(-1, keepdim=True))


def softmax_backward_tangent(p: Tensor, p_t: Tensor | None, x: Tensor, x_t: Tensor | None) -> Tensor | None:
    """The tangent of `softmax_backward` in both of its arguments."""
    result = None
    if p_t is not None:
        inner = (p * x).sum(-1, keepdim=True)
        result = p_t * (x - inner) - p * (p_t * x).sum(-1, keepdim=True)
    return add(result, None if x_t is None else softmax_backward(p, x_t))
