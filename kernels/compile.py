"""Compiles the Triton kernels ahead of time, without a GPU, and reports what they need of one.

    python -m vitfast.kernels.compile [--case NAME ...] [--arch 80 90 100] [--dtype bfloat16 float32] [--json FILE]

Each case is a call of an operator on tensors without storage (device "meta"). Its launches are the ones a real call
makes, with the same blocks, warps and specialisation; only Triton's driver is left out. Registers and spilled bytes
(local memory) are per thread, and shared memory per block of threads; the first two are read from the compiled binary.
The first kernel that does not compile ends the command with Triton's error and a status other than zero.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from . import attention, attention_tangents, window_attention, window_attention_tangents
from .common import statistics_dtype
from .launch import Launch

ARCHS = (80, 90, 100)
TANGENTS = 8  # of each input, along all of which the tangents of a case are taken at once
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
_TYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}


@dataclass(frozen=True)
class Report:
    """What one kernel of one case needs on one architecture, ``sm_<arch>``."""

    kernel: str
    case: str
    arch: int
    dtype: str
    num_warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int


def _window_attention_case(
    heads: int, head_dim: int, window: int, channels_first: bool
) -> Callable[[torch.dtype], list[Launch]]:
    """Both directions and tangents, with a shift and a bias: per head and packed, or shared on channels-first maps."""

    def launches(dtype: torch.dtype) -> list[Launch]:
        size, pair = 8 * window, (window, window)
        if channels_first:
            maps = torch.empty(3, 128, heads, head_dim, size, size, dtype=dtype, device="meta")
            query, key, value = maps.permute(0, 1, 4, 5, 2, 3)
            maps_t = maps.new_empty((3, TANGENTS, *maps.shape[1:]))
            query_t, key_t, value_t = maps_t.permute(0, 1, 2, 5, 6, 3, 4)
        else:
            packed = torch.empty(128, size, size, 3, heads, head_dim, dtype=dtype, device="meta")
            query, key, value = packed.unbind(3)
            query_t, key_t, value_t = packed.new_empty((TANGENTS, *packed.shape)).unbind(4)
        statistics = statistics_dtype(dtype)
        bias = query.new_empty((1 if channels_first else heads, window**2, window**2), dtype=statistics)
        lse = query.new_empty((128, heads, size, size), dtype=statistics)
        out = torch.empty_like(query)
        geometry = {"window_size": pair, "shift": (window // 2, window // 2), "scale": head_dim**-0.5}
        forward, _ = window_attention.forward_launches(query, key, value, bias, out, lse, **geometry)
        backward, _ = window_attention.backward_launches(
            out, query, key, value, bias, lse, query, key, value, **geometry
        )
        bias_t, out_t = bias.new_empty((TANGENTS, *bias.shape)), torch.empty_like(query_t)
        arguments = query, key, value, bias, out, out_t, query_t, key_t, value_t, bias_t
        results = out_t, query_t, key_t, value_t
        tangents, _ = window_attention_tangents.tangents_launches(*arguments, *results, **geometry)
        return [*forward, *backward, *tangents]

    return launches


def _attention_case(head_dim: int, bias_shape: tuple[int, ...] | None) -> Callable[[torch.dtype], list[Launch]]:
    """Both directions and tangents of 197 tokens in 6 heads from a packed projection, with a bias of this shape."""

    def launches(dtype: torch.dtype) -> list[Launch]:
        packed = torch.empty(128, 197, 3, 6, head_dim, dtype=dtype, device="meta")
        query, key, value = (t.transpose(1, 2) for t in packed.unbind(2))
        bias = None if bias_shape is None else query.new_empty(bias_shape, dtype=statistics_dtype(dtype))
        lse = query.new_empty((128, 6, 197), dtype=statistics_dtype(dtype))
        out = query.new_empty((128, 197, 6, head_dim)).transpose(1, 2)
        scale = head_dim**-0.5
        forward, _ = attention.forward_launches(query, key, value, bias, out, lse, scale)
        backward, _ = attention.backward_launches(out, query, key, value, bias, out, lse, query, key, value, scale)
        query_t, key_t, value_t = (t.transpose(2, 3) for t in packed.new_empty((TANGENTS, *packed.shape)).unbind(3))
        bias_t = None if bias is None else bias.new_empty((TANGENTS, *bias.shape))
        out_t = query.new_empty((TANGENTS, 128, 197, 6, head_dim)).transpose(2, 3)
        arguments = query, key, value, bias, out, out_t, query_t, key_t, value_t, bias_t
        tangents, _ = attention_tangents.tangents_launches(*arguments, out_t, query_t, key_t, value_t, scale)
        return [*forward, *backward, *tangents]

    return launches


# Swin-T; AlterNet on ImageNet and CIFAR maps; the windows of Swin V2 and of Swin at 384 pixels; the head dimensions of
# vision transformers without a bias, with a learned one, and with one for each key, such as a padding mask
CASES: dict[str, Callable[[torch.dtype], list[Launch]]] = {
    "swin 7x7 D=32": _window_attention_case(3, 32, 7, channels_first=False),
    "alternet 7x7 D=64": _window_attention_case(6, 64, 7, channels_first=True),
    "alternet 4x4 D=64": _window_attention_case(6, 64, 4, channels_first=True),
    "swin 8x8 D=32": _window_attention_case(3, 32, 8, channels_first=False),
    "swin 12x12 D=32": _window_attention_case(4, 32, 12, channels_first=False),
    **{f"vit D={d}": _attention_case(d, None) for d in (32, 48, 64, 80, 128)},
    **{f"vit D={d} bias": _attention_case(d, (1, 6, 197, 197)) for d in (32, 48, 64, 80, 128)},
    "vit D=64 key bias": _attention_case(64, (128, 1, 1, 197)),
}


def compile_launch(launch: Launch, arch: int) -> CompiledKernel:
    """The kernel of ``launch``, specialised for its arguments as Triton's launcher does it, for ``sm_<arch>``.

    Raises:
        RuntimeError: Triton was imported to interpret its kernels.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError(
            "Triton was told to interpret its kernels, which leaves nothing to compile; unset TRITON_INTERPRET"
        )
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(index,)] = "constexpr", value
        elif isinstance(value, tuple):
            signature[parameter.name] = tuple(
                _specialize(element, (index, i), True, constants, attributes) for i, element in enumerate(value)
            )
        else:
            signature[parameter.name] = parameter.annotation_type or _specialize(
                value, (index,), not parameter.do_not_specialize, constants, attributes
            )
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)


def _specialize(value: Any, path: tuple[int, ...], specialize: bool, constants: dict, attributes: dict) -> str:
    """The type of an argument; notes in ``constants`` and ``attributes`` what the compiler may assume about it."""
    if value is None or (specialize and isinstance(value, int) and value == 1):
        constants[path] = value
        return "constexpr"
    if isinstance(value, Tensor):
        aligned = value.storage_offset() * value.element_size() % 16 == 0
        name = f"*{_TYPE_NAMES[value.dtype]}"
    else:
        aligned = specialize and value % 16 == 0
        name = "i32" if -(2**31) <= value < 2**31 else "i64"
    if aligned:
        attributes[path] = [["tt.divisibility", 16]]
    return name


def resources(compiled: CompiledKernel) -> tuple[int, int]:
    """Registers and bytes of local memory per thread, from the compiled binary.

    Raises:
        RuntimeError: Triton's cuobjdump did not print them.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(compiled.asm["cubin"])
        binary.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", binary.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"expected REG, STACK, SHARED and LOCAL from {' '.join(command[:2])}; got:\n{text}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def reports(archs: Sequence[int], dtypes: Sequence[str], cases: Sequence[str]) -> Iterator[Report]:
    """Compiles the kernels of ``cases`` for each dtype and architecture, one report at a time.

    Of launches of a kernel that need the same there is one.
    """
    seen = set()
    for case in cases:
        for dtype in dtypes:
            for launch in CASES[case](DTYPES[dtype]):
                for arch in archs:
                    compiled = compile_launch(launch, arch)
                    registers, spill_bytes = resources(compiled)
                    report = Report(
                        kernel=compiled.metadata.name,
                        case=case,
                        arch=arch,
                        dtype=dtype,
                        num_warps=launch.num_warps,
                        registers=registers,
                        spill_bytes=spill_bytes,
                        shared_bytes=compiled.metadata.shared,
                    )
                    if report not in seen:
                        seen.add(report)
                        yield report


def main(arguments: list[str] | None = None) -> None:
    """Prints one line per compiled kernel as it is done."""
    parser = argparse.ArgumentParser(prog="python -m vitfast.kernels.compile", description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES, nargs="+", default=tuple(CASES), help="all of them if not given")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHS, help="compute capabilities without the dot")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=("bfloat16", "float32"))
    parser.add_argument("--json", metavar="FILE", help="write the reports and the version of Triton there too")
    options = parser.parse_args(arguments)
    row = "{:33} {:18} {:6} {:9} {:>5} {:>9} {:>8} {:>9}"
    print(row.format("kernel", "case", "arch", "dtype", "warps", "registers", "spilled", "shared"))
    done = []
    for report in reports(options.arch, options.dtype, options.case):
        done.append(asdict(report))
        name, case, arch, *rest = done[-1].values()
        print(row.format(name, case, f"sm_{arch}", *rest), flush=True)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"triton": triton.__version__, "reports": done}, file, indent=1)


if __name__ == "__main__":
    main()
