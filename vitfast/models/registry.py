"""Models by name."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

_models: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {}


def register(name: str, model: Callable[..., nn.Module], **defaults: Any) -> None:
    """Makes a model known by name.

    Args:
        name: for `create_model`.
        model: a class or function that takes ``num_classes`` and its options by keyword and returns the model.
        defaults: the options that make the difference between this name and others; users may override them.

    Raises:
        ValueError: the name is taken.
    """
    if name in _models:
        raise ValueError(f"there is already a model {name!r}; register the new one by another name")
    _models[name] = (model, defaults)


def create_model(name: str, num_classes: int = 1000, pretrained: bool = False, **options: Any) -> nn.Module:
    """A model with new weights.

    Args:
        name: one of `list_models`.
        num_classes: outputs of the classifier.
        pretrained: must be False: there are no trained weights yet.
        options: the keyword arguments of the model's class, for example ``in_channels`` or ``width``.

    Raises:
        ValueError: there is no model of this name; ``pretrained`` is True; or an option has a value that cannot be.
        TypeError: the model has no such option.

    >>> model = create_model("alternet_50_cifar", num_classes=100)
    """
    if name not in _models:
        close = difflib.get_close_matches(name, _models, n=5, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}?" if close else "vitfast.list_models() names all of them"
        raise ValueError(f"there is no model {name!r}; {hint}")
    if pretrained:
        raise ValueError(
            f"there are no pretrained weights for {name} yet; make it with pretrained=False and load your own with "
            "model.load_state_dict(...)"
        )
    model, defaults = _models[name]
    known = inspect.signature(model).parameters
    unknown = [option for option in options if option not in known]
    if unknown:
        raise TypeError(
            f"{name} has no option {', '.join(unknown)}; it has: {', '.join(o for o in known if o != 'num_classes')}"
        )
    return model(num_classes=num_classes, **{**defaults, **options})


def list_models(pattern: str = "*") -> list[str]:
    """The names that `create_model` knows and that match a shell pattern, in order of registration.

    >>> list_models("alternet_*cifar")
    ['alternet_18_cifar', 'alternet_50_cifar']
    """
    return fnmatch.filter(_models, pattern)
