"""``vitfast study``: trains on real images and writes a report."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from vitfast.cli.arguments import check_device, check_folder, integer, positive_number, require_packages


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
    parser.add_argument("--seed", type=integer(0), default=0, metavar="N", help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1, for example (default: %(default)s)")
    size = parser.add_argument_group("in place of what the preset says")
    size.add_argument("--epochs", type=integer(1), metavar="N")
    size.add_argument("--batch-size", type=integer(2), metavar="N", help="images of a training step")
    size.add_argument("--lr", type=positive_number, metavar="RATE", help="the largest learning rate")
    size.add_argument("--width", type=integer(1), metavar="N", help="channels of the first stage of all models")
    size.add_argument("--image-size", type=integer(8), metavar="N", help="pixels of a side, for digits and folders")
    size.add_argument("--max-train", type=integer(2), metavar="N", help="train on at most so many images")
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the study and writes the report."""
    require_packages("the study", "matplotlib", "tqdm")
    check_folder(arguments.out)
    device = check_device(arguments.device)
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
