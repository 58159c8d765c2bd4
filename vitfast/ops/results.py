"""The memory of large results on CPUs."""

from __future__ import annotations

from vitfast.ops import _extension

__all__ = ["keep_result_memory"]


def keep_result_memory(limit: int) -> int:
    """Set how much memory of freed results this process keeps on the CPU for later results of their size.

    Memory that comes fresh from the system costs more than many a kernel takes to fill it. What attention and blur
    pooling return, and their gradients, therefore lies in memory that is kept from 1 MiB on, up to 256 MiB if nothing
    else is set. Results that are still in use do not count.

    Args:
        limit: bytes. 0 gives all of it back and lets results come from PyTorch's allocator: for programs that resize
            storages of results, which kept memory does not allow.

    Returns:
        The limit before.

    Raises:
        ValueError: ``limit`` is negative.
        ExtensionError: the compiled part of vitfast is missing.

    On Linux with PyTorch 2.11 or later; elsewhere it changes nothing.
    """
    if limit < 0:
        raise ValueError(f"limit must be a number of bytes, 0 or more; got {limit}")
    return _extension.require().keep_result_bytes(limit)
