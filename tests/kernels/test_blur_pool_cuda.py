"""The CUDA kernels of blur pooling without a GPU: compiled for each architecture, and run by the host's compiler."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import vitfast
from vitfast import reference
from vitfast.ops import _extension
from vitfast.reference.blur_pool import (
    ACTIVATIONS,
    PADDING_MODES,
    blur_pool2d_transposed,
    prologue_backward,
)

ROOT = Path(__file__).parents[2]
TORCH_TARGET = 0x020A000000000000


# ---- what the compiler says ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cuda_build():
    """The module csrc/cuda/build.py."""
    spec = importlib.util.spec_from_file_location("cuda_build", ROOT / "csrc" / "cuda" / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look it up
    spec.loader.exec_module(module)
    return module


needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


@needs_nvcc
@pytest.mark.parametrize("arch", ["80", "90a", "100"])
def test_kernels_need_no_more_than_a_multiprocessor_has(cuda_build, arch):
    kernels = [kernel for kernel in cuda_build.report(arch, TORCH_TARGET) if "blur_pool_kernel" in kernel.name]
    # Four element types; the blur, that of a prologue, and the transpose; pixels of one channel and of a vector of
    # them, for 2, 3, 4 and any number of taps, and columns for 2, 3 and 4 taps and a stride of 1 and 2.
    assert len(kernels) == 4 * 3 * (2 * 4 + 3 * 2)
    for kernel in kernels:
        assert kernel.spilled == 0, kernel
        assert kernel.registers <= 128, kernel  # so that two blocks of 256 threads run at once
        assert kernel.shared == 0, kernel  # but for what a launch asks for


@needs_nvcc
def test_library_uses_the_stable_abi_alone_and_registers_its_kernels(cuda_build, tmp_path):
    """Loaded beside a stand-in for the only function that a PyTorch without CUDA lacks."""
    library, stand_in = tmp_path / "_cuda.so", tmp_path / "stand_in.so"
    assert "warning" not in cuda_build.build(library, ("90a",), TORCH_TARGET)
    nm = ["nm", "--dynamic", "--undefined-only", "--demangle", str(library)]
    names = subprocess.run(nm, capture_output=True, text=True, check=True).stdout
    assert "aoti_torch_get_current_cuda_stream" in names
    assert not re.search(r"\b(at|c10|torch)::", names)
    source = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }'
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    subprocess.run(
        [*compiler, "-shared", "-fPIC", "-xc++", "-", "-o", str(stand_in)], input=source, text=True, check=True
    )
    program = f"""
import ctypes, torch, vitfast
if torch.version.cuda is None:
    ctypes.CDLL({str(stand_in)!r}, ctypes.RTLD_GLOBAL)
torch.ops.load_library({str(library)!r})
for operator in ("blur_pool2d", "blur_pool2d_backward"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"vitfast::{{operator}}", "CUDA")
print(vitfast.functional.blur_pool2d(torch.ones(1, 1, 4, 4), torch.ones(1)).sum().item())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "16.0\n"


def test_the_way_to_the_kernels_is_told():
    if _extension.cuda_available():
        pytest.skip("the CUDA kernels are there")
    with pytest.raises(vitfast.ExtensionError, match=r"(?s)_cuda\.so\) cannot be used: .*VITFAST_CUDA=1 pip install"):
        _extension.require_cuda()


# ---- what the kernels compute ----------------------------------------------------------------------------------------


class Arguments(ctypes.Structure):
    """As in emulated_blur_pool.cpp."""

    _fields_ = (
        *(
            (name, ctypes.c_int32)
            for name in ["batch", "channels", "channels_last", "transpose", "padding", "activation", "aligned"]
        ),
        ("rows", ctypes.c_int32 * 6),
        ("columns", ctypes.c_int32 * 6),
        ("temperature", ctypes.c_double),
        ("weights", ctypes.c_double * 49),
        *((name, ctypes.c_void_p) for name in ("input", "primal", "scale", "shift", "out", "sums")),
    )


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    library = tmp_path_factory.mktemp("emulator") / "emulated_blur_pool.so"
    # The sanitizers' checks end the process at the first finding, with no library to preload.
    checks = ["-fsanitize=undefined,bounds", "-fsanitize-undefined-trap-on-error", "-D_GLIBCXX_ASSERTIONS"]
    command = [*shlex.split(os.environ.get("CXX", "c++")), "-std=c++17", "-O2", "-shared", "-fPIC", *checks]
    command += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, str(Path(__file__).with_name("emulated_blur_pool.cpp")), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int] = (2, 3, 9, 11)
    taps: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)  # left, right, top, bottom
    mode: str = "reflect"
    activation: str | None = None
    scaled: bool = False
    dtype: torch.dtype = torch.float64

    @property
    def blur(self):
        return {"stride": self.stride, "padding": self.padding, "padding_mode": self.mode}

    def tensors(self, channels_last):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)

        x, kernel = 3 * normal(*self.shape), normal(*self.taps)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        scale, shift = (normal(self.shape[1]), normal(self.shape[1])) if self.scaled else (None, None)
        return x, kernel, scale, shift


def address(tensor):
    return None if tensor is None else tensor.data_ptr()


def emulate(emulator, case, source, kernel, out, *, channels_last, transpose, aligned, scale=None, shift=None, **rest):
    """Runs the kernel from ``source`` to ``out``."""
    left, right, top, bottom = case.padding
    sizes, outputs = (out.shape[2:], source.shape[2:]) if transpose else (source.shape[2:], out.shape[2:])
    margins = ((top, bottom), (left, right))
    rows, columns = (
        (size, output, stride, *margin, taps)
        for size, output, stride, margin, taps in zip(sizes, outputs, case.stride, margins, case.taps, strict=True)
    )
    arguments = Arguments(
        batch=case.shape[0],
        channels=case.shape[1],
        channels_last=channels_last,
        transpose=transpose,
        padding=PADDING_MODES.index(case.mode),
        activation=ACTIVATIONS.index(case.activation),
        aligned=aligned,
        rows=rows,
        columns=columns,
        temperature=2.0,
        weights=tuple(kernel.double().flatten().tolist()),
        input=address(source),
        scale=address(scale),
        shift=address(shift),
        out=address(out),
        **{name: address(tensor) for name, tensor in rest.items()},
    )
    run = emulator.blur_pool_double if case.dtype == torch.float64 else emulator.blur_pool_float
    run(ctypes.byref(arguments))


MODES = [
    Case(mode=mode, taps=(taps, taps), padding=padding)
    for mode in PADDING_MODES
    for taps in (2, 3, 4)
    for padding in ((1, 1, 1, 1), (0, 1, 2, 0))
]
ROWS_OF_VECTORS = [
    Case((2, 4, 10, 16), (taps, taps), (stride, stride), 2 * ((taps - 1) // 2, taps // 2), mode, *prologue)
    for mode in PADDING_MODES
    for taps in (2, 3, 4)
    for stride in (1, 2)
    for prologue in [(None, False), ("relu6", True)]
]
CASES = [
    *MODES,
    *ROWS_OF_VECTORS,
    Case(taps=(7, 5), padding=(2, 2, 3, 3), stride=(2, 3)),
    Case(taps=(1, 1), padding=(0, 0, 0, 0)),
    Case(taps=(1, 4), padding=(5, 0, 1, 0), mode="zeros", stride=(5, 1)),
    Case(shape=(1, 2, 1, 1), padding=(3, 2, 1, 4)),
    Case(shape=(1, 2, 2, 3), padding=(7, 5, 6, 4), mode="circular"),
    Case(shape=(2, 2, 3, 2), padding=(7, 5, 6, 4), mode="reflect", stride=(2, 2)),
    Case(shape=(1, 3, 4, 5), padding=(6, 9, 3, 8), mode="replicate", stride=(2, 1)),
    Case(shape=(3, 5, 14, 14), stride=(2, 2)),
    Case(shape=(2, 12, 14, 14), taps=(4, 4), stride=(2, 2), padding=(1, 2, 1, 2), dtype=torch.float32),
    Case(shape=(1, 4, 56, 56), stride=(2, 2), dtype=torch.float32),
    Case(shape=(1, 2, 40, 150), taps=(2, 2), padding=(0, 1, 0, 1), dtype=torch.float32),
    Case(shape=(1, 2, 70, 132), taps=(5, 5), padding=(2, 2, 2, 2), mode="circular"),
    Case(shape=(2, 64, 9, 10), dtype=torch.float32),
    Case(shape=(2, 34, 20, 18), taps=(2, 2), padding=(0, 1, 0, 1)),
    Case(shape=(1, 40, 7, 33), stride=(4, 4), taps=(7, 7), padding=(3, 3, 3, 3)),
    Case(shape=(1, 1, 300, 300), stride=(64, 100), taps=(7, 7), padding=(3, 3, 3, 3)),
    *(Case(activation=activation, scaled=scaled) for activation in ACTIVATIONS[1:] for scaled in (False, True)),
    Case(scaled=True, shape=(2, 5, 12, 12), stride=(2, 2)),
    Case(scaled=True, shape=(2, 68, 12, 12), activation="relu", mode="zeros", dtype=torch.float32),
    Case(scaled=True, shape=(4, 160, 24, 24), activation="relu"),  # threads of several positions each
    Case(scaled=True, shape=(3, 3, 40, 72), activation="tanh_relu", taps=(2, 2), padding=(0, 1, 0, 1)),
]


@pytest.mark.parametrize("aligned", [False, True], ids=["scalars", "vectors"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_blur_and_its_transpose_are_the_definition(emulator, case, channels_last, aligned):
    x, kernel, scale, shift = case.tensors(channels_last)
    prologue = {"scale": scale, "shift": shift, "activation": case.activation, "temperature": 2.0}
    expected = reference.blur_pool2d(x, kernel, **case.blur, **prologue)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    options = {"channels_last": channels_last, "aligned": aligned, "scale": scale, "shift": shift}
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if case.dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}

    out = torch.full_like(expected, torch.nan, memory_format=memory_format)
    emulate(emulator, case, x, kernel, out, transpose=False, **options)
    torch.testing.assert_close(out, expected, **tolerance)

    grad = torch.randn_like(expected).contiguous(memory_format=memory_format)
    grad_u = blur_pool2d_transposed(grad, kernel, tuple(x.shape[2:]), **case.blur)
    grad_x = torch.full_like(x, torch.nan)
    if case.activation is None and not case.scaled:
        emulate(emulator, case, grad, kernel, grad_x, transpose=True, **options)
        torch.testing.assert_close(grad_x, grad_u, **tolerance)
        return
    sums = torch.full((2, case.shape[1]), torch.nan, dtype=torch.float64) if case.scaled else None
    emulate(emulator, case, grad, kernel, grad_x, transpose=True, primal=x, sums=sums, **options)
    wanted = prologue_backward(grad_u, x, scale, shift, case.activation, 2.0)
    torch.testing.assert_close(grad_x, wanted[0], **tolerance)
    if case.scaled:
        spread = {"rtol": 1e-4, "atol": 1e-2} if case.dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
        torch.testing.assert_close(sums, torch.stack(wanted[1:]).double(), **spread)
        # Where nobody asks for these sums:
        alone = torch.full_like(x, torch.nan)
        emulate(emulator, case, grad, kernel, alone, transpose=True, primal=x, sums=None, **options)
        torch.testing.assert_close(alone, grad_x)
