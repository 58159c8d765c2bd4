"""Benchmark cases of window attention: the windows of Swin-T and of AlterNet.

Families:

- ``swin_t``: the four stages at an image size of 224. One packed map (B, H, W, 3, heads, D), windows of 7, shifted by 3
  (in the last stage too, where one window is the whole map and Swin itself does not shift), a learned bias per head.
- ``alternet_7x7``, ``alternet_4x4``: the stages 2 to 4 of AlterNet-50, which hold its attention, on ImageNet (windows
  of 7) and CIFAR (windows of 4). Channels-first maps (B, heads * D, H, W) of queries, keys and values as 1x1
  convolutions make them, no shift, one learned bias (1, N, N) for all heads.

Peers, all plain PyTorch, from the same maps to the same map: ``sdpa`` rolls, partitions into windows, calls
`F.scaled_dot_product_attention`, reverses and rolls back; ``math`` does the same with two matrix products and a
softmax. ``compile_sdpa`` and ``compile`` are those two under ``torch.compile``. ``math_channels_first``, for the
channels-first maps, keeps the tokens of a window innermost, so that nothing is transposed in memory. Peers get what
helps them: the partition is one copy to contiguous matrices; windows count as heads where there is a region mask, so
that the mask is never repeated over the batch; without a shift there is no roll and no mask; and the sum of bias and
region mask is computed ahead of a forward without gradients. In training the bias is learned, so the sum is part of
the step.

Counted work, for a batch B and w x w windows of N = w^2 tokens:

    forward             4 B (H / w) (W / w) heads N^2 D        two matrix products
    forward_backward    3.5 times that                         five more: Q K^T again, dP, dV, dQ, dK

which is what the roll-and-mask formulation multiplies, padding not included. The region mask throws part of the scores
away. ``attended_share`` in the report is the share that it leaves, the least work that any implementation must do.
The bytes are those of the maps and the bias, read or written once in each pass; intermediate_bytes are the float32
scores of all windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
    """The attention of one layer.

    Attributes:
        size: height and width of the map, a multiple of ``window``.
        heads, dim, window, shift, batch: as in `vitfast.functional.window_attention`.
        packed: one packed channels-last map, or three channels-first maps, which are never shifted.
    """

    size: int
    heads: int
    dim: int
    window: int
    shift: int
    batch: int
    packed: bool

    @property
    def windows(self) -> int:
        return (self.size // self.window) ** 2

    @property
    def tokens(self) -> int:
        return self.window**2

    @property
    def scale(self) -> float:
        return self.dim**-0.5


def make_workload(layer: Layer, phase: str, device: torch.device, dtype: torch.dtype) -> Workload:
    """Random inputs, which need not be like a trained network's: no implementation's work depends on values."""
    generator = torch.Generator(device).manual_seed(0)
    normal = partial(torch.randn, generator=generator, device=device, dtype=dtype)
    side, heads, dim = layer.size, layer.heads, layer.dim
    if layer.packed:
        maps = (normal(layer.batch, side, side, 3, heads, dim),)
        bias = normal(heads, layer.tokens, layer.tokens)
        grad = normal(layer.batch, side, side, heads, dim)
    else:
        maps = tuple(normal(layer.batch, heads * dim, side, side) for _ in range(3))
        bias = normal(1, layer.tokens, layer.tokens)
        grad = normal(layer.batch, heads * dim, side, side)
    region = _region_mask(layer, device, dtype) if layer.shift else None
    inputs = (*maps, bias)
    training = phase == FORWARD_BACKWARD
    if training:
        inputs = tuple(tensor.requires_grad_() for tensor in inputs)
    variants = [Variant(OURS, operator_run(partial(_fused, layer), inputs, grad, training))]
    for name, attention, compiled in _peers(layer):
        function = _with_mask(attention, region, bias, training)
        arguments = inputs if training else maps
        if compiled:
            function = compile_peer(function)
        variants.append(Variant(name, operator_run(function, arguments, grad, training), compiled))
    scores = layer.batch * layer.windows * heads * layer.tokens**2
    return Workload(
        variants=tuple(variants),
        plain="math",
        expected=exact_run(partial(_definition, layer), inputs, grad, training),
        details=asdict(layer) | {"attended_share": _attended_share(region)},
        **attention_work(scores, dim, inputs, grad, training),
    )


# ---- vitfast, and the definition -------------------------------------------------------------------------------------


def _fused(layer: Layer, *inputs: Tensor) -> Tensor:
    *maps, bias = inputs
    if layer.packed:
        return functional.window_attention_qkvpacked(*maps, bias, window_size=layer.window, shift=layer.shift)
    query, key, value = (_channels_last_view(layer, x) for x in maps)
    output = functional.window_attention(query, key, value, bias, window_size=layer.window, shift=layer.shift)
    return _channels_first_view(output)


def _definition(layer: Layer, *inputs: Tensor) -> Tensor:
    window, shift = (layer.window,) * 2, (layer.shift,) * 2
    *maps, bias = inputs
    query, key, value = maps[0].unbind(3) if layer.packed else (_channels_last_view(layer, x) for x in maps)
    output = reference.window_attention(query, key, value, bias, window_size=window, shift=shift, scale=layer.scale)
    return output if layer.packed else _channels_first_view(output)


def _channels_last_view(layer: Layer, x: Tensor) -> Tensor:
    """(B, heads * D, H, W) -> (B, H, W, heads, D), without a copy."""
    return x.unflatten(1, (layer.heads, layer.dim)).permute(0, 3, 4, 1, 2)


def _channels_first_view(x: Tensor) -> Tensor:
    """(B, H, W, heads, D) -> (B, heads * D, H, W), without a copy where x is channels-first in memory."""
    return x.permute(0, 3, 4, 1, 2).flatten(1, 2)


# ---- peers -----------------------------------------------------------------------------------------------------------


def _peers(layer: Layer) -> list[tuple[str, Callable[..., Tensor], bool]]:
    """(name, function of maps and mask, whether compiled) of each peer."""
    sdpa = partial(_window_attention, layer, F.scaled_dot_product_attention)
    explicit = partial(_window_attention, layer, partial(_attention, scale=layer.scale))
    peers = [
        ("sdpa", sdpa, False),
        ("math", explicit, False),
        ("compile_sdpa", sdpa, True),
        ("compile", explicit, True),
    ]
    if not layer.packed:
        peers.append(("math_channels_first", partial(_window_attention_channels_first, layer), False))
    return peers


def _with_mask(
    attention: Callable[..., Tensor], region: Tensor | None, bias: Tensor, training: bool
) -> Callable[..., Tensor]:
    """A function of (maps..., bias) in training, else of the maps alone with the mask made once, here."""
    if training:
        return lambda *inputs: attention(inputs[:-1], _mask(region, inputs[-1]))
    mask = _mask(region, bias)
    return lambda *maps: attention(maps, mask)


def _mask(region: Tensor | None, bias: Tensor) -> Tensor:
    """What is added to the scores: (1, heads or 1, N, N), or (1, windows * heads, N, N) with a region mask."""
    return bias.unsqueeze(0) if region is None else (region + bias).flatten(0, 1).unsqueeze(0)


def _region_mask(layer: Layer, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(windows, 1, N, N): 0 where two tokens of a rolled window were neighbours before the roll, else -inf."""
    position = torch.arange(layer.size, device=device)
    wrapped = (position >= layer.size - layer.shift).int()  # these rows or columns came round from the other side
    region = (2 * wrapped[:, None] + wrapped).unflatten(1, (-1, layer.window)).unflatten(0, (-1, layer.window))
    region = region.transpose(1, 2).reshape(layer.windows, 1, layer.tokens)
    apart = region.unsqueeze(-1) != region.unsqueeze(-2)
    return torch.zeros(apart.shape, device=device, dtype=dtype).masked_fill(apart, -math.inf)


def _attended_share(region: Tensor | None) -> float:
    return 1.0 if region is None else float((region == 0).double().mean())


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, scale: float) -> Tensor:
    return torch.add(attn_mask, query @ key.mT, alpha=scale).softmax(-1) @ value


def _window_attention(layer: Layer, attend: Callable[..., Tensor], maps: tuple[Tensor, ...], mask: Tensor) -> Tensor:
    """Roll, partition, attention, reverse, roll back."""
    if layer.packed:
        query, key, value = _partition_packed(layer, maps[0])
        return _reverse_packed(layer, attend(query, key, value, attn_mask=mask))
    query, key, value = (_partition(layer, x) for x in maps)
    return _reverse(layer, attend(query, key, value, attn_mask=mask))


def _partition_packed(layer: Layer, qkv: Tensor) -> tuple[Tensor, ...]:
    """(B, H, W, 3, heads, D) -> three (B, windows * heads, N, D); (B * windows, heads, N, D) without a shift."""
    w = layer.window
    if layer.shift:
        qkv = qkv.roll((-layer.shift, -layer.shift), (1, 2))
        matrices = (layer.batch, layer.windows * layer.heads)
    else:
        matrices = (layer.batch * layer.windows, layer.heads)
    windows = qkv.unflatten(2, (-1, w)).unflatten(1, (-1, w)).permute(5, 0, 1, 3, 6, 2, 4, 7)
    return windows.reshape(3, *matrices, layer.tokens, layer.dim).unbind(0)


def _reverse_packed(layer: Layer, windows: Tensor) -> Tensor:
    """The inverse of `_partition_packed`, to (B, H, W, heads, D)."""
    w, n = layer.window, layer.size // layer.window
    x = windows.reshape(layer.batch, n, n, layer.heads, w, w, layer.dim).permute(0, 1, 4, 2, 5, 3, 6)
    x = x.reshape(layer.batch, layer.size, layer.size, layer.heads, layer.dim)
    return x.roll((layer.shift, layer.shift), (1, 2)) if layer.shift else x


def _partition(layer: Layer, x: Tensor) -> Tensor:
    """(B, heads * D, H, W) -> (B * windows, heads, N, D)."""
    return _split(layer, x).permute(0, 3, 5, 1, 4, 6, 2).reshape(-1, layer.heads, layer.tokens, layer.dim)


def _reverse(layer: Layer, windows: Tensor) -> Tensor:
    """The inverse of `_partition`."""
    w, n = layer.window, layer.size // layer.window
    x = windows.reshape(layer.batch, n, n, layer.heads, w, w, layer.dim).permute(0, 3, 6, 1, 4, 2, 5)
    return x.reshape(layer.batch, layer.heads * layer.dim, layer.size, layer.size)


def _window_attention_channels_first(layer: Layer, maps: tuple[Tensor, ...], mask: Tensor) -> Tensor:
    """With windows (B * windows, heads, D, N): the copies move whole rows of a window, the products are transposed."""
    query, key, value = (
        _split(layer, x).permute(0, 3, 5, 1, 2, 4, 6).reshape(-1, layer.heads, layer.dim, layer.tokens) for x in maps
    )
    output = value @ torch.add(mask, query.mT @ key, alpha=layer.scale).softmax(-1).mT
    w, n = layer.window, layer.size // layer.window
    x = output.reshape(layer.batch, n, n, layer.heads, layer.dim, w, w).permute(0, 3, 4, 1, 5, 2, 6)
    return x.reshape(layer.batch, layer.heads * layer.dim, layer.size, layer.size)


def _split(layer: Layer, x: Tensor) -> Tensor:
    """(B, heads * D, H, W) -> (B, heads, D, H / w, w, W / w, w), a view."""
    w = layer.window
    return x.unflatten(3, (-1, w)).unflatten(2, (-1, w)).unflatten(1, (layer.heads, layer.dim))


# ---- cases -----------------------------------------------------------------------------------------------------------


_IMPLEMENTATIONS = (OURS, "sdpa", "math", "compile_sdpa", "compile")


def _cases(family: str, stages: dict[str, tuple[int, int]], cpu_batch: int, **common) -> list[Case]:
    """Both phases of each stage; a stage is (size, heads)."""

    def make(device, dtype, size, heads, phase):
        batch = 128 if device.type == "cuda" else cpu_batch
        return make_workload(Layer(size, heads, batch=batch, **common), phase, device, dtype)

    implementations = _IMPLEMENTATIONS if common["packed"] else (*_IMPLEMENTATIONS, "math_channels_first")
    return [
        Case(
            operator="window_attention",
            label=label,
            phase=phase,
            family=family,
            implementations=implementations,
            make=partial(make, size=size, heads=heads, phase=phase),
        )
        for label, (size, heads) in stages.items()
        for phase in (FORWARD, FORWARD_BACKWARD)
    ]


CASES = (
    *_cases(
        "swin_t",
        {f"swin_t_stage{i}": stage for i, stage in enumerate(((56, 3), (28, 6), (14, 12), (7, 24)), 1)},
        cpu_batch=8,
        dim=32,
        window=7,
        shift=3,
        packed=True,
    ),
    *_cases(
        "alternet_7x7",
        {f"alternet_7x7_stage{i}": stage for i, stage in enumerate(((28, 6), (14, 12), (7, 24)), 2)},
        cpu_batch=8,
        dim=64,
        window=7,
        shift=0,
        packed=False,
    ),
    *_cases(
        "alternet_4x4",
        {f"alternet_4x4_stage{i}": stage for i, stage in enumerate(((16, 6), (8, 12), (4, 24)), 2)},
        cpu_batch=32,
        dim=64,
        window=4,
        shift=0,
        packed=False,
    ),
)
