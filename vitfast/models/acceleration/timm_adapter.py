"""timm 1.x: attention of the ViT family, the blocks of Swin, the MLPs of both; blur pooling, and blocks of ResNet."""

from __future__ import annotations

from functools import partial
from inspect import signature

from timm.layers import GELU, Attention, BatchNormAct2d, BlurPool2d, ConvNormAct, DropPath, LayerNorm, Mlp
from timm.models.resnet import BasicBlock, Bottleneck
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock, WindowAttention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vitfast import functional
from vitfast.models.acceleration import Adaptation
from vitfast.models.acceleration.blurs import (
    BLURS,
    FusedBlur,
    blur_after_norm,
    blur_after_norm_act,
    may_fuse,
    may_fuse_activation,
    takes,
)
from vitfast.nn._branches import LAYER_NORMS, STOCHASTIC_DEPTHS, add_attention, add_mlp, merge_patches, plain_affine
from vitfast.nn._fusion import (
    apply_linear,
    drops_weights,
    fused_mlp,
    has_hooks,
    is_absent,
    is_idle,
    is_plain_attention,
    is_plain_linear,
)


class FusedAttention(Attention):
    """`timm.layers.Attention` on `vitfast.functional.attention`."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        masked_by_booleans = attn_mask is not None and not attn_mask.is_floating_point()
        if is_causal or masked_by_booleans or drops_weights(self):
            return super().forward(x, attn_mask, is_causal)
        if is_absent(self.q_norm) and is_absent(self.k_norm):
            output = self.attend(apply_linear(self.qkv, x), attn_mask)
        else:
            qkv = apply_linear(self.qkv, x).unflatten(-1, (3, self.num_heads, self.head_dim))
            query, key, value = (t.transpose(1, 2) for t in qkv.unbind(2))
            query, key = self.q_norm(query), self.k_norm(key)
            output = functional.attention(query, key, value, attn_mask, scale=self.scale).transpose(1, 2).flatten(2)
        output = self.norm(output)
        if self.gate is not None:
            output = output * self.gate(x).sigmoid()
        return self.proj_drop(apply_linear(self.proj, output))

    def attend(self, qkv: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """From packed projections (B, N, 3 C) to the heads' results (B, N, C)."""
        qkv = qkv.unflatten(-1, (3, self.num_heads, self.head_dim))
        return functional.attention_qkvpacked(qkv, attn_mask, scale=self.scale).flatten(2)


class FusedBlock(Block):
    """timm's ViT block with its normalisations, stochastic depth and additions beside the matrix products."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if not (is_absent(self.ls1) and is_absent(self.ls2)):
            return super().forward(x, attn_mask, is_causal)
        x = self._add_attention(x, attn_mask, is_causal)
        return add_mlp(x, self.norm2, self.mlp, _plain_layers(self.mlp, x), self.drop_path2)

    def _add_attention(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        attention = self.attn
        known = x.is_cpu and type(attention) is FusedAttention and attn_mask is None and not is_causal
        if known and is_plain_attention(attention):
            layers = plain_affine(attention.qkv, attention.proj)
            output = add_attention(x, self.norm1, layers, attention.attend, self.drop_path1)
            if output is not None:
                return output
        return x + self.drop_path1(attention(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal))


class FusedSwinTransformerBlock(SwinTransformerBlock):
    """timm's Swin block: its windows, shift and region mask inside the fused operator, what is around them beside the
    matrix products."""

    def forward(self, x: Tensor) -> Tensor:
        x = self._add_attention(x)
        tokens = x.flatten(1, 2)  # what hooks on the MLP see in timm
        return add_mlp(tokens, self.norm2, self.mlp, _plain_layers(self.mlp, x), self.drop_path2).view(x.shape)

    def _add_attention(self, x: Tensor) -> Tensor:
        if x.is_cpu and self._is_served(x):
            layers = plain_affine(self.attn.qkv, self.attn.proj)
            output = add_attention(x, self.norm1, layers, self._attend, self.drop_path1)
            if output is not None:
                return output
        return x + self.drop_path1(self._attn(self.norm1(x)))

    def _attn(self, x: Tensor) -> Tensor:
        if not self._is_served(x):
            return super()._attn(x)
        return apply_linear(self.attn.proj, self._attend(apply_linear(self.attn.qkv, x)))

    def _is_served(self, x: Tensor) -> bool:
        padded = any(size % window for size, window in zip(x.shape[1:3], self.window_size, strict=True))
        drops = drops_weights(self.attn) or not is_idle(self.attn.proj_drop)  # for windows, not maps
        return not (padded or drops or has_hooks(self.attn))

    def _attend(self, qkv: Tensor) -> Tensor:
        """From packed projections (B, H, W, 3 C) to the heads' results (B, H, W, C)."""
        attention = self.attn
        return functional.window_attention_qkvpacked(
            qkv.unflatten(-1, (3, attention.num_heads, -1)),
            attention._get_rel_pos_bias().squeeze(0),
            window_size=self.window_size,
            shift=self.shift_size,
            scale=attention.scale,
        ).flatten(3)


class FusedPatchMerging(PatchMerging):
    """timm's patch merging with its normalisation beside the matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        return merge_patches(x, self.norm, self.reduction)


class FusedMlp(Mlp):
    """`timm.layers.Mlp` on `vitfast.functional.mlp`."""

    def forward(self, x: Tensor) -> Tensor:
        if _is_fusible_mlp(self, x):
            return self.drop2(fused_mlp(x, self.fc1, self.fc2))
        return super().forward(x)


class FusedBlurPool2d(BlurPool2d, FusedBlur):
    """`timm.layers.BlurPool2d` on `vitfast.functional.blur_pool2d`."""

    def blur_options(self) -> dict:
        return {
            "kernel": self.filt[0, 0],
            "stride": self.stride,
            "padding": tuple(self.padding),
            "padding_mode": "zeros" if self.pad_mode == "constant" else self.pad_mode,
        }

    def forward(self, x: Tensor) -> Tensor:
        return functional.blur_pool2d(x, **self.blur_options()) if takes(x) else super().forward(x)


class FusedConvNormAct(ConvNormAct):
    """timm's convolution with normalisation and ReLU, which are one pass with the blur in evaluation mode."""

    def forward(self, x: Tensor) -> Tensor:
        return blur_after_norm_act(self.bn, self.bn.act, self.aa, self.conv(x))


class FusedBasicBlock(BasicBlock):
    """timm's ResNet block, in which normalisation, ReLU and blur are one pass in evaluation mode."""

    def forward(self, x: Tensor) -> Tensor:
        if not _keeps_everything(self.drop_block):
            return super().forward(x)
        inner = blur_after_norm(self.bn1, self.act1, self.aa, self.conv1(x))
        return _joined(self, x, self.bn2(self.conv2(inner)), self.act2)


class FusedBottleneck(Bottleneck):
    """timm's ResNet bottleneck, in which normalisation, ReLU and blur are one pass in evaluation mode."""

    def forward(self, x: Tensor) -> Tensor:
        if not _keeps_everything(self.drop_block):
            return super().forward(x)
        inner = self.act1(self.bn1(self.conv1(x)))
        inner = blur_after_norm(self.bn2, self.act2, self.aa, self.conv2(inner))
        return _joined(self, x, self.bn3(self.conv3(inner)), self.act3)


def _keeps_everything(drop_block: nn.Module) -> bool:
    return type(drop_block) is nn.Identity and not has_hooks(drop_block)


def _joined(block: BasicBlock | Bottleneck, x: Tensor, inner: Tensor, activation: nn.Module) -> Tensor:
    """The end of a residual block: what was computed inside of it and what went around."""
    if block.se is not None:
        inner = block.se(inner)
    if block.drop_path is not None:
        inner = block.drop_path(inner)
    return activation(inner + (x if block.downsample is None else block.downsample(x)))


_ATTENTION_PARTS = ("qkv", "q_norm", "k_norm", "norm", "gate", "proj", "proj_drop", "fused_attn", "head_dim")
_BLOCK_PARTS = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")
_MLP_PARTS = ("fc1", "act", "drop1", "norm", "fc2", "drop2")


def _lacks(parts: tuple[str, ...], module: nn.Module) -> str | None:
    missing = [part for part in parts if not hasattr(module, part)]
    return f"this version of timm has it without {', '.join(missing)}" if missing else None


def _is_other_block(block: Block) -> str | None:
    """Blocks pass ``is_causal`` on to any attention that they may have."""
    if "is_causal" not in signature(Block.forward).parameters:
        return "this version of timm has it without is_causal"
    return _lacks(_BLOCK_PARTS, block)


def _is_gelu(activation: nn.Module, whatever_looks: bool = False) -> bool:
    """Whether an activation is the exact GELU, PyTorch's or timm's, and nobody looks at it or that does not matter."""
    exact = type(activation) is GELU or (type(activation) is nn.GELU and activation.approximate == "none")
    return exact and (whatever_looks or not has_hooks(activation))


def _is_fusible_mlp(mlp: Mlp, x: Tensor) -> bool:
    linear = x.is_cpu and is_plain_linear(mlp.fc1) and is_plain_linear(mlp.fc2) and is_absent(mlp.norm)
    return linear and _is_gelu(mlp.act) and is_idle(mlp.drop1)


def _plain_layers(mlp: nn.Module, x: Tensor) -> tuple[nn.Linear, nn.Linear] | None:
    """The linear layers of an MLP that is nothing but these and a GELU now."""
    plain = type(mlp) is FusedMlp and _is_fusible_mlp(mlp, x) and is_idle(mlp.drop2)
    return (mlp.fc1, mlp.fc2) if plain else None


def _has_other_layers(mlp: Mlp) -> str | None:
    if lacking := _lacks(_MLP_PARTS, mlp):
        return lacking
    if not _is_gelu(mlp.act, whatever_looks=True):
        return f"its activation is {mlp.act}, not the exact GELU"
    kinds = {type(mlp.fc1), type(mlp.fc2)}
    return None if kinds == {nn.Linear} else f"its layers are {' and '.join(sorted(k.__name__ for k in kinds))}"


def _is_no_single_blur(blur: BlurPool2d) -> str | None:
    if blur.filt_size > 7:
        return f"its filter has {blur.filt_size} taps, more than 7"
    if blur.filt.is_meta:
        return "its filter has no values yet, it is on the meta device"
    return None if (blur.filt == blur.filt[:1]).all() else "its filter is not the same for all channels"


def _has_norm_act_and_blur(layer: ConvNormAct) -> bool:
    norm, kept = layer.bn, nn.Identity
    return type(norm) is BatchNormAct2d and type(norm.drop) is kept and may_fuse_activation(norm.act, layer.aa)


def _has_other_attention(block: nn.Module) -> str | None:
    kind = type(block.attn)
    return None if kind is WindowAttention else f"its attention is a {kind.__qualname__}, not timm's WindowAttention"


BLURS.add(BlurPool2d)
LAYER_NORMS.add(LayerNorm)
STOCHASTIC_DEPTHS.add(DropPath)
ADAPTATIONS = {
    Attention: Adaptation(FusedAttention, partial(_lacks, _ATTENTION_PARTS)),
    Block: Adaptation(FusedBlock, _is_other_block),
    PatchMerging: Adaptation(FusedPatchMerging),
    Mlp: Adaptation(FusedMlp, _has_other_layers),
    BlurPool2d: Adaptation(FusedBlurPool2d, _is_no_single_blur),
    ConvNormAct: Adaptation(FusedConvNormAct, applies=_has_norm_act_and_blur),
    BasicBlock: Adaptation(FusedBasicBlock, applies=lambda block: may_fuse(block.bn1, block.act1, block.aa)),
    Bottleneck: Adaptation(FusedBottleneck, applies=lambda block: may_fuse(block.bn2, block.act2, block.aa)),
    SwinTransformerBlock: Adaptation(FusedSwinTransformerBlock, _has_other_attention, parts=("attn",)),
}
