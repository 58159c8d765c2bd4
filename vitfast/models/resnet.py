"""ResNet, with activations after the convolutions (``resnet_*``) or before them (``preresnet_*``).

Each also with MC dropout (``*_mcdo_*``), with spatial smoothing after the stages (``*_dnn_smoothing_*``), and with both
(``*_mcdo_smoothing_*``). The names and the state-dict keys are those of the code of Park & Kim.

Sources: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016; He et al., "Identity Mappings in Deep
Residual Networks", ECCV 2016; Park & Kim, "Blurs Behave Like Ensembles", ICML 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import product

from torch import nn

from vitfast.models.registry import register
from vitfast.models.residual import (
    MakeSmoothing,
    PostActivationBlock,
    PreActivationBlock,
    ResidualNetwork,
    check_stage_counts,
)
from vitfast.nn import Smoothing2d
from vitfast.nn._checks import probability
from vitfast.nn.smoothing import UNBLURRED_BLOCKS


class ResNet(ResidualNetwork):
    """A residual network of convolutions.

    Args:
        num_blocks: blocks in each of the four stages.
        bottleneck: blocks of 1 x 1, 3 x 3 and 1 x 1 convolutions instead of two 3 x 3.
        preactivation: normalisation and activation before each convolution instead of after it.
        smoothing: what smooths the outputs of the stages: a name for `vitfast.nn.Smoothing2d.named`, "TanhBlur" for
            that of the paper; a function from a number of channels to a module; or None for nothing.
        num_smoothings: how often it does, after each of the four stages; once after each if None.
        mc_dropout: the probability of `vitfast.nn.MCDropout` before the last convolution of each block; 0 for none.
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
        width: channels of the first stage; each stage doubles them.
        stem: True for ImageNet's stem, which shrinks images by 4; False for CIFAR's, which keeps their size.
        compat: "hdvw" computes what the code of Park & Kim does where that differs: its blur pads a map on all sides
            and lets it grow by one place; in pre-activation networks, three stages are smoothed, and bottlenecks with
            MC dropout normalise the shortcut.
    """

    def __init__(
        self,
        *,
        num_blocks: Sequence[int],
        bottleneck: bool,
        preactivation: bool = False,
        smoothing: str | MakeSmoothing | None = None,
        num_smoothings: Sequence[int] | None = None,
        mc_dropout: float = 0.0,
        num_classes: int = 1000,
        in_channels: int = 3,
        width: int = 64,
        stem: bool = True,
        compat: str | None = None,
    ):
        if compat not in (None, "hdvw"):
            raise ValueError(f"compat must be 'hdvw' or None; got {compat!r}")
        mc_dropout = probability("mc_dropout", mc_dropout)
        block = partial(
            PreActivationBlock if preactivation else PostActivationBlock, bottleneck=bottleneck, mc_dropout=mc_dropout
        )
        if compat and preactivation and bottleneck and mc_dropout:
            block = partial(block, normalize_shortcut=True)
        if num_smoothings is None:
            num_smoothings = (1, 1, 1, 0 if compat and preactivation else 1)
        if smoothing is None:
            num_smoothings = (0, 0, 0, 0)
        super().__init__(
            [[block] * count for count in check_stage_counts("num_blocks", num_blocks, minimum=1)],
            bottleneck=bottleneck,
            preactivation=preactivation,
            num_classes=num_classes,
            in_channels=in_channels,
            width=width,
            stem=stem,
            smoothing=_make_smoothing(smoothing, compat),
            num_smoothings=check_stage_counts("num_smoothings", num_smoothings, minimum=0),
        )


def _make_smoothing(smoothing: str | MakeSmoothing | None, compat: str | None) -> MakeSmoothing:
    if smoothing is None:
        return nn.Identity
    if not isinstance(smoothing, str):
        return smoothing
    growing = {"padding": 1, "pad_mode": "zeros"} if compat and smoothing not in UNBLURRED_BLOCKS else {}
    return partial(Smoothing2d.named, smoothing, **growing)


_VARIANTS = {
    "dnn": {},
    "mcdo": {"mc_dropout": 0.3},
    "dnn_smoothing": {"smoothing": "TanhBlur"},
    "mcdo_smoothing": {"smoothing": "TanhBlur", "mc_dropout": 0.3},
}
_DEPTHS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}

for _prefix, _variant, _depth in product(("resnet", "preresnet"), _VARIANTS, _DEPTHS):
    register(
        f"{_prefix}_{_depth}" if _variant == "dnn" else f"{_prefix}_{_variant}_{_depth}",
        ResNet,
        aliases=[f"{_prefix}_dnn_{_depth}"] if _variant == "dnn" else [],
        num_blocks=_DEPTHS[_depth],
        bottleneck=_depth >= 50,
        preactivation=_prefix == "preresnet",
        **_VARIANTS[_variant],
    )
