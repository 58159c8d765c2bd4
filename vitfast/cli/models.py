"""``vitfast models``: which models there are."""

from __future__ import annotations

import argparse


def add_parser(subparsers) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "models",
        help="list the models",
        description="List the models that vitfast.create_model builds, with their number of parameters.",
    )
    parser.add_argument("pattern", nargs="?", default="*", help="shell pattern, for example 'alternet*' (default: all)")
    parser.add_argument("--num-classes", type=int, default=1000, metavar="N", help="classes (default: %(default)s)")
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints a line per model."""
    import torch

    from vitfast import create_model, list_models
    from vitfast.cli import UserError

    if arguments.num_classes < 1:
        raise UserError(f"--num-classes must be at least 1; got {arguments.num_classes}")
    names = list_models(arguments.pattern)
    if not names:
        raise UserError(f"no model matches {arguments.pattern!r}; there are: {', '.join(list_models())}")
    print(f"{'name':24}{'parameters':>14}   with {arguments.num_classes} classes")
    for name in names:
        with torch.device("meta"):  # shapes only: nothing is allocated or initialised
            model = create_model(name, num_classes=arguments.num_classes)
        print(f"{name:24}{sum(p.numel() for p in model.parameters()):>14,}")
    return 0
