"""The study: a ResNet, the same with spatial smoothing, and AlterNet, trained on the same images and compared.

AlterNet replaces the last blocks of the stages of a ResNet by attention in windows (Park & Kim, "How Do Vision
Transformers Work?", ICLR 2022); smoothing blurs the outputs of the stages (Park & Kim, "Blurs Behave Like Ensembles",
ICML 2022). The study trains the three with one recipe, measures accuracy, negative log-likelihood and calibration on
images held out from training, with and without noise, times AlterNet's training step with the fused operators and with
the same operators in plain PyTorch, and looks at what its attention attends to.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitfast.models import create_model
from vitfast.train.attention_view import AttentionView, attention_views
from vitfast.train.data import ImageData, batches, load
from vitfast.train.evaluate import Evaluation, evaluate, evaluate_noisy
from vitfast.train.loop import EpochLog, train
from vitfast.train.progress import Track, silent
from vitfast.train.recipes import Recipe
from vitfast.train.step_time import Agreement, agreement, step_times

__all__ = ["PRESETS", "ModelResult", "Preset", "StudyResult", "run"]


@dataclass(frozen=True)
class Preset:
    """The size of a study.

    Attributes:
        recipe: all models are trained by it.
        alternet, resnet, smoothed: arguments of `vitfast.create_model`.
        image_size: pixels of a side; see `vitfast.train.data.load`.
        max_train, max_held_out: at most so many images; None for all.
        timing_rounds: how often each training step is timed.
    """

    recipe: Recipe
    alternet: dict
    resnet: dict
    smoothed: dict
    image_size: int
    max_train: int | None
    max_held_out: int | None
    timing_rounds: int


# Images of 32 pixels need no stem that shrinks them; one attention block ends each stage but the first.
_ALTERNET = {"name": "alternet_18", "num_blocks2": (0, 1, 1, 1), "window_size": 4, "stem": False}
_RESNET = {"name": "preresnet_18", "stem": False}
_SMOOTHED = {"name": "preresnet_dnn_smoothing_18", "stem": False}

# Standard deviations of the noise on held-out images, in units of the full range of a pixel.
NOISE = (0.05, 0.1, 0.15, 0.2, 0.25)

PRESETS = {
    # About three minutes on two cores with the bundled digits.
    "quick": Preset(
        Recipe(epochs=12),
        alternet=_ALTERNET | {"width": 16},
        resnet=_RESNET | {"width": 16},
        smoothed=_SMOOTHED | {"width": 16},
        image_size=32,
        max_train=1500,
        max_held_out=2000,
        timing_rounds=12,
    ),
    "full": Preset(
        Recipe(epochs=60, batch_size=128, warmup_epochs=5),
        alternet=_ALTERNET | {"width": 64},
        resnet=_RESNET | {"width": 64},
        smoothed=_SMOOTHED | {"width": 64},
        image_size=32,
        max_train=None,
        max_held_out=None,
        timing_rounds=30,
    ),
}


@dataclass(frozen=True)
class ModelResult:
    """A trained model and what was measured on it.

    Attributes:
        title: for people.
        options: the arguments of `vitfast.create_model`.
        model: in evaluation mode.
        logs: one per epoch.
        held_out: predictions for the held-out images after the last epoch. No epoch was chosen by them.
        noisy: the same for images with noise, by its standard deviation.
    """

    title: str
    options: dict
    model: nn.Module
    logs: list[EpochLog]
    held_out: Evaluation
    noisy: dict[float, Evaluation]

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @property
    def training_seconds(self) -> float:
        return sum(log.seconds for log in self.logs)

    def summary(self) -> dict:
        """The numbers as basic types."""
        diagram = self.held_out.reliability_diagram
        return {
            "title": self.title,
            "options": self.options,
            "parameters": self.parameters,
            "accuracy": self.held_out.accuracy,
            "accuracy_interval_95": self.held_out.accuracy_interval,
            "nll": self.held_out.nll,
            "nll_interval_95": self.held_out.nll_interval,
            "expected_calibration_error": self.held_out.expected_calibration_error,
            "expected_calibration_error_interval_95": self.held_out.expected_calibration_error_interval,
            "reliability_diagram": {
                "edges": diagram.edges.tolist(),
                "count": diagram.count.tolist(),
                "accuracy": _none_for_nan(diagram.accuracy),
                "confidence": _none_for_nan(diagram.confidence),
            },
            "with_noise": [
                {"deviation": deviation, "accuracy": noisy.accuracy, "nll": noisy.nll}
                for deviation, noisy in self.noisy.items()
            ],
            "epochs": [dataclasses.asdict(log) for log in self.logs],
            "training_seconds": self.training_seconds,
        }


@dataclass(frozen=True)
class StudyResult:
    """Everything the report shows.

    Attributes:
        options: what the study was asked to do.
        environment: the machine and the versions.
        recipe: all models were trained by it.
        data: the images.
        alternet, resnet, smoothed: the models.
        step_seconds: of each timed training step: "alternet", "alternet_plain" and "resnet".
        agreement: whether the fused step computes what the plain one does.
        attention_images: places in the held-out split of the images that `attention` was measured on.
        attention: one view per attention block, first to last; the measures per head are means over all these images.
        seconds: from start to end.
    """

    options: dict
    environment: dict
    recipe: Recipe
    data: ImageData
    alternet: ModelResult
    resnet: ModelResult
    smoothed: ModelResult
    step_seconds: dict[str, list[float]]
    agreement: Agreement
    attention_images: Tensor
    attention: list[AttentionView]
    seconds: float

    @property
    def models(self) -> dict[str, ModelResult]:
        return {"alternet": self.alternet, "resnet": self.resnet, "smoothed": self.smoothed}

    @property
    def step_medians(self) -> dict[str, float]:
        return {name: statistics.median(seconds) for name, seconds in self.step_seconds.items()}

    @property
    def step_ratio(self) -> float:
        """How many fused steps of AlterNet fit into a plain one."""
        return self.step_medians["alternet_plain"] / self.step_medians["alternet"]

    @property
    def only_right(self) -> tuple[int, int]:
        """How many held-out images only AlterNet, and how many only the ResNet classifies correctly."""
        alternet, resnet = (
            model.held_out.logits.argmax(1) == model.held_out.labels for model in (self.alternet, self.resnet)
        )
        return int((alternet & ~resnet).sum()), int((resnet & ~alternet).sum())

    def summary(self) -> dict:
        """The numbers as basic types, for JSON."""
        return {
            "options": self.options,
            "environment": self.environment,
            "recipe": dataclasses.asdict(self.recipe),
            "data": {
                "name": self.data.name,
                "classes": self.data.classes,
                "image_shape": self.data.shape,
                "train_images": len(self.data.train),
                "held_out_images": len(self.data.held_out),
            },
            "models": {name: model.summary() for name, model in self.models.items()},
            "images_only_alternet_gets_right": self.only_right[0],
            "images_only_resnet_gets_right": self.only_right[1],
            "training_step": {
                "seconds": self.step_seconds,
                "median_seconds": self.step_medians,
                "ratio_plain_to_fused": self.step_ratio,
                "agreement": dataclasses.asdict(self.agreement),
            },
            "attention": [view.summary() for view in self.attention],
            "total_seconds": self.seconds,
        }


def run(
    source: str = "digits",
    *,
    preset: Preset = PRESETS["quick"],
    seed: int = 0,
    device: torch.device | str = "cpu",
    options: dict | None = None,
    environment: dict | None = None,
    track: Track = silent,
    say: Callable[[str], None] = lambda line: None,
) -> StudyResult:
    """Trains and measures all models; the same seed, machine and thread count give the same accuracies.

    Args:
        source: the images; see `vitfast.train.data.load`.
        preset: the size of the study.
        seed: of the split, the weights, the order of the images and their augmentation.
        device: on which the models are trained.
        options, environment: recorded in the result as they are.
        track: shows progress; see `vitfast.train.progress`.
        say: called with each line of news.

    Raises:
        DataError: the images cannot be used.
        DivergedError: training diverged.
    """
    start = time.perf_counter()
    data = load(
        source,
        image_size=preset.image_size,
        seed=seed,
        max_train=preset.max_train,
        max_held_out=preset.max_held_out,
        track=track,
    )
    say(
        f"{data.name}: {len(data.train)} images to train on, {len(data.held_out)} held out, "
        f"{'x'.join(map(str, data.shape))}, {len(data.classes)} classes"
    )
    alternet, resnet, smoothed = (
        _train_model(title, model, data, preset.recipe, seed=seed, device=device, track=track, say=say)
        for title, model in (
            ("AlterNet", preset.alternet),
            ("ResNet", preset.resnet),
            ("Smoothed ResNet", preset.smoothed),
        )
    )

    say("\nTraining steps, each way in turn")
    generator = torch.Generator().manual_seed(seed)
    batch = next(batches(data, data.train, preset.recipe.batch_size, generator))
    images, labels = (tensor.to(device) for tensor in batch)
    agrees = agreement(alternet.model, images, labels)
    variants = {
        "alternet": (alternet.model, None),
        "alternet_plain": (alternet.model, "reference"),
        "resnet": (resnet.model, None),
    }
    seconds = step_times(variants, images, labels, preset.recipe, rounds=preset.timing_rounds, track=track)

    looked_at = images_to_look_at(data.held_out.labels, generator)
    return StudyResult(
        options={} if options is None else options,
        environment={} if environment is None else environment,
        recipe=preset.recipe,
        data=data,
        alternet=alternet,
        resnet=resnet,
        smoothed=smoothed,
        step_seconds=seconds,
        agreement=agrees,
        attention_images=looked_at,
        attention=attention_views(alternet.model, data.normalize(data.held_out.images[looked_at]).to(device)),
        seconds=time.perf_counter() - start,
    )


def images_to_look_at(labels: Tensor, generator: torch.Generator, count: int = 128) -> Tensor:
    """Places of at most ``count`` images drawn at random, those of different classes first."""
    order = torch.randperm(len(labels), generator=generator).tolist()
    first_of_class = {}
    for place in order:
        first_of_class.setdefault(int(labels[place]), place)
    firsts = [first_of_class[label] for label in sorted(first_of_class)]
    taken = set(firsts)
    return torch.tensor((firsts + [place for place in order if place not in taken])[:count])


def _train_model(
    title: str,
    options: dict,
    data: ImageData,
    recipe: Recipe,
    *,
    seed: int,
    device: torch.device | str,
    track: Track,
    say: Callable[[str], None],
) -> ModelResult:
    torch.manual_seed(seed)
    model = create_model(num_classes=len(data.classes), in_channels=data.shape[0], **options).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    say(f"\n{title}: {options['name']}, {parameters / 1e6:.2f} M parameters")

    def on_epoch(log: EpochLog) -> None:
        say(
            f"  epoch {log.epoch:3}/{recipe.epochs}  loss {log.train_loss:6.3f}  held out: "
            f"accuracy {100 * log.held_out_accuracy:5.1f} %  NLL {log.held_out_nll:6.3f}  {log.seconds:6.1f} s"
        )

    logs = train(model, data, recipe, seed=seed, track=track, on_epoch=on_epoch)
    model.eval()
    noisy = {deviation: evaluate_noisy(model, data, data.held_out, deviation, seed=seed) for deviation in NOISE}
    return ModelResult(title, options, model, logs, evaluate(model, data, data.held_out), noisy)


def _none_for_nan(values: Tensor) -> list[float | None]:
    """JSON has no NaN."""
    return [None if math.isnan(value) else value for value in values.tolist()]
