"""timm 1.x: attention of the ViT family, the blocks of Swin, and the MLPs of both."""

from __future__ import annotations

from functools import partial

from timm.layers import Attention, Mlp
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
from torch import Tensor, nn

from vitfast import functional
from vitfast.models.acceleration import Adaptation
from vitfast.nn._fusion import apply_linear, fused_mlp, has_hooks, is_exact_gelu, is_idle, is_plain_linear


class FusedAttention(Attention):
    """`timm.layers.Attention` on `vitfast.functional.attention`."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        masked_by_booleans = attn_mask is not None and not attn_mask.is_floating_point()
        if is_causal or masked_by_booleans or not is_idle(self.attn_drop):
            return super().forward(x, attn_mask, is_causal)
        qkv = apply_linear(self.qkv, x).unflatten(-1, (3, self.num_heads, self.head_dim))
        if isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity):
            output = functional.attention_qkvpacked(qkv, attn_mask, scale=self.scale)
        else:
            query, key, value = (t.transpose(1, 2) for t in qkv.unbind(2))
            query, key = self.q_norm(query), self.k_norm(key)
            output = functional.attention(query, key, value, attn_mask, scale=self.scale).transpose(1, 2)
        output = self.norm(output.flatten(2))
        if self.gate is not None:
            output = output * self.gate(x).sigmoid()
        return self.proj_drop(apply_linear(self.proj, output))


class FusedSwinTransformerBlock(SwinTransformerBlock):
    """timm's Swin block with its windows, shift and region mask inside the fused operator."""

    def _attn(self, x: Tensor) -> Tensor:
        attention = self.attn
        padded = any(size % window for size, window in zip(x.shape[1:3], self.window_size, strict=True))
        if padded or has_hooks(attention) or not is_idle(attention.attn_drop):
            return super()._attn(x)
        output = functional.window_attention_qkvpacked(
            apply_linear(attention.qkv, x).unflatten(-1, (3, attention.num_heads, -1)),
            attention._get_rel_pos_bias().squeeze(0),
            window_size=self.window_size,
            shift=self.shift_size,
            scale=attention.scale,
        )
        return attention.proj_drop(apply_linear(attention.proj, output.flatten(3)))


class FusedMlp(Mlp):
    """`timm.layers.Mlp` on `vitfast.functional.mlp`."""

    def forward(self, x: Tensor) -> Tensor:
        linear = is_plain_linear(self.fc1) and is_plain_linear(self.fc2) and isinstance(self.norm, nn.Identity)
        if linear and is_exact_gelu(self.act) and is_idle(self.drop1):
            return self.drop2(fused_mlp(x, self.fc1, self.fc2))
        return super().forward(x)


_ATTENTION_PARTS = ("qkv", "q_norm", "k_norm", "norm", "gate", "proj", "proj_drop", "fused_attn", "head_dim")
_MLP_PARTS = ("fc1", "act", "drop1", "norm", "fc2", "drop2")


def _lacks(parts: tuple[str, ...], module: nn.Module) -> str | None:
    missing = [part for part in parts if not hasattr(module, part)]
    return f"this version of timm has it without {', '.join(missing)}" if missing else None


def _has_other_attention(block: nn.Module) -> str | None:
    kind = type(block.attn)
    return None if kind is WindowAttention else f"its attention is a {kind.__qualname__}, not timm's WindowAttention"


ADAPTATIONS = {
    Attention: Adaptation(FusedAttention, partial(_lacks, _ATTENTION_PARTS)),
    Mlp: Adaptation(FusedMlp, partial(_lacks, _MLP_PARTS)),
    SwinTransformerBlock: Adaptation(FusedSwinTransformerBlock, _has_other_attention, parts=("attn",)),
}
