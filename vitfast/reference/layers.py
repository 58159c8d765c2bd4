"""Tangents of normalisations and GELU and of their gradients, in plain PyTorch.

A tangent of None is zero, and G is the gradient of the output. They are written out because PyTorch's own forward-mode
formula of layer normalisation is not differentiable in reverse.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vitfast.reference._algebra import add


def layer_norm_tangent(
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor | None,
    x_t: Tensor | None,
    weight_t: Tensor | None,
    bias_t: Tensor | None,
) -> Tensor:
    """Of x^ w + b over the last dimension, with x^ = (x - m(x)) r, r = (variance + eps)^(-1/2) and m() for the mean.

    ``mean`` is m(x) and ``inverse`` r, (..., 1).

    x^. = r (x. - m(x.) - x^ m(x^ x.)), and the tangent is x^. w + x^ w. + b. Without a weight, w is 1.
    """
    normal = (x - mean) * inverse
    result = None
    if x_t is not None:
        result = _normalised_tangent(normal, inverse, x_t)
        result = result if weight is None else result * weight
    result = add(result, None if weight_t is None else normal * weight_t)
    result = add(result, bias_t)
    return torch.zeros_like(x) if result is None else result.expand(x.shape)


def layer_norm_backward_tangent(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor | None,
    grad_t: Tensor | None,
    x_t: Tensor | None,
    weight_t: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the gradients dx = r (h - m(h) - x^ m(h x^)) with h = G w, dw = sum of G x^ and db = sum of G."""
    normal = (x - mean) * inverse
    grad_t = torch.zeros_like(grad) if grad_t is None else grad_t
    x_t = torch.zeros_like(x) if x_t is None else x_t
    normal_t = _normalised_tangent(normal, inverse, x_t)
    inverse_t = -(inverse**2) * _mean(normal * x_t)
    h, h_t = grad, grad_t
    if weight is not None:
        h, h_t = grad * weight, grad_t * weight
    if weight_t is not None:
        h_t = h_t + grad * weight_t
    slope, slope_t = _mean(h * normal), _mean(h_t * normal + h * normal_t)
    residual = h - _mean(h) - normal * slope
    residual_t = h_t - _mean(h_t) - normal_t * slope - normal * slope_t
    return (
        inverse_t * residual + inverse * residual_t,
        (grad_t * normal + grad * normal_t).flatten(0, -2).sum(0),
        grad_t.flatten(0, -2).sum(0),
    )


def batch_norm_tangent(
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor | None,
    x_t: Tensor | None,
    weight_t: Tensor | None,
    bias_t: Tensor | None,
) -> Tensor:
    """Of x^ w + b over the second dimension, with x^ = (x - mean) r and constants ``mean`` and ``inverse``, r, of every
    channel: x. r w + x^ w. + b. Without a weight, w is 1."""
    mean, inverse, weight, weight_t, bias_t = (_of_channels(t, x) for t in (mean, inverse, weight, weight_t, bias_t))
    result = None if x_t is None else x_t * (inverse if weight is None else inverse * weight)
    result = add(result, None if weight_t is None else (x - mean) * inverse * weight_t)
    result = add(result, bias_t)
    return torch.zeros_like(x) if result is None else result.expand(x.shape)


def batch_norm_backward_tangent(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor | None,
    grad_t: Tensor | None,
    x_t: Tensor | None,
    weight_t: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the gradients dx = G w r, dw = sum of G x^ and db = sum of G."""
    mean, inverse, weight, weight_t = (_of_channels(t, x) for t in (mean, inverse, weight, weight_t))
    grad_t = torch.zeros_like(grad) if grad_t is None else grad_t
    x_t = torch.zeros_like(x) if x_t is None else x_t
    h_t = grad_t if weight is None else grad_t * weight
    h_t = add(h_t, None if weight_t is None else grad * weight_t)
    over = [dim for dim in range(x.dim()) if dim != 1]
    weight_grad_t = (grad_t * (x - mean) + grad * x_t) * inverse
    return h_t * inverse, weight_grad_t.sum(over), grad_t.sum(over)


def _of_channels(vector: Tensor | None, x: Tensor) -> Tensor | None:
    """(channels,) as what is multiplied with x, (batch, channels, ...)."""
    return None if vector is None else vector.reshape(-1, *(1,) * (x.dim() - 2))


def gelu_tangent(x: Tensor, x_t: Tensor) -> Tensor:
    """Of x Phi(x): (Phi + x phi) x."""
    return x_t * _gelu_slope(x)


def gelu_backward_tangent(grad: Tensor, x: Tensor, grad_t: Tensor | None, x_t: Tensor | None) -> Tensor:
    """Of the gradient dx = G (Phi + x phi): G. (Phi + x phi) + G (2 - x^2) phi x."""
    result = None if grad_t is None else grad_t * _gelu_slope(x)
    result = add(result, None if x_t is None else grad * (2 - x * x) * _density(x) * x_t)
    return torch.zeros_like(x) if result is None else result


def _mean(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True)


def _normalised_tangent(normal: Tensor, inverse: Tensor, x_t: Tensor) -> Tensor:
    return inverse * (x_t - _mean(x_t) - normal * _mean(normal * x_t))


def _density(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _gelu_slope(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x * math.sqrt(0.5))) + x * _density(x)
