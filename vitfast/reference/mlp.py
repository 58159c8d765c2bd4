"""The feed-forward part of a transformer, defined in a few lines of PyTorch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def mlp(x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None) -> Tensor:
    """GELU(x W1^T + b1) W2^T + b2, with the exact GELU, h Phi(h)."""
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)


def mlp_backward(
    grad: Tensor, x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of x, W1, b1, W2 and b2, written out: differentiable once more.

    With h = x W1^T + b1, a = h Phi(h) and G the gradient of the output,

        dA = G W2,  dH = dA (Phi(h) + h phi(h)),  dx = dH W1,  dW1 = dH^T x,  dW2 = G^T a,  db1 and db2 sums over rows.
    """
    x_rows, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    h = F.linear(x_rows, weight1, bias1)
    cdf = 0.5 * (1 + torch.erf(h * math.sqrt(0.5)))
    density = torch.exp(-0.5 * h * h) / math.sqrt(2 * math.pi)
    grad_h = grad_rows @ weight2 * (cdf + h * density)
    return (
        (grad_h @ weight1).reshape(x.shape),
        grad_h.mT @ x_rows,
        None if bias1 is None else grad_h.sum(0),
        grad_rows.mT @ (h * cdf),
        None if bias2 is None else grad_rows.sum(0),
    )
