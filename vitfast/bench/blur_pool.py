"""Benchmark cases of blur pooling: feature maps of ResNets, 3 taps with stride 2, 2 with 1 and 4 with 2.

Families: ``blur_nchw`` and ``blur_nhwc`` are the blur alone in the two memory formats; ``norm_relu_blur_nchw`` and
``..._nhwc`` have a normalisation in evaluation mode and a ReLU before it.

Peers: ``conv``, `F.pad` and a depthwise `F.conv2d`, after `F.batch_norm` and `F.relu` in the second family, as timm and
others compute it, and ``compile``, the same under ``torch.compile``.

Counted work: a multiply-add per tap of a kernel of one dimension, along rows for every input row and along columns for
every output, and as much in the backward. The bytes are those of input and output, read or written once, in the
backward those of the two gradients, and of the input once more if there is a prologue. intermediate_bytes are the
padded map, and with a prologue two more maps.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vitfast import functional
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

__all__ = ["CASES", "Blur", "make_workload"]

_EPS = 1e-5


@dataclass(frozen=True)
class Blur:
    """A blur of a (batch, channels, size, size) map."""

    batch: int
    channels: int
    size: int
    taps: int
    stride: int
    channels_last: bool
    prologue: bool


def make_workload(blur: Blur, phase: str, device: torch.device, dtype: torch.dtype) -> Workload:
    """Random maps."""
    generator = torch.Generator(device).manual_seed(0)
    normal = partial(torch.randn, generator=generator, device=device, dtype=dtype)
    training = phase == FORWARD_BACKWARD
    memory_format = torch.channels_last if blur.channels_last else torch.contiguous_format
    x = normal(blur.batch, blur.channels, blur.size, blur.size).contiguous(memory_format=memory_format)
    weight, bias, mean = 1 + 0.1 * normal(blur.channels), normal(blur.channels), normal(blur.channels)
    variance = 1 + normal(blur.channels).square()
    taps = _PASCAL[blur.taps].to(device, dtype)
    kernel = torch.outer(taps, taps)
    before, after = (blur.taps - 1) // 2, blur.taps // 2

    def ours(x: Tensor) -> Tensor:
        if not blur.prologue:
            return functional.blur_pool2d(x, kernel, stride=blur.stride)
        norm = (weight, bias, mean, variance, _EPS)
        return functional.blur_pool2d(x, kernel, stride=blur.stride, norm=norm, activation="relu")

    def plain(x: Tensor) -> Tensor:
        constants = (weight, bias, mean, variance, kernel)
        w, b, m, v, k = (tensor.to(x.dtype) for tensor in constants)
        if blur.prologue:
            x = F.relu(F.batch_norm(x, m, v, w, b, eps=_EPS))
        x = F.pad(x, (before, after, before, after), mode="reflect")
        return F.conv2d(x, k.expand(blur.channels, 1, -1, -1), stride=blur.stride, groups=blur.channels)

    inputs = (x.requires_grad_(training),)
    grad = normal(plain(x.detach()).shape).contiguous(memory_format=memory_format)
    step = partial(operator_run, inputs=inputs, grad=grad, training=training)
    output_rows = grad.numel() // grad.shape[3]
    multiplied = 2 * blur.taps * grad.shape[3] * (x.numel() // blur.size + output_rows)
    moved = x.nbytes + grad.nbytes
    return Workload(
        variants=(
            Variant(OURS, step(ours)),
            Variant("conv", step(plain)),
            Variant("compile", step(compile_peer(plain)), compiled=True),
        ),
        plain="conv",
        expected=exact_run(plain, inputs, grad, training),
        flops=multiplied * (2 if training else 1),
        bytes=moved + (moved + (x.nbytes if blur.prologue else 0) if training else 0),
        intermediate_bytes=x.nbytes * (blur.size + blur.taps - 1) ** 2 // blur.size**2
        + (2 * x.nbytes if blur.prologue else 0),
        details=asdict(blur),
        beside_copies=device.type == "cpu",
    )


_PASCAL = {
    2: torch.tensor([1.0, 1.0]) / 2,
    3: torch.tensor([1.0, 2.0, 1.0]) / 4,
    4: torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8,
}
_SHAPES = ((8, 64, 56), (8, 256, 56), (8, 64, 32), (8, 512, 14))
_KERNELS = ((3, 2), (2, 1), (4, 2))  # taps, stride


def _case(blur: Blur, phase: str) -> Case:
    layout = "nhwc" if blur.channels_last else "nchw"
    family = f"{'norm_relu_blur' if blur.prologue else 'blur'}_{layout}"
    shape = f"{blur.batch}x{blur.channels}x{blur.size}x{blur.size}"
    return Case(
        operator="blur_pool2d",
        label=f"{family}_{shape}_{blur.taps}taps_stride{blur.stride}",
        phase=phase,
        family=family,
        implementations=(OURS, "conv", "compile"),
        make=lambda device, dtype: make_workload(blur, phase, device, dtype),
    )


CASES = tuple(
    _case(Blur(*shape, taps, stride, channels_last, prologue), phase)
    for prologue in (False, True)
    for channels_last in (False, True)
    for shape in _SHAPES
    for taps, stride in _KERNELS
    for phase in (FORWARD, FORWARD_BACKWARD)
)
