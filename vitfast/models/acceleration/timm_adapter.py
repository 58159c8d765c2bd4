"""timm 1.x: attention of the ViT family, and the blocks of Swin."""

from __future__ import annotations

from timm.layers import Attention
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
from torch import Tensor, nn

from vitfast import functional
from vitfast.models.acceleration import Adaptation
from vitfast.models.acceleration._conditions import has_hooks, is_idle


class FusedAttention(Attention):
    """`timm.layers.Attention` on `vitfast.functional.attention`."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        masked_by_booleans = attn_mask is not None and not attn_mask.is_floating_point()
        if is_causal or masked_by_booleans or not is_idle(self.attn_drop):
            return super().forward(x, attn_mask, is_causal)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        if isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity):
            output = functional.attention_qkvpacked(qkv, attn_mask, scale=self.scale)
        else:
            query, key, value = (t.transpose(1, 2) for t in qkv.unbind(2))
            query, key = self.q_norm(query), self.k_norm(key)
            output = functional.attention(query, key, value, attn_mask, scale=self.scale).transpose(1, 2)
        output = self.norm(output.flatten(2))
        if self.gate is not None:
            output = output * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(output))


class FusedSwinTransformerBlock(SwinTransformerBlock):
    """timm's Swin block with its windows, shift and region mask inside the fused operator."""

    def _attn(self, x: Tensor) -> Tensor:
        attention = self.attn
        padded = any(size % window for size, window in zip(x.shape[1:3], self.window_size, strict=True))
        if padded or has_hooks(attention) or not is_idle(attention.attn_drop):
            return super()._attn(x)
        output = functional.window_attention_qkvpacked(
            attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)),
            attention._get_rel_pos_bias().squeeze(0),
            window_size=self.window_size,
            shift=self.shift_size,
            scale=attention.scale,
        )
        return attention.proj_drop(attention.proj(output.flatten(3)))


def _lacks_parts(attention: nn.Module) -> str | None:
    parts = ("qkv", "q_norm", "k_norm", "norm", "gate", "proj", "proj_drop", "fused_attn", "head_dim")
    missing = [part for part in parts if not hasattr(attention, part)]
    return f"this version of timm has it without {', '.join(missing)}" if missing else None


def _has_other_attention(block: nn.Module) -> str | None:
    kind = type(block.attn)
    return None if kind is WindowAttention else f"its attention is a {kind.__qualname__}, not timm's WindowAttention"


ADAPTATIONS = {
    Attention: Adaptation(FusedAttention, _lacks_parts),
    SwinTransformerBlock: Adaptation(FusedSwinTransformerBlock, _has_other_attention),
}
