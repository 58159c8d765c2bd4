"""Every kernel compiles for the three architectures, without a GPU, by the command that reports what they need."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

ARCHS = (80, 90, 100)
WHOLE = ["window_attention_fwd_kernel", "window_attention_bwd_kernel"]
BLOCKS = ["window_attention_bwd_query_kernel", "window_attention_bwd_key_kernel"]
ATTENTION = ["attention_fwd_kernel", "attention_bwd_query_kernel", "attention_bwd_key_kernel"]
SHAPES = [
    ("swin 7x7 D=32", ("float16", "bfloat16", "float32"), WHOLE),
    ("alternet 4x4 D=64", ("bfloat16",), WHOLE),
    ("swin 12x12 D=32", ("bfloat16",), WHOLE + BLOCKS),
    ("vit D=64 bias", ("bfloat16", "float32"), [*ATTENTION, "attention_bwd_bias_kernel"]),
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
    assert len(reports) == len(expected)
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
    forward = [r for r in compiled[3] if "_fwd_" in r["kernel"] and r["dtype"] in ("float16", "bfloat16")]
    assert len(forward) >= len(ARCHS)
    assert [r for r in forward if r["spill_bytes"]] == []


def test_the_interpreter_leaves_nothing_to_compile():
    done = compile_command("--case", "swin 7x7 D=32", TRITON_INTERPRET="1")
    assert done.returncode != 0
    assert "unset TRITON_INTERPRET" in done.stderr


def test_an_architecture_that_does_not_compile_is_an_error(tmp_path):
    done = compile_command(
        "--case", "swin 7x7 D=32", "--arch", "1", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path)
    )
    assert done.returncode != 0
