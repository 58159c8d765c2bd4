"""timm, the library whose modules vitfast.nn must match, is importable without torchvision."""

import enum
import sys
import types

STANDINS = (
    "torchvision",
    "torchvision.datasets",
    "torchvision.models",
    "torchvision.models.feature_extraction",
    "torchvision.ops",
    "torchvision.ops.misc",
    "torchvision.transforms",
    "torchvision.transforms.functional",
)


class StandIn(types.ModuleType):
    """A module in which every name is an empty class, which is enough to import timm."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def make_timm_importable():
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):  # not there, or built for another torch
        for name in STANDINS:
            sys.modules[name] = StandIn(name)
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, sys.modules[name])
        modes = ("NEAREST", "BILINEAR", "BICUBIC", "BOX", "HAMMING", "LANCZOS")  # timm makes a table of them
        functional = sys.modules["torchvision.transforms.functional"]
        functional.InterpolationMode = enum.Enum("InterpolationMode", modes)


make_timm_importable()
