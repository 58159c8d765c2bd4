"""Loads the compiled extension and says clearly what to do when it cannot be loaded."""

from __future__ import annotations

import types
from pathlib import Path

import torch  # its shared libraries must be loaded before the extension that links to them

try:
    from vitfast import _C
except ImportError as error:
    _C = None
    _load_error = error
else:
    _load_error = None


def _load_cuda() -> str | None:
    """Loads the library of CUDA kernels, which registers them; returns what is in the way, or None.

    It needs a PyTorch that was built with CUDA, but no GPU yet.
    """
    library = Path(__file__).parent.parent / "_cuda.so"
    if not library.exists():
        return "they were not built"
    if _C is None:
        return "vitfast._C could not be loaded"
    if torch.version.cuda is None:
        return "this PyTorch was built without CUDA"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return str(error)
    return None


_cuda_obstacle = _load_cuda()  # here, once, because Dynamo cannot trace it


class ExtensionError(ImportError):
    """The compiled part of vitfast is missing or does not load."""


def available() -> bool:
    """Whether the compiled extension was loaded."""
    return _C is not None


def cuda_available() -> bool:
    """Whether the CUDA C++ kernels were loaded."""
    return _cuda_obstacle is None


def require_cuda() -> None:
    """Raises `ExtensionError` with the way to build the CUDA C++ kernels when there are none."""
    if _cuda_obstacle is not None:
        raise ExtensionError(
            f"vitfast's CUDA kernels (vitfast/_cuda.so) cannot be used: {_cuda_obstacle}.\n"
            "Build them by nvcc, for a PyTorch with CUDA:\n"
            "    VITFAST_CUDA=1 pip install --no-build-isolation .        (in a checkout: -e . for an editable install)"
        )


def require() -> types.ModuleType:
    """The extension module; raises `ExtensionError` with the way to build it when there is none."""
    if _C is None:
        raise ExtensionError(
            f"vitfast's compiled extension (vitfast._C) could not be loaded: {_load_error}.\n"
            "Build it for the PyTorch that is installed here with GCC:\n"
            "    pip install --no-build-isolation .        (in a checkout: -e . for an editable install)\n"
            "or compute without it: with vitfast.backend('reference'): ..."
        ) from _load_error
    return _C
