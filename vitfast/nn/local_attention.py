r"""Local attention on channels-first maps: the attention of AlterNet.

In each window and for each head, :math:`O = \mathrm{softmax}(D^{-1/2} Q K^T + \mathrm{bias})\, V`. Query, key and value
come from convolutions; one table of relative position biases serves all heads.

**Key stride.** With ``k`` > 1, keys and values come from a convolution of kernel and stride k, so that each stands for
a cell of k x k pixels and a window of N queries has N / k^2 keys. The bias of a query and such a key is the mean of the
biases of the query and the k x k pixels of the cell.

Source: Park & Kim, "How Do Vision Transformers Work?", ICLR 2022, section 4.1 and appendix.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitfast import functional
from vitfast.nn._checks import positive_integer
from vitfast.nn._windows import apply_attention_maps, as_pair


class LocalAttention2d(nn.Module):
    """Multi-head self-attention in the windows of a channels-first map, (B, C, H, W) -> (B, dim_out, H, W).

    The maps are read where the convolutions wrote them: windows cost no copy, in either memory format. Windows at the
    edges are smaller where H or W is not a multiple of the window. Attention dropout during training needs the score
    matrix and is computed in plain PyTorch.

    Args:
        dim_in: channels of the input.
        dim_out: channels of the output; ``dim_in`` if None.
        window_size: pixels of a window, one integer or (rows, columns).
        k: stride of keys and values; it must divide the window, and H and W.
        heads: attention heads.
        dim_head: channels of a head.
        attn_drop: dropout probability of the attention weights.
        proj_drop: dropout probability of the output.

    State dict: ``pos_embedding`` (2 * rows - 1, 2 * columns - 1), indexed by the key's place seen from the query;
    ``attn.to_q.weight``, ``attn.to_kv.weight``, ``attn.to_out.0.weight``, ``attn.to_out.0.bias``.

    >>> attention = LocalAttention2d(64, 128, window_size=7)
    >>> attention(torch.randn(2, 64, 28, 28)).shape
    torch.Size([2, 128, 28, 28])
    """

    def __init__(
        self,
        dim_in: int,
        dim_out: int | None = None,
        *,
        window_size: int | tuple[int, int] = 7,
        k: int = 1,
        heads: int = 8,
        dim_head: int = 32,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.window_size = rows, columns = as_pair("window_size", window_size)
        self.k = positive_integer("k", k)
        if rows % k or columns % k:
            raise ValueError(f"k must divide window_size = {self.window_size}; got {k}")
        self.dim_in = positive_integer("dim_in", dim_in)
        self.heads = positive_integer("heads", heads)
        self.dim_head = positive_integer("dim_head", dim_head)
        inner = self.heads * self.dim_head
        self.pos_embedding = nn.Parameter(torch.empty(2 * rows - 1, 2 * columns - 1, **factory))
        self.attn = nn.ModuleDict(
            {
                "to_q": nn.Conv2d(dim_in, inner, 1, bias=False, **factory),
                "to_kv": nn.Conv2d(dim_in, 2 * inner, k, stride=k, bias=False, **factory),
                "to_out": nn.Sequential(
                    nn.Conv2d(inner, dim_in if dim_out is None else dim_out, 1, **factory), nn.Dropout(proj_drop)
                ),
            }
        )
        self.attn_drop = nn.Dropout(attn_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the position embedding anew; the convolutions have their own."""
        nn.init.normal_(self.pos_embedding, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim_in, H, W) -> (B, dim_out, H, W); H and W must be multiples of ``k``."""
        query, key, value = self._project(x)
        if self.training and self.attn_drop.p > 0:
            maps = functional.window_attention_weights(query, key, self._bias(), window_size=self.window_size)
            output = apply_attention_maps(self.attn_drop(maps), value, query.shape[1:3], self.window_size, (0, 0))
        else:
            output = functional.window_attention(query, key, value, self._bias(), window_size=self.window_size)
        return self.attn["to_out"](output.permute(0, 3, 4, 1, 2).flatten(1, 2))

    def attention_maps(self, x: Tensor) -> Tensor:
        """The attention weights that `forward` computes from the same map, before dropout.

        Exact and differentiable. In the convention of `vitfast.functional.window_attention_weights`:
        (B, windows, heads, N, M), windows and the pixels of each row by row, N queries and M = N / k^2 keys; places
        outside the map are 0.
        """
        query, key, _ = self._project(x)
        return functional.window_attention_weights(query, key, self._bias(), window_size=self.window_size)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query (B, H, W, heads, D), key and value (B, H / k, W / k, heads, D): views of what the convolutions give."""
        if x.dim() != 4 or x.shape[1] != self.dim_in:
            raise ValueError(f"x must have the shape (B, {self.dim_in}, H, W); got {tuple(x.shape)}")
        if x.shape[2] % self.k or x.shape[3] % self.k:
            raise ValueError(
                f"H and W must be multiples of the key stride k = {self.k}; got {tuple(x.shape)}. "
                "Pad the map, or take a k that divides them"
            )
        query = self.attn["to_q"](x).unflatten(1, (self.heads, self.dim_head))
        key, value = self.attn["to_kv"](x).unflatten(1, (2, self.heads, self.dim_head)).unbind(1)
        return tuple(t.permute(0, 3, 4, 1, 2) for t in (query, key, value))

    def _bias(self) -> Tensor:
        """(1, N, M), for all heads."""
        rows, columns = self.window_size
        views = self.pos_embedding.unfold(0, rows, 1).unfold(1, columns, 1)  # [rows, columns, rows, columns]
        # views[a, b] is the part of the table that the query at (rows - 1 - a, columns - 1 - b) sees.
        bias = views.flip(0, 1).flatten(0, 1)  # [N, rows, columns]
        if self.k > 1:
            bias = bias.unflatten(2, (-1, self.k)).unflatten(1, (-1, self.k)).mean((2, 4))
        return bias.flatten(1).unsqueeze(0)

    def extra_repr(self) -> str:
        return f"window_size={self.window_size}, k={self.k}, heads={self.heads}, dim_head={self.dim_head}"
