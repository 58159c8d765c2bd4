r"""The trace of a symmetric operator from products with random vectors.

Sources: Hutchinson, "A Stochastic Estimator of the Trace of the Influence Matrix", 1990; Meyer, Musco, Musco &
Woodruff, "Hutch++: Optimal Stochastic Trace Estimation", SOSA 2021; Epperly, Tropp & Webber, "XTrace: Making the Most
of Every Sample in Stochastic Trace Estimation", SIAM J. Matrix Anal. Appl. 2024.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["TraceEstimate", "trace"]

METHODS = ("hutchinson", "hutch++", "xtrace")


@dataclass(frozen=True)
class TraceEstimate:
    """A trace.

    Attributes:
        value: the estimate.
        standard_error: of the estimate; NaN where there is but one sample.
        products: how many products with a vector it took.
    """

    value: float
    standard_error: float
    products: int


def trace(operator, samples: int = 32, method: str = "xtrace", *, seed: int = 0) -> TraceEstimate:
    r"""Estimates the trace of a symmetric operator; without bias, whatever the method.

    - "hutchinson": the mean of :math:`\omega^\top A \omega`. Its error falls as ``samples`` to the power -1/2.
    - "hutch++": a third of the products finds the range of the largest eigenvalues, whose trace is then exact.
    - "xtrace": every vector serves both ends: each estimate leaves one vector out of the range and tests with it.
      The error falls as 1 / ``samples`` or faster, with the eigenvalues.

    Args:
        operator: as in `vitfast.hessian.top_eigenvalues`.
        samples: products with a vector, at least 2, for "hutch++" 3, for "xtrace" 4.
        method: one of the above.
        seed: of the random vectors.

    Raises:
        ValueError: the method is unknown, or there are too few samples for it, or more than the operator has rows.

    >>> trace(torch.diag(torch.arange(100.0)), 40).value
    4950.0
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    least = {"hutchinson": 2, "hutch++": 3, "xtrace": 4}[method]
    if samples < least:
        raise ValueError(f"{method} needs at least {least} samples; got {samples}")
    size = operator.shape[0]
    if method != "hutchinson" and samples > 2 * size:
        raise ValueError(f"{method} has no use for more than 2 n = {2 * size} samples; got {samples}")
    generator = torch.Generator().manual_seed(seed)
    estimate = {"hutchinson": _hutchinson, "hutch++": _hutch_plus_plus, "xtrace": _xtrace}[method]
    return estimate(operator, samples, generator)


def _signs(operator, columns: int, generator: torch.Generator) -> Tensor:
    """Random signs: of all vectors with independent entries, those whose estimates vary least."""
    bits = torch.randint(0, 2, (operator.shape[0], columns), generator=generator)
    return (2 * bits - 1).to(operator.device, operator.dtype)


def _column_dots(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).double().sum(0)


def _estimate(samples: Tensor, products: int, exact: float = 0.0) -> TraceEstimate:
    error = samples.std() / math.sqrt(len(samples)) if len(samples) > 1 else torch.tensor(math.nan)
    return TraceEstimate(exact + samples.mean().item(), error.item(), products)


def _hutchinson(operator, samples: int, generator: torch.Generator) -> TraceEstimate:
    omega = _signs(operator, samples, generator)
    return _estimate(_column_dots(omega, operator @ omega), samples)


def _hutch_plus_plus(operator, samples: int, generator: torch.Generator) -> TraceEstimate:
    third = samples // 3
    q = torch.linalg.qr(operator @ _signs(operator, third, generator))[0]
    exact = _column_dots(q, operator @ q).sum().item()
    omega = _signs(operator, samples - 2 * third, generator)
    omega = omega - q @ (q.T @ omega)
    return _estimate(_column_dots(omega, operator @ omega), samples, exact)


def _xtrace(operator, samples: int, generator: torch.Generator) -> TraceEstimate:
    r"""For each vector :math:`\omega_i`, with :math:`P_i` the projector on the range of A times the others,

    .. math:: t_i = \mathrm{tr}(P_i A P_i) + \omega_i^\top (1 - P_i) A (1 - P_i) \, \omega_i

    With :math:`A \Omega = Q R`, :math:`P_i = Q (1 - s_i s_i^\top) Q^\top`, where :math:`s_i` is the direction that is
    orthogonal to all columns of R but the i-th, :math:`(R R^\top)^{-1} r_i` normalised. There is none, and
    :math:`s_i = 0`, where the others span as much without it: where the rank of A is less than the number of vectors.
    """
    half = samples // 2
    omega = _signs(operator, half, generator)
    image = operator @ omega
    left, singular, right = torch.linalg.svd(image.double(), full_matrices=False)
    kept = singular > len(image) * torch.finfo(operator.dtype).eps * singular.max()
    q = left[:, kept].to(operator.dtype)
    projected = operator @ q
    h = (q.T @ projected).double()
    h = 0.5 * (h + h.T)
    inverse = right[kept] / singular[kept, None]  # (R R^T)^-1 R, with R = diag(singular) right
    leverage = right[kept].square().sum(0)  # 1 where only column i has a direction
    s = inverse / torch.linalg.vector_norm(inverse, dim=0) * (leverage > 1 - 1e-6)
    w = (q.T @ omega).double()  # Q^T omega_i
    x = w - s * (s * w).sum(0)  # so that (1 - P_i) omega_i = omega_i - Q x_i
    inside = h.trace() - (s * (h @ s)).sum(0)
    cross = (x * (projected.T @ omega).double()).sum(0)  # x_i^T Q^T A omega_i
    outside = _column_dots(omega, image) - 2 * cross + (x * (h @ x)).sum(0)
    return _estimate(inside + outside, 2 * half)
