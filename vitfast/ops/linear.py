"""Linear layers on the CPU in float32, by oneDNN: the matrix products of `vitfast.functional.mlp` and of the modules.

PyTorch multiplies float32 matrices on the CPU by a BLAS, which adds to an output that holds the bias already: that is
written, read and written again. oneDNN, which PyTorch carries for 16-bit matrices, convolutions and compiled code, adds
the bias on the way out, and is the faster of the two also without one. `DESIGN.md` has the figures.

Whatever else comes is `torch.nn.functional.linear`: other dtypes, of which the 16-bit ones go to oneDNN anyway, other
devices, transforms of `torch.func`, `torch.compile`, autocast, and a PyTorch without oneDNN or where it is switched
off.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from vitfast.ops._rules import is_autocast, is_batched_gradient, is_transformed, records_gradients
from vitfast.ops.backend import is_chosen

_DTYPE = torch.float32


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b of x (..., C), W (D, C) and b (D,)."""
    if x.dtype != _DTYPE or not is_plain_call(x):
        return F.linear(x, weight, bias)
    if records_gradients((x, weight) if bias is None else (x, weight, bias)):
        return Linear.apply(x, weight, bias)
    return product(rows_of(x), weight, bias).reshape(*x.shape[:-1], len(weight))


def is_plain_call(x: Tensor) -> bool:
    """Whether the CPU's own path may serve: nothing but evaluation and, at most, a recorded gradient is going on."""
    return (
        type(x) in (Tensor, Parameter)  # a subclass may see PyTorch's operations only
        and not torch.compiler.is_compiling()
        and not is_transformed()
        and not is_autocast(x.device)
        and is_chosen("cpu", x.device)
    )


def is_plain_backward(grad: Tensor) -> bool:
    """Whether a backward computes nothing but numbers: no graph of its own, no tangents, not many gradients at once."""
    return not (torch.is_grad_enabled() or is_transformed() or is_batched_gradient(grad))


def rows_of(x: Tensor) -> Tensor:
    """(..., C) as a matrix."""
    return x.reshape(-1, x.shape[-1])


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b of matrices; W may be a transposed view."""
    if x.dtype != torch.float32 or not _onednn_serves() or len(x) == 0:
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _onednn_serves() -> bool:
    return _has_linear and torch.backends.mkldnn.enabled


def _find_linear() -> bool:
    """Whether this PyTorch has oneDNN's linear layer, as its compiler calls it, and it does what it did."""
    if not torch.backends.mkldnn.is_available():
        return False
    x, weight, bias = torch.ones(2, 3), torch.ones(4, 3), torch.ones(4)
    try:
        found = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.equal(found, F.linear(x, weight, bias))


_has_linear = _find_linear()


class Linear(torch.autograd.Function):
    """(x, W, b) -> x W^T + b. Called outside of transforms only."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return product(rows_of(x), weight, bias).reshape(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows, grads = rows_of(x), rows_of(grad)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = product(grads, weight.t()) if is_plain_backward(grad) else grads @ weight
            grad_x = grad_x.reshape(x.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = grads.t() @ rows
        if ctx.needs_input_grad[2]:
            grad_bias = grads.sum(0)
        return grad_x, grad_weight, grad_bias
