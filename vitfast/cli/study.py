"""``vitfast study``: trains on real images and writes a report."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_LARGEST_INTEGER = 2**63 - 1  # of 64 bits, as PyTorch takes for a seed or a size


def add_parser(subparsers) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "study",
        help="train a ResNet, a smoothed ResNet and AlterNet on real images, and write a report",
        description="Train AlterNet, the ResNet it comes from and that ResNet with spatial smoothing on the same "
        "images; measure accuracy, calibration, robustness to noise and the time of a training step with fused kernels "
        "and in plain PyTorch; write index.html and results.json.",
    )
    parser.add_argument(
        "--preset",
        choices=("quick", "full"),
        default="quick",
        help="quick: minutes on two cores; full: wider models, more epochs, all images (default: %(default)s)",
    )
    parser.add_argument(
        "--data",
        default="digits",
        metavar="SOURCE",
        help="digits: the handwritten digits that come with scikit-learn; or a folder with one sub-folder of images "
        "per class, maybe inside train/ and val/ or test/; or CIFAR-10 or CIFAR-100, as folder or .tar.gz "
        "(default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, default=Path("report"), metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--seed", type=_integer(0), default=0, metavar="N", help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1, for example (default: %(default)s)")
    size = parser.add_argument_group("in place of what the preset says")
    size.add_argument("--epochs", type=_integer(1), metavar="N")
    size.add_argument("--batch-size", type=_integer(2), metavar="N", help="images of a training step")
    size.add_argument("--lr", type=_positive_number, metavar="RATE", help="the largest learning rate")
    size.add_argument("--width", type=_integer(1), metavar="N", help="channels of the first stage of all models")
    size.add_argument("--image-size", type=_integer(8), metavar="N", help="pixels of a side, for digits and folders")
    size.add_argument("--max-train", type=_integer(2), metavar="N", help="train on at most so many images")
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the study and writes the report."""
    _check_requirements()
    _check_folder(arguments.out)
    device = _device(arguments.device)
    from vitfast.cli import UserError
    from vitfast.cli.info import collect
    from vitfast.train import progress, report, study

    result = study.run(
        arguments.data,
        preset=_preset(arguments, study.PRESETS[arguments.preset]),
        seed=arguments.seed,
        device=device,
        options={"preset": arguments.preset, "data": arguments.data, "seed": arguments.seed, "device": str(device)},
        environment=collect(),
        track=progress.bar,
        say=lambda line: print(line, flush=True),
    )
    try:
        page = report.write(result, arguments.out)
    except OSError as error:
        raise UserError(f"the report could not be written to {arguments.out}: {error}") from error
    print("\n" + "\n".join(_lines(result)))
    print(f"\n{result.seconds:.0f} s in all; the report: {page}")
    return 0


def _preset(arguments: argparse.Namespace, preset):
    """The preset with what the user put in place of its values."""

    def given(**values):
        return {name: value for name, value in values.items() if value is not None}

    return dataclasses.replace(
        preset,
        recipe=dataclasses.replace(
            preset.recipe, **given(epochs=arguments.epochs, batch_size=arguments.batch_size, lr=arguments.lr)
        ),
        alternet=preset.alternet | given(width=arguments.width),
        resnet=preset.resnet | given(width=arguments.width),
        smoothed=preset.smoothed | given(width=arguments.width),
        **given(image_size=arguments.image_size, max_train=arguments.max_train),
    )


def _lines(result) -> list[str]:
    strongest = max(result.resnet.noisy)
    lines = [f"{'held-out images':18}{'accuracy':>10}{'NLL':>9}{'ECE':>9}{f'accuracy, noise {strongest}':>24}"]
    for model in result.models.values():
        held_out = model.held_out
        lines.append(
            f"{model.title:18}{100 * held_out.accuracy:8.1f} %{held_out.nll:9.3f}"
            f"{100 * held_out.expected_calibration_error:7.1f} %{100 * model.noisy[strongest].accuracy:22.1f} %"
        )
    medians = {name: 1e3 * seconds for name, seconds in result.step_medians.items()}
    return [
        *lines,
        f"training step of AlterNet: {medians['alternet']:.1f} ms with the fused kernels, "
        f"{medians['alternet_plain']:.1f} ms in plain PyTorch ({result.step_ratio:.2f} x); "
        f"of the ResNet: {medians['resnet']:.1f} ms",
    ]


def _integer(minimum: int) -> Callable[[str], int]:
    """A type for argparse."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = -1
        if number > _LARGEST_INTEGER:
            raise argparse.ArgumentTypeError(
                f"must be an integer of at least {minimum} and at most {_LARGEST_INTEGER}; got {text!r}"
            )
        if number < minimum:
            raise argparse.ArgumentTypeError(f"must be an integer of at least {minimum}; got {text!r}")
        return number

    return parse


def _positive_number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0; got {text!r}")
    return number


def _check_requirements() -> None:
    """Before minutes of training, not after."""
    from importlib.util import find_spec

    from vitfast.cli import UserError

    missing = [name for name in ("matplotlib", "tqdm") if find_spec(name) is None]
    if missing:
        raise UserError(f"the study needs {' and '.join(missing)}: pip install 'vitfast[study]'")


def _check_folder(folder: Path) -> None:
    """Makes the folder of the report and a file in it, and removes them: what forbids that is to show before training.

    Permissions alone do not tell: the file system may be read-only or full, or a name too long.
    """
    from vitfast.cli import UserError

    folder = folder.absolute()
    missing = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"--out: {folder} cannot be used for the report: {error.strerror}") from error
    finally:
        for path in missing:
            with suppress(OSError):
                path.rmdir()


def _device(text: str):
    import torch

    from vitfast.cli import UserError

    try:
        device = torch.device(text)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--device {text} cannot be used here: {reason}") from error
    return device
