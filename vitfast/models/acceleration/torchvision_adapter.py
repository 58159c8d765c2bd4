"""torchvision: the blocks of Swin and of VisionTransformer, their attention and MLPs, and Swin's patch merging."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.swin_transformer import PatchMerging, ShiftedWindowAttention, SwinTransformerBlock
from torchvision.models.vision_transformer import EncoderBlock, MLPBlock
from torchvision.ops import MLP, StochasticDepth

from vitfast import functional
from vitfast.models.acceleration import Adaptation
from vitfast.nn._branches import STOCHASTIC_DEPTHS, add_attention, add_mlp, merge_patches
from vitfast.nn._fusion import fused_mlp, has_hooks, is_exact_gelu, is_idle, is_plain_linear
from vitfast.ops.linear import linear


class FusedShiftedWindowAttention(ShiftedWindowAttention):
    """torchvision's Swin attention with its windows, shift and region mask inside the fused operator."""

    def forward(self, x: Tensor) -> Tensor:
        if self._drops():
            return super().forward(x)
        height, width = x.shape[1:3]
        rows, columns = self.window_size
        # As torchvision does it: padded with zeros, which then are keys as well.
        x = F.pad(x, (0, 0, 0, -width % columns, 0, -height % rows))
        output = self.attend(linear(x, self.qkv.weight, self.qkv.bias))
        output = linear(output, self.proj.weight, self.proj.bias)
        return output[:, :height, :width].contiguous()

    def attend(self, qkv: Tensor) -> Tensor:
        """From packed projections of whole windows, (B, H, W, 3 C), to the heads' results (B, H, W, C)."""
        shift = tuple(
            0 if window >= size else shift
            for shift, window, size in zip(self.shift_size, self.window_size, qkv.shape[1:3], strict=True)
        )
        return functional.window_attention_qkvpacked(
            qkv.unflatten(-1, (3, self.num_heads, -1)),
            self.get_relative_position_bias().squeeze(0),
            window_size=tuple(self.window_size),
            shift=shift,
        ).flatten(3)

    def is_plain(self, x: Tensor) -> bool:
        """Whether it is nothing but two linear layers with attention in windows between them now."""
        padded = any(size % window for size, window in zip(x.shape[1:3], self.window_size, strict=True))
        return x.is_cpu and not self._drops() and not padded and not has_hooks(self)

    def _drops(self) -> bool:
        """Whether dropout draws numbers, for windows and not for maps."""
        return self.training and (self.attention_dropout > 0 or self.dropout > 0)


class FusedSwinTransformerBlock(SwinTransformerBlock):
    """torchvision's Swin block with its normalisations, stochastic depth and additions beside the matrix products."""

    def forward(self, x: Tensor) -> Tensor:
        x = self._add_attention(x)
        return add_mlp(x, self.norm2, self.mlp, _plain_layers(self.mlp, x), self.stochastic_depth)

    def _add_attention(self, x: Tensor) -> Tensor:
        attention = self.attn
        if type(attention) is FusedShiftedWindowAttention and attention.is_plain(x):
            # Its weights are all that torchvision takes of its layers.
            layers = (attention.qkv.weight, attention.qkv.bias), (attention.proj.weight, attention.proj.bias)
            output = add_attention(x, self.norm1, layers, attention.attend, self.stochastic_depth)
            if output is not None:
                return output
        return x + self.stochastic_depth(attention(self.norm1(x)))


class FusedPatchMerging(PatchMerging):
    """torchvision's patch merging with its normalisation beside the matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        return merge_patches(x, self.norm, self.reduction) if x.dim() == 4 else super().forward(x)


class FusedEncoderBlock(EncoderBlock):
    """torchvision's ViT block with its `torch.nn.MultiheadAttention` computed by the fused operator."""

    def forward(self, input: Tensor) -> Tensor:
        attention = self.self_attention
        # Its dropout draws in another order of memory.
        if (attention.training and attention.dropout > 0) or not is_idle(self.dropout) or has_hooks(attention):
            return super().forward(input)
        torch._assert(input.dim() == 3, f"Expected (batch_size, seq_length, hidden_dim) got {input.shape}")
        layers = (
            (attention.in_proj_weight, attention.in_proj_bias),
            (attention.out_proj.weight, attention.out_proj.bias),
        )
        x = add_attention(input, self.ln_1, layers, self._attend, None)
        if x is None:
            x = linear(self._attend(linear(self.ln_1(input), *layers[0])), *layers[1]) + input
        return add_mlp(x, self.ln_2, self.mlp, _plain_layers(self.mlp, x), None)

    def _attend(self, qkv: Tensor) -> Tensor:
        """From packed projections (B, N, 3 C) to the heads' results (B, N, C)."""
        heads = self.self_attention.num_heads
        return functional.attention_qkvpacked(qkv.unflatten(-1, (3, heads, -1))).flatten(2)


class FusedMLP(MLP):
    """torchvision's MLP on `vitfast.functional.mlp`."""

    def forward(self, input: Tensor) -> Tensor:
        return _mlp(self, input) if _is_fusible_mlp(self, input) else super().forward(input)


class FusedMLPBlock(MLPBlock):
    """The MLP of torchvision's VisionTransformer on `vitfast.functional.mlp`."""

    def forward(self, input: Tensor) -> Tensor:
        return _mlp(self, input) if _is_fusible_mlp(self, input) else super().forward(input)


def _is_fusible_mlp(mlp: nn.Sequential, x: Tensor) -> bool:
    """Whether it is linear layer, GELU, dropout, linear layer, dropout, on the CPU."""
    if not x.is_cpu or len(mlp) != 5:
        return False
    fc1, activation, dropout, fc2, _ = mlp
    return is_plain_linear(fc1) and is_plain_linear(fc2) and is_exact_gelu(activation) and is_idle(dropout)


def _mlp(mlp: nn.Sequential, x: Tensor) -> Tensor:
    fc1, _, _, fc2, dropout = mlp
    return dropout(fused_mlp(x, fc1, fc2))


def _plain_layers(mlp: nn.Sequential, x: Tensor) -> tuple[nn.Linear, nn.Linear] | None:
    """The linear layers of an MLP that is nothing but these and a GELU now."""
    plain = type(mlp) in (FusedMLP, FusedMLPBlock) and _is_fusible_mlp(mlp, x) and is_idle(mlp[4])
    return (mlp[0], mlp[3]) if plain else None


def _has_other_attention(block: nn.Module) -> str | None:
    attention = block.self_attention
    if type(attention) is not nn.MultiheadAttention:
        return f"its attention is a {type(attention).__qualname__}, not torch.nn.MultiheadAttention"
    plain = attention._qkv_same_embed_dim and attention.bias_k is None and not attention.add_zero_attn
    return None if plain and attention.batch_first else "its torch.nn.MultiheadAttention has unusual options"


def _has_other_layers(mlp: nn.Sequential) -> str | None:
    kinds = [type(layer).__qualname__ for layer in mlp]
    expected = ["Linear", "GELU", "Dropout", "Linear", "Dropout"]
    return None if kinds == expected else f"its layers are {', '.join(kinds)} instead of {', '.join(expected)}"


STOCHASTIC_DEPTHS.add(StochasticDepth)
ADAPTATIONS = {
    SwinTransformerBlock: Adaptation(FusedSwinTransformerBlock),
    PatchMerging: Adaptation(FusedPatchMerging),
    ShiftedWindowAttention: Adaptation(FusedShiftedWindowAttention),
    EncoderBlock: Adaptation(FusedEncoderBlock, _has_other_attention, parts=("self_attention",)),
    MLP: Adaptation(FusedMLP, _has_other_layers),
    MLPBlock: Adaptation(FusedMLPBlock, _has_other_layers),
}
