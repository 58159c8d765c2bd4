"""Blur pooling in plain PyTorch.

A map u is padded, correlated with one kernel k for all channels, and subsampled by the stride s:

    y[o, p] = sum over i, j of k[i, j] * u[pad(s o + i - top), pad(s p + j - left)]

where u = activation(scale * x + shift), and ``pad`` says which place of the map a place of its margin repeats. Without
a prologue u is x.

Shapes: ``x`` (B, C, H, W); ``kernel`` (K, L); ``scale`` and ``shift`` (C,). float16 and bfloat16 are computed in
float32 and rounded once, at the end.

Sources: Zhang, "Making Convolutional Networks Shift-Invariant Again", ICML 2019; Park & Kim, "Blurs Behave Like
Ensembles: Spatial Smoothings to Improve Accuracy, Uncertainty, and Robustness", ICML 2022.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
ACTIVATIONS = (None, "relu", "relu6", "tanh_relu")


def blur_pool2d(
    x: Tensor,
    kernel: Tensor,
    *,
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    padding_mode: str,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """The definition: (B, C, H, W) -> (B, C, H', W'). ``padding`` is (left, right, top, bottom)."""
    u = prologue(x, scale, shift, activation, temperature).to(_compute_dtype(x.dtype))
    left, right, top, bottom = padding
    u = _pad(_pad(u, -2, top, bottom, padding_mode), -1, left, right, padding_mode)
    channels = x.shape[1]
    weight = kernel.to(u.dtype).expand(channels, 1, *kernel.shape)
    return F.conv2d(u, weight, stride=stride, groups=channels).to(x.dtype)


def prologue(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, activation: str | None, temperature: float
) -> Tensor:
    """u = activation(scale * x + shift), in the dtype that is computed in if it is not x itself.

    ``activation`` is one of `ACTIVATIONS`; "tanh_relu" is relu(temperature * tanh(z / temperature)).
    """
    if scale is None and shift is None and activation is None:
        return x
    z = x.to(_compute_dtype(x.dtype))
    if scale is not None:
        z = z * scale.to(z.dtype)[:, None, None]
    if shift is not None:
        z = z + shift.to(z.dtype)[:, None, None]
    if activation == "tanh_relu":
        z = temperature * (z / temperature).tanh()
    if activation == "relu6":
        return F.relu6(z)
    return z if activation is None else z.relu()


def fold_norm(
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """scale and shift of the normalisation weight * (x - mean) / sqrt(variance + eps) + bias, in float32 at least."""
    dtype = torch.promote_types(variance.dtype, torch.float32)
    scale = (variance.to(dtype) + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.to(dtype)
    mean = mean.to(dtype)
    return scale, -mean * scale if bias is None else torch.addcmul(bias.to(dtype), mean, scale, value=-1)


def prologue_backward(
    grad: Tensor, x: Tensor, scale: Tensor | None, shift: Tensor | None, activation: str | None, temperature: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of x, scale and shift for the gradient of u, written out: differentiable any number of times.

    With z = scale * x + shift: dz = activation'(z) * du, dx = scale * dz, and per channel dscale = sum of dz * x and
    dshift = sum of dz.
    """
    wide = x.to(_compute_dtype(x.dtype))
    z = prologue(wide, scale, shift, None, temperature)
    dz = grad.to(wide.dtype)
    if activation == "tanh_relu":
        dz = dz * (1 - (z / temperature).tanh().square())
    if activation is not None:
        dz = dz.masked_fill(z <= 0, 0)
    if activation == "relu6":
        dz = dz.masked_fill(z >= 6, 0)
    dx = dz if scale is None else dz * scale.to(dz.dtype)[:, None, None]
    return (
        dx.to(x.dtype),
        None if scale is None else (dz * wide).sum((0, 2, 3)).to(scale.dtype),
        None if shift is None else dz.sum((0, 2, 3)).to(shift.dtype),
    )


def blur_pool2d_transposed(
    grad: Tensor,
    kernel: Tensor,
    size: tuple[int, int],
    *,
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    padding_mode: str,
) -> Tensor:
    """The transpose of the blur: the gradient of u, of height and width ``size``, for the gradient of y."""
    wide = grad.to(_compute_dtype(grad.dtype))
    channels = grad.shape[1]
    weight = kernel.to(wide.dtype).expand(channels, 1, *kernel.shape)
    left, right, top, bottom = padding
    spread = F.conv_transpose2d(wide, weight, stride=stride, groups=channels)
    # Places that no kernel reached, at the far edges, where the stride went past them.
    missing = [size[0] + top + bottom - spread.shape[2], size[1] + left + right - spread.shape[3]]
    u = F.pad(spread, (0, missing[1], 0, missing[0]))
    u = _unpad(u, -1, left, right, padding_mode)
    return _unpad(u, -2, top, bottom, padding_mode).to(grad.dtype)


def _pad(u: Tensor, dim: int, before: int, after: int, mode: str) -> Tensor:
    """One dimension padded; unlike `torch.nn.functional.pad` by more than its size, too, as repeated application."""
    if before == after == 0:
        return u
    if mode == "zeros":
        return F.pad(u, (before, after) if dim == -1 else (0, 0, before, after))
    return u.index_select(dim, _sources(u.shape[dim], before, after, mode, u.device))


def _unpad(u: Tensor, dim: int, before: int, after: int, mode: str) -> Tensor:
    """The transpose of `_pad`: what lies in the margins is added to the places that they repeat."""
    size = u.shape[dim] - before - after
    if mode == "zeros" or before == after == 0:
        return u.narrow(dim, before, size)
    shape = list(u.shape)
    shape[dim] = size
    return u.new_zeros(shape).index_add(dim, _sources(size, before, after, mode, u.device), u)


def _sources(size: int, before: int, after: int, mode: str, device: torch.device) -> Tensor:
    """Which place of a dimension every place of the padded one repeats."""
    places = torch.arange(-before, size + after, device=device)
    if mode == "replicate":
        return places.clamp(0, size - 1)
    if mode == "circular":
        return places % size
    places = places % max(2 * (size - 1), 1)  # back and forth, and the edges once
    return torch.minimum(places, 2 * (size - 1) - places)


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
