"""Every operator and its peers under pytest-benchmark: one group per operator, shape and pass.

    pytest benchmarks -k swin_t_stage4                   one shape
    pytest benchmarks -k "not compile" --benchmark-json out.json

The cases are those of `vitfast bench`, which is the better judge of ratios: it interleaves the implementations, while
pytest-benchmark measures one after the other.
"""

from functools import lru_cache

import pytest
import torch

from vitfast.bench import cases
from vitfast.bench.runner import dtype_name, error_limit, relative_error

CASES = {case.name: case for case in cases()}
IMPLEMENTATIONS = [(name, impl) for name, case in CASES.items() for impl in case.implementations]


@lru_cache(maxsize=1)  # the implementations of a case follow each other
def prepare(name, device, dtype):
    torch.compiler.reset()
    workload = CASES[name].make(device, dtype)
    return workload, workload.expected()


@pytest.mark.parametrize(("name", "impl"), IMPLEMENTATIONS)
def test_operator(benchmark, name, impl, device, dtype):
    workload, expected = prepare(name, device, dtype)
    (variant,) = (variant for variant in workload.variants if variant.name == impl)
    (plain,) = (variant for variant in workload.variants if variant.name == workload.plain)
    error = relative_error(variant.run(), expected)
    benchmark.group = name
    benchmark.extra_info.update(
        error=error,
        flops=workload.flops,
        bytes=workload.bytes,
        dtype=dtype_name(dtype),
        device=device.type,
    )

    def step():
        variant.run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    benchmark(step)
    assert error <= error_limit(relative_error(plain.run(), expected), dtype)
