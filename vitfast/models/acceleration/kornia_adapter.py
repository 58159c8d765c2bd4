"""kornia: blur pooling and max-blur pooling."""

from __future__ import annotations

import kornia
import torch.nn.functional as F
from kornia.filters import BlurPool2D, MaxBlurPool2D
from torch import Tensor, nn

from vitfast import functional
from vitfast.models.acceleration import Adaptation
from vitfast.models.acceleration.blurs import BLURS, FusedBlur, takes


class FusedBlurPool2D(BlurPool2D, FusedBlur):
    """`kornia.filters.BlurPool2D` on `vitfast.functional.blur_pool2d`."""

    def blur_options(self) -> dict:
        return _options(self)

    def forward(self, input: Tensor) -> Tensor:
        return functional.blur_pool2d(input, **_options(self)) if takes(input) else super().forward(input)


class FusedMaxBlurPool2D(MaxBlurPool2D):
    """`kornia.filters.MaxBlurPool2D` on `vitfast.functional.blur_pool2d`."""

    def forward(self, input: Tensor) -> Tensor:
        if not takes(input):
            return super().forward(input)
        pooled = F.max_pool2d(input, self.max_pool_size, stride=1)
        return functional.blur_pool2d(pooled, **_options(self))


def _options(module: BlurPool2D | MaxBlurPool2D) -> dict:
    kernel = module.kernel.reshape(module.kernel.shape[-2:])
    return {"kernel": kernel, "stride": module.stride, "padding_mode": "zeros"}


def _pads_otherwise(module: nn.Module) -> str | None:
    taps = module.kernel.shape[-1]
    if taps > 7:
        return f"its kernel has {taps} taps, more than 7"
    version = tuple(int(part) for part in kornia.__version__.split(".")[:2])
    if taps % 2 == 0 and version < (0, 9):
        return f"kornia {kornia.__version__} pads even kernels otherwise than kornia 0.9"
    return None


BLURS.add(BlurPool2D)
ADAPTATIONS = {
    BlurPool2D: Adaptation(FusedBlurPool2D, _pads_otherwise),
    MaxBlurPool2D: Adaptation(FusedMaxBlurPool2D, _pads_otherwise),
}
