"""``vitfast hessian``: eigenvalues of a model's loss on real images, with pictures."""

from __future__ import annotations

import argparse
import ast
import json
import time
from pathlib import Path

from vitfast.cli.arguments import check_device, check_folder, integer, positive_number, require_packages


def add_parser(subparsers) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "hessian",
        help="eigenvalues, trace and spectral density of a model's Hessian on real images",
        description="Measure the Hessian of a model's negative log-likelihood with L2 regularisation: the eigenvalues "
        "that are largest in magnitude, of all images together and of each batch on its own, as 'How Do Vision "
        "Transformers Work?' did; the trace; the density of all eigenvalues. Write hessian.json, largest.svg and "
        "density.svg.",
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="one of 'vitfast models' (default: the small AlterNet of 'vitfast study', 16 channels wide)",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="OPTION=VALUE",
        help="arguments of vitfast.create_model, for example width=16 or patch_size=4",
    )
    parser.add_argument("--weights", metavar="SOURCE", help="trained weights, as vitfast.load_weights takes them")
    parser.add_argument(
        "--epochs",
        type=integer(0),
        default=3,
        metavar="N",
        help="train so long first, if there are no weights (default: %(default)s)",
    )
    parser.add_argument(
        "--data", default="digits", metavar="SOURCE", help="as of 'vitfast study' (default: %(default)s)"
    )
    parser.add_argument("--image-size", type=integer(8), default=32, metavar="N", help="default: %(default)s")
    parser.add_argument("--batches", type=integer(1), default=8, metavar="N", help="default: %(default)s")
    parser.add_argument("--batch-size", type=integer(1), default=16, metavar="N", help="default: %(default)s")
    parser.add_argument("--eigenvalues", type=integer(1), default=5, metavar="K", help="default: %(default)s")
    parser.add_argument("--tol", type=positive_number, default=1e-3, help="relative residual (default: %(default)s)")
    parser.add_argument("--weight-decay", type=float, default=5e-4, metavar="L2", help="default: %(default)s")
    parser.add_argument(
        "--steps", type=integer(2), default=40, metavar="N", help="of the density (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("hessian"), metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--seed", type=integer(0), default=0, metavar="N", help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1, for example (default: %(default)s)")
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints, and writes the results."""
    require_packages("vitfast hessian", "matplotlib", "tqdm")
    check_folder(arguments.out)
    device = check_device(arguments.device)
    import torch.nn.functional as F

    from vitfast import hessian, train
    from vitfast.train import progress

    start = time.perf_counter()
    data = train.load(arguments.data, image_size=arguments.image_size, seed=arguments.seed, track=progress.bar)
    name, model = _model(arguments, data)
    model = model.to(device)
    if arguments.weights is None and arguments.epochs > 0:
        print(f"training {name} for {arguments.epochs} epochs on {data.name}", flush=True)
        recipe = train.Recipe(epochs=arguments.epochs)
        log = train.train(model, data, recipe, seed=arguments.seed, track=progress.bar)[-1]
        print(f"accuracy on held-out images: {100 * log.held_out_accuracy:.1f} %", flush=True)
    model.eval()
    batches = _batches(arguments, data, device)
    size, decay = sum(p.numel() for p in model.parameters()), arguments.weight_decay
    images = sum(len(labels) for _, labels in batches)
    print(f"{name}: {size:,} parameters, {images} images in {len(batches)} batches", flush=True)
    operator = hessian.HessianOperator(model, F.cross_entropy, batches, weight_decay=decay)
    top = hessian.top_eigenvalues(operator, arguments.eigenvalues, "LM", arguments.tol, seed=arguments.seed)
    print(f"largest eigenvalues of all together: {_numbers(top.values)} ({top.products} products)", flush=True)
    trace = hessian.trace(operator, 16, seed=arguments.seed)
    print(f"trace: {trace.value:.4g} +- {trace.standard_error:.2g} ({trace.products} products)", flush=True)
    density = hessian.spectral_density(operator, arguments.steps, 2, seed=arguments.seed)
    negative = density.share(-float("inf"), 0)
    print(f"share of negative eigenvalues: {100 * negative:.2f} % ({density.products} products)", flush=True)
    spectrum = hessian.max_eigenvalue_spectrum(
        model,
        F.cross_entropy,
        batches,
        k=arguments.eigenvalues,
        weight_decay=decay,
        tol=arguments.tol,
        seed=arguments.seed,
        progress=True,
    )
    print(
        f"largest eigenvalues of each batch: {100 * spectrum.negative_proportion:.1f} % are negative (NEP), the mean "
        f"of the positive ones is {spectrum.mean_positive:.4g} (APE; {spectrum.products} products)"
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    density.plot(arguments.out / "density.svg", title=f"Density of Hessian eigenvalues, {name}")
    spectrum.plot(arguments.out / "largest.svg", title=f"Largest Hessian eigenvalues of batches, {name}")
    results = {
        "model": name,
        "parameters": size,
        "data": data.name,
        "batches": len(batches),
        "batch_size": arguments.batch_size,
        "weight_decay": decay,
        "eigenvalues": top.values.tolist(),
        "residuals": top.residuals.tolist(),
        "converged": top.converged.tolist(),
        "trace": trace.value,
        "trace_standard_error": trace.standard_error,
        "negative_share": negative,
        "batch_eigenvalues": spectrum.values.tolist(),
        "nep": spectrum.negative_proportion,
        "ape": spectrum.mean_positive,
        "products": top.products + trace.products + density.products + spectrum.products,
        "seconds": time.perf_counter() - start,
    }
    (arguments.out / "hessian.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"{results['seconds']:.0f} s in all; results and pictures: {arguments.out}")
    return 0


def _model(arguments: argparse.Namespace, data):
    """The name of the model and the model."""
    from vitfast import create_model, load_weights
    from vitfast.cli import UserError
    from vitfast.models.registry import options_of
    from vitfast.train.study import PRESETS

    options = _options(arguments.set)
    preset = PRESETS["quick"].alternet if arguments.model is None else {"name": arguments.model}
    name = preset["name"]
    taken = options_of(name)
    fitting = {"image_size": data.shape[1:], "stem": False, "in_channels": data.shape[0]}
    options = {key: value for key, value in fitting.items() if key in taken} | preset | options
    try:
        model = create_model(num_classes=len(data.classes), **options)
        if arguments.weights is not None:
            load_weights(model, arguments.weights)
    except (TypeError, ValueError, FileNotFoundError, ImportError) as error:
        raise UserError(str(error)) from error
    return name, model


def _options(texts: list[str]) -> dict:
    from vitfast.cli import UserError

    options = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise UserError(f"--set takes OPTION=VALUE; got {text!r}")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value
    return options


def _batches(arguments: argparse.Namespace, data, device) -> list:
    """The first batches of an epoch of augmented training images."""
    from itertools import islice

    import torch

    from vitfast import train

    generator = torch.Generator().manual_seed(arguments.seed)
    stream = train.batches(data, data.train, arguments.batch_size, generator)
    return [(images.to(device), labels.to(device)) for images, labels in islice(stream, arguments.batches)]


def _numbers(values) -> str:
    return ", ".join(f"{value:.4g}" for value in values.tolist())
