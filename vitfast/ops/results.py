"""The memory of large results on CPUs."""

from __future__ import annotations

from vitfast.ops import _extension

__all__ = ["keep_result_memory"]


def keep_result_memory(limit: int) -> int:
    """Set how much memory of freed results this process keeps on the CPU for later results of their size.

    Memory that comes fresh from the system costs more than many a kernel takes to fill it. What attention and blur
    pooling return, and their gradients, therefore lies in memory that is kept when they are freed, if they have 1 MiB
    or more: 256 MiB in all by default. Results that are in use do not count. On Linux with PyTorch 2.11 or later;
    elsewhere nothing is kept.

    Args:
        limit: bytes. Results that are larger come from PyTorch's allocator. With 0 what was kept goes back to the
            system, and all results are PyTorch's own: for programs that resize the storages of results, which is not
            possible otherwise.

    Returns:
        The limit before.

    Raises:
        ValueError: ``limit`` is negative.
        ExtensionError: the compiled part of vitfast is missing.
    """
    if limit < 0:
        raise ValueError(f"limit must be a number of bytes, 0 or more; got {limit}")
    before = _extension.require().keep_result_bytes(limit)
    global _are_handed_over
    _are_handed_over = limit > 0
    return before


_are_handed_over = True


def are_handed_over() -> bool:
    """Whether results may lie in memory whose storages PyTorch cannot resize."""
    return _are_handed_over
