"""Tangents of matrix products, layer normalisation and GELU, K at a time: what `vitfast.hessian` computes with.

PyTorch differentiates each of these twice in a dozen passes over memory that hold K tangents each. Here they are one
pass of a kernel, or the matrix products alone, which add to what is there.

Tangents and results have K in front; a tangent of None is zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitfast import reference
from vitfast.ops import _extension
from vitfast.ops._tangents import count_of, mapped
from vitfast.ops.linear import has_gradient_kernel, product

# ---- sums of matrix products -----------------------------------------------------------------------------------------


class Products:
    """A sum of matrix products, (K, rows, columns). What is None is left out."""

    def __init__(self, count: int, rows: int, columns: int):
        self._shape = (count, rows, columns)
        self._total: Tensor | None = None
        self._is_own = False  # whether products may be added to the total in place

    def begin(self, start: Tensor | None) -> None:
        """With what can be expanded to the shape, and is only read."""
        if start is not None:
            self._total = start.expand(self._shape)

    def add(self, a: Tensor | None, b: Tensor | None) -> None:
        """The products of K pairs, of which one may be a single matrix, the same for all."""
        if a is None or b is None:
            return
        if b.dim() == 2 and a.is_contiguous():
            self._add_rows(a.flatten(0, 1), b)
        else:
            self._add_pairs(*(t.expand(self._shape[0], *t.shape) if t.dim() == 2 else t for t in (a, b)))
        self._is_own = True

    def _add_rows(self, rows: Tensor, b: Tensor) -> None:
        if self._total is None:
            self._total = product(rows, b.t()).view(self._shape)
            return
        if not self._is_own:
            self._total = self._total.clone(memory_format=torch.contiguous_format)
        self._total.view(len(rows), -1).addmm_(rows, b)

    def _add_pairs(self, a: Tensor, b: Tensor) -> None:
        if len(a) > 0 and has_gradient_kernel(a[0].t(), b[0]):  # a is the transpose of what lies in memory
            add = self._total is not None
            if not add:
                self._total = b.new_empty(self._shape)
            elif not self._is_own:
                self._total = self._total.clone(memory_format=torch.contiguous_format)
            for columns, rows, out in zip(a, b, self._total, strict=True):
                torch.ops.vitfast.weight_gradient(columns.t(), rows, out, None, add)
        elif self._total is None:
            self._total = torch.bmm(a, b)
        elif self._is_own:
            self._total.baddbmm_(a, b)
        else:
            self._total = torch.baddbmm(self._total, a, b)

    @property
    def total(self) -> Tensor | None:
        """None if nothing was added."""
        return self._total


# ---- layer normalisation of rows -------------------------------------------------------------------------------------


def layer_norm_tangents(
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor | None,
    x_t: Tensor | None,
    weight_t: Tensor | None,
    bias_t: Tensor | None,
) -> Tensor:
    """Of the output, (K, rows, channels) for x (rows, channels) and its statistics (rows, 1)."""
    primals, tangents = (x, mean, inverse, weight), (x_t, weight_t, bias_t)
    if not _serves(*primals, *tangents):
        return mapped(lambda *t: reference.layer_norm_tangent(*primals, *t), tangents).to(x.dtype)
    count = count_of(tangents)
    output_t = x.new_empty(count, *x.shape)
    torch.ops.vitfast.layer_norm_tangents(
        *map(_dense, (*primals, None, *tangents, None)), count, output_t, None, None, None
    )
    return output_t


def layer_norm_backward_tangents(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor | None,
    grad_t: Tensor | None,
    x_t: Tensor | None,
    weight_t: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the gradients of x, of the weight and of the bias, whether there are such or not."""
    primals, tangents = (x, mean, inverse, weight), (grad_t, x_t, weight_t)
    if not _serves(*primals, grad, *tangents):
        results = mapped(lambda *t: reference.layer_norm_backward_tangent(grad, *primals, *t), tangents)
        return tuple(result.to(x.dtype) for result in results)
    count = count_of(tangents)
    x_grad_t = x.new_empty(count, *x.shape)
    weight_grad_t, bias_grad_t = (x.new_empty(count, x.shape[1]) for _ in range(2))
    torch.ops.vitfast.layer_norm_tangents(
        *map(_dense, (*primals, grad, x_t, weight_t, None, grad_t)), count, None, x_grad_t, weight_grad_t, bias_grad_t
    )
    return x_grad_t, weight_grad_t, bias_grad_t


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


# ---- GELU ------------------------------------------------------------------------------------------------------------


def gelu_tangents(x: Tensor, x_t: Tensor) -> Tensor:
    """Of gelu(x), with the exact GELU, x Phi(x)."""
    if not _serves(x, x_t):
        return mapped(lambda t: reference.gelu_tangent(x, t), (x_t,))
    output_t = x.new_empty(*x_t.shape)
    torch.ops.vitfast.gelu_tangents(x.contiguous(), None, x_t.contiguous(), None, output_t)
    return output_t


def gelu_backward_tangents(grad: Tensor, x: Tensor, grad_t: Tensor | None, x_t: Tensor | None) -> Tensor:
    """Of the gradient of x."""
    tangents = (grad_t, x_t)
    if not _serves(x, grad, *tangents):
        return mapped(lambda *t: reference.gelu_backward_tangent(grad, x, *t), tangents)
    x_grad_t = x.new_empty(count_of(tangents), *x.shape)
    grad_t, x_t = (None if t is None else t.contiguous() for t in tangents)
    torch.ops.vitfast.gelu_tangents(x.contiguous(), grad.contiguous(), x_t, grad_t, x_grad_t)
    return x_grad_t


# ---- where there are kernels -----------------------------------------------------------------------------------------


def _serves(*tensors: Tensor | None) -> bool:
    first, *others = (t for t in tensors if t is not None)
    return (
        _extension.available()
        and first.device.type == "cpu"
        and first.dtype in (torch.float32, torch.float64)
        and all(t.dtype == first.dtype for t in others)
    )


if _extension.available():
    for _name in ("gelu_tangents", "layer_norm_tangents"):  # they return nothing: results are written
        torch.library.register_fake(f"vitfast::{_name}", lambda *arguments: None)
