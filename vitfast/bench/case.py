"""What a benchmark case is: one operator, one shape and one pass, with all its implementations.

A new operator adds a file with a tuple ``CASES`` and names it in `vitfast.bench.registry`. Nothing else changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = [
    "FORWARD",
    "FORWARD_BACKWARD",
    "OURS",
    "Case",
    "Run",
    "Variant",
    "Workload",
    "compile_peer",
    "forward_run",
    "training_run",
]

OURS = "vitfast"
FORWARD, FORWARD_BACKWARD = "forward", "forward_backward"

Run = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Variant:
    """One implementation of a case.

    Attributes:
        name: `OURS`, or that of a peer.
        run: does the whole timed step and returns its results, always new tensors and in the order of
            `Workload.expected`.
        compiled: whether the first call compiles with ``torch.compile``.
    """

    name: str
    run: Run
    compiled: bool = False


@dataclass(frozen=True)
class Workload:
    """A case on one device in one dtype: inputs made, implementations ready to run.

    Attributes:
        variants: all compute the same results from the same inputs. The first is `OURS`.
        plain: the peer whose error sets the tolerance: plain PyTorch in the same dtype.
        expected: computes these results in float64.
        flops: floating-point operations that are counted, a multiply-add as two. The operator's file says which.
        bytes: compulsory traffic: each input read once and each result written once, by the forward and the backward.
        intermediate_bytes: size of what an unfused implementation writes to memory in between and a fused one does not.
        details: shapes and the like, for the report.
    """

    variants: tuple[Variant, ...]
    plain: str
    expected: Run
    flops: int
    bytes: int
    intermediate_bytes: int
    details: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A benchmark case.

    Attributes:
        operator, label: of `name`.
        phase: `FORWARD` without gradients, or `FORWARD_BACKWARD`.
        family: the cases whose ratios are averaged in the report, for example the stages of one model.
        implementations: the names of the workload's variants, in their order.
        make: (device, dtype) -> workload. Sizes may depend on the device: a GPU wants larger batches.
    """

    operator: str
    label: str
    phase: str
    family: str
    implementations: tuple[str, ...]
    make: Callable[[torch.device, torch.dtype], Workload]

    @property
    def name(self) -> str:
        return f"{self.operator}/{self.label}/{self.phase}"


def compile_peer(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``function`` as torch.compile makes it fastest: one graph, for these shapes alone.

    On GPUs it chooses between versions of a kernel by timing them. These choices are not kept on disk, where
    `vitfast.bench.precompile` would leave some that were made while other processes used the GPU.
    """
    return torch.compile(function, fullgraph=True, dynamic=False, options={"autotune_local_cache": False})


def forward_run(function: Callable[..., Tensor], *arguments: Tensor) -> Run:
    """A step that calls ``function`` without recording gradients; its result is the output."""

    def run():
        with torch.no_grad():
            return (function(*arguments),)

    return run


def training_run(function: Callable[..., Tensor], leaves: tuple[Tensor, ...], grad: Tensor) -> Run:
    """A step that calls ``function`` and differentiates it; results are the output and fresh gradients of all leaves.

    Args:
        leaves: the arguments of ``function``, all of which require a gradient.
        grad: the gradient of the output.
    """

    def run():
        output = function(*leaves)
        return (output.detach(), *torch.autograd.grad(output, leaves, grad))

    return run
