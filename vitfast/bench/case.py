"""What a benchmark case is: one operator or model, one shape and one pass, with all its implementations.

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
    "Unavailable",
    "Variant",
    "Workload",
    "attention_work",
    "compile_peer",
    "exact_run",
    "operator_run",
]

OURS = "vitfast"
FORWARD, FORWARD_BACKWARD = "forward", "forward_backward"

Run = Callable[[], tuple[Tensor, ...]]


class Unavailable(Exception):
    """A case cannot be measured here; the message says why, without paths, and what would help."""


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
            None: memory is compared with that of ``plain``.
        details: shapes and the like, for the report.
        beside_copies: whether large copies are timed in turn with the variants, for what is bound by memory: its rate
            changes from moment to moment on machines that share it.
        floor: for a model, the step of `OURS` as if attention took no time. Its results mean nothing.
    """

    variants: tuple[Variant, ...]
    plain: str
    expected: Run
    flops: int
    bytes: int
    intermediate_bytes: int | None
    details: dict = field(default_factory=dict)
    beside_copies: bool = False
    floor: Run | None = None


@dataclass(frozen=True)
class Case:
    """A benchmark case.

    Attributes:
        operator, label: of `name`.
        phase: `FORWARD` without gradients, or `FORWARD_BACKWARD`; models have names of their own for these.
        family: the cases whose ratios are averaged in the report, for example the stages of one model.
        implementations: the names of the workload's variants, in their order.
        make: (device, dtype) -> workload. Sizes may depend on the device: a GPU wants larger batches. Raises
            `Unavailable` where something is missing.
        compiles: whether peers are under ``torch.compile``.
        apart: whether implementations run in processes of their own on the CPU, see `vitfast.bench.processes`.
    """

    operator: str
    label: str
    phase: str
    family: str
    implementations: tuple[str, ...]
    make: Callable[[torch.device, torch.dtype], Workload]
    compiles: bool = True
    apart: bool = False

    @property
    def name(self) -> str:
        return f"{self.operator}/{self.label}/{self.phase}"


def compile_peer(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``function`` as torch.compile makes it fastest: one graph, for these shapes alone.

    On GPUs it chooses between versions of a kernel by timing them. These choices are not kept on disk, where
    `vitfast.bench.precompile` would leave some that were made while other processes used the GPU.
    """
    return torch.compile(function, fullgraph=True, dynamic=False, options={"autotune_local_cache": False})


def operator_run(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor, training: bool) -> Run:
    """The step of an operator.

    Args:
        inputs: the arguments of ``function``; in training, all require a gradient.
        grad: the gradient of the output.
        training: whether to differentiate: the results are then the output and fresh gradients of all inputs, else the
            output alone, and no gradients are recorded.
    """

    def forward():
        with torch.no_grad():
            return (function(*inputs),)

    def forward_backward():
        output = function(*inputs)
        return (output.detach(), *torch.autograd.grad(output, inputs, grad))

    return forward_backward if training else forward


def exact_run(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor, training: bool) -> Run:
    """`operator_run` of the definition, in float64."""

    def run():
        exact = tuple(tensor.detach().double().requires_grad_(training) for tensor in inputs)
        return operator_run(function, exact, grad.double(), training)()

    return run


def attention_work(scores: int, dim: int, inputs: tuple[Tensor, ...], output: Tensor, training: bool) -> dict[str, int]:
    """What attention with so many scores must do, as fields of a `Workload`.

    The forward has two matrix products, of 2 ``dim`` operations for each score. The backward has five: Q K^T again, dP,
    dV, dQ and dK; it reads all inputs once more and the gradient of the output, and writes those of the inputs. The
    intermediates are the scores in float32.
    """
    bytes_in, bytes_out = sum(tensor.nbytes for tensor in inputs), output.nbytes
    return {
        "flops": 2 * dim * scores * (7 if training else 2),
        "bytes": 3 * bytes_in + 2 * bytes_out if training else bytes_in + bytes_out,
        "intermediate_bytes": 4 * scores,
    }
