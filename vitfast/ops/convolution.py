"""Convolutions with stride 1 and their tangents, K at a time: what `vitfast.hessian` computes with.

The tangent of a convolution is the sum of two, x_t * w + x * w_t, and so is that of either of its gradients. Kernels
for 3x3 filters (`winograd_kernel.h`) add them up before anything is written, and multiply 2.25 times less often than
the definition, by Winograd's algorithm F(2x2, 3x3). Convolutions with 1x1 filters are matrix products of pixels.

They take float32 on the CPU and return channels last: neighbouring channels make up vectors, and rows of pixels. Maps
in another layout are copied first, so whoever calls them does well to stay with channels last.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vitfast.ops import _extension
from vitfast.ops.backend import is_chosen
from vitfast.ops.layers import Products

_FILTER, _CHANNELS, _TILE = 3, 16, 2
# A tile of 2x2 results takes 16 multiplications, 36 by the definition. Where maps are so small or odd that less than
# this share of the tiles' pixels is in the map, the definition is as fast.
_LEAST_USED = 0.6


def serves(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    groups: int,
) -> bool:
    """Whether there is something faster than PyTorch's convolution with such options."""
    if (
        weight.dim() != 4
        or transposed
        or groups != 1
        or any(step != 1 for step in (*stride, *dilation))
        or len(set(padding)) != 1  # one number may stand for both
        or not has_best_layout(weight)
        or not _extension.available()
        or not is_chosen("cpu", weight.device)
    ):
        return False
    out_size = [size + 2 * padding[0] - taps + 1 for size, taps in zip(x.shape[2:], weight.shape[2:], strict=True)]
    if 0 in (*x.shape, *weight.shape) or min(out_size) <= 0:
        return False
    return padding[0] == 0 if _is_pointwise(weight) else _kernels_serve(weight, out_size, padding[0])


def _kernels_serve(weight: Tensor, out_size: Sequence[int], padding: int) -> bool:
    return (
        weight.shape[2:] == (_FILTER, _FILTER)
        and padding < _FILTER
        and all(channels % _CHANNELS == 0 for channels in weight.shape[:2])
        and out_size[0] * out_size[1] >= _LEAST_USED * _rounded_up(out_size[0]) * _rounded_up(out_size[1])
    )


def _rounded_up(size: int) -> int:
    return -(-size // _TILE) * _TILE


def has_best_layout(x: Tensor) -> bool:
    """Whether images of its dtype and device are convolved fastest with channels last, whatever computes it."""
    return x.device.type == "cpu" and x.dtype == torch.float32


def output_tangents(x: Tensor, weight: Tensor, x_t: Tensor | None, weight_t: Tensor | None, padding: int) -> Tensor:
    """x_t * w + x * w_t, (K, images, outputs, height, width), with channels last."""
    if _is_pointwise(weight):
        return _sum_of_products(x, weight.flatten(1).t(), x_t, None if weight_t is None else weight_t.flatten(2).mT)
    return _sum_of_convolutions(x, weight, x_t, weight_t, weight.shape[0], padding, transposed=False)


def input_gradient_tangents(
    grad: Tensor, weight: Tensor, grad_t: Tensor | None, weight_t: Tensor | None, padding: int
) -> Tensor:
    """Of the gradient of x, (K, *x.shape), with channels last, for the padding of the convolution."""
    if _is_pointwise(weight):
        return _sum_of_products(grad, weight.flatten(1), grad_t, None if weight_t is None else weight_t.flatten(2))
    padding = _FILTER - 1 - padding
    return _sum_of_convolutions(grad, weight, grad_t, weight_t, weight.shape[1], padding, transposed=True)


def weight_gradient_tangents(
    grad: Tensor, x: Tensor, weight: Tensor, grad_t: Tensor | None, x_t: Tensor | None, padding: int
) -> Tensor:
    """Of the gradient of the weight, (K, *weight.shape)."""
    count = len(x_t if grad_t is None else grad_t)
    if _is_pointwise(weight):
        total = Products(count, *weight.shape[:2])
        if grad_t is not None:
            total.add(_pixels(grad_t).mT, _pixels(x))
        if x_t is not None:
            total.add(_pixels(grad).t(), _pixels(x_t))
        return total.total().view(count, *weight.shape)
    result = x.new_empty(count, *weight.shape)
    maps = (None if t is None else channels_last(t) for t in (x_t, grad, x, grad_t))
    torch.ops.vitfast.conv3x3_weight_gradient(*maps, padding, result)
    return result


def channels_last(maps: Tensor) -> Tensor:
    """(..., channels, height, width) with channels adjacent; a copy if they are not."""
    return maps if maps.stride(-3) == 1 else maps.movedim(-3, -1).contiguous().movedim(-1, -3)


def _is_pointwise(weight: Tensor) -> bool:
    return weight.shape[2:] == (1, 1)


def _pixels(maps: Tensor) -> Tensor:
    """(images, channels, height, width), maybe with K in front, as rows of channels."""
    return maps.movedim(-3, -1).flatten(-4, -2)


def _sum_of_products(x: Tensor, b: Tensor, x_t: Tensor | None, b_t: Tensor | None) -> Tensor:
    """Pixels of x_t times b, plus those of x times b_t, as maps again."""
    count, columns = len(b_t if x_t is None else x_t), b.shape[1]
    total = Products(count, x.numel() // x.shape[1], columns)
    if x_t is not None:
        total.add(_pixels(x_t), b)
    total.add(_pixels(x), b_t)
    images, _, height, width = x.shape
    return total.total().view(count, images, height, width, columns).movedim(-1, -3)


def _sum_of_convolutions(
    x: Tensor,
    weight: Tensor,
    x_t: Tensor | None,
    weight_t: Tensor | None,
    channels: int,
    padding: int,
    transposed: bool,
) -> Tensor:
    count = len(weight_t if x_t is None else x_t)
    height, width = (size + 2 * padding - (_FILTER - 1) for size in x.shape[2:])
    result = x.new_empty(count, len(x), height, width, channels).movedim(-1, -3)
    torch.ops.vitfast.conv3x3(
        None if x_t is None else channels_last(x_t),
        weight.contiguous(),
        channels_last(x),
        None if weight_t is None else _contiguous_filters(weight_t),
        padding,
        transposed,
        result,
    )
    return result


def _contiguous_filters(weight_t: Tensor) -> Tensor:
    """K filters, each of them contiguous; they may be far apart, as parts of K long vectors are."""
    return weight_t if weight_t[0].is_contiguous() else weight_t.contiguous()


if _extension.available():
    for _name in ("conv3x3", "conv3x3_weight_gradient"):  # they return nothing: results are written
        torch.library.register_fake(f"vitfast::{_name}", lambda *arguments: None)
