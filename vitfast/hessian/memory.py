"""How many vectors at a time the free memory allows."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

__all__ = ["fitting_chunk", "free_bytes"]

# Beyond so many vectors at a time nothing gets faster.
MOST_AT_A_TIME = 16

# Of the free memory; the rest is for others, and for an estimate that is one.
_SHARE = 0.5

# A tangent and its gradient's tangent for every value that the gradient keeps, and what is on the way.
_TANGENTS = 3


def fitting_chunk(fn: Callable[[Any], Tensor], params: Any, count: int) -> int:
    """How many of ``count`` vectors to take at a time, by one run of ``fn``, a function of the parameters."""
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    with torch.enable_grad():
        leaves = tree_map(lambda p: p.detach().requires_grad_(), params)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            fn(leaves)
    tensors = tree_flatten(params)[0]
    vector = sum(p.numel() * p.element_size() for p in tensors)
    per_vector = _TANGENTS * kept + 4 * vector
    return int(max(1, min(count, MOST_AT_A_TIME, _SHARE * free_bytes(tensors[0].device) // max(per_vector, 1))))


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
