"""One launch of a Triton kernel as a value.

Calling an operator and compiling it ahead of time build the same `Launch`, so the compiled report shows the blocks,
warps and specialisations that run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


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
        """Launch on the current stream of the device of the first tensor, which need not be the current device."""
        tensor = next(value for value in self.arguments.values() if isinstance(value, torch.Tensor))
        with torch.cuda.device_of(tensor):
            self.kernel[(self.programs,)](**self.arguments, **self.options)
