"""What a model predicts for a split, and how good that is."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitfast.analysis import calibration, ensemble, robustness
from vitfast.train.data import ImageData, Split, batches

__all__ = ["Evaluation", "evaluate", "evaluate_noisy", "predict"]


@dataclass(frozen=True)
class Evaluation:
    """Predictions for a split, and what can be said about them.

    ``logits`` (n, classes), here logarithms of probabilities, and ``labels`` (n,) are on the CPU. The measures and
    their 95 % intervals are those of `vitfast.analysis.calibration`.
    """

    logits: Tensor
    labels: Tensor

    @property
    def accuracy(self) -> float:
        return calibration.accuracy(self.logits, self.labels)

    @property
    def accuracy_interval(self) -> tuple[float, float]:
        return calibration.wilson_interval(self.accuracy, len(self.labels))

    @property
    def nll(self) -> float:
        return calibration.nll(self.logits, self.labels)

    @property
    def nll_interval(self) -> tuple[float, float]:
        return calibration.nll_interval(self.logits, self.labels)

    @property
    def expected_calibration_error(self) -> float:
        return self.reliability_diagram.expected_calibration_error

    @property
    def expected_calibration_error_interval(self) -> tuple[float, float]:
        return calibration.expected_calibration_error_interval(self.logits, self.labels)

    @property
    def reliability_diagram(self) -> calibration.ReliabilityDiagram:
        return calibration.reliability_diagram(self.logits, self.labels)


def predict(model: nn.Module, data: ImageData, split: Split, *, batch_size: int = 256, samples: int = 1) -> Tensor:
    """Logarithms of the class probabilities (n, classes), on the CPU: `vitfast.predict` for all images of a split."""
    device = next(model.parameters()).device
    return torch.cat(
        [
            ensemble.predict(model, images.to(device), samples, logarithm=True).cpu()
            for images, _ in batches(data, split, batch_size)
        ]
    )


def evaluate(model: nn.Module, data: ImageData, split: Split, *, batch_size: int = 256, samples: int = 1) -> Evaluation:
    """`predict` together with the labels."""
    return Evaluation(predict(model, data, split, batch_size=batch_size, samples=samples), split.labels)


def evaluate_noisy(
    model: nn.Module, data: ImageData, split: Split, deviation: float, *, seed: int = 0, batch_size: int = 256
) -> Evaluation:
    """`evaluate` on images with `gaussian_noise`, the same for every model of the same seed."""
    generator = torch.Generator().manual_seed(seed)
    noisy = robustness.gaussian_noise(split.images.float() / 255, deviation, generator)
    return evaluate(model, data, dataclasses.replace(split, images=255 * noisy), batch_size=batch_size)
