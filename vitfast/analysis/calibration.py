r"""How good the predicted probabilities of a classifier are.

With n images, logits z_i, labels y_i, probabilities :math:`p_i = \mathrm{softmax}(z_i)`, the predicted class
:math:`\hat y_i = \arg\max_k p_{ik}` and its confidence :math:`c_i = \max_k p_{ik}`:

* accuracy: the share of images with :math:`\hat y_i = y_i`;
* negative log-likelihood: :math:`-\frac1n \sum_i \log p_{i, y_i}`, in nats;
* expected calibration error: :math:`\sum_b \frac{n_b}{n} |\mathrm{acc}_b - \mathrm{conf}_b|`, over bins of equal width
  that sort the images by confidence.

All three are measured on a sample of images; the functions ``*_interval`` say how far another sample of the same size
would stray, at 95 % for the default ``z``.

Every function takes ``logits`` (n, classes) and ``labels`` (n,). Log-probabilities are logits too, so predictions that
were averaged over an ensemble are passed as the logarithm of their mean. All sums are float64.

Sources: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017; Naeini et al., "Obtaining Well Calibrated
Probabilities Using Bayesian Binning", AAAI 2015; for the intervals Wilson, JASA 22 (1927), and Efron, "Bootstrap
Methods: Another Look at the Jackknife", Annals of Statistics 7 (1979).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "ReliabilityDiagram",
    "accuracy",
    "expected_calibration_error",
    "expected_calibration_error_interval",
    "nll",
    "nll_interval",
    "reliability_diagram",
    "wilson_interval",
]


@dataclass(frozen=True)
class ReliabilityDiagram:
    """Accuracy against confidence, per bin of confidence; float64 tensors on the CPU.

    Attributes:
        edges: (bins + 1,), from 0 to 1. Bin b holds the confidences in (edges[b], edges[b + 1]]: 1.0 is in the last.
        count: (bins,), images in each bin, int64.
        accuracy: (bins,), share of them that are classified correctly; NaN where a bin is empty.
        confidence: (bins,), their mean confidence; NaN where a bin is empty.
    """

    edges: Tensor
    count: Tensor
    accuracy: Tensor
    confidence: Tensor

    @property
    def expected_calibration_error(self) -> float:
        """The gap between accuracy and confidence, averaged over the images."""
        gap = (self.accuracy - self.confidence).abs().nan_to_num(0.0)
        return float((gap * self.count).sum() / self.count.sum())


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of images whose largest logit is that of their label, in [0, 1]."""
    _check(logits, labels)
    return float((logits.argmax(1) == labels).double().mean())


def nll(logits: Tensor, labels: Tensor) -> float:
    """The mean negative log-likelihood of the labels, in nats; infinite where a label has probability 0."""
    return float(_losses(logits, labels).mean())


def nll_interval(logits: Tensor, labels: Tensor, *, z: float = 1.96) -> tuple[float, float]:
    """``nll +- z * standard error`` by the central limit theorem, cut off at 0; needs at least two images."""
    losses = _losses(logits, labels)
    if len(losses) < 2:
        raise ValueError("the spread of the NLL needs at least two images; got one")
    mean, half = float(losses.mean()), z * float(losses.std()) / math.sqrt(len(losses))
    return max(0.0, mean - half), mean + half


def expected_calibration_error(logits: Tensor, labels: Tensor, *, bins: int = 15) -> float:
    """The expected calibration error (ECE) in [0, 1], with bins as in `reliability_diagram`.

    It is biased upwards on few images: a bin's accuracy strays from its expectation even where the model is calibrated.
    """
    return reliability_diagram(logits, labels, bins=bins).expected_calibration_error


def expected_calibration_error_interval(
    logits: Tensor, labels: Tensor, *, bins: int = 15, z: float = 1.96, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """``ECE +- z * standard error``, cut off at 0 and 1.

    The standard error is that of ``resamples`` bootstrap samples of the images. The interval tells how much the
    measured ECE varies from sample to sample; the upward bias of `expected_calibration_error` is in its centre.
    """
    centre = expected_calibration_error(logits, labels, bins=bins)
    _, place, confidence, correct = _sort_into_bins(logits, labels, bins)
    gap, n = (correct - confidence).cpu(), len(labels)
    place, generator = place.cpu(), torch.Generator().manual_seed(seed)
    errors = torch.empty(resamples, dtype=torch.float64)
    for i in range(resamples):
        drawn = torch.randint(n, (n,), generator=generator)
        # The sum over the images of a bin is n_b (acc_b - conf_b): no division, so empty bins need no care.
        errors[i] = torch.bincount(place[drawn], weights=gap[drawn], minlength=bins).abs().sum() / n
    half = z * float(errors.std())
    return max(0.0, centre - half), min(1.0, centre + half)


def reliability_diagram(logits: Tensor, labels: Tensor, *, bins: int = 15) -> ReliabilityDiagram:
    """Sorts the images into ``bins`` bins of equal width by their confidence; see `ReliabilityDiagram`."""
    _check(logits, labels)
    if bins < 1:
        raise ValueError(f"bins must be at least 1; got {bins}")
    edges, place, confidence, correct = _sort_into_bins(logits, labels, bins)
    count = torch.bincount(place, minlength=bins)
    right = torch.bincount(place, weights=correct, minlength=bins)
    summed = torch.bincount(place, weights=confidence, minlength=bins)
    return ReliabilityDiagram(edges, count.cpu(), (right / count).cpu(), (summed / count).cpu())


def wilson_interval(share: float, n: int, *, z: float = 1.96) -> tuple[float, float]:
    """The interval of a share measured on ``n`` images, at 95 % for the default ``z``.

    Unlike ``share +- z * standard error`` it stays inside [0, 1] and keeps a width when the share is 0 or 1.
    """
    if n < 1 or not 0 <= share <= 1:
        raise ValueError(f"a share in [0, 1] of at least one image is needed; got {share} of {n}")
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """(n,), the negative log-likelihood of each label."""
    _check(logits, labels)
    return -logits.double().log_softmax(1).gather(1, labels[:, None]).squeeze(1)


def _sort_into_bins(logits: Tensor, labels: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The bins' edges (bins + 1,) and for each image its bin, its confidence and 1 or 0 for right or wrong, (n,)."""
    confidence, predicted = logits.double().softmax(1).max(1)
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    # With the inner edges only, whatever rounding makes of a confidence of 1 falls into the last bin.
    place = torch.bucketize(confidence, edges[1:-1].to(confidence.device))
    return edges, place, confidence, (predicted == labels).double()


def _check(logits: Tensor, labels: Tensor) -> None:
    if logits.dim() != 2 or labels.dim() != 1 or len(logits) != len(labels) or logits.numel() == 0:
        raise ValueError(
            "logits must have the shape (n, classes) and labels (n,), with n and classes at least 1; "
            f"got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    if not logits.is_floating_point() or labels.dtype != torch.int64:
        raise TypeError(f"logits must be floating point and labels int64; got {logits.dtype} and {labels.dtype}")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(
            f"labels must be in 0 ... {logits.shape[1] - 1}; got {int(labels.min())} ... {int(labels.max())}"
        )
    if logits.isnan().any():
        raise ValueError("logits contain NaN: the model has diverged, or its input was not finite")
