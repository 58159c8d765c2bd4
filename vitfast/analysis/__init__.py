"""What a trained model does, measured."""

from vitfast.analysis import attention, calibration, ensemble, robustness
from vitfast.analysis.ensemble import TemporalSmoothing, predict, sample_predictions, temporal_smoothing

__all__ = [
    "TemporalSmoothing",
    "attention",
    "calibration",
    "ensemble",
    "predict",
    "robustness",
    "sample_predictions",
    "temporal_smoothing",
]
