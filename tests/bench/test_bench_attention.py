"""Whether the benchmark is fair: every implementation computes the same results, and the counted work is right."""

import pytest
import torch

from vitfast import bench
from vitfast.bench.attention import Layer, make_workload
from vitfast.bench.case import FORWARD, FORWARD_BACKWARD, OURS
from vitfast.bench.runner import error_limit, relative_error

CPU = torch.device("cpu")
PHASES = (FORWARD, FORWARD_BACKWARD)


@pytest.fixture(params=[False, True], ids=["no_bias", "bias"])
def layer(request):
    return Layer(batch=2, tokens=17, heads=3, dim=8, bias=request.param)


@pytest.mark.parametrize("phase", PHASES)
def test_all_implementations_agree_with_the_definition(layer, phase):
    workload = make_workload(layer, phase, CPU, torch.float64)
    expected = workload.expected()
    for variant in workload.variants:
        if variant.compiled:
            continue
        results = variant.run()
        assert [r.shape for r in results] == [e.shape for e in expected], variant.name
        assert relative_error(results, expected) <= layer.tokens * torch.finfo(torch.float64).eps, variant.name
        assert not any(r.requires_grad for r in results), variant.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("phase", PHASES)
def test_vitfast_is_as_exact_as_plain_pytorch(layer, phase, dtype):
    workload = make_workload(layer, phase, CPU, dtype)
    expected = workload.expected()
    errors = {v.name: relative_error(v.run(), expected) for v in workload.variants if not v.compiled}
    assert errors[OURS] <= error_limit(errors[workload.plain], dtype)


@pytest.mark.slow
def test_compiled_peers_agree_with_the_definition(layer):
    torch.compiler.reset()
    workload = make_workload(layer, FORWARD_BACKWARD, CPU, torch.float64)
    expected = workload.expected()
    compiled = [variant for variant in workload.variants if variant.compiled]
    assert [variant.name for variant in compiled] == ["compile_sdpa", "compile"]
    for variant in compiled:
        assert relative_error(variant.run(), expected) <= layer.tokens * torch.finfo(torch.float64).eps, variant.name


def test_counted_work():
    layer = Layer(batch=2, tokens=17, heads=3, dim=8, bias=True)
    scores, qkv, bias = 2 * 3 * 17 * 17, 4 * 2 * 17 * 3 * 3 * 8, 4 * 3 * 17 * 17
    forward, training = (make_workload(layer, phase, CPU, torch.float32) for phase in PHASES)
    assert forward.flops == scores * 2 * 16
    assert training.flops == scores * 7 * 16
    assert forward.bytes == qkv + bias + qkv // 3
    assert training.bytes == forward.bytes + 2 * (qkv + bias) + qkv // 3
    assert forward.intermediate_bytes == training.intermediate_bytes == 4 * scores


@pytest.mark.parametrize("case", bench.cases("vit_8x197x3"), ids=lambda case: case.name)
def test_implementations_are_announced_as_they_come(case):
    workload = case.make(CPU, torch.float32)
    assert tuple(variant.name for variant in workload.variants) == case.implementations
    assert workload.variants[0].name == OURS
    assert workload.plain in case.implementations
