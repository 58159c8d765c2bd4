"""Predictions averaged: over draws of the same model, over models, and over time.

Sources: Gal & Ghahramani, "Dropout as a Bayesian Approximation", ICML 2016 (Monte Carlo dropout); Lakshminarayanan,
Pritzel & Blundell, "Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles", NeurIPS 2017; Park,
Lee, Lee & Kim, "Vector Quantized Bayesian Neural Network Inference for Data Streams", AAAI 2021 (temporal smoothing).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral, Real

import torch
from torch import Tensor, nn

__all__ = ["TemporalSmoothing", "predict", "sample_predictions", "temporal_smoothing"]


def sample_predictions(model: nn.Module | Sequence[nn.Module], x: Tensor, samples: int = 1) -> Iterator[Tensor]:
    """Logarithms of class probabilities (B, classes), one tensor per forward pass: log softmax(model(x)).

    Models are in evaluation mode meanwhile, and back in their own afterwards; only layers that draw in evaluation mode
    too, such as `vitfast.nn.MCDropout`, make samples of one model differ. No gradients are recorded.

    Args:
        model: from inputs to logits (B, classes); or several, an ensemble, each of which is asked ``samples`` times.
        x: the inputs of a batch.
        samples: forward passes of each model.

    Raises:
        TypeError: ``model`` is neither a module nor a sequence of modules, or ``samples`` is no integer.
        ValueError: ``samples`` is less than 1, there is no model, or a model does not return (B, classes).
    """
    several = isinstance(model, Sequence | nn.ModuleList)
    models = model if several else [model]
    if not all(isinstance(each, nn.Module) for each in models):
        raise TypeError(f"model must be a torch.nn.Module or a sequence of them; got {type(model).__name__}")
    if len(models) == 0:
        raise ValueError("an ensemble needs at least one model; got none")
    if not isinstance(samples, Integral) or isinstance(samples, bool):
        raise TypeError(f"samples must be an integer; got {samples!r}")
    if samples < 1:
        raise ValueError(f"samples must be at least 1; got {samples}")
    return (_log_probabilities(each, x) for each in models for _ in range(samples))


@torch.no_grad()
def _log_probabilities(model: nn.Module, x: Tensor) -> Tensor:
    with _evaluating(model):
        logits = model(x)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"a model must return logits, (B, classes); {type(model).__name__} returned {got}")
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)


def predict(model: nn.Module | Sequence[nn.Module], x: Tensor, samples: int = 1, *, logarithm: bool = False) -> Tensor:
    r"""The mean of class probabilities over draws and models, (B, classes).

    :math:`p(y | x) = \frac{1}{S} \sum_s \mathrm{softmax}(f_s(x))`, in float32 at least. Only the sum is kept, whatever
    the number of samples.

    Args:
        model, x, samples: those of `sample_predictions`, with its errors.
        logarithm: whether to return log p, in which the smallest probabilities do not become 0.

    >>> model = vitfast.create_model("resnet_mcdo_18", num_classes=10, stem=False)
    >>> vitfast.predict(model, torch.randn(8, 3, 32, 32), samples=50).sum(1)  # ones
    """
    total, count = None, 0
    for sample in sample_predictions(model, x, samples):
        total = sample if total is None else torch.logaddexp(total, sample)
        count += 1
    mean = total - math.log(count)
    return mean if logarithm else mean.exp()


def temporal_smoothing(predictions: Tensor, time_constant: float) -> Tensor:
    r"""Predictions for a stream of inputs, each averaged with those before it, which weigh less the older they are.

    :math:`\bar p_t = \sum_{k=0}^{t} e^{-k/\tau} p_{t-k} \,/\, \sum_{k=0}^{t} e^{-k/\tau}`

    Args:
        predictions: (T, ...), for example class probabilities (T, classes), one per time step.
        time_constant: tau > 0, in time steps.

    Returns:
        (T, ...). Differentiable.

    Raises:
        TypeError: ``time_constant`` is no number.
        ValueError: ``time_constant`` is not above 0, or ``predictions`` has no dimension.
    """
    if predictions.dim() == 0:
        raise ValueError("predictions must be (T, ...), one per time step; got a tensor without dimensions")
    smooth = TemporalSmoothing(time_constant)
    steps = [smooth(prediction) for prediction in predictions]
    return torch.stack(steps) if steps else predictions


class TemporalSmoothing:
    """`temporal_smoothing` for one prediction after the other, as they come.

    Args:
        time_constant: tau > 0, in time steps.

    >>> smooth = TemporalSmoothing(time_constant=5)
    >>> for frame in video:
    ...     probabilities = smooth(vitfast.predict(model, frame))
    """

    def __init__(self, time_constant: float):
        if isinstance(time_constant, bool) or not isinstance(time_constant, Real):
            raise TypeError(f"time_constant must be a number; got {time_constant!r}")
        if not time_constant > 0:
            raise ValueError(f"time_constant must be above 0; got {time_constant}")
        self.time_constant = float(time_constant)
        self.reset()

    def reset(self) -> None:
        """Forgets all predictions: the next one is the first."""
        self._sum: Tensor | None = None
        self._weight = 0.0

    def __call__(self, prediction: Tensor) -> Tensor:
        """The average of this prediction and those before it, which had the same shape."""
        if self._sum is not None and self._sum.shape != prediction.shape:
            raise ValueError(
                f"a prediction must have the shape of the one before, {tuple(self._sum.shape)}; got "
                f"{tuple(prediction.shape)}; reset() begins another stream"
            )
        decay = math.exp(-1 / self.time_constant)
        self._sum = prediction if self._sum is None else decay * self._sum + prediction
        self._weight = decay * self._weight + 1
        return self._sum / self._weight


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode of every module, and then each one's own mode again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
