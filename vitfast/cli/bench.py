"""``vitfast bench``: how fast operators and models are on this machine, next to the best PyTorch path."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from pathlib import Path

_DTYPES = ("float32", "float64", "float16", "bfloat16")
_DEFAULT_DTYPES = {"cpu": ["float32"], "cuda": ["bfloat16", "float32"]}


def add_parser(subparsers) -> None:
    """Adds the command."""
    from vitfast.bench.runner import DEFAULT_ROUNDS

    parser = subparsers.add_parser(
        "bench",
        help="time every fused operator against the best PyTorch path, or whole models against their originals",
        description="Time the fused operators and their peers in plain PyTorch, eager and compiled, with the error "
        "against float64 beside the time. All cases take a few minutes, most of which is compiling the peers. "
        "'vitfast bench models' instead times models of timm, torchvision and transformers before and after "
        "vitfast.accelerate.",
    )
    parser.add_argument(
        "pattern",
        nargs="?",
        default="*",
        help="part of the cases' names, or shell pattern: 'swin_t', 'stage4/forward'; whole models are measured only "
        "by a pattern that begins with 'models': 'models/timm'",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the raw figures, machine and versions there")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--dtype",
        type=_dtypes,
        metavar="NAME,...",
        help=f"any of {', '.join(_DTYPES)} (default: float32 on the CPU, bfloat16,float32 on a GPU)",
    )
    parser.add_argument(
        "--rounds",
        type=_positive,
        default=DEFAULT_ROUNDS,
        metavar="N",
        help="samples of each implementation (default: %(default)s)",
    )
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out the peers under torch.compile: much quicker"
    )
    parser.add_argument(
        "--seconds",
        type=_positive,
        metavar="N",
        help="begin no case later than this after the start, and report what was measured until then (default: no end)",
    )
    parser.add_argument("--list", action="store_true", help="print the names of the cases and measure nothing")
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints tables and writes JSON."""
    until = math.inf if arguments.seconds is None else time.monotonic() + arguments.seconds

    import torch

    from vitfast import bench
    from vitfast.bench.precompile import precompile
    from vitfast.bench.runner import dtype_of
    from vitfast.cli import UserError

    cases = bench.cases(arguments.pattern)
    if not cases:
        raise UserError(
            f"no case matches {arguments.pattern!r}; vitfast bench --list and vitfast bench models --list show them all"
        )
    if arguments.list:
        print("\n".join(case.name for case in cases))
        return 0
    if arguments.json is not None and not arguments.json.parent.is_dir():
        raise UserError(f"--json: there is no folder {arguments.json.parent}; create it first")
    if arguments.json is not None and arguments.json.is_dir():
        raise UserError(f"--json: {arguments.json} is a folder; name a file in it")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("PyTorch sees no CUDA device here: nothing was measured.")
        return 0
    if arguments.json is not None:
        _check_writable(arguments.json)
    device = torch.device(arguments.device)
    names = arguments.dtype if arguments.dtype is not None else _DEFAULT_DTYPES[arguments.device]
    dtypes = [dtype_of(name) for name in names]
    if not arguments.no_compile:
        precompile(cases, device, dtypes, _announce)
    report = bench.run(
        cases,
        device,
        dtypes,
        rounds=arguments.rounds,
        compiled=not arguments.no_compile,
        command=_command(arguments, names),
        announce=_announce,
        until=until,
    )
    print(bench.format_report(report))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _check_writable(path: Path) -> None:
    """Before minutes of measuring, not after. Figures that the file already holds stay until there are new ones."""
    from vitfast.cli import UserError

    try:
        path.open("a").close()
    except OSError as error:
        raise UserError(f"--json: {path} cannot be written to: {error.strerror}") from error


def _announce(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _command(arguments: argparse.Namespace, dtypes: list[str]) -> str:
    """The command that does the same again, without the file it writes to."""
    words = ["vitfast", "bench", arguments.pattern, "--device", arguments.device, "--dtype", ",".join(dtypes)]
    words += ["--rounds", str(arguments.rounds)]
    if arguments.seconds is not None:
        words += ["--seconds", str(arguments.seconds)]
    return shlex.join([*words, "--no-compile"] if arguments.no_compile else words)


def _dtypes(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in _DTYPES]
    if unknown or len(set(names)) != len(names):
        raise argparse.ArgumentTypeError(
            f"expected names from {', '.join(_DTYPES)}, with commas, each once; got {text!r}"
        )
    return names


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1; got {text!r}")
    return int(text)
