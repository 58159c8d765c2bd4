"""The libraries whose models are measured, and compared with in the tests: imported where they are used."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

import torch

from vitfast.bench.case import Unavailable

__all__ = ["load"]

# torchvision's wheels on PyPI are built for CUDA. Beside a CPU build of PyTorch their compiled operators do not load,
# and the import fails for want of two declarations. No model that is measured calls these operators.
_DECLARATIONS = tuple(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor" for name in ("nms", "qnms"))
_MISSING = "operator torchvision::nms does not exist"

_declared: list[torch.library.Library] = []  # declarations last as long as the object they were made with


def load(name: str) -> ModuleType:
    """The library ``name``.

    Raises:
        Unavailable: it is not installed, or its import fails.
    """
    try:
        if importlib.util.find_spec("torchvision") is not None:
            _import_torchvision()  # timm and transformers do, the latter only when a model is asked for
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        raise Unavailable(f"{missing} is not installed: pip install {missing}") from error
    except Exception as error:  # whatever a library that was built for another version of PyTorch may raise
        raise Unavailable(
            f"the import of {name} fails with {type(error).__name__}; python -c 'import {name}' shows why. "
            f"torchvision must be the build for torch {torch.__version__}"
        ) from error


def _import_torchvision() -> None:
    try:
        importlib.import_module("torchvision")
        return
    except RuntimeError as error:
        if _MISSING not in str(error) or _declared:
            raise
    for module in [module for module in sys.modules if module.partition(".")[0] == "torchvision"]:
        del sys.modules[module]  # as far as its import came
    _declared.append(torch.library.Library("torchvision", "DEF"))
    for declaration in _DECLARATIONS:
        _declared[0].define(declaration)
    importlib.import_module("torchvision")
