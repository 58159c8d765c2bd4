"""ViT: a transformer on the patches of an image.

Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021; the sizes Ti and S: Touvron et al., "Training
data-efficient image transformers", ICML 2021. State-dict keys are those of timm's VisionTransformer.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitfast.models._transformer import fit_loaded, initialize, make_head, stochastic_depth
from vitfast.models.registry import register
from vitfast.nn import PatchEmbed, TransformerBlock
from vitfast.nn._checks import non_negative_integer, positive_integer
from vitfast.nn._windows import as_pair

_POOLS = ("token", "avg")


class VisionTransformer(nn.Module):
    """A Vision Transformer: (B, in_channels, H, W) -> (B, num_classes).

    A checkpoint of another image size loads: its position embedding is interpolated, see `set_image_size`.

    Args:
        embed_dim: channels of the tokens.
        depth: number of blocks.
        num_heads: attention heads.
        image_size: pixels of the images, one integer or (rows, columns), multiples of the patch.
        patch_size: pixels of a patch, one integer or (rows, columns).
        in_channels: channels of the images.
        num_classes: outputs of the classifier; 0 for a model that returns the pooled features (B, embed_dim).
        class_token: whether a learned token goes in front of the patches.
        global_pool: what the classifier sees: "token", the class token, or "avg", the mean over the patches. With the
            latter, the last normalisation comes after it, as ``fc_norm``.
        mlp_ratio: channels inside the MLPs, as a multiple of ``embed_dim``.
        qkv_bias: whether the linear layers of query, key and value have biases.
        qk_norm: whether query and key are normalised.
        init_values: what layer scale starts with; None for no layer scale.
        drop: dropout probability before the classifier.
        pos_drop: dropout probability after the position embedding.
        proj_drop: dropout probability after attention and after each layer of the MLPs.
        attn_drop: dropout probability of the attention weights.
        drop_path: probability that stochastic depth drops the last block; it grows linearly from 0 in the first.
        norm_eps: epsilon of the normalisations.

    >>> model = create_model("vit_s", num_classes=100, image_size=(192, 256))
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
        image_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_channels: int = 3,
        num_classes: int = 1000,
        class_token: bool = True,
        global_pool: str = "token",
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        init_values: float | None = None,
        drop: float = 0.0,
        pos_drop: float = 0.0,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        if global_pool not in _POOLS:
            raise ValueError(f"global_pool must be one of {', '.join(map(repr, _POOLS))}; got {global_pool!r}")
        if global_pool == "token" and not class_token:
            raise ValueError('global_pool "token" needs a class token; without one choose global_pool="avg"')
        norm_layer = partial(nn.LayerNorm, eps=norm_eps)
        depth = positive_integer("depth", depth)
        self.num_classes = non_negative_integer("num_classes", num_classes)
        self.global_pool = global_pool
        self.patch_embed = PatchEmbed(patch_size, in_channels, embed_dim)
        self.image_size, self.grid_size = self._check_image_size(image_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim)) if class_token else None
        self.num_prefix_tokens = int(class_token)
        tokens = self.num_prefix_tokens + math.prod(self.grid_size)
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, embed_dim))
        self.pos_drop = nn.Dropout(pos_drop)
        self.blocks = nn.Sequential(
            *(
                TransformerBlock(
                    embed_dim,
                    num_heads,
                    mlp_ratio,
                    qkv_bias=qkv_bias,
                    qk_norm=qk_norm,
                    proj_drop=proj_drop,
                    attn_drop=attn_drop,
                    init_values=init_values,
                    drop_path=rate,
                    norm_layer=norm_layer,
                )
                for rate in stochastic_depth(drop_path, depth)
            )
        )
        self.norm = norm_layer(embed_dim) if global_pool == "token" else nn.Identity()
        self.fc_norm = norm_layer(embed_dim) if global_pool == "avg" else nn.Identity()
        self.head_drop = nn.Dropout(drop)
        self.head = make_head(embed_dim, self.num_classes)
        initialize(self)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=1e-6)
        self.register_load_state_dict_pre_hook(fit_loaded)

    def _check_image_size(self, image_size: int | tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """The size as a pair, and the patches in each direction."""
        size, patch = as_pair("image_size", image_size), self.patch_embed.patch_size
        if any(s % p for s, p in zip(size, patch, strict=True)):
            raise ValueError(f"image_size must be a multiple of patch_size = {patch}; got {image_size}")
        return size, (size[0] // patch[0], size[1] // patch[1])

    def set_image_size(self, image_size: int | tuple[int, int]) -> None:
        """Prepares the model for images of another size.

        The position embedding is interpolated over the grid of patches, bicubically and antialiased; the class token
        keeps its own.

        Args:
            image_size: the new one, one integer or (rows, columns).

        Raises:
            ValueError: it is no multiple of the patch.
        """
        size, grid = self._check_image_size(image_size)
        if grid != self.grid_size:
            resized = resize_positions(self.pos_embed.detach(), self.num_prefix_tokens, self.grid_size, grid)
            self.pos_embed = nn.Parameter(resized, requires_grad=self.pos_embed.requires_grad)
        self.image_size, self.grid_size = size, grid

    def fit_state_dict(self, state: dict[str, Tensor], prefix: str = "") -> None:
        """Interpolates the position embedding of a checkpoint, in place, to the image size of this model.

        A checkpoint does not say how its patches lay: they count as a square, as in all published ones. One that cannot
        be that stays as it is. ``load_state_dict`` calls this.

        Args:
            state: the state dict.
            prefix: of the keys of this model.
        """
        key = f"{prefix}pos_embed"
        positions = state.get(key)
        if positions is None or positions.dim() != 3 or positions.shape == self.pos_embed.shape:
            return
        side = math.isqrt(max(positions.shape[1] - self.num_prefix_tokens, 0))
        if side > 0 and side * side + self.num_prefix_tokens == positions.shape[1]:
            state[key] = resize_positions(positions, self.num_prefix_tokens, (side, side), self.grid_size)

    def forward_features(self, x: Tensor) -> Tensor:
        """The tokens after the last block, (B, N, embed_dim); normalised unless ``global_pool`` is "avg".

        The class token, if there is one, comes first, then the patches row by row.

        Raises:
            ValueError: the images are not of the size that the model was made for.
        """
        if tuple(x.shape[2:]) != self.image_size:
            raise ValueError(
                f"the position embedding is made for images of {self.image_size} pixels; got the shape "
                f"{tuple(x.shape)}. model.set_image_size(...) interpolates it to another size"
            )
        x = self.patch_embed(x).flatten(1, 2)
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), 1)
        return self.norm(self.blocks(self.pos_drop(x + self.pos_embed)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.forward_features(x)
        pooled = x[:, 0] if self.global_pool == "token" else x[:, self.num_prefix_tokens :].mean(1)
        return self.head(self.head_drop(self.fc_norm(pooled)))


def resize_positions(positions: Tensor, prefix: int, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Interpolates position embeddings from one grid of patches to another.

    Args:
        positions: (1, prefix + old rows * old columns, C).
        prefix: tokens in front of the patches, which keep their embedding.
        old, new: (rows, columns) of the grids.

    Returns:
        (1, prefix + new rows * new columns, C).
    """
    grid = positions[:, prefix:].unflatten(1, old).permute(0, 3, 1, 2)
    if grid.dtype in (torch.float16, torch.bfloat16):
        grid = grid.float()  # not implemented in 16 bit on every device
    grid = F.interpolate(grid, new, mode="bicubic", antialias=True)
    return torch.cat((positions[:, :prefix], grid.permute(0, 2, 3, 1).flatten(1, 2).to(positions.dtype)), 1)


for _name, _embed_dim, _depth, _num_heads, _patch_size, _weights in (
    ("ti", 192, 12, 3, 16, "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"),
    ("s", 384, 12, 6, 16, "timm/vit_small_patch16_224.augreg_in21k_ft_in1k"),
    ("b", 768, 12, 12, 16, "timm/vit_base_patch16_224.augreg2_in21k_ft_in1k"),
    ("l", 1024, 24, 16, 16, "timm/vit_large_patch16_224.augreg_in21k_ft_in1k"),
    ("h", 1280, 32, 16, 14, None),
):
    register(
        f"vit_{_name}",
        VisionTransformer,
        weights=_weights,
        embed_dim=_embed_dim,
        depth=_depth,
        num_heads=_num_heads,
        patch_size=_patch_size,
    )
