"""The layers around attention in a transformer for images.

Sources: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021; layer scale: Touvron et al., "Going Deeper with
Image Transformers", ICCV 2021; stochastic depth: Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitfast.nn._branches import STOCHASTIC_DEPTHS, add_attention, add_mlp, plain_affine
from vitfast.nn._checks import positive_integer, probability
from vitfast.nn._fusion import fused_mlp, is_absent, is_exact_gelu, is_idle, is_plain_attention, is_plain_linear
from vitfast.nn._windows import as_pair
from vitfast.nn.attention import Attention

_layer_norm = partial(nn.LayerNorm, eps=1e-6)


class PatchEmbed(nn.Module):
    """Cuts images into patches and maps each to a vector.

    State-dict keys and results are those of ``timm.layers.PatchEmbed`` with ``output_fmt="NHWC"``.

    Args:
        patch_size: pixels of a patch, one integer or (rows, columns).
        in_channels: channels of the images.
        embed_dim: channels of the result.
        norm_layer: makes a normalisation of the result from its number of channels; None for no normalisation.
        bias: whether the linear map has a bias.

    State dict: ``proj.weight`` (embed_dim, in_channels, rows, columns), ``proj.bias``, and what ``norm`` holds.

    >>> PatchEmbed(16, in_channels=3, embed_dim=192)(torch.randn(2, 3, 224, 224)).shape
    torch.Size([2, 14, 14, 192])
    """

    def __init__(
        self,
        patch_size: int | tuple[int, int],
        in_channels: int,
        embed_dim: int,
        norm_layer: Callable[..., nn.Module] | None = None,
        bias: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.patch_size = as_pair("patch_size", patch_size)
        self.in_channels = positive_integer("in_channels", in_channels)
        self.embed_dim = positive_integer("embed_dim", embed_dim)
        self.proj = nn.Conv2d(in_channels, embed_dim, self.patch_size, stride=self.patch_size, bias=bias, **factory)
        self.norm = nn.Identity() if norm_layer is None else norm_layer(embed_dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """The vectors of all patches.

        Args:
            x: images (B, in_channels, H, W). Where H or W is no multiple of the patch, zeros are added below and to the
                right, as Swin's authors do it.

        Returns:
            (B, ceil(H / rows), ceil(W / columns), embed_dim).

        Raises:
            ValueError: the shape does not fit.
        """
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"images must have the shape (B, {self.in_channels}, H, W); got {tuple(x.shape)}")
        rows, columns = self.patch_size
        missing = (-x.shape[3] % columns, -x.shape[2] % rows)
        if any(missing):
            x = F.pad(x, (0, missing[0], 0, missing[1]))
        return self.norm(self.proj(x).permute(0, 2, 3, 1))

    def extra_repr(self) -> str:
        return f"patch_size={self.patch_size}"


class Mlp(nn.Module):
    """Two linear layers with an activation between them, over the last dimension.

    With the exact GELU, without dropout between the layers and as long as nobody hooks on to them, it is the fused
    `vitfast.functional.mlp`.

    Arguments, initialisation, state-dict keys and results are those of ``timm.layers.Mlp``.

    Args:
        in_features: channels of the input.
        hidden_features: channels between the layers; ``in_features`` if None.
        out_features: channels of the output; ``in_features`` if None.
        act_layer: makes the activation.
        bias: whether the linear layers have biases.
        drop: dropout probability after each linear layer.

    State dict: ``fc1.weight``, ``fc1.bias``, ``fc2.weight``, ``fc2.bias``.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        bias: bool = True,
        drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        in_features = positive_integer("in_features", in_features)
        hidden_features = (
            in_features if hidden_features is None else positive_integer("hidden_features", hidden_features)
        )
        out_features = in_features if out_features is None else positive_integer("out_features", out_features)
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias, **factory)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden_features, out_features, bias=bias, **factory)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if self._is_fusible(x):
            return self.drop2(fused_mlp(x, self.fc1, self.fc2))
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))

    def _is_fusible(self, x: Tensor) -> bool:
        linear = x.is_cpu and is_plain_linear(self.fc1) and is_plain_linear(self.fc2)
        return linear and is_exact_gelu(self.act) and is_idle(self.drop1)


def plain_layers(mlp: nn.Module, x: Tensor) -> tuple[nn.Linear, nn.Linear] | None:
    """The linear layers of an `Mlp` that is nothing but these and the exact GELU for x now, and on the CPU."""
    plain = type(mlp) is Mlp and mlp._is_fusible(x) and is_idle(mlp.drop2)
    return (mlp.fc1, mlp.fc2) if plain else None


class LayerScale(nn.Module):
    """x -> gamma * x with a learned factor for each channel.

    Args:
        dim: channels.
        init_values: what all factors start with.

    State dict: ``gamma`` (dim,).
    """

    def __init__(self, dim: int, init_values: float = 1e-5, device=None, dtype=None):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((positive_integer("dim", dim),), init_values, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth: in training, each sample is set to zero with probability p, and the others grow by 1 / (1 - p).

    Args:
        drop_prob: the probability p; 0 <= p < 1.
    """

    def __init__(self, drop_prob: float = 0.0):
        super().__init__()
        self.drop_prob = probability("drop_prob", drop_prob)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, ...) -> (B, ...)."""
        if self.drop_prob == 0 or not self.training:
            return x
        kept = x.new_empty((len(x),) + (1,) * (x.dim() - 1)).bernoulli_(1 - self.drop_prob)
        return x * kept.div_(1 - self.drop_prob)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3g}"


class TransformerBlock(nn.Module):
    """A pre-normalised transformer block: x + attn(norm1(x)), then x + mlp(norm2(x)).

    Arguments, initialisation, state-dict keys and results are those of ``timm.models.vision_transformer.Block``.

    Args:
        dim: channels of input and output.
        num_heads: attention heads.
        mlp_ratio: channels inside the MLP, as a multiple of ``dim``.
        qkv_bias, qk_norm, proj_bias, attn_drop: of `vitfast.nn.Attention`.
        proj_drop: dropout probability of the attention's output and after each layer of the MLP.
        init_values: what layer scale starts with; None for no layer scale.
        drop_path: probability that stochastic depth drops a branch.
        act_layer: makes the activation of the MLP.
        norm_layer: makes the normalisations from a number of channels; by default with the epsilon of ViT, 1e-6.

    State dict: what ``norm1``, ``attn``, ``norm2``, ``mlp`` and, with ``init_values``, ``ls1`` and ``ls2`` hold.

    >>> TransformerBlock(192, num_heads=3)(torch.randn(2, 197, 192)).shape
    torch.Size([2, 197, 192])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        init_values: float | None = None,
        drop_path: float = 0.0,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = _layer_norm,
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.norm1 = norm_layer(dim, **factory)
        self.attn = Attention(
            dim,
            num_heads=num_heads,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            proj_bias=proj_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            norm_layer=norm_layer,
            **factory,
        )
        self.ls1 = nn.Identity() if init_values is None else LayerScale(dim, init_values, **factory)
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = norm_layer(dim, **factory)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, bias=proj_bias, drop=proj_drop, **factory)
        self.ls2 = nn.Identity() if init_values is None else LayerScale(dim, init_values, **factory)
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x (B, N, dim) -> (B, N, dim); the mask and the flag are those of `vitfast.nn.Attention`."""
        x = self._add_attention(x, attn_mask, is_causal)
        if is_absent(self.ls2):
            return add_mlp(x, self.norm2, self.mlp, plain_layers(self.mlp, x), self.drop_path2)
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def _add_attention(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        attention = self.attn
        known = x.is_cpu and type(attention) is Attention and attn_mask is None and not is_causal
        if known and is_absent(self.ls1) and is_plain_attention(attention):
            layers = plain_affine(attention.qkv, attention.proj)
            output = add_attention(x, self.norm1, layers, attention.attend, self.drop_path1)
            if output is not None:
                return output
        return x + self.drop_path1(self.ls1(attention(self.norm1(x), attn_mask, is_causal)))


STOCHASTIC_DEPTHS.add(DropPath)
