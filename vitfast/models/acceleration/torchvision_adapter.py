"""torchvision: the attention of Swin, the encoder blocks of VisionTransformer, and the MLPs of both."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.swin_transformer import ShiftedWindowAttention
from torchvision.models.vision_transformer import EncoderBlock, MLPBlock
from torchvision.ops import MLP

from vitfast import functional
from vitfast.models.acceleration import Adaptation
from vitfast.nn._fusion import fused_mlp, has_hooks, is_exact_gelu, is_idle, is_plain_linear
from vitfast.ops.linear import linear


class FusedShiftedWindowAttention(ShiftedWindowAttention):
    """torchvision's Swin attention with its windows, shift and region mask inside the fused operator."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.attention_dropout > 0:
            return super().forward(x)
        height, width = x.shape[1:3]
        rows, columns = self.window_size
        # As torchvision does it: padded with zeros, which then are keys as well.
        x = F.pad(x, (0, 0, 0, -width % columns, 0, -height % rows))
        shift = tuple(
            0 if window >= size else shift
            for shift, window, size in zip(self.shift_size, self.window_size, x.shape[1:3], strict=True)
        )
        qkv = linear(x, self.qkv.weight, self.qkv.bias).unflatten(-1, (3, self.num_heads, -1))
        bias = self.get_relative_position_bias().squeeze(0)
        output = functional.window_attention_qkvpacked(qkv, bias, window_size=(rows, columns), shift=shift)
        output = linear(output.flatten(3), self.proj.weight, self.proj.bias)
        output = F.dropout(output, p=self.dropout, training=self.training)
        return output[:, :height, :width].contiguous()


class FusedEncoderBlock(EncoderBlock):
    """torchvision's ViT block with its `torch.nn.MultiheadAttention` computed by the fused operator."""

    def forward(self, input: Tensor) -> Tensor:
        attention = self.self_attention
        if (attention.training and attention.dropout > 0) or has_hooks(attention):
            return super().forward(input)
        torch._assert(input.dim() == 3, f"Expected (batch_size, seq_length, hidden_dim) got {input.shape}")
        qkv = linear(self.ln_1(input), attention.in_proj_weight, attention.in_proj_bias)
        output = functional.attention_qkvpacked(qkv.unflatten(-1, (3, attention.num_heads, -1)))
        output = linear(output.flatten(2), attention.out_proj.weight, attention.out_proj.bias)
        x = self.dropout(output) + input
        return x + self.mlp(self.ln_2(x))


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


def _no_obstacle(_: nn.Module) -> None:
    return None


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


ADAPTATIONS = {
    ShiftedWindowAttention: Adaptation(FusedShiftedWindowAttention, _no_obstacle),
    EncoderBlock: Adaptation(FusedEncoderBlock, _has_other_attention, parts=("self_attention",)),
    MLP: Adaptation(FusedMLP, _has_other_layers),
    MLPBlock: Adaptation(FusedMLPBlock, _has_other_layers),
}
