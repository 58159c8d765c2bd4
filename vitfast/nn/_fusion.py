"""Fused functions in the place of modules, and when they may stand there."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules import module as _modules

from vitfast import functional
from vitfast.ops.linear import linear


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody looks at calls of the module or a part of it: by a hook, on it or on all modules, or by a
    ``forward`` of its own that the instance was given."""
    if (
        _modules._global_forward_hooks
        or _modules._global_forward_pre_hooks
        or _modules._global_backward_hooks
        or _modules._global_backward_pre_hooks
    ):
        return True
    if not module._modules:  # the usual case, for which a walk would take longer than the check
        return _is_watched(module)
    return any(map(_is_watched, module.modules()))


def _is_watched(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def is_absent(module: nn.Module) -> bool:
    """Whether a module does nothing, and nobody looks at it."""
    return type(module) is nn.Identity and not has_hooks(module)


def is_idle(dropout: nn.Module) -> bool:
    """Whether a dropout does nothing now, and nobody looks at what it is given."""
    return type(dropout) is nn.Dropout and not (dropout.training and dropout.p > 0) and not has_hooks(dropout)


def drops_weights(attention: nn.Module) -> bool:
    """Whether an attention with timm's attributes drops weights now, or somebody looks at its dropout.

    Its mode decides: the probability is all that fused attention gets of the dropout.
    """
    return not is_idle(attention.attn_drop) or (attention.training and attention.attn_drop.p > 0)


def is_plain_attention(attention: nn.Module) -> bool:
    """Whether an attention over all tokens with timm's attributes is nothing but two plain linear layers with attention
    between them now, and nobody looks inside."""
    norms = (attention.q_norm, attention.k_norm, attention.norm)
    if attention.gate is not None or not all(map(is_absent, norms)):
        return False
    return not (drops_weights(attention) or has_hooks(attention)) and is_idle(attention.proj_drop)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, no subclass of it, and nobody looks at what goes in or out."""
    return type(module) is nn.Linear and not has_hooks(module)


def is_exact_gelu(module: nn.Module) -> bool:
    """Whether a module is PyTorch's GELU without the approximation by tanh, and nobody looks at it."""
    return type(module) is nn.GELU and module.approximate == "none" and not has_hooks(module)


def apply_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x), on the CPU by the faster of PyTorch's matrix products if the layer is a plain linear one."""
    return linear(x, layer.weight, layer.bias) if x.is_cpu and is_plain_linear(layer) else layer(x)


def fused_mlp(x: Tensor, fc1: nn.Linear, fc2: nn.Linear) -> Tensor:
    """fc2(gelu(fc1(x))) by the fused function, which is faster than the modules on the CPU alone."""
    return functional.mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias)


def folds(norm: nn.Module, kind: type[nn.BatchNorm2d] = nn.BatchNorm2d) -> bool:
    """Whether a module is a batch normalisation that is one scale and shift per channel now, and nobody looks at it."""
    return type(norm) is kind and not norm.training and norm.running_mean is not None and not has_hooks(norm)


def norm_arguments(norm: nn.BatchNorm2d) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor, float]:
    """A norm that `folds` as `vitfast.functional.blur_pool2d` takes it."""
    return norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps
