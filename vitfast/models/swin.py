"""Swin: a transformer whose attention sees windows, shifted in every second block, on maps that shrink by stages.

Source: Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", ICCV 2021. State-dict
keys are those of timm 1.x, whose stages begin with the patch merging.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import islice

import torch.nn.functional as F
from torch import Tensor, nn

from vitfast.models._transformer import fit_loaded, initialize, make_head, stochastic_depth
from vitfast.models.registry import register
from vitfast.nn import DropPath, Mlp, PatchEmbed, WindowAttention
from vitfast.nn._branches import add_attention, add_mlp, merge_patches, plain_affine
from vitfast.nn._checks import is_integer, non_negative_integer, positive_integer
from vitfast.nn._fusion import drops_weights, has_hooks, is_idle
from vitfast.nn._windows import as_pair
from vitfast.nn.transformer import plain_layers
from vitfast.nn.window_attention import resize_bias_table


class SwinBlock(nn.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x)), on maps (B, H, W, dim).

    Maps that are no multiple of the window are padded with zeros after the normalisation, below and to the right, as in
    the authors' detection code. The padding takes part in the attention, as it did in what they trained.

    Args:
        dim: channels.
        num_heads: attention heads.
        window_size: (rows, columns) of the windows.
        shifted: whether the windows are shifted by half their size, in directions in which there is more than one.
        mlp_ratio: channels inside the MLP, as a multiple of ``dim``.
        qkv_bias, attn_drop: of `vitfast.nn.WindowAttention`.
        proj_drop: dropout probability of the attention's output and after each layer of the MLP.
        drop_path: probability that stochastic depth drops a branch.
        norm_layer: makes the normalisations from a number of channels.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: tuple[int, int],
        *,
        shifted: bool,
        mlp_ratio: float,
        qkv_bias: bool,
        proj_drop: float,
        attn_drop: float,
        drop_path: float,
        norm_layer: partial[nn.LayerNorm],
    ):
        super().__init__()
        self.shifted = shifted
        self.norm1 = norm_layer(dim)
        self.attn = WindowAttention(
            dim,
            num_heads,
            window_size=window_size,
            qkv_bias=qkv_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
        )
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop)
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self._add_attention(x)
        return add_mlp(x, self.norm2, self.mlp, plain_layers(self.mlp, x), self.drop_path2)

    def _add_attention(self, x: Tensor) -> Tensor:
        attention, size, window = self.attn, x.shape[1:3], self.attn.window_size
        missing = [-s % w for s, w in zip(size, window, strict=True)]
        shift = tuple(w // 2 if self.shifted and s > w else 0 for s, w in zip(size, window, strict=True))
        if x.is_cpu and not any(missing) and type(attention) is WindowAttention and not has_hooks(attention):
            idle = not drops_weights(attention) and is_idle(attention.proj_drop)
            layers = plain_affine(attention.qkv, attention.proj) if idle else None
            output = add_attention(x, self.norm1, layers, partial(attention.attend, shift=shift), self.drop_path1)
            if output is not None:
                return output
        normal = self.norm1(x)
        if any(missing):
            normal = F.pad(normal, (0, 0, 0, missing[1], 0, missing[0]))
        return x + self.drop_path1(attention(normal, shift_size=shift)[:, : size[0], : size[1]])


class PatchMerging(nn.Module):
    """Halves a map: the channels of 2 x 2 tokens, normalised, go through a linear layer.

    (B, H, W, dim) -> (B, ceil(H / 2), ceil(W / 2), out_dim); odd maps are padded with zeros.
    """

    def __init__(self, dim: int, out_dim: int, norm_layer: partial[nn.LayerNorm]):
        super().__init__()
        self.norm = norm_layer(4 * dim)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return merge_patches(x, self.norm, self.reduction)


class SwinStage(nn.Module):
    """Patch merging, except in the first stage, and blocks, of which every second one shifts its windows."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[SwinBlock]):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class SwinHead(nn.Module):
    """Mean over the map, dropout and the classifier ``fc``: (B, H, W, in_features) -> (B, num_classes)."""

    def __init__(self, in_features: int, num_classes: int, drop: float):
        super().__init__()
        self.drop = nn.Dropout(drop)
        self.fc = make_head(in_features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(x.mean((1, 2))))


class SwinTransformer(nn.Module):
    """A Swin Transformer: (B, in_channels, H, W) -> (B, num_classes), for images of any size.

    Images are padded with zeros to whole patches, and maps to whole windows, see `SwinBlock`. A checkpoint with other
    windows loads: its bias tables are interpolated.

    Args:
        embed_dim: channels of the first stage; each stage doubles them.
        depths: blocks in each stage.
        num_heads: attention heads in each stage.
        image_size: pixels of the images the windows are made for, one integer or (rows, columns): no window is larger
            than the map of its stage. Images of other sizes are welcome.
        patch_size: pixels of a patch, one integer or (rows, columns).
        window_size: tokens of a window, one integer or (rows, columns).
        in_channels: channels of the images.
        num_classes: outputs of the classifier; 0 for a model that returns the pooled features.
        mlp_ratio: channels inside the MLPs, as a multiple of those of the stage.
        qkv_bias: whether the linear layers of query, key and value have biases.
        drop: dropout probability before the classifier.
        proj_drop: dropout probability after attention and after each layer of the MLPs.
        attn_drop: dropout probability of the attention weights.
        drop_path: probability that stochastic depth drops the last block; it grows linearly from 0 in the first.
        norm_eps: epsilon of the normalisations.

    >>> model = create_model("swin_t", num_classes=10, image_size=32, patch_size=2, window_size=4)
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        image_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 4,
        window_size: int | tuple[int, int] = 7,
        in_channels: int = 3,
        num_classes: int = 1000,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop: float = 0.0,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.1,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        depths = _counts("depths", depths)
        num_heads = _counts("num_heads", num_heads)
        if len(depths) != len(num_heads):
            raise ValueError(f"depths and num_heads must have one entry per stage each; got {depths} and {num_heads}")
        embed_dim = positive_integer("embed_dim", embed_dim)
        norm_layer = partial(nn.LayerNorm, eps=norm_eps)
        self.num_classes = non_negative_integer("num_classes", num_classes)
        self.patch_embed = PatchEmbed(patch_size, in_channels, embed_dim, norm_layer)
        windows = as_pair("window_size", window_size)
        size = as_pair("image_size", image_size)
        size = [math.ceil(s / p) for s, p in zip(size, self.patch_embed.patch_size, strict=True)]
        rates = iter(stochastic_depth(drop_path, sum(depths)))
        stages = []
        for i, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            dim = embed_dim * 2**i
            downsample = nn.Identity()
            if i > 0:
                downsample = PatchMerging(dim // 2, dim, norm_layer)
                size = [math.ceil(s / 2) for s in size]
            block = partial(
                SwinBlock,
                dim,
                heads,
                tuple(map(min, windows, size)),
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                proj_drop=proj_drop,
                attn_drop=attn_drop,
                norm_layer=norm_layer,
            )
            blocks = [block(shifted=j % 2 == 1, drop_path=rate) for j, rate in enumerate(islice(rates, depth))]
            stages.append(SwinStage(downsample, blocks))
        self.layers = nn.Sequential(*stages)
        self.norm = norm_layer(dim)
        self.head = SwinHead(dim, self.num_classes, drop)
        initialize(self)
        self.register_load_state_dict_pre_hook(fit_loaded)

    def fit_state_dict(self, state: dict[str, Tensor], prefix: str = "") -> None:
        """Interpolates the bias tables of a checkpoint, in place, to the windows of this model.

        A table does not say of which window it is: it counts as that of a square one, as in all published checkpoints.
        One that cannot be that stays as it is. ``load_state_dict`` calls this.

        Args:
            state: the state dict.
            prefix: of the keys of this model.
        """
        for name, module in self.named_modules():
            key = f"{prefix}{name}.relative_position_bias_table"
            if not isinstance(module, WindowAttention) or key not in state:
                continue
            table = state[key]
            side = math.isqrt(table.shape[0])
            if table.shape != module.relative_position_bias_table.shape and side % 2 and side * side == table.shape[0]:
                window = (side // 2 + 1, side // 2 + 1)
                state[key] = resize_bias_table(table, window, module.window_size)

    def forward_features(self, x: Tensor) -> Tensor:
        """The normalised map after the last stage, (B, H', W', C)."""
        return self.norm(self.layers(self.patch_embed(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))


def _counts(name: str, values: Sequence[int]) -> tuple[int, ...]:
    """One positive integer per stage."""
    if not isinstance(values, Sequence) or not all(is_integer(value) for value in values):
        raise TypeError(f"{name} must be integers, one per stage; got {values!r}")
    if not values or min(values) < 1:
        raise ValueError(f"{name} must be integers of at least 1, one per stage; got {values}")
    return tuple(values)


for _name, _embed_dim, _depths, _num_heads, _weights in (
    ("t", 96, (2, 2, 6, 2), (3, 6, 12, 24), "timm/swin_tiny_patch4_window7_224.ms_in1k"),
    ("s", 96, (2, 2, 18, 2), (3, 6, 12, 24), "timm/swin_small_patch4_window7_224.ms_in1k"),
    ("b", 128, (2, 2, 18, 2), (4, 8, 16, 32), "timm/swin_base_patch4_window7_224.ms_in1k"),
    ("l", 192, (2, 2, 18, 2), (6, 12, 24, 48), "timm/swin_large_patch4_window7_224.ms_in22k_ft_in1k"),
):
    register(
        f"swin_{_name}",
        SwinTransformer,
        weights=_weights,
        embed_dim=_embed_dim,
        depths=_depths,
        num_heads=_num_heads,
    )
