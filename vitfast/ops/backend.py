"""Which implementation of an operator serves a call."""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections.abc import Iterator

import torch

from vitfast.ops import _extension

BACKENDS = ("reference", "cpu", "triton", "cuda")

# Looked up here, once, because Dynamo cannot trace the search.
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

# A plain global because Dynamo guards on those: a compiled function is compiled again for another backend.
_forced: str | None = None


class BackendError(RuntimeError):
    """A forced backend cannot serve the call."""


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one implementation for every vitfast operator that this process calls inside the block.

    Args:
        name: ``"reference"`` (plain PyTorch, any device), ``"cpu"`` (C++), ``"triton"`` (NVIDIA GPUs; or CPU tensors in
            Triton's interpreter, ``TRITON_INTERPRET=1``) or ``"cuda"`` (CUDA C++, NVIDIA GPUs).

    Raises:
        ValueError: ``name`` is none of these.
        BackendError: raised by the operator, when that backend cannot serve it.

    >>> with vitfast.backend("reference"):
    ...     y = model(x)
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {name!r}")
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def in_use() -> tuple[str | None, str | None]:
    """What choices depend on beside the tensors: the implementation that `backend` forces, and the instruction set of
    the CPU's kernels; None if there is none."""
    return _forced, _extension.require().instruction_set() if _extension.available() else None


def choose(operator: str, served: tuple[str, ...], device: torch.device) -> str:
    """The backend for a call of ``operator``, which has the kernels ``served``, on tensors of ``device``."""
    name = _forced
    if name is None:
        return _default(operator, served, device)
    if name == "reference":
        return name
    if name not in served:
        raise BackendError(f"{operator} has no {name} kernel; it has: {', '.join((*served, 'reference'))}")
    if name == "cpu" and device.type != "cpu":
        raise BackendError(
            f"backend 'cpu' was forced, but the tensors of {operator} are on {device}; move them with .cpu()"
        )
    if name == "triton" and device.type != "cuda" and not triton_interpreted():
        raise BackendError(
            f"backend 'triton' was forced, but the tensors of {operator} are on {device}; move them to a CUDA device, "
            "or set TRITON_INTERPRET=1 before Python starts to interpret the kernel on the CPU"
        )
    if name == "triton" and not triton_available():
        raise BackendError(
            f"backend 'triton' was forced for {operator}, but triton is not installed: pip install triton"
        )
    if name == "cuda" and device.type != "cuda":
        raise BackendError(f"backend 'cuda' was forced, but the tensors of {operator} are on {device}")
    if name == "cpu":
        _extension.require()
    if name == "cuda":
        _extension.require_cuda()
    return name


def is_chosen(name: str, device: torch.device) -> bool:
    """Whether the kernels ``name`` are forced, or nothing is and they are those of ``device``.

    For operators that have no other kernels, and leave every other case to PyTorch.
    """
    if name != device.type or _forced not in (None, name):
        return False
    _extension.require()
    return True


def _default(operator: str, served: tuple[str, ...], device: torch.device) -> str:
    if device.type == "cpu" and "cpu" in served:
        _extension.require()
        return "cpu"
    if device.type == "cuda":
        if "cuda" in served and _extension.cuda_available():
            return "cuda"
        if "triton" in served and triton_available():
            return "triton"
        _warn_once(operator, served)
    return "reference"


def triton_available() -> bool:
    """Whether Triton is installed."""
    return _TRITON_INSTALLED


def triton_interpreted() -> bool:
    """Whether Triton kernels run in its interpreter in this process."""
    if not triton_available():
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


_warned: set[str] = set()


def _warn_once(operator: str, served: tuple[str, ...]) -> None:
    if operator not in _warned:
        _warned.add(operator)
        missing = {
            "cuda": "the CUDA kernels were not built (VITFAST_CUDA=1 pip install --no-build-isolation .)",
            "triton": "triton is not installed (pip install triton)",
        }
        reason = " and ".join(text for backend, text in missing.items() if backend in served)
        warnings.warn(
            f"{operator} runs as plain PyTorch on this CUDA device: {reason}",
            RuntimeWarning,
            stacklevel=6,  # the caller of vitfast.functional
        )
