"""Models by name."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from vitfast.models.weights import load_weights


@dataclass(frozen=True)
class _Entry:
    model: Callable[..., nn.Module]
    defaults: dict[str, Any]
    weights: str | None


_models: dict[str, _Entry] = {}


def register(
    name: str,
    model: Callable[..., nn.Module],
    *,
    aliases: Iterable[str] = (),
    weights: str | None = None,
    **defaults: Any,
) -> None:
    """Makes a model known by name.

    Args:
        name: for `create_model`.
        model: a class or function that takes ``num_classes`` and its options by keyword and returns the model.
        aliases: other names for it.
        weights: what ``pretrained=True`` stands for, a source of `vitfast.load_weights`; None if there are none.
        defaults: the options that make the difference between this name and others; users may override them.

    Raises:
        ValueError: a name is taken.
    """
    names = [name, *aliases]
    for each in names:
        if each in _models:
            raise ValueError(f"there is already a model {each!r}; register the new one by another name")
    _models.update(dict.fromkeys(names, _Entry(model, defaults, weights)))


def create_model(
    name: str, num_classes: int = 1000, pretrained: bool | str | Path = False, **options: Any
) -> nn.Module:
    """A model, with new or trained weights.

    Args:
        name: one of `list_models`.
        num_classes: outputs of the classifier.
        pretrained: False for new weights; a file, folder or Hugging Face repository for those it holds, see
            `vitfast.load_weights`; True for ImageNet weights of timm's repositories, which ViT and Swin have.
        options: the keyword arguments of the model's class, for example ``in_channels`` or ``image_size``.

    Raises:
        ValueError: there is no model of this name, or there are no trained weights for it; the trained weights do not
            fit, for example for another ``num_classes``; or an option has a value that cannot be.
        TypeError: the model has no such option.

    >>> model = create_model("alternet_50_cifar", num_classes=100)
    >>> model = create_model("swin_t", pretrained="checkpoints/swin_tiny.safetensors")
    """
    if name not in _models:
        close = difflib.get_close_matches(name, _models, n=5, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}?" if close else "vitfast.list_models() names all of them"
        raise ValueError(f"there is no model {name!r}; {hint}")
    entry = _models[name]
    if pretrained is True and entry.weights is None:
        raise ValueError(
            f"there are no published weights for {name}; make it with pretrained=False, or name a file of your own: "
            "pretrained=path"
        )
    known = inspect.signature(entry.model).parameters
    unknown = [option for option in options if option not in known]
    if unknown:
        raise TypeError(
            f"{name} has no option {', '.join(unknown)}; it has: {', '.join(o for o in known if o != 'num_classes')}"
        )
    model = entry.model(num_classes=num_classes, **{**entry.defaults, **options})
    if pretrained is False:
        return model
    return load_weights(model, entry.weights if pretrained is True else pretrained)


def options_of(name: str) -> list[str]:
    """The options that `create_model` takes for a name; none if there is no such model."""
    return list(inspect.signature(_models[name].model).parameters) if name in _models else []


def list_models(pattern: str = "*") -> list[str]:
    """The names that `create_model` knows and that match a shell pattern, in order of registration.

    >>> list_models("alternet_*cifar")
    ['alternet_18_cifar', 'alternet_50_cifar']
    """
    return fnmatch.filter(_models, pattern)
