"""The layouts in which trained weights come, and their conversion to the keys of this package's models.

A ViT or a Swin has the keys of timm 1.x here, a ResNet or an AlterNet those of Park & Kim's code. `to_native` knows by
a key that only it has which of the others a checkpoint is in: most differ in names, some keep query, key and value
apart, two have no convolution for the patches.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["to_native"]

State = dict[str, Tensor]


@dataclass(frozen=True)
class _Layout:
    """One layout.

    Attributes:
        name: for people.
        marker: matches, at its beginning, a key that no other layout has.
        renames: regular expressions and what replaces them, all applied to each key, in this order.
        prepare: what else is to be done, before renaming.
    """

    name: str
    marker: str
    renames: tuple[tuple[str, str | Callable[[re.Match], str]], ...]
    prepare: Callable[[State], State] = lambda state: state


def _next_stage(match: re.Match) -> str:
    """timm 1.x merges patches at the beginning of a stage, everybody else at the end of the one before."""
    return f"layers.{int(match[1]) + 1}.downsample"


def _torchvision_stage(match: re.Match) -> str:
    """torchvision counts patch embedding (0), stages (odd) and mergings (even) in one sequence."""
    index = int(match[1])
    return f"layers.{index // 2}." + ("blocks." if index % 2 else "downsample.")


def _google_kernels(state: State) -> State:
    """Flax multiplies from the right, and keeps the heads of attention apart."""
    converted = {}
    for key, value in state.items():
        if key.endswith("embedding/kernel"):
            value = value.permute(3, 2, 0, 1)  # [rows, columns, in, out]
        elif re.search(r"(query|key|value)/kernel$", key):
            value = value.flatten(1).T  # [in, heads, D]
        elif key.endswith("out/kernel"):
            value = value.flatten(0, 1).T  # [heads, D, out]
        elif re.search(r"(query|key|value)/bias$", key):
            value = value.flatten()
        elif key.endswith("kernel"):
            value = value.T
        converted[key] = value.contiguous()
    return converted


def _square_patches(state: State) -> State:
    """The linear layer of the authors' patch embedding as a convolution: its inputs go by row, column, channel."""
    key = "embedding.0.patch_embedding.1.weight"
    weight, channels = state[key], 3
    side = round((weight.shape[1] / channels) ** 0.5)
    if channels * side * side != weight.shape[1]:
        raise ValueError(
            f"{key} of shape {tuple(weight.shape)} cannot be that of square patches of {channels} channels, which is "
            "all that this layout is converted for"
        )
    return state | {key: weight.unflatten(1, (side, side, channels)).permute(0, 3, 1, 2).contiguous()}


_PROJECTIONS = (
    (r"\battention\.([qkv])_proj\b", r"attn.\1"),
    (r"\battention\.(?:attention|self)\.(query|key|value)\b", lambda match: f"attn.{match[1][0]}"),
    (r"\battention\.(?:o_proj|output\.dense)\b", "attn.proj"),
    (r"\b(?:mlp\.fc1|intermediate\.dense)\b", "mlp.fc1"),
    (r"(?<!attention\.)\b(?:mlp\.fc2|output\.dense)\b", "mlp.fc2"),
    (r"\blayernorm_before\b", "norm1"),
    (r"\blayernorm_after\b", "norm2"),
    (r"^layernorm\b", "norm"),
    (r"^embeddings\.patch_embeddings\.projection\b", "patch_embed.proj"),
)

_LAYOUTS = (
    _Layout(
        "torchvision's VisionTransformer",
        r"conv_proj\.weight",
        (
            (r"^conv_proj\b", "patch_embed.proj"),
            (r"^class_token$", "cls_token"),
            (r"^encoder\.pos_embedding$", "pos_embed"),
            (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
            (r"\bself_attention\.in_proj_", "attn.qkv."),
            (r"\bself_attention\.out_proj\b", "attn.proj"),
            (r"\bln_([12])\b", r"norm\1"),
            (r"\bmlp\.(?:0|linear_1)\b", "mlp.fc1"),
            (r"\bmlp\.(?:3|linear_2)\b", "mlp.fc2"),
            (r"^encoder\.ln\b", "norm"),
            (r"^heads\.head\b", "head"),
        ),
    ),
    _Layout(
        "torchvision's SwinTransformer",
        r"features\.0\.0\.weight",
        (
            (r"^features\.0\.0\b", "patch_embed.proj"),
            (r"^features\.0\.2\b", "patch_embed.norm"),
            (r"^features\.(\d+)\.", _torchvision_stage),
            (r"\bmlp\.0\b", "mlp.fc1"),
            (r"\bmlp\.3\b", "mlp.fc2"),
            (r"^head\.", "head.fc."),
        ),
    ),
    _Layout(
        "transformers' ViT",
        r"(?:(?:vit|deit)\.)?embeddings\.cls_token",
        (
            (r"^(?:vit|deit)\.", ""),
            (r"^embeddings\.cls_token$", "cls_token"),
            (r"^embeddings\.position_embeddings$", "pos_embed"),
            (r"^(?:encoder\.layer|layers)\.(\d+)\.", r"blocks.\1."),
            *_PROJECTIONS,
            (r"^classifier\.", "head."),
        ),
    ),
    _Layout(
        "transformers' Swin",
        r"(?:swin\.)?embeddings\.norm\.weight",
        (
            (r"^swin\.", ""),
            (r"^embeddings\.norm\b", "patch_embed.norm"),
            (r"^encoder\.", ""),
            (r"^layers\.(\d+)\.downsample\b", _next_stage),
            (r"\battention\.(?:self|relative_position_bias)\.(?=relative_position_bias_table$)", "attn."),
            *_PROJECTIONS,
            (r"^classifier\.", "head.fc."),
        ),
    ),
    _Layout(
        "timm's Swin before version 0.8",
        r"layers\.0\.downsample\.reduction\.weight",
        (
            (r"^layers\.(\d+)\.downsample\b", _next_stage),
            (r"^head\.(weight|bias)$", r"head.fc.\1"),
        ),
    ),
    _Layout(
        "Google's ViT",
        r"(?:opt/target/|params/|params/img/)?embedding/kernel",
        (
            (r"^(?:opt/target|params/img|params)/", ""),
            (r"^embedding/", "patch_embed.proj."),
            (r"^cls$", "cls_token"),
            (r"^Transformer/posembed_input/pos_embedding$", "pos_embed"),
            (r"^Transformer/encoderblock_(\d+)/", r"blocks.\1."),
            (r"\bMultiHeadDotProductAttention_1/(query|key|value)/", lambda match: f"attn.{match[1][0]}."),
            (r"\bMultiHeadDotProductAttention_1/out/", "attn.proj."),
            (r"\bMlpBlock_3/Dense_0/", "mlp.fc1."),
            (r"\bMlpBlock_3/Dense_1/", "mlp.fc2."),
            (r"\bLayerNorm_0/", "norm1."),
            (r"\bLayerNorm_2/", "norm2."),
            (r"^Transformer/encoder_norm/", "norm."),
            (r"^head/", "head."),
            (r"\.(?:kernel|scale)$", ".weight"),
        ),
        _google_kernels,
    ),
    _Layout(
        "Park & Kim's ViT",
        r"embedding\.0\.patch_embedding\.1\.weight",
        (
            (r"^embedding\.0\.patch_embedding\.1\.", "patch_embed.proj."),
            (r"^embedding\.1\.cls_token$", "cls_token"),
            (r"^embedding\.2\.pos_embedding$", "pos_embed"),
            (r"^transformers\.", "blocks."),
            (r"\battn\.to_qkv\.", "attn.qkv."),
            (r"\battn\.to_out\.0\.", "attn.proj."),
            (r"\bff\.net\.0\.", "mlp.fc1."),
            (r"\bff\.net\.3\.", "mlp.fc2."),
            (r"^classifier\.1\.", "norm."),
            (r"^classifier\.2\.", "head."),
        ),
        _square_patches,
    ),
)

# What older versions saved although it follows from the shapes.
_DERIVED = re.compile(r"(?:^|\.)(?:relative_position_index|attn_mask)$")


def to_native(state: State) -> State:
    """A checkpoint in the layout of this package's models; one of an unknown layout, or already in it, as it is.

    >>> list(to_native({"conv_proj.weight": weight, "encoder.ln.bias": bias}))
    ['patch_embed.proj.weight', 'norm.bias']
    """
    state = {key: value for key, value in state.items() if not _DERIVED.search(key)}
    layout = next((layout for layout in _LAYOUTS if _matches(layout.marker, state)), None)
    if layout is None:
        return state
    return _pack({_renamed(key, layout): value for key, value in layout.prepare(state).items()})


def _matches(marker: str, keys: Iterable[str]) -> bool:
    return any(re.match(marker, key) for key in keys)


def _renamed(key: str, layout: _Layout) -> str:
    for pattern, replacement in layout.renames:
        key = re.sub(pattern, replacement, key)
    return key


def _pack(state: State) -> State:
    """Query, key and value as one linear layer; the rest as it is."""
    packed = {}
    for key, value in state.items():
        match = re.fullmatch(r"(.*\battn\.)([qkv])\.(weight|bias)", key)
        if match is None:
            packed[key] = value
        elif match[2] == "q":
            names = [f"{match[1]}{part}.{match[3]}" for part in "qkv"]
            if all(name in state for name in names):
                packed[f"{match[1]}qkv.{match[3]}"] = torch.cat([state[name] for name in names])
    return packed
