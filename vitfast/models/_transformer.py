"""What the transformer families share."""

from __future__ import annotations

from torch import Tensor, nn


def initialize(model: nn.Module) -> None:
    """Truncated normal weights of standard deviation 0.02 for all linear layers, biases of zero.

    Source: the released code of DeiT (Touvron et al., ICML 2021) and Swin (Liu et al., ICCV 2021).
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def stochastic_depth(largest: float, depth: int) -> list[float]:
    """Drop probabilities that grow linearly, from 0 in the first of ``depth`` blocks to ``largest`` in the last."""
    return [largest * i / max(depth - 1, 1) for i in range(depth)]


def make_head(in_features: int, num_classes: int) -> nn.Module:
    """The classifier; without classes, the features themselves."""
    return nn.Linear(in_features, num_classes) if num_classes > 0 else nn.Identity()


def fit_loaded(model: nn.Module, state: dict[str, Tensor], prefix: str, *_) -> None:
    """Fits what ``load_state_dict`` is given to the model; a hook, and at this level for the sake of pickling."""
    model.fit_state_dict(state, prefix)
