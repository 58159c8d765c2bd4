r"""What attention in windows looks at, from its attention maps.

The maps ``weights`` are those of `vitfast.functional.window_attention_weights` with as many keys as queries:
(B, windows, heads, N, N), rows sum to 1, places outside the map are 0. Uniform attention gives the weight 1 / m to each
of the m tokens that a window has inside the map; two of the measures here are multiples of it, so that windows of
different sizes, and the smaller ones at the edges, can be compared.

Sources: the distance is that of Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, section 4.5, and of
Raghu et al., "Do Vision Transformers See Like CNNs?", NeurIPS 2021.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitfast.reference import window_partition, window_reverse

__all__ = ["mean_distance", "received", "relative_to_offset"]

Pair = tuple[int, int]


def mean_distance(weights: Tensor, map_size: Pair, window_size: Pair, shift: Pair = (0, 0)) -> Tensor:
    r"""(heads,), the distance in tokens from a query to what it attends to.

    :math:`\frac{1}{n} \sum_{q} \sum_k P_{qk} |x_q - x_k|` over all n queries of all images.

    Args:
        weights: (B, windows, heads, N, N).
        map_size: (H, W), tokens of the map.
        window_size: (rows, columns), tokens of a window.
        shift: (rows, columns), by which the windows are moved.

    Raises:
        ValueError: ``weights`` has another shape than such a map has.
    """
    _check(weights, map_size, window_size, shift)
    places = torch.cartesian_prod(*(torch.arange(n, dtype=weights.dtype, device=weights.device) for n in map_size))
    places = window_partition(places.view(1, *map_size, 1, 2), window_size, shift)[0, :, 0]  # (windows, N, 2)
    distance = torch.cdist(places, places)[:, None]
    queries = len(weights) * map_size[0] * map_size[1]
    return (weights * distance).sum((0, 1, 3, 4)) / queries


def received(weights: Tensor, map_size: Pair, window_size: Pair, shift: Pair = (0, 0)) -> Tensor:
    """(B, heads, H, W), the attention each place receives from its window, as a multiple of that of uniform attention.

    The mean over the places of a window is 1. Arguments and errors as in `mean_distance`.
    """
    _check(weights, map_size, window_size, shift)
    onto_keys = weights.sum(-2)[..., None]  # uniform attention: m queries give 1 / m each
    return window_reverse(onto_keys, map_size, window_size, shift)[..., 0].permute(0, 3, 1, 2)


def relative_to_offset(weights: Tensor, map_size: Pair, window_size: Pair, shift: Pair = (0, 0)) -> Tensor:
    """(heads, 2 rows - 1, 2 columns - 1), the mean attention to the place that lies (dy, dx) from the query.

    It is a multiple of uniform attention, averaged over all pairs of tokens with the offset (dy, dx), which stands at
    [rows - 1 + dy, columns - 1 + dx]; NaN where no window of the map has such a pair. Arguments and errors as in
    `mean_distance`.
    """
    _check(weights, map_size, window_size, shift)
    rows, columns = window_size
    ones = torch.ones(1, *map_size, 1, 1, dtype=weights.dtype, device=weights.device)
    inside = window_partition(ones, window_size, shift)[0, :, 0, :, 0]  # (windows, N)
    multiples = (weights * inside.sum(1)[:, None, None, None]).sum((0, 1))  # (heads, N, N)
    pairs = len(weights) * (inside[:, :, None] * inside[:, None, :]).sum(0)  # (N, N)

    place = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).to(weights.device)
    offset = place[None, :] - place[:, None] + torch.tensor([rows - 1, columns - 1], device=weights.device)
    index = (offset[..., 0] * (2 * columns - 1) + offset[..., 1]).flatten()
    size = (2 * rows - 1) * (2 * columns - 1)
    summed = weights.new_zeros(len(multiples), size).index_add_(1, index, multiples.flatten(1))
    count = weights.new_zeros(size).index_add_(0, index, pairs.flatten())
    return (summed / count).unflatten(1, (2 * rows - 1, 2 * columns - 1))


def _check(weights: Tensor, map_size: Pair, window_size: Pair, shift: Pair) -> None:
    tokens = window_size[0] * window_size[1]
    windows = 1
    for size, window, offset in zip(map_size, window_size, shift, strict=True):
        windows *= -(-(size + (window - offset) % window) // window)
    if weights.dim() != 5 or weights.shape[1] != windows or weights.shape[3:] != (tokens, tokens):
        raise ValueError(
            f"weights must have the shape (B, {windows}, heads, {tokens}, {tokens}) for map_size = {map_size}, "
            f"window_size = {window_size} and shift = {shift}; got {tuple(weights.shape)}"
        )
