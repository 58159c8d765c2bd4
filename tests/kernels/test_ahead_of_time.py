"""Every kernel compiles for the three architectures, without a GPU, by the command that reports what they need."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from vitfast.kernels import attention_tangents, window_attention_tangents
from vitfast.kernels.compile import compile_launch

ARCHS = (80, 90, 100)
WHOLE = ["window_attention_fwd_kernel", "window_attention_bwd_kernel", "window_attention_tangents_kernel"]
BLOCKS = [
    "window_attention_fwd_blocks_kernel",
    "window_attention_bwd_query_kernel",
    "window_attention_bwd_key_kernel",
    "window_attention_bwd_kernel",
    "window_attention_tangents_kernel",
]
TANGENTS_BLOCKS = [
    "window_attention_rows_kernel",
    "window_attention_tangents_query_kernel",
    "window_attention_tangents_key_kernel",
]
ATTENTION = [
    "attention_fwd_kernel",
    "attention_bwd_query_kernel",
    "attention_bwd_key_kernel",
    "attention_rows_kernel",
    "attention_tangents_query_kernel",
    "attention_tangents_key_kernel",
]
ATTENTION_BIAS = ["attention_bwd_bias_kernel", "attention_tangents_bias_kernel"]
SHAPES = [
    ("swin 7x7 D=32", ("float16", "bfloat16"), [*WHOLE, "window_attention_tangents_key_kernel"]),
    ("swin 7x7 D=32", ("float32",), WHOLE + TANGENTS_BLOCKS),
    ("alternet 4x4 D=64", ("bfloat16",), WHOLE),
    ("alternet 7x7 D=64", ("bfloat16",), [*WHOLE, *TANGENTS_BLOCKS, "transpose_kernel"]),
    ("swin 12x12 D=32", ("bfloat16",), BLOCKS + TANGENTS_BLOCKS),
    ("vit D=64 bias", ("bfloat16", "float32"), ATTENTION + ATTENTION_BIAS),
    ("vit D=64 key bias", ("bfloat16",), ATTENTION),
    ("vit D=80", ("bfloat16",), ATTENTION),
]


def compile_command(*arguments, **environment):
    command = [sys.executable, "-m", "vitfast.kernels.compile", *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: shape[0])
def compiled(request, tmp_path_factory):
    """(dtypes, kernels, table as printed, reports) of one shape, compiled anew."""
    case, dtypes, kernels = request.param
    folder = tmp_path_factory.mktemp("compiled")
    file = folder / "reports.json"
    arguments = ["--case", case, "--arch", *map(str, ARCHS), "--dtype", *dtypes, "--json", str(file)]
    done = compile_command(*arguments, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(folder / "cache"))
    assert done.returncode == 0, done.stderr
    return dtypes, kernels, done.stdout, json.loads(file.read_text())["reports"]


def test_every_kernel_compiles_for_every_architecture(compiled):
    dtypes, kernels, table, reports = compiled
    expected = {(kernel, arch, dtype) for kernel in kernels for arch in ARCHS for dtype in dtypes}
    assert {(r["kernel"], r["arch"], r["dtype"]) for r in reports} == expected
    assert len({tuple(report.values()) for report in reports}) == len(reports)
    heading, *rows = table.splitlines()
    assert heading.split() == ["kernel", "case", "arch", "dtype", "warps", "registers", "spilled", "shared"]
    for row, report in zip(rows, reports, strict=True):
        numbers = [report[name] for name in ("num_warps", "registers", "spill_bytes", "shared_bytes")]
        assert [int(word) for word in row.split()[-4:]] == numbers


def test_resources_fit_every_gpu(compiled):
    """255 registers a thread, 64 K registers and 99 KiB of shared memory a block: any GPU since Ampere has them."""
    for report in compiled[3]:
        assert 0 < report["registers"] <= 255
        assert report["registers"] * 32 * report["num_warps"] <= 2**16
        assert 0 < report["shared_bytes"] <= 99 * 1024
        assert report["spill_bytes"] >= 0


def test_tensor_core_forward_does_not_spill(compiled):
    dtypes = [dtype for dtype in compiled[0] if dtype != "float32"]
    forward = [r for r in compiled[3] if "_fwd_" in r["kernel"] and r["dtype"] in dtypes]
    assert len(forward) == len(ARCHS) * len(dtypes)
    assert [r for r in forward if r["spill_bytes"]] == []


# ---- tangents --------------------------------------------------------------------------------------------------------
# The code depends on which of them are given, and the compiler looks closer at types than the interpreter.

INPUTS = ["grad", "query", "key", "value", "bias"]
GIVEN = {
    **{f"{name} alone": [name] for name in INPUTS},
    "side by side": INPUTS,
    "output": INPUTS[1:],
    "nothing but the output": ["value"],
}


def empty_tangents(given, beside, **primals):
    """Three tangents of each of those that are ``given``, ``beside`` each other in memory or one after the other."""
    tangents = []
    for name, x in primals.items():
        shape = (*x.shape, 3) if beside else (3, *x.shape)
        tangent = x.new_empty(shape) if name in given else None
        tangents.append(tangent.movedim(-1, 0) if beside and tangent is not None else tangent)
    return tangents


def attention_launches(given, beside, output_only, bias_shape):
    x = torch.empty(2, 3, 40, 16, dtype=torch.bfloat16, device="meta")
    bias = x.new_empty(bias_shape, dtype=torch.float32)
    tangents = empty_tangents(given, beside, grad=x, query=x, key=x, value=x, bias=bias)
    results = [x.new_empty((3, *x.shape)), *(None if output_only else x.new_empty((3, *x.shape)) for _ in range(3))]
    return attention_tangents.tangents_launches(x, x, x, bias, x, *tangents, *results, 1.0)[0]


def window_attention_launches(given, beside, output_only, window):
    x = torch.empty(2, 12, 12, 3, 16, dtype=torch.bfloat16, device="meta")
    bias = x.new_empty((3, window**2, window**2), dtype=torch.float32)
    tangents = empty_tangents(given, beside, grad=x, query=x, key=x, value=x, bias=bias)
    results = [x.new_empty((3, *x.shape)), *(None if output_only else x.new_empty((3, *x.shape)) for _ in range(3))]
    geometry = {"window_size": (window, window), "shift": (0, 1), "scale": 1.0}
    return window_attention_tangents.tangents_launches(x, x, x, bias, x, *tangents, *results, **geometry)[0]


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize(
    ("launches", "argument"),
    [(attention_launches, (1, 3, 40, 40)), (attention_launches, (2, 1, 1, 40))]
    + [(window_attention_launches, window) for window in (4, 7, 12)],
    ids=["attention", "attention with a key bias", "window 4x4", "window 7x7", "window 12x12"],
)
def test_tangents_of_zero_compile(launches, argument, given):
    for launch in launches(GIVEN[given], given == "side by side", "output" in given, argument):
        assert "cubin" in compile_launch(launch, 90).asm


def test_the_interpreter_leaves_nothing_to_compile():
    done = compile_command("--case", "swin 7x7 D=32", TRITON_INTERPRET="1")
    assert done.returncode != 0
    assert "unset TRITON_INTERPRET" in done.stderr


def test_an_architecture_that_does_not_compile_is_an_error(tmp_path):
    done = compile_command(
        "--case", "swin 7x7 D=32", "--arch", "1", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path)
    )
    assert done.returncode != 0
