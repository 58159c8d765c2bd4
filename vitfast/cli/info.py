"""``vitfast info``: what is compiled, and what runs on this machine."""

from __future__ import annotations

import argparse
import json
import platform


def add_parser(subparsers) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "info",
        help="versions, the compiled extension, instruction sets and GPU in use",
        description="Say which versions are installed, how the extension was compiled, and which hardware is used.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints what `collect` finds."""
    environment = collect()
    if arguments.json:
        print(json.dumps(environment, indent=2))
    else:
        print("\n".join(f"{name:18}{value}" for name, value in _lines(environment)))
    return 0


def collect() -> dict:
    """Versions, machine, extension and GPU, as basic types for JSON; what is absent is None."""
    import numpy
    import torch

    from vitfast.bench.environment import machine, versions

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "versions": versions() | {"numpy": numpy.__version__},
        "machine": {"platform": platform.platform()} | machine(device),
        "extension": _extension(),
    }


def _extension() -> dict:
    from vitfast.ops import _extension as extension

    try:
        module = extension.require()
    except extension.ExtensionError as error:
        return {"loaded": False, "error": str(error)}
    return {"loaded": True, "instruction_set": module.instruction_set(), **module.build_info()}


def _lines(environment: dict) -> list[tuple[str, str]]:
    """The same, for people."""
    machine, extension, gpu = environment["machine"], environment["extension"], environment["machine"]["gpu"]
    lines = [(name, "none" if version is None else version) for name, version in environment["versions"].items()]
    lines += [
        ("platform", machine["platform"]),
        ("cpu", f"{machine['cpu']}, {machine['logical_cpus']} logical CPUs, {machine['memory_gib']} GiB"),
        ("threads", f"{machine['threads']} (torch.get_num_threads())"),
        ("gpu", f"{gpu['name']}, {gpu['capability']}, {gpu['memory_gib']} GiB" if gpu else "none that PyTorch can use"),
    ]
    if not extension["loaded"]:
        return [*lines, ("extension", extension["error"].replace("\n", "\n" + " " * 18))]
    return [
        *lines,
        ("flags", extension["flags"]),
        ("torch ABI", f"stable, from torch {extension['torch_target']}"),
        ("compiled for", ", ".join(extension["instruction_sets"])),
        ("in use", extension["instruction_set"]),
        ("CUDA kernels", ", ".join(map(str, extension["cuda_architectures"])) or "not compiled"),
    ]
