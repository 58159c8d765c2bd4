"""What residual networks are made of: stem, blocks, stages, classifier.

A network is a stem, four stages and a classifier. The stages work at ``channels`` = width, 2 width, 4 width, 8 width;
from the second on, the first block of a stage halves the map. A block puts out ``expansion * channels``, where the
expansion is 1 for two 3 x 3 convolutions, and 4 for a bottleneck of 1 x 1, 3 x 3 and 1 x 1.

- post-activation (He et al., "Deep Residual Learning", CVPR 2016): x -> relu(shortcut(x) + F(x)), where F ends with a
  normalisation;
- pre-activation (He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016): x -> shortcut(x) + F(a),
  a = relu(norm(x)), where F ends with a convolution. Where the shape changes, the shortcut takes a instead of x.

Two options change what a network computes, and not its parameters: `vitfast.nn.MCDropout` before the last convolution
of each branch, and smoothing (`vitfast.nn.Smoothing2d`) after the stages.

The state-dict keys are those of the models of Park & Kim, "How Do Vision Transformers Work?", ICLR 2022.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from vitfast.nn import MCDropout
from vitfast.nn._checks import is_integer, positive_integer

MakeBlock = Callable[[int, int, int], nn.Module]
"""(in_channels, channels, stride) -> a block, which has an attribute ``out_channels``."""

MakeSmoothing = Callable[[int], nn.Module]
"""channels -> a module from maps of that many channels to maps of as many."""


def expansion(bottleneck: bool) -> int:
    """How many times wider than its ``channels`` the output of a block is."""
    return 4 if bottleneck else 1


class PostActivationBlock(nn.Module):
    """x -> relu(shortcut(x) + F(x)); F normalises after each convolution."""

    def __init__(self, in_channels: int, channels: int, stride: int, *, bottleneck: bool, mc_dropout: float = 0.0):
        super().__init__()
        *convolutions, last = _convolutions(in_channels, channels, stride, bottleneck)
        self.out_channels = last.out_channels
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != self.out_channels:
            self.shortcut.append(_convolution(in_channels, self.out_channels, 1, stride))
            self.shortcut.append(nn.BatchNorm2d(self.out_channels))
        branch = [nn.Sequential(c, nn.BatchNorm2d(c.out_channels), nn.ReLU()) for c in convolutions]
        branch.append(_after_dropout(mc_dropout, last, nn.BatchNorm2d(last.out_channels)))
        self.conv1, self.conv2, self.conv3 = branch if bottleneck else (*branch, nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.conv3(self.conv2(self.conv1(x))))


class PreActivationBlock(nn.Module):
    """x -> shortcut(x) + F(relu(bn(x))); F normalises before each convolution.

    ``normalize_shortcut`` adds a normalisation to the shortcut's convolution, which in some of the authors' models is.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        *,
        bottleneck: bool,
        mc_dropout: float = 0.0,
        normalize_shortcut: bool = False,
    ):
        super().__init__()
        first, *inner, last = _convolutions(in_channels, channels, stride, bottleneck)
        self.out_channels = last.out_channels
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != self.out_channels:
            self.shortcut.append(_convolution(in_channels, self.out_channels, 1, stride))
            if normalize_shortcut:
                self.shortcut.append(nn.BatchNorm2d(self.out_channels))
        self.bn = nn.BatchNorm2d(in_channels)
        branch = [first, *(nn.Sequential(nn.BatchNorm2d(c.in_channels), nn.ReLU(), c) for c in inner)]
        branch.append(_after_dropout(mc_dropout, nn.BatchNorm2d(last.in_channels), nn.ReLU(), last))
        self.conv1, self.conv2, self.conv3 = branch if bottleneck else (*branch, nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn(x))
        skip = self.shortcut(activated) if len(self.shortcut) > 0 else x
        return skip + self.conv3(self.conv2(self.conv1(activated)))


def _convolutions(in_channels: int, channels: int, stride: int, bottleneck: bool) -> list[nn.Conv2d]:
    """The convolutions of a block's branch."""
    if bottleneck:
        return [
            _convolution(in_channels, channels, 1),
            _convolution(channels, channels, 3, stride),
            _convolution(channels, expansion(bottleneck) * channels, 1),
        ]
    return [_convolution(in_channels, channels, 3, stride), _convolution(channels, channels, 3)]


def _after_dropout(rate: float, *layers: nn.Module) -> nn.Sequential:
    """The layers in a row, after dropout if there is any; their state-dict keys are the same with and without it."""
    named = [(str(i), layer) for i, layer in enumerate(layers)]
    return nn.Sequential(OrderedDict([("dropout", MCDropout(rate)), *named] if rate else named))


def _convolution(in_channels: int, out_channels: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, size, stride=stride, padding=size // 2, bias=False)


def make_stem(in_channels: int, width: int, *, imagenet: bool, preactivation: bool) -> nn.Sequential:
    """The layers before the first stage.

    For ImageNet's image sizes a 7 x 7 convolution and max pooling, which shrink the map by 4; else a 3 x 3 convolution.
    Pre-activation networks leave normalisation and activation to their first block.
    """
    stem = nn.Sequential(
        _convolution(in_channels, width, 7, stride=2) if imagenet else _convolution(in_channels, width, 3)
    )
    if not preactivation:
        stem.extend([nn.BatchNorm2d(width), nn.ReLU()])
    if imagenet:
        stem.append(nn.MaxPool2d(3, stride=2, padding=1))
    return stem


def make_stage(blocks: Sequence[MakeBlock], in_channels: int, channels: int, stride: int) -> nn.Sequential:
    """Blocks in a row; the first one has the stride."""
    stage = nn.Sequential()
    for make_block in blocks:
        stage.append(make_block(in_channels, channels, stride))
        in_channels, stride = stage[-1].out_channels, 1
    return stage


class Classifier(nn.Module):
    """Mean over the map and a linear layer; in a pre-activation network after the normalisation its blocks lack."""

    def __init__(self, in_channels: int, num_classes: int, *, preactivation: bool):
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels) if preactivation else nn.Identity()
        self.relu = nn.ReLU() if preactivation else nn.Identity()
        self.dense = nn.Linear(in_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(self.relu(self.bn(x)).mean((2, 3)))


class ResidualNetwork(nn.Module):
    """A stem, four stages of blocks, smoothed or not, and a classifier: (B, in_channels, H, W) -> (B, num_classes).

    Args:
        stages: for each of the four stages, how to make its blocks.
        bottleneck: whether they are bottlenecks.
        preactivation: whether they normalise before the convolutions.
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
        width: channels of the first stage.
        stem: True for ImageNet's stem, which shrinks images by 4; False for one that keeps their size.
        smoothing: how to make what smooths the output of a stage.
        num_smoothings: how often, after each of the four stages.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[MakeBlock]],
        *,
        bottleneck: bool,
        preactivation: bool,
        num_classes: int,
        in_channels: int,
        width: int,
        stem: bool,
        smoothing: MakeSmoothing = nn.Identity,
        num_smoothings: Sequence[int] = (0, 0, 0, 0),
    ):
        super().__init__()
        for name, value in (("num_classes", num_classes), ("in_channels", in_channels), ("width", width)):
            positive_integer(name, value)
        self.in_channels = in_channels
        self.layer0 = make_stem(in_channels, width, imagenet=stem, preactivation=preactivation)
        channels = [width, 2 * width, 4 * width, 8 * width]
        widened = [expansion(bottleneck) * c for c in channels]
        self.layer1 = make_stage(stages[0], width, channels[0], stride=1)
        self.layer2 = make_stage(stages[1], widened[0], channels[1], stride=2)
        self.layer3 = make_stage(stages[2], widened[1], channels[2], stride=2)
        self.layer4 = make_stage(stages[3], widened[2], channels[3], stride=2)
        self.smooth1, self.smooth2, self.smooth3, self.smooth4 = (
            nn.Sequential(*(smoothing(c) for _ in range(count)))
            for c, count in zip(widened, num_smoothings, strict=True)
        )
        self.classifier = nn.Sequential(Classifier(widened[3], num_classes, preactivation=preactivation))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"images must have the shape (B, {self.in_channels}, H, W); got {tuple(x.shape)}")
        x = self.layer0(x)
        x = self.smooth1(self.layer1(x))
        x = self.smooth2(self.layer2(x))
        x = self.smooth3(self.layer3(x))
        x = self.smooth4(self.layer4(x))
        return self.classifier(x)


def check_stage_counts(name: str, counts: Sequence[int], minimum: int) -> tuple[int, ...]:
    """One integer per stage."""
    expected = f"{name} must be four integers, one per stage, of at least {minimum}"
    if not isinstance(counts, Sequence) or not all(is_integer(count) for count in counts):
        raise TypeError(f"{expected}; got {counts!r}")
    if len(counts) != 4 or min(counts) < minimum:
        raise ValueError(f"{expected}; got {counts}")
    return tuple(counts)
