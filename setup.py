"""Builds the extension module vitfast._C, and the CUDA kernels beside it; all else stands in pyproject.toml.

Environment:
    VITFAST_CUDA=1      also the library of CUDA kernels, by nvcc (see csrc/cuda/build.py)
    VITFAST_CUDA_ARCHS  for which architectures, 80;90a;100 if not set
    VITFAST_SANITIZE=1  with AddressSanitizer and UndefinedBehaviorSanitizer (see `make sanitize`)
    MAX_JOBS            compiler processes, passed on to ninja
"""

import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pybind11
import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent.resolve()

# The stable ABI of torch 2.10: what is built against any later torch also loads in 2.10 and every release after it.
TORCH_TARGET_VERSION = 0x020A000000000000

COMPILE = [
    "-std=c++17",
    "-O3",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",  # the headers of the stable ABI have some
    "-Werror=return-type",
    "-fvisibility=hidden",
    "-ffp-contract=fast",  # a * b + c on the vector type becomes one fused multiply-add
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",  # vectors wider than the baseline's registers never cross a function boundary between files
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION:#x}",
]
LINK = ["-Wl,--as-needed", "-Wl,--no-undefined-version"]
if os.environ.get("VITFAST_SANITIZE") == "1":
    SANITIZE = "-fsanitize=address,undefined"
    COMPILE += [SANITIZE, "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined", "-g1", "-O1"]
    # Checks of addresses as calls, not in line: the unrolled kernels then compile in half the time.
    COMPILE += ["--param", "asan-instrumentation-with-call-threshold=0"]
    LINK += [SANITIZE]
else:
    COMPILE += ["-g0"]  # Python's own flags ask for debug information, ten times the size of the library


def quoted(text: str) -> str:
    """A C string literal, for a macro on a compiler's command line."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def compiler_version() -> str:
    command = shlex.split(os.environ.get("CXX", "c++"))
    try:
        version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(
            f"vitfast needs GCC to build its extension, but {shlex.join(command)} does not run: {error}. "
            "Install it (Debian, Ubuntu: apt install g++) or set CXX"
        ) from error
    return version.stdout.splitlines()[0]


def load_cuda_build():
    """The module csrc/cuda/build.py."""
    spec = importlib.util.spec_from_file_location("vitfast_cuda_build", ROOT / "csrc" / "cuda" / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look it up
    spec.loader.exec_module(module)
    return module


CUDA = load_cuda_build() if os.environ.get("VITFAST_CUDA") == "1" else None


class Build(BuildExtension):
    """The extension module, then the CUDA library beside it."""

    def run(self):
        super().run()
        if CUDA is not None:
            beside = Path(self.get_ext_fullpath("vitfast._C")).resolve().parent
            CUDA.build(beside / "_cuda.so", CUDA.architectures(), TORCH_TARGET_VERSION)


def define(name: str, text: str) -> str:
    return f"-D{name}={quoted(text)}"


COMPILE += [
    define("VITFAST_COMPILER", compiler_version()),
    define("VITFAST_FLAGS", " ".join(COMPILE)),
    define("VITFAST_TORCH_TARGET", "2.10"),
    define("VITFAST_CUDA_ARCHITECTURES", ";".join(CUDA.architectures()) if CUDA else ""),
    # messages name source files, but not where they were compiled; after VITFAST_FLAGS, which would repeat it
    f"-ffile-prefix-map={ROOT}/=",
    f"-ffile-prefix-map={Path(torch.__file__).parent}/=torch/",
]

setup(
    packages=[
        *(".".join(path.parent.relative_to(ROOT).parts) for path in sorted((ROOT / "vitfast").rglob("__init__.py"))),
        "vitfast.kernels",
    ],
    package_dir={"vitfast": "vitfast", "vitfast.kernels": "kernels"},
    ext_modules=[
        CppExtension(
            "vitfast._C",
            sources=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp")),
            # pip's pybind11 before the copy in torch's headers, which refuses TORCH_TARGET_VERSION on torch 2.11
            include_dirs=[pybind11.get_include(), str(ROOT / "csrc")],
            depends=[str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h")],
            extra_compile_args=COMPILE,
            extra_link_args=LINK,
        )
    ],
    cmdclass={"build_ext": Build},
)
