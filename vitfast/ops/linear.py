"""Linear layers on the CPU in float32, by oneDNN: the matrix products of `vitfast.functional.mlp` and of the modules.

PyTorch multiplies float32 matrices on the CPU by a BLAS, which adds to an output that holds the bias already: that is
written, read and written again. oneDNN, which PyTorch carries for 16-bit matrices, convolutions and compiled code, adds
the bias on the way out, and is the faster of the two also without one. `DESIGN.md` has the figures.

Gradients of weights and biases have a kernel of our own (`weight_gradient_kernel.h`): the BLAS is slow where rows are
many and the weight is small, oneDNN slower still, and the sum of the bias's gradient would be a pass of its own.

Whatever else comes is `torch.nn.functional.linear`: other dtypes, of which the 16-bit ones go to oneDNN anyway, other
devices, transforms of `torch.func`, `torch.compile`, autocast, and a PyTorch without oneDNN or where it is switched
off.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from vitfast.ops import _extension
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
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # -1 would be any number where there are no columns


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b of matrices; W may be a transposed view."""
    if x.dtype != torch.float32 or x.device.type != "cpu" or not _onednn_serves() or 0 in (*x.shape, *weight.shape):
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def parameter_gradients(
    grad: Tensor, x: Tensor, needed: tuple[bool, bool], sums: tuple[Tensor | None, Tensor | None] = (None, None)
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of W and b of y = x W^T + b: G^T x, and the sum of the rows of G.

    Args:
        grad: G, that of y, a matrix.
        x: a matrix.
        needed: whether that of W is needed, and that of b.
        sums: what an earlier call returned, which this one adds to.
    """
    weight, bias = sums
    wants_weight, wants_bias = needed
    add = weight is not None or bias is not None
    if wants_weight and is_plain_backward(grad) and has_gradient_kernel(grad, x):
        if not add:
            weight = x.new_empty(grad.shape[1], x.shape[1])
            bias = grad.new_empty(grad.shape[1]) if wants_bias else None
        torch.ops.vitfast.weight_gradient(grad, x, weight, bias, add)
        return weight, bias
    if wants_weight:
        weight = weight.addmm_(grad.t(), x) if add else grad.t() @ x
    if wants_bias:
        bias = bias.add_(grad.sum(0)) if add else grad.sum(0)
    return weight, bias


def has_gradient_kernel(grad: Tensor, x: Tensor) -> bool:
    """Whether `torch.ops.vitfast.weight_gradient` serves the matrices: it stores whole vectors."""
    return (
        is_chosen("cpu", x.device)
        and grad.dtype == x.dtype == torch.float32
        and x.shape[1] % 16 == 0
        and 0 not in (*grad.shape, *x.shape)
        and grad.stride(1) == x.stride(1) == 1
    )


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
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = product(grads, weight.t()) if is_plain_backward(grad) else grads @ weight
            grad_x = grad_x.reshape(x.shape)
        return grad_x, *parameter_gradients(grads, rows, ctx.needs_input_grad[1:])


if _extension.available():  # it returns nothing, and so does its fake
    torch.library.register_fake("vitfast::weight_gradient", lambda *tensors: None)
