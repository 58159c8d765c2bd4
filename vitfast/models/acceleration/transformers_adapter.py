"""transformers 5: the layers of ViT, DeiT and Swin, their attention and MLPs, and Swin's patch merging.

And the attention implementation "vitfast", for every model that takes one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.activations import GELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.deit.modeling_deit import DeiTAttention, DeiTLayer, DeiTMLP
from transformers.models.swin.modeling_swin import (
    SwinAttention,
    SwinDropPath,
    SwinLayer,
    SwinMLP,
    SwinPatchMerging,
)
from transformers.models.vit.modeling_vit import ViTAttention, ViTLayer, ViTMLP

from vitfast import functional
from vitfast.models.acceleration import Adaptation
from vitfast.nn._branches import STOCHASTIC_DEPTHS, Affine, add_attention, add_mlp, merge_patches, plain_affine
from vitfast.nn._fusion import apply_linear, fused_mlp, has_hooks, is_exact_gelu, is_idle, is_plain_linear
from vitfast.ops import branches


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **options,
) -> tuple[Tensor, None]:
    """An attention function of transformers: query (B, heads, N, D) in, (B, N, heads, D) out, without the weights.

    It serves attention over all tokens with an additive mask or none. The rest is transformers' "sdpa": boolean and
    causal masks, dropout, heads that share keys, and whatever else an option may ask for.
    """
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    is_causal = is_causal and attention_mask is None and query.shape[2] > 1
    plain_mask = attention_mask is None or attention_mask.dtype == query.dtype
    plain_heads = query.shape[1] == key.shape[1] and key.shape == value.shape
    asked = any(value is not None and name not in _WITHOUT_EFFECT for name, value in options.items())
    if is_causal or dropout > 0 or not plain_mask or not plain_heads or asked:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **options)
    output = functional.attention(query, key, value, attention_mask, scale=scaling)
    return output.transpose(1, 2), None


# What "sdpa" does not read either: where tokens are, and windows, which are in the mask.
_WITHOUT_EFFECT = ("output_attentions", "position_ids", "sliding_window", "use_cache", "cache_position")


def register() -> None:
    """Makes ``attn_implementation="vitfast"`` known to transformers, with the masks that "sdpa" gets."""
    AttentionInterface.register("vitfast", attention_forward)
    AttentionMaskInterface.register("vitfast", sdpa_mask)


def _projected(attention: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of x (..., channels), each (..., heads, D)."""
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    return tuple(apply_linear(projection, x).unflatten(-1, (-1, attention.head_dim)) for projection in projections)


# Fewer rows, and copying three weights into one costs more than all fusion gains.
_PACKED_ROWS = 1024


def _packed_layers(attention: nn.Module, x: Tensor) -> tuple[Affine, Affine] | None:
    """The layers for query, key and value as one, and the one for the output; None where they are no plain layers, x
    (..., C) has too few rows, or nothing would be fused."""
    if x.numel() < _PACKED_ROWS * x.shape[-1] or not branches.serves(x, (), ()):
        return None
    layers = plain_affine(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    if layers is None:
        return None
    *projections, output = layers
    weights, biases = zip(*projections, strict=True)
    alike = len({(weight.shape, bias is None) for weight, bias in projections}) == 1
    return ((torch.cat(weights), None if biases[0] is None else torch.cat(biases)), output) if alike else None


def _is_fusible(attention: nn.Module) -> bool:
    """Whether the weights are neither asked for nor dropped."""
    drops = attention.training and attention.attention_dropout > 0
    return attention.config._attn_implementation == "sdpa" and not drops


def _self_attention(attention: nn.Module, hidden_states: Tensor) -> tuple[Tensor, None]:
    """ViT's and DeiT's attention."""
    query, key, value = (t.transpose(1, 2) for t in _projected(attention, hidden_states))
    output = functional.attention(query, key, value, scale=attention.scaling)
    return apply_linear(attention.o_proj, output.transpose(1, 2).flatten(2)), None


class FusedViTAttention(ViTAttention):
    """ViT's attention on `vitfast.functional.attention`."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs):
        if attention_mask is not None or not _is_fusible(self):
            return super().forward(hidden_states, attention_mask, **kwargs)
        return _self_attention(self, hidden_states)


class FusedDeiTAttention(DeiTAttention):
    """DeiT's attention on `vitfast.functional.attention`."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs):
        if attention_mask is not None or not _is_fusible(self):
            return super().forward(hidden_states, attention_mask, **kwargs)
        return _self_attention(self, hidden_states)


def _self_attention_layer(layer: nn.Module, x: Tensor, attention_mask: Tensor | None, **kwargs) -> Tensor:
    """ViT's and DeiT's layer."""
    output = _add_self_attention(layer, x) if attention_mask is None and is_idle(layer.dropout) else None
    if output is None:
        branch, _ = layer.attention(layer.layernorm_before(x), attention_mask, **kwargs)
        output = layer.dropout(branch) + x
    if not is_idle(layer.dropout):
        return layer.dropout(layer.mlp(layer.layernorm_after(output))) + output
    return add_mlp(output, layer.layernorm_after, layer.mlp, _plain_layers(layer.mlp, output), None)


def _add_self_attention(layer: nn.Module, x: Tensor) -> Tensor | None:
    attention = layer.attention
    known = x.is_cpu and type(attention) in (FusedViTAttention, FusedDeiTAttention)
    if not known or not _is_fusible(attention) or has_hooks(attention):
        return None

    def attend(qkv: Tensor) -> Tensor:
        qkv = qkv.unflatten(-1, (3, -1, attention.head_dim))
        return functional.attention_qkvpacked(qkv, scale=attention.scaling).flatten(2)

    return add_attention(x, layer.layernorm_before, _packed_layers(attention, x), attend, None)


class FusedViTLayer(ViTLayer):
    """ViT's layer with its normalisations and additions beside the matrix products."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
        return _self_attention_layer(self, hidden_states, attention_mask, **kwargs)


class FusedDeiTLayer(DeiTLayer):
    """DeiT's layer with its normalisations and additions beside the matrix products."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
        return _self_attention_layer(self, hidden_states, attention_mask, **kwargs)


class FusedSwinLayer(SwinLayer):
    """Swin's layer: its windows, shift and region mask inside the fused operator, what is around them beside the matrix
    products."""

    def forward(
        self, hidden_states: Tensor, input_dimensions: tuple[int, int], always_partition: bool = False, **kwargs
    ):
        attention = self.attention
        # Dropout draws and hooks see windows there, not maps.
        plain = _is_fusible(attention) and not has_hooks(attention) and is_idle(self.dropout)
        if not plain or min(input_dimensions) < self.window_size:
            return super().forward(hidden_states, input_dimensions, always_partition, **kwargs)
        if not always_partition:
            self.set_shift_and_window_size(input_dimensions)
        x = self._add_attention(hidden_states.unflatten(1, input_dimensions)).flatten(1, 2)
        return add_mlp(x, self.layernorm_after, self.mlp, _plain_layers(self.mlp, x), None), None

    def _add_attention(self, x: Tensor) -> Tensor:
        """The first half of the layer, on a map (B, H, W, C)."""
        attention, window = self.attention, self.window_size
        height, width = x.shape[1:3]
        padding = (0, 0, 0, -width % window, 0, -height % window)
        if x.is_cpu and not any(padding):

            def attend(qkv: Tensor) -> Tensor:
                qkv = qkv.unflatten(-1, (3, -1, attention.head_dim))
                bias, options = self._attention_arguments()
                return functional.window_attention_qkvpacked(qkv, bias, **options).flatten(3)

            layers = _packed_layers(attention, x)
            output = add_attention(x, self.layernorm_before, layers, attend, self.drop_path)
            if output is not None:
                return output
        # As transformers does it: padded with zeros, which then are keys as well.
        normal = self.layernorm_before(x.flatten(1, 2)).view(x.shape)
        projected = _projected(attention, F.pad(normal, padding))
        bias, options = self._attention_arguments()
        output = functional.window_attention(*projected, bias, **options)
        output = apply_linear(attention.o_proj, output.flatten(3))[:, :height, :width]
        return x + self.drop_path(output.flatten(1, 2)).view(x.shape)

    def _attention_arguments(self) -> tuple[Tensor, dict]:
        bias = self.attention.relative_position_bias().squeeze(0)
        return bias, {"window_size": self.window_size, "shift": self.shift_size, "scale": self.attention.scaling}


class FusedSwinPatchMerging(SwinPatchMerging):
    """Swin's patch merging with its normalisation beside the matrix product."""

    def forward(self, input_feature: Tensor, input_dimensions: tuple[int, int]) -> Tensor:
        if has_hooks(self.norm) or has_hooks(self.reduction):  # which see sequences, not maps
            return super().forward(input_feature, input_dimensions)
        return merge_patches(input_feature.unflatten(1, input_dimensions), self.norm, self.reduction).flatten(1, 2)


class FusedViTMLP(ViTMLP):
    """ViT's MLP on `vitfast.functional.mlp`."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return _mlp(self, hidden_states) if _is_fusible_mlp(self, hidden_states) else super().forward(hidden_states)


class FusedDeiTMLP(DeiTMLP):
    """DeiT's MLP on `vitfast.functional.mlp`."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return _mlp(self, hidden_states) if _is_fusible_mlp(self, hidden_states) else super().forward(hidden_states)


class FusedSwinMLP(SwinMLP):
    """Swin's MLP on `vitfast.functional.mlp`."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return _mlp(self, hidden_states) if _is_fusible_mlp(self, hidden_states) else super().forward(hidden_states)


def _is_fusible_mlp(mlp: nn.Module, x: Tensor) -> bool:
    return x.is_cpu and is_plain_linear(mlp.fc1) and is_plain_linear(mlp.fc2) and _is_gelu(mlp.activation_fn)


def _plain_layers(mlp: nn.Module, x: Tensor) -> tuple[nn.Linear, nn.Linear] | None:
    """The linear layers of an MLP that is nothing but these and a GELU now."""
    plain = type(mlp) in (FusedViTMLP, FusedDeiTMLP, FusedSwinMLP) and _is_fusible_mlp(mlp, x)
    return (mlp.fc1, mlp.fc2) if plain else None


def _is_gelu(activation: nn.Module) -> bool:
    own = type(activation) is GELUActivation and activation.act is F.gelu and not has_hooks(activation)
    return own or is_exact_gelu(activation)


def _mlp(mlp: nn.Module, x: Tensor) -> Tensor:
    return fused_mlp(x, mlp.fc1, mlp.fc2)


def _has_other_attention(layer: nn.Module) -> str | None:
    kind = type(layer.attention)
    return None if kind is SwinAttention else f"its attention is a {kind.__qualname__}, not SwinAttention"


def _has_other_activation(mlp: nn.Module) -> str | None:
    kind = type(mlp.activation_fn).__qualname__
    return None if _is_gelu(mlp.activation_fn) else f"its activation is {kind}, not the exact GELU"


STOCHASTIC_DEPTHS.add(SwinDropPath)
ADAPTATIONS = {
    ViTLayer: Adaptation(FusedViTLayer),
    DeiTLayer: Adaptation(FusedDeiTLayer),
    SwinPatchMerging: Adaptation(FusedSwinPatchMerging),
    ViTAttention: Adaptation(FusedViTAttention),
    ViTMLP: Adaptation(FusedViTMLP, _has_other_activation),
    DeiTAttention: Adaptation(FusedDeiTAttention),
    DeiTMLP: Adaptation(FusedDeiTMLP, _has_other_activation),
    SwinLayer: Adaptation(FusedSwinLayer, _has_other_attention, parts=("attention",)),
    SwinMLP: Adaptation(FusedSwinMLP, _has_other_activation),
}
