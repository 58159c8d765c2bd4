"""How many vectors at a time the free memory allows, and memory that one product leaves to the next."""

from __future__ import annotations

import ctypes
import os
import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

__all__ = [
    "bytes_of_vector",
    "fitting_chunk",
    "free_bytes",
    "hold_freed_memory",
    "keeping_freed_memory",
    "release_freed_memory",
]

# Beyond so many vectors at a time nothing gets faster.
MOST_AT_A_TIME = 16

# Of the free memory; the rest is for others, and for an estimate that is one.
_SHARE = 0.5

# A tangent and its gradient's tangent for every value that the gradient keeps, and what is on the way.
_TANGENTS = 3


def bytes_of_vector(fn: Callable[[Any], Tensor], params: Any) -> int:
    """What a vector of a product takes, estimated by one run of ``fn``, a function of the parameters."""
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor.detach()  # the tensor itself would keep what keeps it

    with torch.enable_grad():
        leaves = tree_map(lambda p: p.detach().requires_grad_(), params)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            fn(leaves)
    return _TANGENTS * kept + 4 * sum(p.numel() * p.element_size() for p in tree_flatten(params)[0])


def fitting_chunk(per_vector: int, count: int, device: torch.device) -> int:
    """How many of ``count`` vectors to take at a time, each of so many bytes."""
    return int(max(1, min(count, MOST_AT_A_TIME, _SHARE * free_bytes(device) // max(per_vector, 1))))


def free_bytes(device: torch.device) -> int:
    """Bytes that may still be allocated on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        with open("/proc/meminfo") as lines:
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


# ---- memory that is freed and asked for again ------------------------------------------------------------------------

# K tangents of a feature map are tens of megabytes. Such memory glibc takes from the system for every tensor anew, and
# the system fills it with zeros page by page: a fifth of the time of a product on a convolutional network. Meanwhile
# glibc is told to take memory from its heap and to keep what is freed.

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # of malloc.h
# What glibc arrives at by itself in a program that frees large blocks, on 64 bits, and its default.
_LARGEST_MMAP_THRESHOLD, _DEFAULT_MMAP_MAX = 32 << 20, 65536

_libc = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
_lock = threading.RLock()  # a collection of garbage inside of it may release
_holders = 0


def hold_freed_memory() -> None:
    """Has the process keep memory that it frees, until as many calls of `release_freed_memory`. Of glibc only."""
    global _holders
    with _lock:
        _holders += 1
        if _libc is not None and _holders == 1:
            _libc.mallopt(_M_MMAP_MAX, 0)
            _libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def release_freed_memory() -> None:
    """Returns it to the system."""
    global _holders
    with _lock:
        _holders -= 1
        if _libc is not None and _holders == 0:
            _libc.mallopt(_M_MMAP_MAX, _DEFAULT_MMAP_MAX)
            _libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
            _libc.mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST_MMAP_THRESHOLD)
            _libc.malloc_trim(0)


@contextmanager
def keeping_freed_memory() -> Iterator[None]:
    """Between `hold_freed_memory` and `release_freed_memory`."""
    hold_freed_memory()
    try:
        yield
    finally:
        release_freed_memory()
