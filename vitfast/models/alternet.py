"""AlterNet: a pre-activation ResNet whose stages end with local self-attention.

The build-up rule of the paper: going backwards from the end of a stage, every second convolution block is replaced by
an attention block. A stage of n blocks with m attention blocks is n - 2m convolution blocks, followed by m times
(convolution block, attention block).

An attention block, x -> x + A(norm2(conv(gelu(norm1(x))))), narrows its input to the stage's channels by a 1 x 1
convolution and leaves the widening to the output projection of the attention A.

Source: Park & Kim, "How Do Vision Transformers Work?", ICLR 2022, section 4.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from vitfast.models.registry import register
from vitfast.models.residual import MakeBlock, PreActivationBlock, ResidualNetwork, check_stage_counts
from vitfast.nn import LocalAttention2d


class AttentionBlock(nn.Module):
    """x -> x + attn(norm2(conv(gelu(norm1(x))))).

    Args:
        in_channels: channels of input and output.
        channels: of the stage, between ``conv`` and ``attn``.
        stride: must be 1; attention blocks do not shrink maps.
        attention: the keyword arguments of `vitfast.nn.LocalAttention2d`.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, **attention):
        super().__init__()
        if stride != 1:
            raise ValueError(f"an attention block keeps the size of the map, stride 1; got stride {stride}")
        self.out_channels = in_channels
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.attn = LocalAttention2d(channels, in_channels, **attention)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm2(self.conv(F.gelu(self.norm1(x)))))


class AlterNet(ResidualNetwork):
    """A pre-activation ResNet in which attention replaces convolution at the end of stages.

    With ``num_blocks2=(0, 0, 0, 0)`` it is the pre-activation ResNet that it comes from.

    Args:
        num_blocks: blocks in each of the four stages, of both kinds together.
        num_blocks2: how many of them are attention blocks, in each stage; at most half.
        bottleneck: convolution blocks of 1 x 1, 3 x 3 and 1 x 1 convolutions instead of two 3 x 3.
        heads: attention heads in each stage.
        dim_head: channels of a head; ``width`` if None, so that attention grows with the convolutions.
        window_size: pixels of an attention window, one integer or (rows, columns).
        k: stride of keys and values; see `vitfast.nn.LocalAttention2d`.
        attn_drop: dropout probability of the attention weights.
        proj_drop: dropout probability of the attention's output.
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
        width: channels of the first stage; each stage doubles them.
        stem: True for ImageNet's stem, which shrinks images by 4; False for CIFAR's, which keeps their size.
    """

    def __init__(
        self,
        *,
        num_blocks: Sequence[int],
        num_blocks2: Sequence[int],
        bottleneck: bool,
        heads: Sequence[int] = (3, 6, 12, 24),
        dim_head: int | None = None,
        window_size: int | tuple[int, int] = 7,
        k: int = 1,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        num_classes: int = 1000,
        in_channels: int = 3,
        width: int = 64,
        stem: bool = True,
    ):
        num_blocks = check_stage_counts("num_blocks", num_blocks, minimum=1)
        num_blocks2 = check_stage_counts("num_blocks2", num_blocks2, minimum=0)
        if any(2 * attention > total for attention, total in zip(num_blocks2, num_blocks, strict=True)):
            raise ValueError(
                f"num_blocks2 must be at most half of num_blocks = {num_blocks} in each stage, because each attention "
                f"block follows a convolution block; got {num_blocks2}"
            )
        convolution = partial(PreActivationBlock, bottleneck=bottleneck)
        attention = partial(
            AttentionBlock,
            dim_head=width if dim_head is None else dim_head,
            window_size=window_size,
            k=k,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
        )
        super().__init__(
            [
                _build_up(total, count, convolution, partial(attention, heads=stage_heads))
                for total, count, stage_heads in zip(
                    num_blocks, num_blocks2, check_stage_counts("heads", heads, minimum=1), strict=True
                )
            ],
            bottleneck=bottleneck,
            preactivation=True,
            num_classes=num_classes,
            in_channels=in_channels,
            width=width,
            stem=stem,
        )
        self.layer0 = nn.Sequential(OrderedDict(layer0=self.layer0))  # the authors' keys: layer0.layer0.0.weight


def _build_up(total: int, count: int, convolution: MakeBlock, attention: MakeBlock) -> list[MakeBlock]:
    """The blocks of a stage by the build-up rule."""
    return [convolution] * (total - 2 * count) + [convolution, attention] * count


for _depth, _num_blocks, _num_blocks2 in (
    (18, (2, 2, 2, 2), (0, 1, 1, 1)),
    (34, (3, 4, 6, 4), (0, 1, 3, 2)),
    (50, (3, 4, 6, 4), (0, 1, 3, 2)),
    (101, (3, 4, 23, 4), (0, 1, 3, 2)),
    (152, (3, 8, 36, 4), (0, 1, 3, 2)),
):
    register(f"alternet_{_depth}", AlterNet, num_blocks=_num_blocks, num_blocks2=_num_blocks2, bottleneck=_depth >= 50)

# For images of 32 x 32: the stem keeps their size, and windows of 4 x 4 divide the maps of all stages.
for _depth, _num_blocks, _num_blocks2 in ((18, (2, 2, 2, 2), (0, 1, 1, 1)), (50, (3, 4, 6, 4), (0, 1, 1, 2))):
    register(
        f"alternet_{_depth}_cifar",
        AlterNet,
        num_blocks=_num_blocks,
        num_blocks2=_num_blocks2,
        bottleneck=_depth >= 50,
        window_size=4,
        stem=False,
    )
