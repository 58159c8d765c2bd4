"""Primal results that are computed when somebody reads them.

A gradient with tangents is run for its tangents. The primal gradients of a model's parameters come with them, a third
of the products of the gradient itself. Those of weights and biases that are parameters themselves nobody reads: they
stay undone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Deferred", "forgotten", "value_of", "version_of"]


def version_of(tensor: Tensor) -> int:
    """How often a tensor has been changed in place, as far as PyTorch counts."""
    return 0 if tensor.is_inference() else tensor._version


class Deferred:
    """function(*args) for later, of whose result the layout is known.

    Args:
        function: returns a new tensor, or a view of an argument.
        args: may be deferred themselves.
        shape: of the result.
        strides: likewise; None for those of a contiguous tensor.
    """

    __slots__ = ("_args", "_function", "_strides", "_versions", "device", "dtype", "shape", "value")

    def __init__(self, function: Callable[..., Tensor], args: Sequence[Any], shape: Sequence[int], strides=None):
        like = next(x for x in args if isinstance(x, (Tensor, Deferred)))
        self.dtype, self.device, self.shape = like.dtype, like.device, torch.Size(shape)
        self._function, self._args, self._strides = function, args, strides
        self._versions = _versions(args)
        self.value: Tensor | None = None  # once it has been read

    def dim(self) -> int:
        """How many dimensions the result has."""
        return len(self.shape)

    @property
    def is_contiguous(self) -> bool:
        """Whether it is known to be."""
        return self._strides is None

    def stride(self) -> Sequence[int]:
        """Of the result."""
        return torch.empty(self.shape, device="meta").stride() if self._strides is None else self._strides

    def read(self) -> Tensor:
        """The result.

        Raises:
            RuntimeError: an argument has been changed in place since.
        """
        if self.value is None:
            if _versions(self._args) != self._versions:
                raise RuntimeError("a tensor that the backward pass has yet to read was changed in place")
            self.value = self._function(*map(value_of, self._args))
            self._function, self._args, self._versions = _refuse, (), []  # with what they hold
        return self.value


def value_of(x: Any) -> Any:
    """What is deferred, read; anything else as it is."""
    return x.read() if isinstance(x, Deferred) else x


def forgotten(like: Tensor | Deferred) -> Deferred:
    """One that nobody can read any more, and that holds no memory."""
    return Deferred(_refuse, (torch.empty((), dtype=like.dtype, device=like.device),), like.shape, like.stride())


def _refuse(*args) -> Tensor:
    raise RuntimeError("the primal gradient of a parameter is not kept")


def _versions(args: Sequence[Any]) -> list[int | None]:
    return [version_of(x) if isinstance(x, Tensor) else None for x in args]
