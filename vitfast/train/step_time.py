"""The time of a training step, and whether two ways of computing it agree."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitfast.ops.backend import backend
from vitfast.train.loop import train_step
from vitfast.train.progress import Track, silent
from vitfast.train.recipes import Recipe, make_optimizer

__all__ = ["Agreement", "agreement", "step_times"]


@dataclass(frozen=True)
class Agreement:
    """One training step in float32, fused and in plain PyTorch, against plain PyTorch in float64.

    Gradients are compared as one vector of all parameters: :math:`|g - g_{64}| / |g_{64}|`.

    Attributes:
        loss_fused, loss_plain, loss_float64: the loss of the same batch.
        gradient_error_fused, gradient_error_plain: relative distance of the gradient from the float64 one.
        gradient_difference: relative distance of the two float32 gradients from each other.
    """

    loss_fused: float
    loss_plain: float
    loss_float64: float
    gradient_error_fused: float
    gradient_error_plain: float
    gradient_difference: float


def step_times(
    variants: dict[str, tuple[nn.Module, str | None]],
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    *,
    rounds: int,
    track: Track = silent,
) -> dict[str, list[float]]:
    """Seconds of a training step on one batch (forward, backward and optimiser) of each variant, ``rounds`` times.

    Args:
        variants: name -> (model, backend): a backend for `vitfast.backend`, or None for the fused kernels. The models
            are copied and left as they are.

    The variants are measured in turn, so that all meet the same disturbances, and the one that begins changes with
    every round. The round before the first is not counted: it compiles, and sets up the optimiser's state.
    """
    prepared = []
    for name, (model, backend_name) in variants.items():
        model = copy.deepcopy(model).train()
        prepared.append((name, model, make_optimizer(model, recipe), _forced(backend_name)))
    seconds = {name: [] for name in variants}
    for turn in track(range(rounds + 1), "timing steps", rounds + 1):
        first = turn % len(prepared)
        for name, model, optimizer, context in prepared[first:] + prepared[:first]:
            with context():
                _finish(images)
                start = time.perf_counter()
                train_step(model, optimizer, images, labels, recipe.label_smoothing)
                _finish(images)
                elapsed = time.perf_counter() - start
            if turn > 0:
                seconds[name].append(elapsed)
    return seconds


def agreement(model: nn.Module, images: Tensor, labels: Tensor) -> Agreement:
    """Compares loss and gradients of the model on one batch; see `Agreement`. The model is left as it was."""
    loss_fused, fused = _gradient(model, images, labels, None)
    loss_plain, plain = _gradient(model, images, labels, "reference")
    loss_exact, exact = _gradient(copy.deepcopy(model).double(), images.double(), labels, "reference")
    norm = exact.norm()
    return Agreement(
        loss_fused,
        loss_plain,
        loss_exact,
        float((fused - exact).norm() / norm),
        float((plain - exact).norm() / norm),
        float((fused - plain).norm() / norm),
    )


def _finish(tensor: Tensor) -> None:
    """Waits until the device of ``tensor`` has done its work."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def _forced(name: str | None) -> Callable[[], AbstractContextManager]:
    return nullcontext if name is None else partial(backend, name)


def _gradient(model: nn.Module, images: Tensor, labels: Tensor, backend_name: str | None) -> tuple[float, Tensor]:
    """The loss, and the gradient of all parameters as one float64 vector, of a copy of the model in training mode."""
    model = copy.deepcopy(model).train()
    with _forced(backend_name)():
        loss = F.cross_entropy(model(images), labels)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
    return float(loss.detach()), torch.cat([g.flatten().double() for g in gradients])
