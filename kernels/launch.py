"""One launch of a Triton kernel as a value.

Calling an operator and compiling it ahead of time build the same `Launch`, so the compiled report shows the blocks,
warps and specialisations that run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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

    def run(self) -> None:
        """Launch on the current stream of the device of the first tensor, which need not be the current device.

        Raises:
            RuntimeError: Triton interprets its kernels, and a tensor is bfloat16.
        """
        tensors = [value for value in self.arguments.values() if isinstance(value, torch.Tensor)]
        if triton.knobs.runtime.interpret and any(tensor.dtype == torch.bfloat16 for tensor in tensors):
            raise RuntimeError(
                "Triton's interpreter multiplies bfloat16 wrongly: take float16 or float32 there, or a GPU"
            )
        with torch.cuda.device_of(tensors[0]):
            self.kernel[(self.programs,)](**self.arguments, **self.options)
