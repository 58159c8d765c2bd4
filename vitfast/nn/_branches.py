"""Residual branches of transformer blocks, x + drop_path(f(norm(x))): fused on the CPU where nobody looks inside."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from vitfast.nn._fusion import has_hooks, is_plain_linear
from vitfast.ops import branches
from vitfast.ops.branches import Depth, Norm

# Exactly these classes are known: layer normalisations over the last dimension, and modules that multiply every sample
# by a random number and draw the same numbers for any shape of the samples. Adapters of libraries add theirs.
LAYER_NORMS: set[type[nn.Module]] = {nn.LayerNorm}
STOCHASTIC_DEPTHS: set[type[nn.Module]] = {nn.Identity, type(None)}

Affine = tuple[Tensor, Tensor | None]
"""Weight and bias of a linear layer."""


def plain_affine(*layers: nn.Module) -> tuple[Affine, ...] | None:
    """Weights and biases of linear layers, or None if one of them is something else or somebody looks at it."""
    return tuple((layer.weight, layer.bias) for layer in layers) if all(map(is_plain_linear, layers)) else None


def add_mlp(
    x: Tensor, norm: nn.Module, mlp: nn.Module, layers: tuple[nn.Linear, nn.Linear] | None, drop_path: nn.Module | None
) -> Tensor:
    """x + drop_path(mlp(norm(x))); without ``drop_path``, x + mlp(norm(x)).

    Args:
        x: (B, ..., C).
        layers: those of ``mlp``, if it is nothing but two plain linear layers with the exact GELU between them now.
    """
    affine = None if layers is None or has_hooks(mlp) else plain_affine(*layers)
    if affine is not None and _is_fusible(x, norm, drop_path, *affine):
        layer1, layer2 = affine
        return branches.residual_mlp(x, _norm(norm), (*layer1, *layer2), _draw(drop_path, x))
    branch = mlp(norm(x))
    return x + (branch if drop_path is None else drop_path(branch))


def add_attention(
    x: Tensor,
    norm: nn.Module,
    layers: tuple[Affine, Affine] | None,
    attend: Callable[[Tensor], Tensor],
    drop_path: nn.Module | None,
) -> Tensor | None:
    """x + drop_path(layer2(attend(layer1(norm(x))))), or None where that cannot be fused now.

    Args:
        x: (B, ..., C).
        layers: the projection to query, key and value, and that of the result; None is no layers that can be fused.
        attend: from packed projections (B', ..., D) of some samples to what the second layer takes, sample by sample.
    """
    if layers is None or not _is_fusible(x, norm, drop_path, *layers):
        return None
    depth = _draw(drop_path, x)
    projected, x = branches.norm_linear(x, _norm(norm), *layers[0], depth)
    return branches.add_linear(x, attend(projected), *layers[1], depth)


def merge_patches(x: Tensor, norm: nn.Module, reduction: nn.Module) -> Tensor:
    """Swin's patch merging: reduction(norm(y)) with y (B, H / 2, W / 2, 4 C) for x (B, H, W, C).

    y holds the tokens of patches of 2 x 2; odd maps are padded with zeros.
    """
    height, width = x.shape[1:3]
    if height % 2 or width % 2:
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
    x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # [B, H / 2, 2, W / 2, 2, C]
    # The authors' order of the four tokens: down the first column, then down the second.
    x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)
    affine = plain_affine(reduction)
    if affine is not None and _is_fusible(x, norm, None, *affine):
        return branches.norm_linear(x, _norm(norm), *affine[0], Depth(len(x)))[0]
    return reduction(norm(x))


def _is_fusible(x: Tensor, norm: nn.Module, drop_path: nn.Module | None, *layers: Affine) -> bool:
    """Whether the steps around the matrix products of a branch with such linear layers can be fused now."""
    return (
        x.is_cpu
        and type(norm) in LAYER_NORMS
        and type(drop_path) in STOCHASTIC_DEPTHS
        and norm.normalized_shape == x.shape[-1:]
        and branches.serves(
            x, [weight for weight, _ in layers], [norm.weight, norm.bias, *(bias for _, bias in layers)]
        )
        and not has_hooks(norm)
        and (drop_path is None or not has_hooks(drop_path))
    )


def _norm(norm: nn.LayerNorm) -> Norm:
    return Norm(norm.weight, norm.bias, norm.eps)


def _draw(drop_path: nn.Module | None, x: Tensor) -> Depth:
    """What a module for stochastic depth multiplies each sample by, drawn by the module itself."""
    if drop_path is None:
        return Depth(len(x))
    ones = x.new_ones(len(x), 1)
    factors = drop_path(ones)
    return Depth(len(x)) if factors is ones else Depth(len(x), tuple(factors.flatten().tolist()))
