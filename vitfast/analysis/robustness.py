"""Images made worse on purpose, to see what a model makes of them.

Source: Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", ICLR
2019.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gaussian_noise"]


def gaussian_noise(images: Tensor, deviation: float, generator: torch.Generator | None = None) -> Tensor:
    r"""White noise: :math:`\min(\max(x + \sigma \epsilon, 0), 1)` with :math:`\epsilon \sim \mathcal{N}(0, 1)`.

    Args:
        images: any shape, floating point, from 0 (black) to 1 (white).
        deviation: sigma, in units of the full range.
        generator: of the noise, on the device of the images.

    Raises:
        TypeError: the images are not floating point.
        ValueError: ``deviation`` is negative.
    """
    if not images.is_floating_point():
        raise TypeError(f"images must be floating point, from 0 to 1; got {images.dtype}")
    if deviation < 0:
        raise ValueError(f"deviation must be at least 0; got {deviation}")
    noise = torch.empty_like(images).normal_(generator=generator)
    return (images + deviation * noise).clamp(0, 1)
