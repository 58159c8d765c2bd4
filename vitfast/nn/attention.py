r"""Multi-head self-attention over all tokens: the attention of the Vision Transformer.

For each head, :math:`O = \mathrm{softmax}(D^{-1/2} Q K^T + \mathrm{mask})\, V`, with query, key and value from one
linear layer and a linear layer after the heads.

Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021; Vaswani et al., NeurIPS 2017.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vitfast import functional
from vitfast.nn._checks import positive_integer
from vitfast.nn._fusion import apply_linear, is_absent


class Attention(nn.Module):
    """Multi-head self-attention.

    A drop-in replacement for ``timm.layers.Attention``, the one of ``timm.models.vision_transformer`` (timm 1.x):
    arguments, defaults, initialisation, state-dict keys and results are the same.

    A floating-point ``attn_mask`` is part of the fused operator, and may be learned. Attention dropout during training
    and ``is_causal`` need the score matrix and are computed in plain PyTorch.

    Args:
        dim: channels of the input.
        num_heads: attention heads.
        attn_head_dim: channels of a head; ``dim // num_heads`` if None.
        dim_out: channels of the output; ``dim`` if None.
        qkv_bias: whether the linear layer of query, key and value has a bias; that of the gate too.
        qk_norm: whether query and key are normalised, each head by itself.
        scale_norm: whether the merged heads are normalised before the last linear layer.
        proj_bias: whether the last linear layer has a bias.
        gated: whether the merged heads are multiplied by the sigmoid of a linear layer of the input.
        attn_drop: dropout probability of the attention weights.
        proj_drop: dropout probability of the output.
        norm_layer: makes the normalisations, from a number of channels; needed with ``qk_norm`` and ``scale_norm``.

    State dict: ``qkv.weight``, ``qkv.bias``, ``proj.weight``, ``proj.bias``, and what ``q_norm``, ``k_norm``, ``norm``
    and ``gate`` hold.

    >>> attention = Attention(192, num_heads=3, qkv_bias=True)
    >>> attention(torch.randn(2, 197, 192)).shape
    torch.Size([2, 197, 192])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        attn_head_dim: int | None = None,
        dim_out: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        gated: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[..., nn.Module] | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.dim = positive_integer("dim", dim)
        self.num_heads = positive_integer("num_heads", num_heads)
        self.head_dim = self._head_dim(attn_head_dim)
        dim_out = self.dim if dim_out is None else positive_integer("dim_out", dim_out)
        if (qk_norm or scale_norm) and norm_layer is None:
            raise ValueError("qk_norm and scale_norm need a norm_layer, for example torch.nn.LayerNorm; got None")
        self.attn_dim = self.num_heads * self.head_dim
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(self.dim, 3 * self.attn_dim, bias=qkv_bias, **factory)
        self.q_norm = norm_layer(self.head_dim, **factory) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **factory) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.norm = norm_layer(self.attn_dim, **factory) if scale_norm else nn.Identity()
        self.gate = nn.Linear(self.dim, self.attn_dim, bias=qkv_bias, **factory) if gated else None
        self.proj = nn.Linear(self.attn_dim, dim_out, bias=proj_bias, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    def _head_dim(self, attn_head_dim: int | None) -> int:
        if attn_head_dim is not None:
            return positive_integer("attn_head_dim", attn_head_dim)
        if self.dim % self.num_heads:
            raise ValueError(
                f"dim must be a multiple of num_heads, unless attn_head_dim is given; got dim = {self.dim} and "
                f"num_heads = {self.num_heads}"
            )
        return self.dim // self.num_heads

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attention of all tokens to all tokens.

        Args:
            x: tokens (B, N, dim).
            attn_mask: broadcasts to (B, heads, N, N): added to the scores if floating point, True where a query may
                see a key if boolean.
            is_causal: token i sees the tokens j <= i only.

        Returns:
            (B, N, dim_out).

        Raises:
            TypeError, ValueError: dtypes or shapes do not fit.
        """
        dropout_p = self.attn_drop.p if self.training else 0.0
        options = {"scale": self.scale, "is_causal": is_causal, "dropout_p": dropout_p}
        qkv, bias = self._project(x), _as_bias(attn_mask, x.dtype)
        if self._has_qk_norm():
            query, key, value = (t.transpose(1, 2) for t in self._normalised(qkv))
            output = functional.attention(query, key, value, bias, **options).transpose(1, 2)
        else:
            output = functional.attention_qkvpacked(qkv, bias, **options)
        output = self.norm(output.flatten(2))
        if self.gate is not None:
            output = output * self.gate(x).sigmoid()
        return self.proj_drop(apply_linear(self.proj, output))

    def attention_maps(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """The attention weights that `forward` computes from the same arguments, before dropout: (B, heads, N, N).

        Exact and differentiable, in plain PyTorch.
        """
        query, key, _ = (t.transpose(1, 2) for t in self._normalised(self._project(x)))
        scores = self.scale * query @ key.mT
        bias = _as_bias(attn_mask, scores.dtype)
        if bias is not None:
            scores = scores + bias
        if is_causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(hidden, -torch.inf)
        return scores.softmax(-1)

    def attend(self, qkv: Tensor) -> Tensor:
        """From packed projections (B, N, 3 attn_dim) to the heads' results (B, N, attn_dim), without dropout."""
        qkv = qkv.unflatten(-1, (3, self.num_heads, self.head_dim))
        return functional.attention_qkvpacked(qkv, scale=self.scale).flatten(2)

    def _project(self, x: Tensor) -> Tensor:
        """The packed projection, (B, N, 3, heads, D)."""
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x must be tokens (B, N, {self.dim}); got {tuple(x.shape)}")
        return apply_linear(self.qkv, x).unflatten(-1, (3, self.num_heads, self.head_dim))

    def _has_qk_norm(self) -> bool:
        return not (is_absent(self.q_norm) and is_absent(self.k_norm))

    def _normalised(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, each (B, N, heads, D)."""
        query, key, value = qkv.unbind(2)
        return self.q_norm(query), self.k_norm(key), value

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}"


def _as_bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask as what is added to the scores: 0 where a boolean one is True, -inf elsewhere."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf)
