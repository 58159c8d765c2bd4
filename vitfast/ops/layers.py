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
from vitfast.ops.linear import has_gradient_kernel, has_product_kernel

# ---- sums of matrix products -----------------------------------------------------------------------------------------


class Products:
    """A sum of matrix products, (K, rows, columns). What is None is left out."""

    def __init__(self, count: int, rows: int, columns: int):
        self._shape = (count, rows, columns)
        self._start: Tensor | None = None
        self._terms: list[tuple[Tensor, Tensor]] = []

    def begin(self, start: Tensor | None) -> None:
        """With what can be expanded to the shape, and is only read."""
        self._start = start

    def add(self, a: Tensor | None, b: Tensor | None) -> None:
        """The products of K pairs, of which one may be a single matrix, the same for all."""
        if a is not None and b is not None:
            self._terms.append((a, b))

    def total(self) -> Tensor | None:
        """None if nothing was added."""
        if not self._terms:
            return None if self._start is None else self._start.expand(self._shape)
        if all(self._has_product_kernel(*term) for term in self._terms) and self._starts_with_rows():
            return self._by_products()
        if all(self._has_gradient_kernel(*term) for term in self._terms) and self._start is None:
            return self._by_gradients()
        return self._by_pytorch()

    def _has_product_kernel(self, a: Tensor, b: Tensor) -> bool:
        return self._shape[0] > 0 and has_product_kernel(_first(a), _first(b))

    def _has_gradient_kernel(self, a: Tensor, b: Tensor) -> bool:
        return self._shape[0] > 0 and has_gradient_kernel(_first(a).t(), _first(b))  # A is what lies in memory, turned

    def _starts_with_rows(self) -> bool:
        start = self._start
        return start is None or (start.dim() == 3 and start.shape[1] == 1 and start.stride(2) == 1)

    def _by_products(self) -> Tensor:
        result = self._terms[0][0].new_empty(self._shape)
        first, second = (*self._terms, (None, None))[:2]
        start = None if self._start is None else self._start.expand(self._shape[0], 1, self._shape[2]).squeeze(1)
        torch.ops.vitfast.matrix_sum(*first, *second, start, result)
        return result

    def _by_gradients(self) -> Tensor:
        result = self._terms[0][0].new_empty(self._shape)
        for i, (a, b) in enumerate(self._terms):
            for grad, x, out in zip(*map(self._each, (a, b)), result, strict=True):
                torch.ops.vitfast.weight_gradient(grad.t(), x, out, None, i > 0)
        return result

    def _by_pytorch(self) -> Tensor:
        total = self._start
        for i, (a, b) in enumerate(self._terms):
            if total is None and b.dim() == 2 and a.is_contiguous():
                total = (a.flatten(0, 1) @ b).view(self._shape)  # one product instead of K
            elif total is None:
                total = torch.bmm(self._each(a), self._each(b))
            elif i == 0:
                total = torch.baddbmm(total, self._each(a), self._each(b))
            else:
                total.baddbmm_(self._each(a), self._each(b))
        return total

    def _each(self, matrices: Tensor) -> Tensor:
        return matrices if matrices.dim() == 3 else matrices.expand(self._shape[0], *matrices.shape)


def _first(matrices: Tensor) -> Tensor:
    return matrices if matrices.dim() == 2 else matrices[0]


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
