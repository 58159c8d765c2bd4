"""Whether the benchmark of the MLP is fair: every implementation computes the same results, and the work is right."""

import pytest
import torch

from vitfast.bench import cases
from vitfast.bench.case import FORWARD, FORWARD_BACKWARD, OURS
from vitfast.bench.mlp import Layer, make_workload
from vitfast.bench.runner import error_limit, relative_error

CPU = torch.device("cpu")
LAYER = Layer(rows=50, channels=12, hidden=40)
BRANCH = Layer(rows=50, channels=16, hidden=48, residual=True)  # which the kernels take in float32
each_layer = pytest.mark.parametrize("layer", [LAYER, BRANCH], ids=["mlp", "residual branch"])
each_phase = pytest.mark.parametrize("phase", [FORWARD, FORWARD_BACKWARD])


@each_layer
@each_phase
def test_all_implementations_agree_with_the_definition(phase, layer):
    workload = make_workload(layer, phase, CPU, torch.float64)
    expected = workload.expected()
    for variant in workload.variants:
        if variant.compiled:
            continue
        results = variant.run()
        assert [r.shape for r in results] == [e.shape for e in expected], variant.name
        assert relative_error(results, expected) <= layer.rows * torch.finfo(torch.float64).eps, variant.name
        assert not any(r.requires_grad for r in results), variant.name


@each_layer
@each_phase
def test_vitfast_is_as_exact_as_plain_pytorch(phase, layer):
    workload = make_workload(layer, phase, CPU, torch.float32)
    expected = workload.expected()
    errors = {v.name: relative_error(v.run(), expected) for v in workload.variants if not v.compiled}
    assert errors[OURS] <= error_limit(errors[workload.plain], torch.float32)


@pytest.mark.slow
@each_layer
@each_phase
def test_the_compiled_peer_agrees_with_the_definition(phase, layer):
    torch.compiler.reset()
    workload = make_workload(layer, phase, CPU, torch.float64)
    (compiled,) = (variant for variant in workload.variants if variant.compiled)
    limit = layer.rows * torch.finfo(torch.float64).eps
    assert relative_error(compiled.run(), workload.expected()) <= limit


def test_counted_work():
    forward, training = (make_workload(LAYER, phase, CPU, torch.float32) for phase in (FORWARD, FORWARD_BACKWARD))
    tokens, weights = 4 * 50 * 12, 4 * (2 * 12 * 40 + 12 + 40)
    assert forward.flops == 4 * 50 * 12 * 40
    assert training.flops == 3 * forward.flops
    assert forward.bytes == tokens + weights + tokens
    assert training.bytes == 3 * (tokens + weights) + 2 * tokens
    assert forward.intermediate_bytes == 2 * 4 * 50 * 40


def test_cases_are_the_shapes_of_the_models():
    names = [case.name for case in cases("mlp/")]
    assert len(names) == 24
    assert {"mlp/swin_t_mlp_stage1/forward", "residual_mlp/vit_b_mlp/forward_backward"} <= set(names)
