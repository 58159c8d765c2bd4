"""timm, torchvision and transformers, which the tests compare with, made importable beside a CPU build of PyTorch.

torchvision's wheels are built for CUDA: its compiled operators do not load beside a CPU-only PyTorch, and its import
then fails, for want of two operators, with timm's and transformers'. Their declarations are enough to import it.
"""

import sys

import torch

_library = None


def make_importable() -> None:
    global _library
    try:
        import torchvision
    except RuntimeError:  # operator torchvision::nms does not exist
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401


make_importable()
