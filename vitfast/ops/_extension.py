"""Loads the compiled extension and says clearly what to do when it cannot be loaded."""

from __future__ import annotations

import types

import torch  # noqa: F401  (its shared libraries must be loaded before the extension that links to them)

try:
    from vitfast import _C
except ImportError as error:
    _C = None
    _load_error = error
else:
    _load_error = None


class ExtensionError(ImportError):
    """The compiled part of vitfast is missing or does not load."""


def available() -> bool:
    """Whether the compiled extension was loaded."""
    return _C is not None


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
