"""Benchmark cases of attention over all tokens, at the shapes of Vision Transformers.

Families, all with one packed projection (B, N, 3, heads, D):

- ``vit``: 65, 197, 257 and 577 tokens: patches of 4 on 32 x 32 pixels, of 16 on 224, of 14 on 224, of 16 on 384, each
  with a class token;
- ``vit_bias``: a learned bias (1, heads, N, N), as relative positions give it, with its gradient in training.

Peers, all plain PyTorch: ``sdpa`` calls `F.scaled_dot_product_attention` on the parts of the projection, as Vision
Transformers do; ``sdpa_contiguous``, in the forward, on tensors (B, heads, N, D) that it was given for nothing, which
no model is; ``math`` is two matrix products and a softmax. ``compile_sdpa`` and ``compile`` are the first and the
last under ``torch.compile``.

Counted work: 4 B heads N^2 D in the forward, 3.5 times that with the backward. The bytes are those of projection,
output and bias, read or written once in each pass; intermediate_bytes are the float32 scores.
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
    attention_work,
    compile_peer,
    exact_run,
    operator_run,
)

__all__ = ["CASES", "Layer", "make_workload"]


@dataclass(frozen=True)
class Layer:
    """The attention of one layer: ``tokens`` is N, ``bias`` whether scores have a learned one."""

    batch: int
    tokens: int
    heads: int
    dim: int
    bias: bool


def make_workload(layer: Layer, phase: str, device: torch.device, dtype: torch.dtype) -> Workload:
    """Random inputs, which need not be like a trained network's: no implementation's work depends on values."""
    generator = torch.Generator(device).manual_seed(0)
    normal = partial(torch.randn, generator=generator, device=device, dtype=dtype)
    training = phase == FORWARD_BACKWARD
    inputs = [normal(layer.batch, layer.tokens, 3, layer.heads, layer.dim)]
    if layer.bias:
        inputs.append(normal(1, layer.heads, layer.tokens, layer.tokens))
    inputs = tuple(tensor.requires_grad_(training) for tensor in inputs)
    grad = normal(layer.batch, layer.tokens, layer.heads, layer.dim)
    step = partial(operator_run, grad=grad, training=training)
    math = partial(_math, scale=layer.dim**-0.5)
    variants = [
        Variant(OURS, step(functional.attention_qkvpacked, inputs)),
        Variant("sdpa", step(_sdpa, inputs)),
        Variant("math", step(math, inputs)),
        Variant("compile_sdpa", step(compile_peer(_sdpa), inputs), compiled=True),
        Variant("compile", step(compile_peer(math), inputs), compiled=True),
    ]
    if not training:
        parts = (t.contiguous() for t in _parts(inputs[0]))
        variants.append(Variant("sdpa_contiguous", step(_sdpa_of_parts, (*parts, *inputs[1:]))))
    return Workload(
        variants=tuple(variants),
        plain="math",
        expected=exact_run(_definition, inputs, grad, training),
        details=asdict(layer),
        **attention_work(layer.batch * layer.heads * layer.tokens**2, layer.dim, inputs, grad, training),
    )


def _definition(qkv: Tensor, bias: Tensor | None = None) -> Tensor:
    return reference.attention(*_parts(qkv), bias, scale=qkv.shape[-1] ** -0.5).transpose(1, 2)


def _parts(qkv: Tensor) -> tuple[Tensor, ...]:
    """Query, key and value, (B, heads, N, D), without a copy."""
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


# ---- peers -----------------------------------------------------------------------------------------------------------


def _sdpa(qkv: Tensor, bias: Tensor | None = None) -> Tensor:
    return _sdpa_of_parts(*_parts(qkv), bias)


def _math(qkv: Tensor, bias: Tensor | None = None, *, scale: float) -> Tensor:
    query, key, value = _parts(qkv)
    scores = query @ key.mT
    scores = scores * scale if bias is None else torch.add(bias, scores, alpha=scale)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def _sdpa_of_parts(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2)


# ---- cases -----------------------------------------------------------------------------------------------------------


_FORWARD_IMPLEMENTATIONS = (OURS, "sdpa", "math", "compile_sdpa", "compile", "sdpa_contiguous")


def _case(family: str, label: str, layer: Layer, phase: str) -> Case:
    return Case(
        operator="attention",
        label=label,
        phase=phase,
        family=family,
        implementations=_FORWARD_IMPLEMENTATIONS if phase == FORWARD else _FORWARD_IMPLEMENTATIONS[:-1],
        make=lambda device, dtype: make_workload(layer, phase, device, dtype),
    )


_LAYERS = {
    "vit_32x65x3": (32, 65, 3),
    "vit_8x197x3": (8, 197, 3),
    "vit_8x197x12": (8, 197, 12),
    "vit_32x257x3": (32, 257, 3),
    "vit_4x577x12": (4, 577, 12),
}

CASES = tuple(
    _case(family, label + ("_bias" if bias else ""), Layer(*shape, dim=64, bias=bias), phase)
    for family, bias in (("vit", False), ("vit_bias", True))
    for label, shape in _LAYERS.items()
    for phase in (FORWARD, FORWARD_BACKWARD)
)
