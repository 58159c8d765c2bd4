"""What the modules with windows share."""

from __future__ import annotations

from torch import Tensor

from vitfast import functional, reference


def as_pair(name: str, value: int | tuple[int, int], minimum: int = 1) -> tuple[int, int]:
    """(rows, columns) from one integer or a pair of them, each at least ``minimum``."""
    pair = functional.integer_pair(name, value)
    if min(pair) < minimum:
        raise ValueError(f"{name} must be at least {minimum}; got {value}")
    return pair


def apply_attention_maps(
    maps: Tensor, value: Tensor, map_size: tuple[int, int], window_size: tuple[int, int], shift: tuple[int, int]
) -> Tensor:
    """Sums of the values, weighted by attention maps.

    Args:
        maps: (B, windows, heads, N, M), as from `vitfast.functional.window_attention_weights`.
        value: (B, H / r, W / r, heads, D).
        map_size: (H, W).
        window_size, shift: of the queries, in rows and columns.

    Returns:
        (B, H, W, heads, D).
    """
    ratio = [size // max(smaller, 1) for size, smaller in zip(map_size, value.shape[1:3], strict=True)]
    key_window, key_shift = (
        tuple(size // max(r, 1) for size, r in zip(pair, ratio, strict=True)) for pair in (window_size, shift)
    )
    windows = maps @ reference.window_partition(value, key_window, key_shift)
    return reference.window_reverse(windows, map_size, window_size, shift)
