r"""Window attention with a learned relative position bias: the attention of Swin Transformer.

In each window and for each head, :math:`O = \mathrm{softmax}(D^{-1/2} Q K^T + \mathrm{bias})\, V`, with query, key and
value from one linear layer and a linear layer after the heads.

The bias of a query and a key depends on where the one lies seen from the other. A window of (h, w) tokens knows
(2h - 1)(2w - 1) such offsets; the table holds a row per offset and a column per head.

Source: Liu et al., "Swin Transformer", ICCV 2021, section 3.2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vitfast import functional
from vitfast.nn._checks import positive_integer
from vitfast.nn._fusion import apply_linear
from vitfast.nn._windows import apply_attention_maps, as_pair


class WindowAttention(nn.Module):
    """Multi-head self-attention in windows, with a learned relative position bias.

    A drop-in replacement for ``timm.models.swin_transformer.WindowAttention`` (timm 1.x): arguments, defaults,
    initialisation, state-dict keys and results are the same. It takes

    - windows, (num_windows * B, N, dim), with an optional additive ``mask`` (num_windows, N, N), as timm does; or
    - a whole feature map, (B, H, W, dim): windows, ``shift_size`` and its region mask are then part of the fused
      operator, and nothing is rolled, partitioned or reversed.

    Maps whose H or W is not a multiple of the window have smaller windows at their edges. (timm's Swin block pads such
    maps with zeros, which its attention then sees as tokens.)

    Attention dropout during training, and a mask, need the score matrix and are computed in plain PyTorch.

    Args:
        dim: channels of input and output.
        num_heads: attention heads.
        head_dim: channels of a head; ``dim // num_heads`` if None.
        window_size: tokens of a window, one integer or (rows, columns).
        qkv_bias: whether the linear layer of query, key and value has a bias.
        attn_drop: dropout probability of the attention weights.
        proj_drop: dropout probability of the output.

    State dict: ``relative_position_bias_table`` ((2 * rows - 1) * (2 * columns - 1), heads), ``qkv.weight``,
    ``qkv.bias``, ``proj.weight``, ``proj.bias``.

    >>> attention = WindowAttention(96, num_heads=3)
    >>> attention(torch.randn(2, 56, 56, 96), shift_size=3).shape
    torch.Size([2, 56, 56, 96])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int | None = None,
        window_size: int | tuple[int, int] = 7,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.dim = positive_integer("dim", dim)
        self.num_heads = positive_integer("num_heads", num_heads)
        if head_dim is None and dim < num_heads:
            raise ValueError(f"dim must be at least num_heads = {num_heads}, unless head_dim is given; got dim = {dim}")
        head_dim = dim // num_heads if head_dim is None else positive_integer("head_dim", head_dim)
        self.scale = head_dim**-0.5
        self.window_size = as_pair("window_size", window_size)
        self.window_area = math.prod(self.window_size)
        rows, columns = self.window_size
        self.relative_position_bias_table = nn.Parameter(
            torch.empty((2 * rows - 1) * (2 * columns - 1), num_heads, **factory)
        )
        self.register_buffer(
            "relative_position_index",
            torch.empty(self.window_area, self.window_area, device=device, dtype=torch.long),
            persistent=False,
        )
        self.qkv = nn.Linear(dim, 3 * num_heads * head_dim, bias=qkv_bias, **factory)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(num_heads * head_dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the bias table anew and computes the buffers; the linear layers have their own."""
        with torch.no_grad():
            # By inverting the distribution function, as timm does: torch.nn.init.trunc_normal_ draws differently in
            # different versions, and a seed is to give the weights that it gives in timm.
            self.relative_position_bias_table.uniform_(-1, 1).erfinv_().mul_(0.02 * math.sqrt(2)).clamp_(-2, 2)
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        """Computes the buffers that the state dict does not hold, for a module made on the meta device."""
        self.relative_position_index.copy_(_relative_position_index(self.window_size))

    def set_window_size(self, window_size: int | tuple[int, int]) -> None:
        """Changes the window; the table is interpolated, finely near offset zero and coarsely far from it.

        Args:
            window_size: the new one, one integer or (rows, columns).
        """
        window_size = as_pair("window_size", window_size)
        if window_size == self.window_size:
            return
        table = self.relative_position_bias_table
        resized = resize_bias_table(table.detach(), self.window_size, window_size)
        self.relative_position_bias_table = nn.Parameter(resized, requires_grad=table.requires_grad)
        self.relative_position_index = _relative_position_index(window_size).to(table.device)
        self.window_size = window_size
        self.window_area = math.prod(window_size)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, shift_size: int | tuple[int, int] = 0) -> Tensor:
        """Attention in windows.

        Args:
            x: windows (num_windows * B, N, dim), or a map (B, H, W, dim).
            mask: only with windows: added to the scores, (num_windows, N, N), 0 or -inf.
            shift_size: only with a map: Swin's cyclic shift, 0 <= shift_size < window_size, one integer or
                (rows, columns).

        Returns:
            The shape of ``x``.

        Raises:
            TypeError: the mask is not floating point.
            ValueError: shapes do not fit; or a mask with a map, a shift with windows.
        """
        shift = self._check_shift(shift_size)
        qkv = self._project(x, mask, shift)
        if mask is None and not (self.training and self.attn_drop.p > 0):
            output = functional.window_attention_qkvpacked(
                qkv, self._bias(), window_size=self.window_size, shift=shift, scale=self.scale
            )
        else:
            maps = self.attn_drop(self._attention_maps(qkv, mask, shift))
            output = apply_attention_maps(maps, qkv.select(3, 2), qkv.shape[1:3], self.window_size, shift)
        output = output.flatten(3)
        if x.dim() == 3:
            output = output.flatten(1, 2)
        return self.proj_drop(apply_linear(self.proj, output))

    def attention_maps(self, x: Tensor, mask: Tensor | None = None, *, shift_size: int | tuple[int, int] = 0) -> Tensor:
        """The attention weights that `forward` computes from the same arguments, before dropout.

        Exact and differentiable. In the convention of `vitfast.functional.window_attention_weights`:
        (B, windows, heads, N, M), windows and the tokens of each row by row, N queries and M keys; places outside the
        map are 0. Windows as input are maps of one window: (num_windows * B, 1, heads, N, M).
        """
        shift = self._check_shift(shift_size)
        return self._attention_maps(self._project(x, mask, shift), mask, shift)

    def attend(self, qkv: Tensor, shift: tuple[int, int]) -> Tensor:
        """From packed projections (B, H, W, 3 dim) to the heads' results (B, H, W, dim), without dropout."""
        return functional.window_attention_qkvpacked(
            qkv.unflatten(-1, (3, self.num_heads, -1)),
            self._bias(),
            window_size=self.window_size,
            shift=shift,
            scale=self.scale,
        ).flatten(3)

    def _check_shift(self, shift_size: int | tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the shift."""
        shift = as_pair("shift_size", shift_size, minimum=0)
        if any(s >= w for s, w in zip(shift, self.window_size, strict=True)):
            raise ValueError(f"shift_size must be smaller than window_size = {self.window_size}; got {shift_size}")
        return shift

    def _project(self, x: Tensor, mask: Tensor | None, shift: tuple[int, int]) -> Tensor:
        """The packed projection, (B, H, W, 3, heads, D), of checked input."""
        if x.dim() not in (3, 4) or x.shape[-1] != self.dim:
            raise ValueError(
                f"x must be windows (num_windows * B, N, {self.dim}) or a map (B, H, W, {self.dim}); "
                f"got {tuple(x.shape)}"
            )
        if x.dim() == 4:
            if mask is not None:
                raise ValueError(
                    "a mask goes with windows (num_windows * B, N, dim); for a map (B, H, W, dim) give shift_size, and "
                    "its region mask is applied"
                )
            return apply_linear(self.qkv, x).unflatten(-1, (3, self.num_heads, -1))
        if any(shift):
            raise ValueError(
                f"shift_size goes with a map (B, H, W, dim); got windows of shape {tuple(x.shape)}. "
                "Pass the map unpartitioned, or roll it and give a mask"
            )
        if x.shape[1] != self.window_area:
            raise ValueError(
                f"windows of {self.window_size} tokens must have the shape "
                f"(num_windows * B, {self.window_area}, {self.dim}); got {tuple(x.shape)}"
            )
        if mask is not None:
            self._check_mask(x, mask)
        return apply_linear(self.qkv, x).unflatten(-1, (3, self.num_heads, -1)).unflatten(1, self.window_size)

    def _check_mask(self, x: Tensor, mask: Tensor) -> None:
        if not mask.is_floating_point():
            raise TypeError(
                f"mask is added to the scores and must be floating point, 0 or -inf; got {mask.dtype}. A boolean "
                "mask of the pairs to keep becomes that with torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)"
            )
        expected = (self.window_area, self.window_area)
        if mask.dim() != 3 or tuple(mask.shape[1:]) != expected or mask.shape[0] == 0 or len(x) % mask.shape[0]:
            raise ValueError(
                f"mask must have the shape (num_windows, {expected[0]}, {expected[1]}) with a num_windows that divides "
                f"the {len(x)} windows of x; got {tuple(mask.shape)}"
            )

    def _attention_maps(self, qkv: Tensor, mask: Tensor | None, shift: tuple[int, int]) -> Tensor:
        query, key, _ = qkv.unbind(3)
        if mask is None:
            return functional.window_attention_weights(
                query, key, self._bias(), window_size=self.window_size, shift=shift, scale=self.scale
            )
        query, key = (t.flatten(1, 2).transpose(1, 2) for t in (query, key))  # [windows * B, heads, N, D]
        scores = self.scale * query @ key.mT
        scores = scores + self._bias().to(scores.dtype)
        scores = scores.unflatten(0, (-1, mask.shape[0])) + mask.to(scores.dtype).unsqueeze(1)
        return scores.softmax(-1).flatten(0, 1).unsqueeze(1)

    def _bias(self) -> Tensor:
        """(heads, N, N)."""
        return self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)

    def extra_repr(self) -> str:
        return f"window_size={self.window_size}, num_heads={self.num_heads}"


def _relative_position_index(window_size: tuple[int, int]) -> Tensor:
    """The row of the table for each query and key, (N, N): the query's place seen from the key."""
    rows, columns = (torch.arange(size) for size in window_size)
    row, column = (place.flatten() for place in torch.meshgrid(rows, columns, indexing="ij"))
    row_offset = row[:, None] - row[None, :] + window_size[0] - 1
    column_offset = column[:, None] - column[None, :] + window_size[1] - 1
    return row_offset * (2 * window_size[1] - 1) + column_offset


def resize_bias_table(table: Tensor, old_window: tuple[int, int], new_window: tuple[int, int]) -> Tensor:
    """Bilinear interpolation of the table, as BEiT (Bao et al., ICLR 2022) and timm fine-tune at another resolution.

    The old entries are placed at offsets whose steps grow geometrically, so that the outermost ones come to lie at the
    outermost offset of the new window, while the steps near zero stay about one token wide.
    """
    rows, columns = (
        _interpolation(2 * old - 1, 2 * new - 1).to(table.device)
        for old, new in zip(old_window, new_window, strict=True)
    )
    grid = table.double().unflatten(0, (2 * old_window[0] - 1, 2 * old_window[1] - 1))
    return torch.einsum("yr, xc, rch -> yxh", rows, columns, grid).flatten(0, 1).to(table.dtype)


def _interpolation(old: int, new: int) -> Tensor:
    """The matrix (new, old) of linear interpolation from geometrically placed offsets to the integer ones."""
    if old == 1:
        return torch.ones(new, 1, dtype=torch.float64)
    steps = _geometric_ratio(old // 2, new // 2) ** torch.arange(old // 2, dtype=torch.float64)
    places = torch.cat((-steps.cumsum(0).flip(0), steps.new_zeros(1), steps.cumsum(0)))
    targets = torch.arange(new, dtype=torch.float64) - new // 2
    right = torch.searchsorted(places, targets).clamp(1, old - 1)
    weight = ((targets - places[right - 1]) / (places[right] - places[right - 1])).clamp(0, 1)
    matrix = torch.zeros(new, old, dtype=torch.float64)
    matrix.scatter_(1, (right - 1)[:, None], 1 - weight[:, None])
    return matrix.scatter_(1, right[:, None], weight[:, None])


def _geometric_ratio(terms: int, total: int) -> float:
    """The q in [1.01, 1.5] for which 1 + q + ... + q^(terms - 1) comes nearest to ``total``.

    By bisection to 1e-6, with timm's limits and its choice of the last midpoint, for equal results.
    """
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (ratio**terms - 1) / (ratio - 1) > total:
            high = ratio
        else:
            low = ratio
    return ratio
