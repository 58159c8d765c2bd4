"""Spatial smoothing: an activation that bounds a feature map, and a blur; one pass over the map.

Source: Park & Kim, "Blurs Behave Like Ensembles: Spatial Smoothings to Improve Accuracy, Uncertainty, and Robustness",
ICML 2022.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch.nn.functional as F
from torch import Tensor, nn

from vitfast import functional
from vitfast.nn._checks import positive_integer
from vitfast.nn._fusion import folds, norm_arguments
from vitfast.nn.blur_pool import BlurPool2d, Padding

# By the temperature that the authors gave them.
ACTIVATIONS = {None: 1.0, "relu": math.inf, "tanh": 10.0, "sigmoid": 10.0, "softmax": 10.0, "scaling": 5.0}

# The blocks of the paper's study: the arguments of `Smoothing2d` that make them.
_UNBLURRED = {"kernel": "box", "filt_size": 1}
BLOCKS = {
    "Blur": {"activation": None},
    "TanhBlur": {"activation": "tanh"},
    "BNTanhBlur": {"activation": "tanh", "norm": True},
    "BNBlur": {"activation": "relu", "norm": True},
    "ReLuBlur": {"activation": "relu", "temperature": 6.0},
    "SigmoidBlur": {"activation": "sigmoid"},
    "SoftmaxBlur": {"activation": "softmax"},
    "ScalingBlur": {"activation": "scaling"},
    "Tanh": {"activation": "tanh", **_UNBLURRED},
    "ReLu": {"activation": "relu", "temperature": 6.0, **_UNBLURRED},
    "Scaling": {"activation": "scaling", **_UNBLURRED},
}
UNBLURRED_BLOCKS = tuple(name for name, options in BLOCKS.items() if options.get("filt_size") == 1)


class Smoothing2d(BlurPool2d):
    r"""Normalisation, if wanted, activation and blur: (B, C, H, W) -> (B, C, H, W).

    With the temperature T, the activations are

    - "tanh": :math:`\mathrm{relu}(T \tanh(x / T))`,
    - "sigmoid": :math:`\mathrm{relu}(4 T (\sigma(x / T) - \frac12))`, which is that of tanh at twice the temperature,
    - "softmax": :math:`T \, \mathrm{softmax}(x / T)` over the channels,
    - "relu": :math:`\min(\mathrm{relu}(x), T)`,
    - "scaling": :math:`x / T`,
    - None: x.

    `named` makes the blocks of the paper by their names.

    Args:
        channels: of the map.
        activation: one of the above.
        norm: whether a batch normalisation comes first; in evaluation mode it is part of the same pass.
        temperature: T; None for what the authors chose: 10; 5 for "scaling"; no bound for "relu".
        filt_size: taps of the blur; 1 for none.
        kernel: as in `BlurPool2d`; the authors' is the mean of 2 x 2 places.
        pad_mode: as in `BlurPool2d`; "replicate" serves maps of any size, and keeps the mean of a constant map.
        padding: as in `BlurPool2d`; "same" keeps the size of the map, and `1` with zeros is what the authors' code
            does, which lets the map grow by one.

    >>> Smoothing2d(64)(torch.randn(2, 64, 32, 32)).shape
    torch.Size([2, 64, 32, 32])
    """

    def __init__(
        self,
        channels: int,
        activation: str | None = "tanh",
        *,
        norm: bool = False,
        temperature: float | None = None,
        filt_size: int = 2,
        kernel: str | Sequence[float] | Tensor = "box",
        pad_mode: str = "replicate",
        padding: Padding = "same",
        device=None,
        dtype=None,
    ):
        super().__init__(
            positive_integer("channels", channels),
            filt_size,
            stride=1,
            pad_mode=pad_mode,
            kernel=kernel,
            padding=padding,
            device=device,
            dtype=dtype,
        )
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}; got {activation!r}")
        self.activation = activation
        self.temperature = ACTIVATIONS[activation] if temperature is None else _checked(temperature, activation)
        self.bn = nn.BatchNorm2d(channels, device=device, dtype=dtype) if norm else nn.Identity()
        if activation == "scaling":
            self.kernel /= self.temperature

    @classmethod
    def named(cls, name: str, channels: int, **options) -> Smoothing2d:
        """A block of the paper: "TanhBlur", the one it recommends; "Blur", "BNTanhBlur", "BNBlur", "ReLuBlur",
        "SigmoidBlur", "SoftmaxBlur", "ScalingBlur"; or without a blur "Tanh", "ReLu", "Scaling".

        Args:
            name: of the block.
            channels: of the map.
            options: arguments of the class, in place of those that the name stands for.

        Raises:
            ValueError: there is no such block.

        >>> Smoothing2d.named("BNTanhBlur", 64, temperature=5.0)
        """
        if name not in BLOCKS:
            raise ValueError(f"there is no smoothing block {name!r}; there are: {', '.join(BLOCKS)}")
        return cls(channels, **{**BLOCKS[name], **options})

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        fused = self._fused_activation()
        norm = None
        if fused is not None and folds(self.bn):
            norm = norm_arguments(self.bn)
        else:
            x = self.bn(x)
        if fused is None:
            x, fused = self._activated(x), (None, 1.0)
        activation, temperature = fused
        prologue = {"norm": norm, "activation": activation, "temperature": temperature}
        return functional.blur_pool2d(x, **self.blur_options(), **prologue)

    def _fused_activation(self) -> tuple[str | None, float] | None:
        """``activation`` and ``temperature`` of `vitfast.functional.blur_pool2d`, or None if it has no such one."""
        if self.activation == "tanh":
            return "tanh_relu", self.temperature
        if self.activation == "sigmoid":  # 2 sigmoid(z) - 1 = tanh(z / 2)
            return "tanh_relu", 2 * self.temperature
        if self.activation == "relu":
            return {math.inf: ("relu", 1.0), 6.0: ("relu6", 1.0)}.get(self.temperature)
        return None if self.activation == "softmax" else (None, 1.0)  # the kernel of the blur scales

    def _activated(self, x: Tensor) -> Tensor:
        """By the activations that the fused function does not have."""
        if self.activation == "softmax":
            return self.temperature * F.softmax(x / self.temperature, dim=1)
        return x.clamp(0, self.temperature)

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, activation={self.activation!r}, temperature={self.temperature:g}, {super().extra_repr()}"
        )


def _checked(temperature: float, activation: str | None) -> float:
    if isinstance(temperature, bool) or not isinstance(temperature, Real):
        raise TypeError(f"temperature must be a number; got {temperature!r}")
    if not temperature > 0 or (math.isinf(temperature) and activation != "relu"):
        raise ValueError(f"temperature must be above 0, and finite but for 'relu'; got {temperature}")
    return float(temperature)
