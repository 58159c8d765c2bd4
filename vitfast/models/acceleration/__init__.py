"""Fused kernels inside models of other libraries: `accelerate` and `restore`.

A module is taken over by giving it another class, a subclass of its own that overrides the method in which it computes
what there is a kernel for. Parameters, buffers, hooks, attributes and state-dict keys stay the very same objects;
copying, pickling and `isinstance` go on to work; `restore` gives the class back.

Each library has an adapter, a module of this package, imported only for models with modules of that library. Classes
are compared exactly: a subclass may have changed what this package knows, and is left as it is. While a model is
scripted or traced, the original code serves: only its operations are known there.
"""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, wraps

import torch
from torch import nn
from torch.fx import Proxy

__all__ = ["Adaptation", "Report", "accelerate", "register_attention", "restore"]

# Adapters by the library they know.
_ADAPTERS = {
    "torch": "vitfast.models.acceleration.torch_adapter",
    "kornia": "vitfast.models.acceleration.kornia_adapter",
    "timm": "vitfast.models.acceleration.timm_adapter",
    "torchvision": "vitfast.models.acceleration.torchvision_adapter",
    "transformers": "vitfast.models.acceleration.transformers_adapter",
}


@dataclass(frozen=True)
class Adaptation:
    """How modules of one class are taken over.

    Attributes:
        fused: the subclass they become.
        obstacle: why a module of that class must stay as it is, or None.
        applies: whether a module of that class is of the kind at all; others are left without a word.
        parts: the names of those of its children that it takes over itself.
    """

    fused: type[nn.Module]
    obstacle: Callable[[nn.Module], str | None] = lambda module: None
    applies: Callable[[nn.Module], bool] = lambda module: True
    parts: tuple[str, ...] = ()


@dataclass
class Report:
    """What `accelerate` did.

    Attributes:
        replaced: names of the modules that now use fused kernels, with their classes.
        kept: names of the modules that were left although they are of a known kind, with the reason.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} modules use fused kernels:"] if self.replaced else []
        lines += [f"  {name or '(the model itself)'}: {kind}" for name, kind in self.replaced.items()]
        lines += [f"{len(self.kept)} were left as they are:"] if self.kept else []
        lines += [f"  {name or '(the model itself)'}: {reason}" for name, reason in self.kept.items()]
        return "\n".join(lines) or "no module of a known class: nothing was changed"


def accelerate(model: nn.Module, report: bool = False) -> nn.Module | Report:
    """Replaces attention, MLPs and blurs of timm, torchvision, transformers and kornia by fused kernels, in place.

    Weights, state-dict keys, hooks and the results, within rounding, stay the same, gradients included. Known are

    - timm: the attention of the ViT and DeiT families and of all models built of ``timm.layers.Attention``, PiT among
      them; the blocks of Swin, where roll, partition and reverse disappear too;
    - torchvision: the attention of Swin (not of version 2, whose cosine attention has no kernel) and the encoder blocks
      of ``VisionTransformer``;
    - transformers: the attention of ViT and DeiT, and the layers of Swin, as long as their configuration asks for
      ``attn_implementation="sdpa"``, the default; ``"eager"`` is how one asks for attention maps;
    - of all three, on the CPU, the MLPs with the exact GELU (`vitfast.functional.mlp`), and in float32 the blocks round
      attention and MLP: layer normalisation, stochastic depth, residual additions and Swin's patch merging beside the
      matrix products. Samples that stochastic depth drops are not computed;
    - timm and kornia: blur pooling; and in evaluation mode, as one pass over the map, a batch normalisation, a ReLU and
      a blur that follow each other in a block of timm's ``ResNet`` or in an ``nn.Sequential``.

    Everything else is left as it is. What a fused module cannot do (dropout of attention weights or inside an MLP in
    training, causal masks, padded and shifted windows of timm, modules whose hooks would see something else) it leaves,
    call by call, to the code it replaced. Calling this again takes over what has been added since, and changes nothing
    else.

    Args:
        model: any module; it is changed in place.
        report: whether to return a `Report` instead of the model.

    Returns:
        ``model``, or what was done to it.

    Raises:
        TypeError: ``model`` is not a module.

    >>> model = vitfast.accelerate(timm.create_model("vit_small_patch16_224"))
    """
    _check(model, "accelerate")
    result = Report()
    adaptations, unusable = _adaptations(model)
    by_fused = {adaptation.fused: adaptation for adaptation in adaptations.values()}
    taken_over: set[nn.Module] = set()  # by the module that they are part of, with all their parts
    for name, module in model.named_modules():
        kind = type(module)
        if module in taken_over:
            continue
        if kind in adaptations and adaptations[kind].applies(module):
            obstacle = adaptations[kind].obstacle(module)
            if obstacle is None:
                module.__class__ = adaptations[kind].fused
            else:
                result.kept[name] = f"{kind.__qualname__}: {obstacle}"
        elif kind not in by_fused:
            reason = unusable.get(_library(kind)) or _unknown_attention(kind, adaptations)
            if reason is not None:
                result.kept[name] = reason
        if type(module) in by_fused:
            result.replaced[name] = _original(type(module)).__qualname__
            for part in by_fused[type(module)].parts:
                taken_over.update(getattr(module, part).modules())
    return result if report else model


def restore(model: nn.Module) -> nn.Module:
    """Undoes `accelerate`, in place; a model that was never accelerated stays as it is.

    Args:
        model: any module.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a module.
    """
    _check(model, "restore")
    fused = {adaptation.fused for adaptation in _adaptations(model)[0].values()}
    for module in model.modules():
        if type(module) in fused:
            module.__class__ = _original(type(module))
    return model


def register_attention() -> None:
    """Makes ``attn_implementation="vitfast"`` known to transformers, for every model that takes one.

    Raises:
        ImportError: transformers is not installed.

    >>> vitfast.models.register_attention()
    >>> transformers.AutoModel.from_pretrained(name, attn_implementation="vitfast")
    """
    importlib.import_module(_ADAPTERS["transformers"]).register()


def _check(model: object, function: str) -> None:
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise TypeError(f"{function} takes a model, an instance of torch.nn.Module; got the class {model.__name__}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function} takes a torch.nn.Module; got {type(model).__name__}")


def _library(kind: type[nn.Module]) -> str:
    return kind.__module__.partition(".")[0]


def _adaptations(model: nn.Module) -> tuple[dict[type[nn.Module], Adaptation], dict[str, str]]:
    """How the classes of those libraries that the model has modules of are taken over, and which libraries cannot be.

    A library cannot be where its adapter does not find what it was written for: it is another version, or broken.
    """
    kinds = {base for module in model.modules() for base in type(module).__mro__}
    found: dict[type[nn.Module], Adaptation] = {}
    unusable: dict[str, str] = {}
    for library in _ADAPTERS.keys() & {_library(kind) for kind in kinds}:
        try:
            found |= _adapter(library)
        except (ImportError, AttributeError) as error:
            unusable[library] = f"this version of {library} is not known: {error}"
    return found, unusable


@cache
def _adapter(library: str) -> dict[type[nn.Module], Adaptation]:
    adaptations = importlib.import_module(_ADAPTERS[library]).ADAPTATIONS
    for adaptation in adaptations.values():
        _give_way_to_tracing(adaptation.fused)
    return adaptations


def _give_way_to_tracing(fused: type[nn.Module]) -> None:
    """Has a fused class compute by the code it replaces while a module of it is traced or scripted."""
    original = _original(fused)

    def prepared(self):
        module = copy.copy(self)
        module.__class__ = original
        return module

    fused.__prepare_scriptable__ = prepared
    for name in ("forward", "_attn"):
        if name in vars(fused):
            setattr(fused, name, _unless_traced(vars(fused)[name], getattr(original, name)))


def _unless_traced(method: Callable, original: Callable) -> Callable:
    @wraps(method)
    def either(self, *args, **kwargs):
        if torch.jit.is_tracing() or any(isinstance(value, Proxy) for value in (*args, *kwargs.values())):
            return original(self, *args, **kwargs)
        return method(self, *args, **kwargs)

    return either


def _original(fused: type[nn.Module]) -> type[nn.Module]:
    """The class that a fused one replaces: its first base."""
    return fused.__bases__[0]


def _unknown_attention(kind: type[nn.Module], adaptations: dict[type[nn.Module], Adaptation]) -> str | None:
    """Why a module that looks like attention is not taken over."""
    known = next((base for base in kind.__mro__[1:] if base in adaptations), None)
    if known is not None:
        return f"{kind.__qualname__} is a subclass of {known.__qualname__} and may compute something else"
    if _library(kind) in _ADAPTERS.keys() - {"torch"} and re.search(r"Att(ention|n)|XCA", kind.__name__):
        return f"there is no fused kernel for {kind.__module__}.{kind.__qualname__}"
    return None
