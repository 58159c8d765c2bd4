"""Modules on the fused operators: parameters, initialisation, state-dict names."""

from vitfast.nn.local_attention import LocalAttention2d
from vitfast.nn.window_attention import WindowAttention

__all__ = ["LocalAttention2d", "WindowAttention"]
