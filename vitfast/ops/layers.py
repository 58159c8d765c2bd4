"""Tangents of matrix products, normalisations and GELU, K at a time: what `vitfast.hessian` computes with.

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
    """A sum of at most two matrix products, (K, rows, columns). What is None is left out."""

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
            assert len(self._terms) < 2
            self._terms.append((a, b))

    def total(self) -> Tensor | None:
        """None if nothing was added."""
        if not self._terms:
            return None if self._start is None else self._start.expand(self._shape)
        result = self.by_kernel()
        return self._by_pytorch() if result is None else result

    def by_kernel(self) -> Tensor | None:
        """The sum of the products that were added, or None if no kernel serves."""
        if self._product_kernel_serves():
            return self._by_products()
        if self._gradient_kernel_serves():
            return self._by_gradients()
        return None

    def _product_kernel_serves(self) -> bool:
        start = self._start
        return (
            _extension.available()
            and self._shape[0] > 0
            and all(has_product_kernel(_first(a), _first(b)) for a, b in self._terms)
            and (start is None or (start.shape[1:] == (1, self._shape[2]) and start.stride(2) == 1))
        )

    def _gradient_kernel_serves(self) -> bool:
        return (
            _extension.available()
            and self._shape[0] > 0
            and self._start is None
            and all(has_gradient_kernel(_first(a).t(), _first(b)) for a, b in self._terms)  # A^T is what lies in memory
        )

    def _by_products(self) -> Tensor:
        result = self._terms[0][0].new_empty(self._shape)
        first, second = (*self._terms, (None, None))[:2]
        start = None if self._start is None else self._start.expand(self._shape[0], 1, self._shape[2]).squeeze(1)
        torch.ops.vitfast.matrix_sum(*first, *second, start, result)
        return result

    def _by_gradients(self) -> Tensor:
        result = self._terms[0][0].new_empty(self._shape)
        first, second = (*((a.transpose(-1, -2), b) for a, b in self._terms), (None, None))[:2]
        torch.ops.vitfast.weight_gradient(*first, *second, result, None, False)
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


def matrix_product(a: Tensor, b: Tensor, row: Tensor | None = None) -> Tensor:
    """A B + row."""
    products = Products(1, a.shape[0], b.shape[1])
    products.begin(None if row is None else row[None, None])
    products.add(a, b)
    result = products.by_kernel()
    if result is not None:
        return result[0]
    return a @ b if row is None else torch.addmm(row, a, b)


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
    _normalization_tangents(primals, (None, *tangents, None), False, count, output_t, None, None, None)
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
    results = (x_grad_t, weight_grad_t, bias_grad_t)
    _normalization_tangents(primals, (grad, x_t, weight_t, None, grad_t), False, count, None, *results)
    return results


def _normalization_tangents(primals, others, per_channel: bool, count: int, *results: Tensor | None) -> None:
    """Writes results of (x, mean, inverse, weight) and (grad, x_t, weight_t, bias_t, grad_t)."""
    x, mean, inverse, weight = map(_dense, primals)
    torch.ops.vitfast.normalization_tangents(
        x, mean, inverse, per_channel, weight, *map(_dense, others), count, *results
    )


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


# ---- batch normalisation with constant statistics --------------------------------------------------------------------


def batch_norm_tangents(
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor | None,
    x_t: Tensor | None,
    weight_t: Tensor | None,
    bias_t: Tensor | None,
) -> Tensor:
    """Of the output, (K, batch, channels, ...) for x (batch, channels, ...) and the statistics of channels."""
    primals, tangents = (x, mean, inverse, weight), (x_t, weight_t, bias_t)
    if not _has_pixels(x) or not _serves(*primals, *tangents):
        return mapped(lambda *t: reference.batch_norm_tangent(*primals, *t), tangents).to(x.dtype)
    pixels, count = _pixels(x, x), count_of(tangents)
    output_t = x.new_empty(count, *pixels.shape)
    others = (None, _pixels(x_t, x), weight_t, bias_t, None)
    _normalization_tangents((pixels, *primals[1:]), others, True, count, output_t, None, None, None)
    return _maps(output_t, x)


def batch_norm_backward_tangents(
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
    if not _has_pixels(x) or not _serves(*primals, grad, *tangents):
        results = mapped(lambda *t: reference.batch_norm_backward_tangent(grad, *primals, *t), tangents)
        return tuple(result.to(x.dtype) for result in results)
    pixels, count = _pixels(x, x), count_of(tangents)
    x_grad_t = x.new_empty(count, *pixels.shape)
    weight_grad_t, bias_grad_t = (x.new_empty(count, x.shape[1]) for _ in range(2))
    others = (_pixels(grad, x), _pixels(x_t, x), weight_t, None, _pixels(grad_t, x))
    results = (x_grad_t, weight_grad_t, bias_grad_t)
    _normalization_tangents((pixels, *primals[1:]), others, True, count, None, *results)
    return _maps(x_grad_t, x), weight_grad_t, bias_grad_t


def _has_pixels(x: Tensor) -> bool:
    """Whether the channels of a pixel lie side by side."""
    return x.dim() > 1 and x.numel() > 0 and x.movedim(1, -1).is_contiguous()


def _pixels(maps: Tensor | None, x: Tensor) -> Tensor | None:
    """Maps in the shape of x, (batch, channels, ...), as (pixels, channels); if they have K in front, so has the
    result."""
    if maps is None:
        return None
    leading = maps.dim() - x.dim()
    return maps.movedim(1 + leading, -1).reshape(*maps.shape[:leading], x.numel() // x.shape[1], x.shape[1])


def _maps(pixels: Tensor, x: Tensor) -> Tensor:
    """(K, pixels, channels) as K maps in the shape of x."""
    batch, channels, *sizes = x.shape
    return pixels.view(-1, batch, *sizes, channels).movedim(-1, 2)


# ---- GELU ------------------------------------------------------------------------------------------------------------


def gelu_tangents(x: Tensor, x_t: Tensor) -> Tensor:
    """Of gelu(x), with the exact GELU, x Phi(x)."""
    if not _serves(x, x_t):
        return mapped(lambda t: reference.gelu_tangent(x, t), (x_t,))
    order = order_in_memory(x)
    x, x_t = (_dense(_permuted(t, order)) for t in (x, x_t))
    output_t = torch.empty_like(x_t)
    torch.ops.vitfast.gelu_tangents(x, None, x_t, None, output_t)
    return _permuted_back(output_t, order)


def gelu_backward_tangents(grad: Tensor, x: Tensor, grad_t: Tensor | None, x_t: Tensor | None) -> Tensor:
    """Of the gradient of x."""
    tangents = (grad_t, x_t)
    if not _serves(x, grad, *tangents):
        return mapped(lambda *t: reference.gelu_backward_tangent(grad, x, *t), tangents)
    order = order_in_memory(x)
    x, grad, grad_t, x_t = (_dense(_permuted(t, order)) for t in (x, grad, grad_t, x_t))
    x_grad_t = x.new_empty(count_of((grad_t, x_t)), *x.shape)
    torch.ops.vitfast.gelu_tangents(x, grad, x_t, grad_t, x_grad_t)
    return _permuted_back(x_grad_t, order)


# Elementwise, so that maps with channels last may stay so.


def order_in_memory(x: Tensor) -> list[int]:
    """The dimensions, the one with the largest stride first."""
    return sorted(range(x.dim()), key=lambda dim: -x.stride(dim))


def _permuted(x: Tensor | None, order: list[int]) -> Tensor | None:
    """The last dimensions in this order; there may be K in front."""
    if x is None:
        return None
    return x.permute(order) if x.dim() == len(order) else x.permute(0, *(dim + 1 for dim in order))


def _permuted_back(tangents: Tensor, order: list[int]) -> Tensor:
    back = sorted(range(len(order)), key=order.__getitem__)
    return _permuted(tangents, back)


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
    for _name in ("gelu_tangents", "normalization_tangents"):  # they return nothing: results are written
        torch.library.register_fake(f"vitfast::{_name}", lambda *arguments: None)
