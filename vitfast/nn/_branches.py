"""Residual branches of transformer blocks, x + drop_path(f(norm(x))): fused on the CPU where nobody looks inside."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from vitfast.nn._fusion import has_hooks
from vitfast.ops import branches
from vitfast.ops.branches import Depth, Norm

# Exactly these classes are known: layer normalisations over the last dimension, and modules that multiply every sample
# by a random number and draw the same numbers for any shape of the samples. Adapters of libraries add theirs.
LAYER_NORMS: set[type[nn.Module]] = {nn.LayerNorm}
STOCHASTIC_DEPTHS: set[type[nn.Module]] = {nn.Identity}

Affine = tuple[Tensor, Tensor | None]
"""Weight and bias of a linear layer."""


def affine(layer: nn.Linear) -> Affine:
    """What a plain linear layer multiplies by and adds."""
    return layer.weight, layer.bias


def add_mlp(
    x: Tensor, norm: nn.Module, mlp: nn.Module, layers: tuple[nn.Linear, nn.Linear] | None, drop_path: nn.Module
) -> Tensor:
    """x + drop_path(mlp(norm(x))).

    Args:
        x: (B, ..., C).
        layers: those of ``mlp``, if it is nothing but two plain linear layers with the exact GELU between them now.
    """
    if layers is not None and not has_hooks(mlp):
        layer1, layer2 = map(affine, layers)
        if is_fusible(x, norm, drop_path, layer1, layer2):
            return branches.residual_mlp(x, _norm(norm), (*layer1, *layer2), _draw(drop_path, x))
    return x + drop_path(mlp(norm(x)))


def add_attention(
    x: Tensor,
    norm: nn.Module,
    projection: Affine,
    attend: Callable[[Tensor], Tensor],
    output: Affine,
    drop_path: nn.Module,
) -> Tensor:
    """x + drop_path(output(attend(projection(norm(x))))) of what `is_fusible`.

    Args:
        x: (B, ..., C).
        attend: from packed projections (B', ..., D) of some samples to what ``output`` takes, sample by sample.
    """
    depth = _draw(drop_path, x)
    projected, x = branches.norm_linear(x, _norm(norm), *projection, depth)
    return branches.add_linear(x, attend(projected), *output, depth)


def project_normalized(x: Tensor, norm: nn.Module, layer: nn.Linear) -> Tensor:
    """layer(norm(x)) for x (B, ..., C)."""
    if not has_hooks(layer) and is_fusible(x, norm, nn.Identity(), affine(layer)):
        return branches.norm_linear(x, _norm(norm), *affine(layer), Depth(len(x)))[0]
    return layer(norm(x))


def is_fusible(x: Tensor, norm: nn.Module, drop_path: nn.Module, *layers: Affine) -> bool:
    """Whether the steps around the matrix products of a branch with such linear layers can be fused now."""
    return (
        type(norm) in LAYER_NORMS
        and type(drop_path) in STOCHASTIC_DEPTHS
        and norm.normalized_shape == x.shape[-1:]
        and branches.serves(
            x, [weight for weight, _ in layers], [norm.weight, norm.bias, *(bias for _, bias in layers)]
        )
        and not has_hooks(norm)
        and not has_hooks(drop_path)
    )


def _norm(norm: nn.LayerNorm) -> Norm:
    return Norm(norm.weight, norm.bias, norm.eps)


def _draw(drop_path: nn.Module, x: Tensor) -> Depth:
    """What a module for stochastic depth multiplies each sample by, drawn by the module itself."""
    ones = x.new_ones(len(x), 1)
    factors = drop_path(ones)
    return Depth(len(x)) if factors is ones else Depth(len(x), tuple(factors.flatten().tolist()))
