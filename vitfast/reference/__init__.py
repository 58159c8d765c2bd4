"""Plain-PyTorch definitions: what every kernel is checked against, and the path on devices without one.

This package imports nothing else of vitfast.
"""

from vitfast.reference.attention import (
    attention,
    attention_backward,
    attention_backward_tangent,
    attention_tangent,
)
from vitfast.reference.blur_pool import blur_pool2d, blur_pool2d_transposed
from vitfast.reference.layers import (
    batch_norm_backward_tangent,
    batch_norm_tangent,
    gelu_backward_tangent,
    gelu_tangent,
    layer_norm_backward_tangent,
    layer_norm_tangent,
)
from vitfast.reference.mlp import mlp, mlp_backward
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
    "attention",
    "attention_backward",
    "attention_backward_tangent",
    "attention_tangent",
    "batch_norm_backward_tangent",
    "batch_norm_tangent",
    "blur_pool2d",
    "blur_pool2d_transposed",
    "gelu_backward_tangent",
    "gelu_tangent",
    "layer_norm_backward_tangent",
    "layer_norm_tangent",
    "mlp",
    "mlp_backward",
    "window_attention",
    "window_attention_backward",
    "window_attention_backward_tangent",
    "window_attention_tangent",
    "window_attention_weights",
    "window_partition",
    "window_reverse",
]
