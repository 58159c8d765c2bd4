"""torch.nn: normalisation, activation and blur that follow each other in an ``nn.Sequential``."""

from __future__ import annotations

from torch import Tensor, nn

from vitfast.models.acceleration import Adaptation
from vitfast.models.acceleration.blurs import blur_after_norm, may_fuse


class FusedSequential(nn.Sequential):
    """`torch.nn.Sequential` in which a batch normalisation, a ReLU and a blur are one pass in evaluation mode.

    In training they are two: the normalisation, and the others.
    """

    def forward(self, input: Tensor) -> Tensor:
        layers = list(self)
        while layers:
            if len(layers) >= 3 and may_fuse(*layers[:3]):
                input = blur_after_norm(*layers[:3], input)
                del layers[:3]
            else:
                input = layers.pop(0)(input)
        return input


def _holds_a_blur_after_a_norm(module: nn.Sequential) -> bool:
    layers = list(module)
    return any(may_fuse(*three) for three in zip(layers, layers[1:], layers[2:], strict=False))


ADAPTATIONS = {nn.Sequential: Adaptation(FusedSequential, applies=_holds_a_blur_after_a_norm)}
