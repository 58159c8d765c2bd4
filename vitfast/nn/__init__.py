"""Modules on the fused operators: parameters, initialisation, state-dict names."""

from vitfast.nn.attention import Attention
from vitfast.nn.local_attention import LocalAttention2d
from vitfast.nn.transformer import DropPath, LayerScale, Mlp, PatchEmbed, TransformerBlock
from vitfast.nn.window_attention import WindowAttention

__all__ = [
    "Attention",
    "DropPath",
    "LayerScale",
    "LocalAttention2d",
    "Mlp",
    "PatchEmbed",
    "TransformerBlock",
    "WindowAttention",
]
