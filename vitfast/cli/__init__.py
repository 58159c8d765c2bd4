"""The command line. Thin: parses, calls the library, prints."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

__all__ = ["UserError", "main"]


class UserError(Exception):
    """What the user asked for cannot be done; the message is all there is to say."""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line instead of printing the usage first."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code: 0, 1 for a failure, 2 for wrong input, 130 for Ctrl-C."""
    from vitfast.ops._extension import ExtensionError
    from vitfast.train import DataError, DivergedError

    arguments = _parser().parse_args(argv)
    try:
        return arguments.func(arguments) or 0
    except (UserError, DataError) as error:
        return _fail(arguments.command, error, code=2)
    except (ExtensionError, DivergedError) as error:
        return _fail(arguments.command, error, code=1)
    except BrokenPipeError:  # whoever read the output, `head` for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def _fail(command: str, error: Exception, code: int) -> int:
    print(f"vitfast {command}: error: {error}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    from vitfast import __version__
    from vitfast.cli import bench, hessian, info, models, study

    parser = _Parser(
        prog="vitfast",
        description="Fused kernels for vision models in PyTorch: measure them, train with them, study what they train.",
    )
    parser.add_argument("--version", action="version", version=f"vitfast {__version__}")
    subparsers = parser.add_subparsers(title="commands", dest="command", metavar="command", required=True)
    for command in (study, hessian, bench, models, info):
        command.add_parser(subparsers)
    return parser
