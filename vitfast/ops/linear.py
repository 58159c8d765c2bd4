"""Linear layers on the CPU in float32: the matrix products of `vitfast.functional.mlp` and of the modules.

PyTorch multiplies float32 matrices on the CPU by a BLAS, which adds to an output that holds the bias already: that is
written, read and written again; and it is slow where rows are many and the weight is small. The products here are
kernels of our own (`matrix_sum_kernel.h`), which add the bias in registers and write where the result is wanted, and so
are the gradients of weights and biases (`weight_gradient_kernel.h`). `DESIGN.md` has the figures.

Whatever else comes is `torch.nn.functional.linear`: other dtypes and devices, transforms of `torch.func`,
`torch.compile`, tracing, autocast, columns that are no whole vectors, and processors without wide ones.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from vitfast.ops import _extension
from vitfast.ops._rules import Recorded, is_autocast, is_batched_gradient, is_transformed, records_gradients
from vitfast.ops.backend import is_chosen

_DTYPE = torch.float32
PLAIN = (Tensor, Parameter)  # a subclass may see PyTorch's operations only


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b of x (..., C), W (D, C) and b (D,)."""
    if x.dtype != _DTYPE or not is_plain_call(x):
        return F.linear(x, weight, bias)
    if records_gradients((x, weight, bias)):
        return Linear.apply(x, weight, bias)
    return product(rows_of(x), weight, bias).reshape(*x.shape[:-1], len(weight))


def is_plain_call(x: Tensor) -> bool:
    """Whether the CPU's own path may serve: nothing but evaluation and, at most, a recorded gradient is going on."""
    return (
        type(x) in PLAIN
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
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


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x W^T + b of matrices, written to ``out`` if there is one; W may be a transposed view."""
    if has_product_kernel(x, weight.t()) and (bias is None or _is_row(bias, len(weight))):
        if out is None:
            out = x.new_empty(len(x), len(weight))
        torch.ops.vitfast.matrix_sum(x, weight.t(), None, None, bias, out[None])
        return out
    if out is None:
        return F.linear(x, weight, bias)
    return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)


def has_product_kernel(a: Tensor, b: Tensor) -> bool:
    """Whether `torch.ops.vitfast.matrix_sum` serves A B. It stores whole vectors, and is made for wide ones."""
    return (
        is_chosen("cpu", a.device)
        and b.is_cpu
        and a.dtype == b.dtype == torch.float32
        and b.shape[1] % 16 == 0
        and 0 not in (*a.shape, *b.shape)
        and a.stride(1) == 1
        and 1 in b.stride()
        and type(a) in PLAIN
        and type(b) in PLAIN
        and _extension.require().instruction_set() != "baseline"
    )


def _is_row(bias: Tensor, columns: int) -> bool:
    return (
        bias.is_cpu
        and bias.dtype == torch.float32
        and bias.shape == (columns,)
        and bias.is_contiguous()
        and type(bias) in PLAIN
    )


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
        torch.ops.vitfast.weight_gradient(grad, x, None, None, weight, bias, add)
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


class Linear(Recorded):
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


if _extension.available():
    for _name in ("matrix_sum", "weight_gradient"):  # they return nothing, and so do their fakes
        torch.library.register_fake(f"vitfast::{_name}", lambda *tensors: None)
