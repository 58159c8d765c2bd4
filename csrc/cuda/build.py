"""Compiles the CUDA part of vitfast, the shared library vitfast/_cuda.so, by nvcc alone.

PyTorch need not have been built with CUDA: the library uses the headers of the stable ABI, and finds what it calls in
the PyTorch that loads it. setup.py calls this where VITFAST_CUDA=1. As a command it says what every kernel needs:

    python csrc/cuda/build.py [--arch 80 90a 100]
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ARCHITECTURES = ("80", "90a", "100")  # the A100, H100 and B200; and what comes after, from the last one's PTX

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Kernel:
    """What ptxas reports of a kernel.

    Attributes:
        name: mangled.
        registers: of a thread.
        spilled: bytes of a thread that did not fit into registers.
        shared: bytes of a block, without those asked for at the launch.
    """

    name: str
    registers: int
    spilled: int
    shared: int


def architectures() -> tuple[str, ...]:
    """Those that VITFAST_CUDA_ARCHS names, separated by semicolons, or `ARCHITECTURES`."""
    named = os.environ.get("VITFAST_CUDA_ARCHS", "")
    return tuple(arch.strip() for arch in named.split(";") if arch.strip()) or ARCHITECTURES


def command(output: Path, archs: tuple[str, ...], torch_target: int) -> list[str]:
    """The call of nvcc that makes the library."""
    import torch

    torch_folder = Path(torch.__file__).parent
    for_each = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [
        shutil.which("nvcc") or "nvcc",
        "-shared",
        "-std=c++17",
        "-O3",
        "--threads=0",
        *("-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Wno-unused-parameter"),
        *for_each,
        f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}",
        "-DUSE_CUDA",
        f"-DTORCH_TARGET_VERSION={torch_target:#x}",
        f"-I{_FOLDER.parent}",
        f"-I{torch_folder / 'include'}",
        f"-I{torch_folder / 'include' / 'torch' / 'csrc' / 'api' / 'include'}",
        *map(str, sorted(_FOLDER.glob("*.cu"))),
        # Needed although nothing of libtorch itself is: where PyTorch has CUDA, it brings the library that has.
        *("-Xlinker", "--no-as-needed", f"-L{torch_folder / 'lib'}", "-ltorch"),
        *("-o", str(output)),
    ]


def build(output: Path, archs: tuple[str, ...], torch_target: int, *flags: str) -> str:
    """Makes the library; returns what nvcc printed.

    Raises:
        SystemExit: nvcc is missing or fails.
    """
    call = [*command(output, archs, torch_target), *flags]
    try:
        done = subprocess.run(call, capture_output=True, text=True)
    except OSError as error:
        raise SystemExit(
            f"the CUDA part of vitfast needs nvcc, of the CUDA toolkit 12.8 or later, which does not run: {error}. "
            "Put it on the PATH, or build without VITFAST_CUDA"
        ) from error
    if done.returncode != 0:
        raise SystemExit(f"nvcc failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def report(arch: str, torch_target: int) -> list[Kernel]:
    """What every kernel needs on one architecture."""
    with tempfile.TemporaryDirectory() as folder:
        printed = build(Path(folder) / "_cuda.so", (arch,), torch_target, "-Xptxas=-v")
    pattern = re.compile(
        r"Compiling entry function '(?P<name>\w+)'.*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill "
        r"loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    kernels = []
    for match in pattern.finditer(printed):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        spilled = int(match["stores"]) + int(match["loads"])
        kernels.append(Kernel(match["name"], int(match["registers"]), spilled, int(shared[1]) if shared else 0))
    return kernels


def _main() -> int:
    parser = argparse.ArgumentParser(description="Say what every CUDA kernel needs, by the compiler's report.")
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES, help="for example 80 90a (default: %(default)s)")
    arguments = parser.parse_args()
    print(f"{'arch':8}{'registers':>10}{'spilled':>10}{'shared':>10}  kernel")
    spilled = 0
    for arch in arguments.arch:
        for kernel in report(arch, 0x020A000000000000):
            print(f"sm_{arch:5}{kernel.registers:10}{kernel.spilled:10}{kernel.shared:10}  {_readable(kernel.name)}")
            spilled += kernel.spilled
    return 1 if spilled else 0


def _readable(name: str) -> str:
    filt = shutil.which("c++filt")
    if filt is None:
        return name
    text = subprocess.run([filt, name], capture_output=True, text=True, check=True).stdout.strip()
    return re.sub(r"\(anonymous namespace\)::|vitfast::|\(.*\)$", "", text.removeprefix("void "))


if __name__ == "__main__":
    sys.exit(_main())
