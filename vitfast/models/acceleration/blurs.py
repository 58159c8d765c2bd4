"""What the adapters share for blurs, alone and after a normalisation and an activation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitfast import functional
from vitfast.nn import BlurPool2d
from vitfast.nn._fusion import folds, has_hooks, scale_and_shift
from vitfast.ops._rules import is_autocast

# The activations that `blur_pool2d` applies on the way.
_ACTIVATIONS = {nn.ReLU: "relu", nn.ReLU6: "relu6"}


class FusedBlur:
    """Mixed into a fused blur: one that `vitfast.functional.blur_pool2d` computes with these options."""

    def blur_options(self) -> dict:
        raise NotImplementedError


BLURS: set[type[nn.Module]] = {BlurPool2d}
"""The blurs that can follow a normalisation in one pass: the classes of the libraries, and this package's own."""


def takes(x: Tensor) -> bool:
    """Whether the fused function returns what a convolution would, its dtype under autocast included."""
    if x.dim() != 4 or not x.is_floating_point():
        return False
    return not is_autocast(x.device) or x.dtype == torch.get_autocast_dtype(x.device.type)


def may_fuse(norm: nn.Module, activation: nn.Module, blur: nn.Module) -> bool:
    """Whether the three can be one pass in evaluation mode."""
    return type(norm) is nn.BatchNorm2d and type(activation) in _ACTIVATIONS and _is_blur(blur)


def blur_after_norm(norm: nn.Module, activation: nn.Module, blur: nn.Module, x: Tensor) -> Tensor:
    """blur(activation(norm(x))) of three that `may_fuse`: one pass over x in evaluation mode, two in training.

    Where somebody looks at what is between them, or the blur has no kernel, the three are called one by one.
    """
    fused = isinstance(blur, FusedBlur) or type(blur) is BlurPool2d
    if not fused or has_hooks(activation) or has_hooks(blur) or not takes(x):
        return blur(activation(norm(x)))
    scale = shift = None
    if folds(norm):
        scale, shift = scale_and_shift(norm)
    else:
        x = norm(x)
    options = blur.blur_options() | {"activation": _ACTIVATIONS[type(activation)]}
    return functional.blur_pool2d(x, scale=scale, shift=shift, **options)


def _is_blur(module: nn.Module) -> bool:
    return isinstance(module, FusedBlur) or type(module) in BLURS
