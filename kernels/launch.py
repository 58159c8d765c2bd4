"""Launches of Triton kernels: one as a value, and all of a call, which are made once.

Calling an operator and compiling it ahead of time build the same `Launch`, so the compiled report shows the blocks,
warps and specialisations that run.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor


def strides(x: Tensor, dims: int) -> tuple[int, ...]:
    """The strides of the last ``dims`` dimensions of x, and behind them that of one in front, which tangents have."""
    return x.stride()[-dims:] + x.stride()[:-dims]


def pointers_and_strides(tensors: dict[str, Tensor | None], dims: int) -> dict[str, Any]:
    """The arguments <name>_ptr and <name>_strides of kernels for ``tensors`` of ``dims`` dimensions."""
    arguments = {}
    for name, tensor in tensors.items():
        arguments[f"{name}_ptr"] = tensor
        arguments[f"{name}_strides"] = None if tensor is None else strides(tensor, dims)
    return arguments


@dataclass(frozen=True)
class Launch:
    """A kernel, the number of its programs, its arguments by name and its compiler options."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, Any]:
        """What Triton's compiler is told: fused multiply-adds by name, as its default changes between versions."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}

    def run(self) -> Any:
        """Launch on the current stream of the device of the first tensor, which need not be the current device.

        Returns:
            The compiled kernel; None in the interpreter.

        Raises:
            RuntimeError: Triton interprets its kernels, and a tensor is bfloat16.
        """
        tensors = [value for value in self.arguments.values() if isinstance(value, torch.Tensor)]
        if triton.knobs.runtime.interpret and any(tensor.dtype == torch.bfloat16 for tensor in tensors):
            raise RuntimeError(
                "Triton's interpreter multiplies bfloat16 wrongly: take float16 or float32 there, or a GPU"
            )
        with torch.cuda.device_of(tensors[0]):
            return self.kernel[(self.programs,)](**self.arguments, **self.options)


# ---- the launches of a call ------------------------------------------------------------------------------------------

Made = tuple[list[Launch], Tensor | None]
"""Launches in their order, and a tensor that they fill and that was made for them, if there is one."""


def run(make: Callable[..., Made], *tensors: Tensor | None, **options: Hashable) -> Tensor | None:
    """Runs the launches of ``make(*tensors, **options)``, and returns the tensor that comes beside them.

    To make launches, and to have Triton specialise them, takes Python 80 microseconds each, many times what the GPU
    needs for small tensors. Both are determined by the options, and by dtype, shape, strides and alignment of the
    tensors, so it is done once for all calls that agree in these; Triton's debugging knobs are looked at then, too.
    What ``make`` allocates is allocated anew every time, and has to be contiguous.

    Args:
        tensors: The first is not None. All are on one device, on whose current stream the kernels are launched.
    """
    key = (make, tensors[0].device, *map(_form, tensors), *options.values())
    known = _known.get(key)
    if known is not None:
        return known.run(tensors)
    # A tensor may be several arguments, and another time those may be different ones: each becomes an object by itself.
    tensors = tuple(None if tensor is None else tensor.detach() for tensor in tensors)
    launches, made = make(*tensors, **options)
    compiled = [launch.run() for launch in launches]
    if all(compiled):  # the interpreter compiles nothing
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        _known[key] = _Known.of(launches, compiled, tensors, made)
    return made


class _Step(NamedTuple):
    """``start`` launches a compiled kernel on all of its arguments in order.

    Those at ``places``, pairs of a place and the index of a tensor, are still to be filled in.
    """

    start: Callable[..., None]
    arguments: list[Any]
    places: list[tuple[int, int]]


class _Known(NamedTuple):
    """What the launches of a call were, without its tensors: those given and, behind them, those that were made."""

    steps: list[_Step]
    made: list[tuple[torch.Size, torch.dtype]]
    result: int | None

    @classmethod
    def of(cls, launches: list[Launch], compiled: list[Any], given: tuple[Tensor | None, ...], made: Tensor | None):
        index = {id(tensor): i for i, tensor in enumerate(given) if tensor is not None}
        forms, steps = [], []
        for launch, kernel in zip(launches, compiled, strict=True):
            ordered = [launch.arguments[parameter.name] for parameter in launch.kernel.params]
            places = []
            for place, value in enumerate(ordered):
                if not isinstance(value, Tensor):
                    continue
                if id(value) not in index:
                    assert value.is_contiguous(), "scratch is allocated anew, by its shape"
                    assert value._base is None, "a view is no scratch"
                    index[id(value)] = len(given) + len(forms)
                    forms.append((value.shape, value.dtype))
                places.append((place, index[id(value)]))
                ordered[place] = None
            steps.append(_Step(kernel[(launch.programs, 1, 1)], ordered, places))
        return cls(steps, forms, None if made is None else index[id(made)])

    def run(self, tensors: tuple[Tensor | None, ...]) -> Tensor | None:
        like = tensors[0]
        tensors = (*tensors, *[like.new_empty(shape, dtype=dtype) for shape, dtype in self.made])
        with torch.cuda.device_of(like):
            for start, arguments, places in self.steps:
                filled = arguments.copy()
                for place, index in places:
                    filled[place] = tensors[index]
                start(*filled)
        return None if self.result is None else tensors[self.result]


_known: dict[tuple[Hashable, ...], _Known] = {}
_MOST_KNOWN = 4096


def _form(x: Tensor | None) -> Hashable:
    """What Triton's launcher and ours look at; it compiles other code for pointers that are no multiple of 16."""
    return None if x is None else (x.dtype, x.shape, x.stride(), x.data_ptr() % 16 == 0)
