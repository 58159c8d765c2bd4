"""What a report says about where it was made. No host name and no path."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

from vitfast._version import __version__
from vitfast.ops import _extension

__all__ = ["machine", "versions"]


def machine(device: torch.device) -> dict:
    """CPU, threads, memory, instruction set of the kernels, and the GPU if that is the device."""
    gpu = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = {
            "name": properties.name,
            "capability": f"sm_{properties.major}{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
        }
    return {
        "cpu": _cpu_name(),
        "logical_cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": _extension.require().instruction_set() if _extension.available() else None,
        "memory_gib": _memory_gib(),
        "gpu": gpu,
    }


def versions() -> dict[str, str | None]:
    """vitfast, Python, PyTorch, Triton, CUDA, and the compiler of the extension; None if absent."""
    return {
        "vitfast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "compiler": _extension.require().build_info()["compiler"] if _extension.available() else None,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _memory_gib() -> float | None:
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
