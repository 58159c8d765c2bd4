"""What the adapters share for blurs, alone and after a normalisation and an activation."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from vitfast import functional
from vitfast.nn import BlurPool2d
from vitfast.nn._fusion import folds, has_hooks, norm_arguments
from vitfast.ops._rules import is_autocast

# The activations that `blur_pool2d` applies on the way.
_ACTIVATIONS = {nn.ReLU: "relu", nn.ReLU6: "relu6"}


class FusedBlur(ABC):
    """Mixed into a fused blur: one that `vitfast.functional.blur_pool2d` computes with these options."""

    @abstractmethod
    def blur_options(self) -> dict:
        """The keyword arguments of `vitfast.functional.blur_pool2d`."""


BLURS: set[type[nn.Module]] = {BlurPool2d}
"""The blurs that can follow a normalisation in one pass: the classes of the libraries, and this package's own."""


def takes(x: Tensor) -> bool:
    """Whether the fused function returns what a convolution would, its dtype under autocast included."""
    if x.dim() != 4 or not x.is_floating_point():
        return False
    return not is_autocast(x.device) or x.dtype == torch.get_autocast_dtype(x.device.type)


def may_fuse(norm: nn.Module, activation: nn.Module, blur: nn.Module) -> bool:
    """Whether the three can be one pass in evaluation mode."""
    return type(norm) is nn.BatchNorm2d and may_fuse_activation(activation, blur)


def may_fuse_activation(activation: nn.Module, blur: nn.Module) -> bool:
    """Whether the two can be one pass."""
    return type(activation) in _ACTIVATIONS and _is_blur(blur)


def blur_after_norm(norm: nn.Module, activation: nn.Module, blur: nn.Module, x: Tensor) -> Tensor:
    """blur(activation(norm(x))) of three that `may_fuse`: one pass over x in evaluation mode, two in training.

    Where somebody looks at what is between them, or the blur has no kernel, the three are called one by one.
    """
    if has_hooks(activation) or not _serves(blur, x):
        return blur(activation(norm(x)))
    if folds(norm):
        return _one_pass(norm_arguments(norm), activation, blur, x)
    return _one_pass(None, activation, blur, norm(x))


def blur_after_norm_act(norm_act: nn.BatchNorm2d, activation: nn.Module, blur: nn.Module, x: Tensor) -> Tensor:
    """blur(norm_act(x)) of a normalisation that applies its activation itself; one pass over x in evaluation mode."""
    if not folds(norm_act, type(norm_act)) or not _serves(blur, x):
        return blur(norm_act(x))
    return _one_pass(norm_arguments(norm_act), activation, blur, x)


def _serves(blur: nn.Module, x: Tensor) -> bool:
    """Whether the fused function may take the place of a blur of x."""
    return (isinstance(blur, FusedBlur) or type(blur) is BlurPool2d) and not has_hooks(blur) and takes(x)


def _one_pass(norm: tuple | None, activation: nn.Module, blur: nn.Module, x: Tensor) -> Tensor:
    options = blur.blur_options() | {"activation": _ACTIVATIONS[type(activation)]}
    return functional.blur_pool2d(x, norm=norm, **options)


def _is_blur(module: nn.Module) -> bool:
    return isinstance(module, FusedBlur) or type(module) in BLURS
