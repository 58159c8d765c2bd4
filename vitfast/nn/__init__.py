"""Modules on the fused operators: parameters, initialisation, state-dict names."""

from vitfast.nn.attention import Attention
from vitfast.nn.blur_pool import BlurPool2d, MaxBlurPool2d
from vitfast.nn.dropout import MCDropout
from vitfast.nn.local_attention import LocalAttention2d
from vitfast.nn.smoothing import Smoothing2d
from vitfast.nn.transformer import DropPath, LayerScale, Mlp, PatchEmbed, TransformerBlock
from vitfast.nn.window_attention import WindowAttention

__all__ = [
    "Attention",
    "BlurPool2d",
    "DropPath",
    "LayerScale",
    "LocalAttention2d",
    "MCDropout",
    "MaxBlurPool2d",
    "Mlp",
    "PatchEmbed",
    "Smoothing2d",
    "TransformerBlock",
    "WindowAttention",
]
