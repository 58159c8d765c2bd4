"""Window attention in plain PyTorch.

Inside each window of a feature map, and for each head,

    S = scale * Q K^T + bias,    P = softmax(S),    O = P V.

Shapes: ``query`` (B, H, W, heads, D); ``key`` and ``value`` (B, H / r, W / r, heads, D) for an integer r;
``bias`` (heads or 1, N, M) with N = window_h * window_w queries and M = N / r^2 keys in a full window.

**Windows and shift.** The grid of windows starts at row ``shift_h - window_h`` and column ``shift_w - window_w``
(at 0 without a shift) and is cut off at the map's edges, so edge windows hold fewer tokens. A token keeps the place
it has in its full window, and with it its rows and columns of the bias. This is what the cyclic shift of Swin
(Liu et al., ICCV 2021, section 3.2) computes: it rolls the map by ``-shift``, and its region mask then forbids every
pair of tokens that were not neighbours before the roll, which leaves exactly the windows of the shifted grid.

The derivatives are written out as well, because second-order methods differentiate through them. With G the gradient
of O, and a dot for the tangent of a quantity:

    dV = P^T G        dP = G V^T        dS = P * (dP - rowsum(P * dP))
    dQ = scale * dS K        dK = scale * dS^T Q        dbias = sum of dS over the windows

    S. = scale * (Q. K^T + Q K.^T) + bias.        P. = P * (S. - rowsum(P * S.))        O. = P. V + P V.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitfast.reference._algebra import (
    add,
    matmul,
    softmax_backward,
    softmax_backward_tangent,
    transposed,
    without_autocast,
)

Pair = tuple[int, int]


def window_partition(x: Tensor, window_size: Pair, shift: Pair) -> Tensor:
    """(B, H, W, heads, D) -> (B, windows, heads, window_h * window_w, D), zeros where a window leaves the map."""
    batch, _, _, heads, dim = x.shape
    top, bottom, left, right = _grid_padding(x.shape[1:3], window_size, shift)
    x = F.pad(x, (0, 0, 0, 0, left, right, top, bottom)) if any((top, bottom, left, right)) else x
    rows, columns = x.shape[1] // window_size[0], x.shape[2] // window_size[1]
    x = x.reshape(batch, rows, window_size[0], columns, window_size[1], heads, dim).permute(0, 1, 3, 5, 2, 4, 6)
    return x.reshape(batch, rows * columns, heads, window_size[0] * window_size[1], dim)


def window_reverse(windows: Tensor, map_size: Pair, window_size: Pair, shift: Pair) -> Tensor:
    """(B, windows, heads, window_h * window_w, D) -> (B, H, W, heads, D): the inverse of `window_partition`."""
    height, width = map_size
    top, bottom, left, right = _grid_padding(map_size, window_size, shift)
    rows, columns = (top + height + bottom) // window_size[0], (left + width + right) // window_size[1]
    batch, _, heads, _, dim = windows.shape
    x = windows.reshape(batch, rows, columns, heads, *window_size, dim).permute(0, 1, 4, 2, 5, 3, 6)
    x = x.reshape(batch, rows * window_size[0], columns * window_size[1], heads, dim)
    return x[:, top : top + height, left : left + width] if any((top, bottom, left, right)) else x


@without_autocast
def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    *,
    window_size: Pair,
    shift: Pair = (0, 0),
    scale: float,
) -> Tensor:
    """The definition: (B, H, W, heads, D) -> (B, H, W, heads, D)."""
    grid = _Grid(query, key, window_size, shift)
    probabilities = _probabilities(grid, query, key, bias, scale)
    return grid.reverse_queries(probabilities @ grid.keys(value))


@without_autocast
def window_attention_weights(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None = None,
    *,
    window_size: Pair,
    shift: Pair = (0, 0),
    scale: float,
) -> Tensor:
    """The attention maps P, (B, windows, heads, N, M); rows of tokens outside the map are zero."""
    grid = _Grid(query, key, window_size, shift)
    probabilities = _probabilities(grid, query, key, bias, scale)
    if grid.query_inside is not None:
        probabilities = probabilities.masked_fill(~grid.query_inside, 0)
    return probabilities


@without_autocast
def window_attention_tangent(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    tangents: tuple[Tensor | None, ...],
    *,
    window_size: Pair,
    shift: Pair = (0, 0),
    scale: float,
) -> Tensor:
    """The tangent of the output along ``tangents``, those of (query, key, value, bias); None stands for zero."""
    grid = _Grid(query, key, window_size, shift)
    probabilities = _probabilities(grid, query, key, bias, scale)
    probabilities_t = _probabilities_tangent(grid, probabilities, query, key, tangents, scale)
    value_t = tangents[2]
    output = add(
        None if probabilities_t is None else probabilities_t @ grid.keys(value),
        None if value_t is None else probabilities @ grid.keys(value_t),
    )
    return torch.zeros_like(query) if output is None else grid.reverse_queries(output)


@without_autocast
def window_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    *,
    window_size: Pair,
    shift: Pair = (0, 0),
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of (query, key, value, bias) for the output's gradient ``grad``."""
    grid = _Grid(query, key, window_size, shift)
    probabilities = _probabilities(grid, query, key, bias, scale)
    g, q, k, v = grid.queries(grad), grid.queries(query), grid.keys(key), grid.keys(value)
    scores_grad = softmax_backward(probabilities, g @ v.mT)
    return (
        grid.reverse_queries(scale * (scores_grad @ k)),
        grid.reverse_keys(scale * (scores_grad.mT @ q)),
        grid.reverse_keys(probabilities.mT @ g),
        None if bias is None else scores_grad.sum((0, 1)).sum_to_size(bias.shape).to(bias.dtype),
    )


@without_autocast
def window_attention_backward_tangent(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    grad_tangent: Tensor | None,
    tangents: tuple[Tensor | None, ...],
    *,
    window_size: Pair,
    shift: Pair = (0, 0),
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The tangents of what `window_attention_backward` returns, along ``grad_tangent`` and ``tangents``.

    With ``grad_tangent`` None this is also the vector-Jacobian product of the backward with respect to
    (query, key, value, bias): second derivatives of the scalar <grad, output> are symmetric.
    """
    grid = _Grid(query, key, window_size, shift)
    probabilities = _probabilities(grid, query, key, bias, scale)
    probabilities_t = _probabilities_tangent(grid, probabilities, query, key, tangents, scale)
    g, q, k, v = grid.queries(grad), grid.queries(query), grid.keys(key), grid.keys(value)
    g_t = None if grad_tangent is None else grid.queries(grad_tangent)
    q_t, k_t, v_t = (
        None if tangent is None else part(tangent)
        for part, tangent in zip((grid.queries, grid.keys, grid.keys), tangents[:3], strict=True)
    )
    probabilities_grad = g @ v.mT
    probabilities_grad_t = add(matmul(g_t, v.mT), matmul(g, transposed(v_t)))
    scores_grad = softmax_backward(probabilities, probabilities_grad)
    scores_grad_t = softmax_backward_tangent(probabilities, probabilities_t, probabilities_grad, probabilities_grad_t)
    query_grad_t = add(matmul(scores_grad_t, k), matmul(scores_grad, k_t))
    key_grad_t = add(matmul(transposed(scores_grad_t), q), matmul(scores_grad.mT, q_t))
    value_grad_t = add(matmul(transposed(probabilities_t), g), matmul(probabilities.mT, g_t))
    if bias is None:
        bias_grad_t = None
    elif scores_grad_t is None:
        bias_grad_t = torch.zeros_like(bias)
    else:
        bias_grad_t = scores_grad_t.sum((0, 1)).sum_to_size(bias.shape).to(bias.dtype)
    return (
        torch.zeros_like(query) if query_grad_t is None else grid.reverse_queries(scale * query_grad_t),
        torch.zeros_like(key) if key_grad_t is None else grid.reverse_keys(scale * key_grad_t),
        torch.zeros_like(value) if value_grad_t is None else grid.reverse_keys(value_grad_t),
        bias_grad_t,
    )


class _Grid:
    """Where the windows of a query map and of its (perhaps smaller) key map lie."""

    def __init__(self, query: Tensor, key: Tensor, window_size: Pair, shift: Pair):
        self.query_map, self.key_map = tuple(query.shape[1:3]), tuple(key.shape[1:3])
        ratio = tuple(n // m if m else 1 for n, m in zip(self.query_map, self.key_map, strict=True))
        self.query_window, self.query_shift = window_size, shift
        self.key_window = (window_size[0] // ratio[0], window_size[1] // ratio[1])
        self.key_shift = (shift[0] // ratio[0], shift[1] // ratio[1])
        self.key_inside = self.query_inside = None
        if any(_grid_padding(self.query_map, window_size, shift)):
            inside_query = torch.ones(1, *self.query_map, 1, 1, dtype=torch.bool, device=query.device)
            inside_key = torch.ones(1, *self.key_map, 1, 1, dtype=torch.bool, device=query.device)
            self.query_inside = self.queries(inside_query)  # [1, windows, 1, N, 1]
            self.key_inside = self.keys(inside_key).mT  # [1, windows, 1, 1, M]

    def queries(self, x: Tensor) -> Tensor:
        return window_partition(x, self.query_window, self.query_shift)

    def keys(self, x: Tensor) -> Tensor:
        return window_partition(x, self.key_window, self.key_shift)

    def reverse_queries(self, x: Tensor) -> Tensor:
        return window_reverse(x, self.query_map, self.query_window, self.query_shift)

    def reverse_keys(self, x: Tensor) -> Tensor:
        return window_reverse(x, self.key_map, self.key_window, self.key_shift)


def _grid_padding(map_size: Pair, window_size: Pair, shift: Pair) -> tuple[int, int, int, int]:
    """Rows and columns to add (top, bottom, left, right) until the shifted grid has full windows only."""
    padding = []
    for size, window, offset in zip(map_size, window_size, shift, strict=True):
        before = (window - offset) % window
        padding += [before, -(size + before) % window]
    return tuple(padding)


def _probabilities(grid: _Grid, query: Tensor, key: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    scores = scale * (grid.queries(query) @ grid.keys(key).mT)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if grid.key_inside is not None:
        scores = scores.masked_fill(~grid.key_inside, float("-inf"))
        # Nothing reads the rows of queries outside the map, but one without any key (a bias of -inf) would be NaN, and
        # reach the gradients of the keys as NaN * 0.
        scores = scores.masked_fill(~grid.query_inside, 0)
    return scores.softmax(-1)


def _probabilities_tangent(
    grid: _Grid, probabilities: Tensor, query: Tensor, key: Tensor, tangents: tuple, scale: float
) -> Tensor | None:
    query_t, key_t, _, bias_t = tangents
    scores_t = add(
        None if query_t is None else scale * (grid.queries(query_t) @ grid.keys(key).mT),
        None if key_t is None else scale * (grid.queries(query) @ grid.keys(key_t).mT),
    )
    scores_t = add(scores_t, None if bias_t is None else bias_t.to(probabilities.dtype))
    return None if scores_t is None else softmax_backward(probabilities, scores_t)
