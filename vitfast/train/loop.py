"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitfast.train.data import ImageData, batch_count, batches
from vitfast.train.evaluate import evaluate
from vitfast.train.progress import Track, silent
from vitfast.train.recipes import Recipe, cosine_schedule, make_optimizer

__all__ = ["DivergedError", "EpochLog", "train", "train_step"]


class DivergedError(RuntimeError):
    """The loss is no longer a finite number."""


@dataclass(frozen=True)
class EpochLog:
    """One epoch of training.

    Attributes:
        epoch: 1 for the first.
        train_loss, train_accuracy: means over the augmented training batches, each seen before the step it causes.
        held_out_nll, held_out_accuracy: on the held-out images, after the epoch.
        seconds: of the training alone, without the evaluation.
    """

    epoch: int
    train_loss: float
    train_accuracy: float
    held_out_nll: float
    held_out_accuracy: float
    seconds: float


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """One step of the optimiser; returns the loss and the logits before it."""
    optimizer.zero_grad(set_to_none=True)
    logits = model(images)
    loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    loss.backward()
    optimizer.step()
    return loss.detach(), logits.detach()


def train(
    model: nn.Module,
    data: ImageData,
    recipe: Recipe,
    *,
    seed: int = 0,
    track: Track = silent,
    on_epoch: Callable[[EpochLog], None] = lambda log: None,
) -> list[EpochLog]:
    """Trains ``model`` in place, on the device it is on, and evaluates it on the held-out images after every epoch.

    Args:
        recipe: the settings.
        seed: of the order of the images, their augmentation and the model's own randomness.
        track: shows progress; see `vitfast.train.progress`.
        on_epoch: called with the log of each epoch as soon as it ends.

    Raises:
        DivergedError: the loss became infinite or NaN.
    """
    device = next(model.parameters()).device
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = make_optimizer(model, recipe)
    steps = batch_count(data.train, recipe.batch_size)
    schedule = cosine_schedule(optimizer, recipe.epochs * steps, round(recipe.warmup_epochs * steps))
    logs = []
    for epoch in range(1, recipe.epochs + 1):
        model.train()
        total_loss = correct = images_seen = 0
        start = time.perf_counter()
        batch_stream = batches(data, data.train, recipe.batch_size, generator)
        for images, labels in track(batch_stream, f"epoch {epoch}/{recipe.epochs}", steps):
            images, labels = images.to(device), labels.to(device)
            loss, logits = train_step(model, optimizer, images, labels, recipe.label_smoothing)
            schedule.step()
            if not math.isfinite(loss):
                raise DivergedError(f"the loss became {float(loss)} in epoch {epoch}; try a smaller learning rate")
            total_loss += float(loss) * len(labels)
            correct += int((logits.argmax(1) == labels).sum())
            images_seen += len(labels)
        seconds = time.perf_counter() - start
        held_out = evaluate(model, data, data.held_out)
        logs.append(
            EpochLog(epoch, total_loss / images_seen, correct / images_seen, held_out.nll, held_out.accuracy, seconds)
        )
        on_epoch(logs[-1])
    return logs
