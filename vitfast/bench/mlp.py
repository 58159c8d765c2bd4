"""Benchmark cases of the MLP: those of Swin-T's stages and of ViT at an image size of 224, a batch of 8.

The MLP alone, and as the residual branch that it is in a block, x + mlp(norm(x)), without stochastic depth.

Peers: ``linear``, two times `F.linear` with `F.gelu` between them, as every model has it (with `F.layer_norm` and the
addition), and ``compile``, the same under ``torch.compile``.

Counted work, for R rows: 4 R C hidden in the forward, the two matrix products, and three times that with the backward,
which has four. The bytes are those of input, output and weights, read or written once in each pass; intermediate_bytes
are the hidden values before and after the activation.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vitfast import functional, reference
from vitfast.bench.case import (
    FORWARD,
    FORWARD_BACKWARD,
    OURS,
    Case,
    Variant,
    Workload,
    compile_peer,
    exact_run,
    operator_run,
)
from vitfast.ops import branches
from vitfast.ops.branches import Depth, Norm

__all__ = ["CASES", "Layer", "make_workload"]


@dataclass(frozen=True)
class Layer:
    """An MLP on ``rows`` tokens of ``channels``, with ``hidden`` channels inside, maybe as a residual branch."""

    rows: int
    channels: int
    hidden: int
    residual: bool = False


def residual_mlp(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, *weights: Tensor) -> Tensor:
    """The branch, fused where the kernels take it, as in a block."""
    norm = Norm(norm_weight, norm_bias, 1e-6)
    if branches.serves(x, weights[::2], (norm_weight, norm_bias, *weights[1::2])):
        return branches.residual_mlp(x, norm, weights, Depth(len(x)))
    return x + functional.mlp(norm(x), *weights)


def plain_residual_mlp(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, *weights: Tensor) -> Tensor:
    """The branch in operations of PyTorch."""
    return x + reference.mlp(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, 1e-6), *weights)


def make_workload(layer: Layer, phase: str, device: torch.device, dtype: torch.dtype) -> Workload:
    """Random inputs, and weights of the size that leaves the hidden values of about 1."""
    generator = torch.Generator(device).manual_seed(0)
    normal = partial(torch.randn, generator=generator, device=device, dtype=dtype)
    training = phase == FORWARD_BACKWARD
    norm = (1 + 0.1 * normal(layer.channels), 0.1 * normal(layer.channels)) if layer.residual else ()
    inputs = (
        normal(layer.rows, layer.channels),
        *norm,
        normal(layer.hidden, layer.channels) * layer.channels**-0.5,
        normal(layer.hidden),
        normal(layer.channels, layer.hidden) * layer.hidden**-0.5,
        normal(layer.channels),
    )
    inputs = tuple(tensor.requires_grad_(training) for tensor in inputs)
    grad = normal(layer.rows, layer.channels)
    step = partial(operator_run, inputs=inputs, grad=grad, training=training)
    ours, plain = (residual_mlp, plain_residual_mlp) if layer.residual else (functional.mlp, reference.mlp)
    product = 2 * layer.rows * layer.channels * layer.hidden
    bytes_in, bytes_out = sum(tensor.nbytes for tensor in inputs), grad.nbytes
    return Workload(
        variants=(
            Variant(OURS, step(ours)),
            Variant("linear", step(plain)),
            Variant("compile", step(compile_peer(plain)), compiled=True),
        ),
        plain="linear",
        expected=exact_run(plain, inputs, grad, training),
        flops=product * (6 if training else 2),
        bytes=3 * bytes_in + 2 * bytes_out if training else bytes_in + bytes_out,
        intermediate_bytes=2 * layer.rows * layer.hidden * grad.element_size(),
        details=asdict(layer),
    )


_LAYERS = {
    "swin_t_mlp_stage1": (25088, 96, 384),
    "swin_t_mlp_stage2": (6272, 192, 768),
    "swin_t_mlp_stage3": (1568, 384, 1536),
    "swin_t_mlp_stage4": (392, 768, 3072),
    "vit_s_mlp": (1576, 384, 1536),
    "vit_b_mlp": (1576, 768, 3072),
}


def _case(operator: str, label: str, layer: Layer, phase: str) -> Case:
    return Case(
        operator=operator,
        label=label,
        phase=phase,
        family=operator,
        implementations=(OURS, "linear", "compile"),
        make=lambda device, dtype: make_workload(layer, phase, device, dtype),
    )


CASES = tuple(
    _case(operator, label, Layer(*shape, residual), phase)
    for operator, residual in (("mlp", False), ("residual_mlp", True))
    for label, shape in _LAYERS.items()
    for phase in (FORWARD, FORWARD_BACKWARD)
)
