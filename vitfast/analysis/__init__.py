"""What a trained model does, measured."""

from vitfast.analysis import attention, calibration

__all__ = ["attention", "calibration"]
