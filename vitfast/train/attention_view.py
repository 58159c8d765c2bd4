"""What the attention blocks of a model look at in some images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitfast.analysis import attention
from vitfast.functional import window_attention_weights
from vitfast.nn import LocalAttention2d

__all__ = ["AttentionView", "attention_views"]


@dataclass(frozen=True)
class AttentionView:
    """One attention block of a model, measured on a batch of images; see `vitfast.analysis.attention`.

    Attributes:
        name: of the module in the model.
        map_size, window_size: (rows, columns) in tokens.
        received: (B, H, W), the attention each place receives, averaged over the heads; 1 if attention were uniform.
        by_offset: (heads, 2 rows - 1, 2 columns - 1), the attention to each offset from the query; 1 if uniform.
        distance: (heads,), the mean distance between a query and what it attends to, in tokens.
        uniform_distance: what that distance would be if attention were uniform.
    """

    name: str
    map_size: tuple[int, int]
    window_size: tuple[int, int]
    received: Tensor
    by_offset: Tensor
    distance: Tensor
    uniform_distance: float

    def summary(self) -> dict:
        """The numbers as basic types."""
        return {
            "name": self.name,
            "map_size": self.map_size,
            "window_size": self.window_size,
            "mean_distance_per_head": self.distance.tolist(),
            "mean_distance_if_uniform": self.uniform_distance,
        }


@torch.no_grad()
def attention_views(model: nn.Module, images: Tensor) -> list[AttentionView]:
    """One view of each `vitfast.nn.LocalAttention2d` in a model in evaluation mode, in the order of computation.

    Args:
        images: (B, channels, height, width), as the model wants them.
    """
    inputs: dict[str, Tensor] = {}
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, LocalAttention2d)}

    def remember(name):
        return lambda module, arguments: inputs.__setitem__(name, arguments[0])

    hooks = [module.register_forward_pre_hook(remember(name)) for name, module in blocks.items()]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return [_view(name, blocks[name], x) for name, x in inputs.items()]


def _view(name: str, block: LocalAttention2d, x: Tensor) -> AttentionView:
    map_size, window_size = tuple(x.shape[2:]), block.window_size
    weights = block.attention_maps(x)
    nothing = torch.zeros(1, *map_size, 1, 1, dtype=weights.dtype, device=weights.device)
    uniform = window_attention_weights(nothing, nothing, window_size=window_size)
    return AttentionView(
        name,
        map_size,
        window_size,
        attention.received(weights, map_size, window_size).mean(1).cpu(),
        attention.relative_to_offset(weights, map_size, window_size).cpu(),
        attention.mean_distance(weights, map_size, window_size).cpu(),
        float(attention.mean_distance(uniform, map_size, window_size)),
    )
