"""Plain-PyTorch definitions: what every kernel is checked against, and the path on devices without one.

This package imports nothing else of vitfast.
"""

from vitfast.reference.window_attention import (
    window_attention,
    window_attention_backward,
    window_attention_backward_tangent,
    window_attention_tangent,
    window_attention_weights,
    window_partition,
    window_reverse,
)

__all__ = [
    "window_attention",
    "window_attention_backward",
    "window_attention_backward_tangent",
    "window_attention_tangent",
    "window_attention_weights",
    "window_partition",
    "window_reverse",
]
