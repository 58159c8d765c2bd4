"""What commands check of their arguments, before minutes of work."""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_LARGEST_INTEGER = 2**63 - 1  # of 64 bits, as PyTorch takes for a seed or a size


def integer(minimum: int) -> Callable[[str], int]:
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


def positive_number(text: str) -> float:
    """A type for argparse."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0; got {text!r}")
    return number


def require_packages(what: str, *names: str) -> None:
    """Before minutes of work, not after."""
    from importlib.util import find_spec

    from vitfast.cli import UserError

    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise UserError(f"{what} needs {' and '.join(missing)}: pip install 'vitfast[study]'")


def check_folder(folder: Path) -> None:
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


def check_device(text: str):
    """The `torch.device` of a name, if it can be used here."""
    import torch

    from vitfast.cli import UserError

    try:
        device = torch.device(text)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--device {text} cannot be used here: {reason}") from error
    return device
