"""ResNet, with activations after the convolutions (``resnet_*``) or before them (``preresnet_*``).

Sources: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016; He et al., "Identity Mappings in Deep
Residual Networks", ECCV 2016. State-dict keys and shapes are those of the ResNets of Park & Kim, ICLR 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from vitfast.models.registry import register
from vitfast.models.residual import PostActivationBlock, PreActivationBlock, ResidualNetwork, check_stage_counts


class ResNet(ResidualNetwork):
    """A residual network of convolutions.

    Args:
        num_blocks: blocks in each of the four stages.
        bottleneck: blocks of 1 x 1, 3 x 3 and 1 x 1 convolutions instead of two 3 x 3.
        preactivation: normalisation and activation before each convolution instead of after it.
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
        width: channels of the first stage; each stage doubles them.
        stem: True for ImageNet's stem, which shrinks images by 4; False for CIFAR's, which keeps their size.
    """

    def __init__(
        self,
        *,
        num_blocks: Sequence[int],
        bottleneck: bool,
        preactivation: bool = False,
        num_classes: int = 1000,
        in_channels: int = 3,
        width: int = 64,
        stem: bool = True,
    ):
        block = partial(PreActivationBlock if preactivation else PostActivationBlock, bottleneck=bottleneck)
        super().__init__(
            [[block] * count for count in check_stage_counts("num_blocks", num_blocks, minimum=1)],
            bottleneck=bottleneck,
            preactivation=preactivation,
            num_classes=num_classes,
            in_channels=in_channels,
            width=width,
            stem=stem,
        )


for _prefix, _preactivation in (("resnet", False), ("preresnet", True)):
    for _depth, _num_blocks in (
        (18, (2, 2, 2, 2)),
        (34, (3, 4, 6, 3)),
        (50, (3, 4, 6, 3)),
        (101, (3, 4, 23, 3)),
        (152, (3, 8, 36, 3)),
    ):
        register(
            f"{_prefix}_{_depth}",
            ResNet,
            num_blocks=_num_blocks,
            bottleneck=_depth >= 50,
            preactivation=_preactivation,
        )
