"""Whether the benchmark is fair: every implementation computes the same results, and the counted work is right."""

import dataclasses

import pytest
import torch

from vitfast import bench
from vitfast.bench.case import FORWARD, FORWARD_BACKWARD, OURS
from vitfast.bench.runner import error_limit, relative_error
from vitfast.bench.window_attention import Layer, make_workload

CPU = torch.device("cpu")
SHIFTED = Layer(size=14, heads=2, dim=8, window=7, shift=3, batch=2, packed=True)
LAYERS = {
    "shifted": SHIFTED,
    "shifted_single_window": dataclasses.replace(SHIFTED, size=7),
    "not_shifted": dataclasses.replace(SHIFTED, shift=0),
    "channels_first": Layer(size=12, heads=3, dim=8, window=4, shift=0, batch=2, packed=False),
}


@pytest.fixture(params=LAYERS.values(), ids=LAYERS)
def layer(request):
    return request.param


@pytest.fixture(params=[FORWARD, FORWARD_BACKWARD])
def phase(request):
    return request.param


def eager(workload):
    return [variant for variant in workload.variants if not variant.compiled]


def rounding(layer):
    """What summing the tokens of a window in another order may change, in float64."""
    return layer.tokens * torch.finfo(torch.float64).eps


def test_all_implementations_agree_with_the_definition(layer, phase):
    workload = make_workload(layer, phase, CPU, torch.float64)
    expected = workload.expected()
    for variant in eager(workload):
        results = variant.run()
        assert [r.shape for r in results] == [e.shape for e in expected], variant.name
        assert relative_error(results, expected) <= rounding(layer), variant.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_vitfast_is_as_exact_as_plain_pytorch(layer, phase, dtype):
    workload = make_workload(layer, phase, CPU, dtype)
    expected = workload.expected()
    errors = {variant.name: relative_error(variant.run(), expected) for variant in eager(workload)}
    assert errors[OURS] <= error_limit(errors[workload.plain], dtype)


def test_training_returns_the_output_and_all_gradients_anew(layer):
    workload = make_workload(layer, FORWARD_BACKWARD, CPU, torch.float32)
    for variant in eager(workload):
        first, second = variant.run(), variant.run()
        assert len(first) == (3 if layer.packed else 5), variant.name
        for a, b in zip(first, second, strict=True):
            assert not a.requires_grad, variant.name
            assert a.data_ptr() != b.data_ptr(), variant.name
            torch.testing.assert_close(a, b, msg=variant.name)


def test_forward_records_no_gradients(layer):
    for variant in eager(make_workload(layer, FORWARD, CPU, torch.float32)):
        (output,) = variant.run()
        assert not output.requires_grad, variant.name


@pytest.mark.slow
def test_compiled_peers_agree_with_the_definition():
    torch.compiler.reset()
    workload = make_workload(SHIFTED, FORWARD_BACKWARD, CPU, torch.float64)
    expected = workload.expected()
    compiled = [variant for variant in workload.variants if variant.compiled]
    assert [variant.name for variant in compiled] == ["compile_sdpa", "compile"]
    for variant in compiled:
        assert relative_error(variant.run(), expected) <= rounding(SHIFTED), variant.name


def test_counted_work():
    # 2 images, 4 windows and 2 heads of 49 x 49 scores; 2 products of 2 * 8 operations for each, then 5 more.
    scores = 2 * 4 * 2 * 49 * 49
    maps, bias = 4 * 2 * 14 * 14 * 2 * 8, 4 * 2 * 49 * 49
    forward = make_workload(SHIFTED, FORWARD, CPU, torch.float32)
    training = make_workload(SHIFTED, FORWARD_BACKWARD, CPU, torch.float32)
    assert forward.flops == scores * 2 * 16
    assert training.flops == scores * 7 * 16
    assert forward.bytes == 4 * maps + bias
    assert training.bytes == forward.bytes + (3 * maps + bias) + maps + (3 * maps + bias)
    assert forward.intermediate_bytes == training.intermediate_bytes == 4 * scores
    # along each axis, regions of 4 + 3 and of 7 tokens: 4 * 4 + 3 * 3 + 7 * 7 of 2 * 7 * 7 pairs are attended
    assert forward.details["attended_share"] == pytest.approx((74 / 98) ** 2)


def test_every_stage_has_both_passes():
    names = [case.name for case in bench.cases()]
    assert len(set(names)) == len(names)
    for i in range(1, 5):
        assert f"window_attention/swin_t_stage{i}/forward" in names
        assert f"window_attention/swin_t_stage{i}/forward_backward" in names
    assert {case.family for case in bench.cases("window_attention/")} == {"swin_t", "alternet_7x7", "alternet_4x4"}


@pytest.mark.parametrize("case", bench.cases("stage4"), ids=lambda case: case.name)
def test_implementations_are_announced_as_they_come(case):
    workload = case.make(CPU, torch.float32)
    assert tuple(variant.name for variant in workload.variants) == case.implementations
    assert workload.variants[0].name == OURS
    assert workload.plain in case.implementations
