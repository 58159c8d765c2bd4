"""Whether the benchmark of blur pooling is fair: every implementation computes the same, and the work is right."""

import dataclasses

import pytest
import torch

from vitfast.bench import cases
from vitfast.bench.blur_pool import Blur, make_workload
from vitfast.bench.case import FORWARD, FORWARD_BACKWARD, OURS
from vitfast.bench.runner import error_limit, relative_error

CPU = torch.device("cpu")
BLUR = Blur(batch=2, channels=5, size=12, taps=3, stride=2, channels_last=False, prologue=False)
BLURS = [
    BLUR,
    dataclasses.replace(BLUR, taps=2, stride=1, channels_last=True),
    dataclasses.replace(BLUR, prologue=True),
    dataclasses.replace(BLUR, prologue=True, channels_last=True),
]
each_phase = pytest.mark.parametrize("phase", [FORWARD, FORWARD_BACKWARD])


@each_phase
@pytest.mark.parametrize("blur", BLURS, ids=str)
def test_all_implementations_agree(blur, phase):
    workload = make_workload(blur, phase, CPU, torch.float64)
    expected = workload.expected()
    for variant in workload.variants:
        if variant.compiled:
            continue
        results = variant.run()
        assert [r.shape for r in results] == [e.shape for e in expected], variant.name
        assert relative_error(results, expected) <= 100 * torch.finfo(torch.float64).eps, variant.name
        assert not any(r.requires_grad for r in results), variant.name
        if blur.channels_last:
            assert all(r.is_contiguous(memory_format=torch.channels_last) for r in results), variant.name


@each_phase
@pytest.mark.parametrize("blur", BLURS, ids=str)
def test_vitfast_is_as_exact_as_plain_pytorch(blur, phase):
    workload = make_workload(blur, phase, CPU, torch.float32)
    expected = workload.expected()
    errors = {v.name: relative_error(v.run(), expected) for v in workload.variants if not v.compiled}
    assert errors[OURS] <= error_limit(errors[workload.plain], torch.float32)


def test_counted_work():
    forward, training = (make_workload(BLUR, phase, CPU, torch.float32) for phase in (FORWARD, FORWARD_BACKWARD))
    assert forward.flops == 2 * 3 * (2 * 5 * 12 * 6 + 2 * 5 * 6 * 6)
    assert forward.bytes == 4 * 2 * 5 * (12 * 12 + 6 * 6)
    assert training.bytes == 2 * forward.bytes
    assert forward.intermediate_bytes == 4 * 2 * 5 * 14 * 14
    with_prologue = make_workload(BLURS[2], FORWARD_BACKWARD, CPU, torch.float32)
    assert with_prologue.bytes == training.bytes + 4 * 2 * 5 * 12 * 12


def test_cases():
    names = [case.name for case in cases("blur_pool2d/")]
    assert len(names) == 96
    assert "blur_pool2d/blur_nhwc_8x512x14x14_4taps_stride2/forward" in names
    assert "blur_pool2d/norm_relu_blur_nchw_8x64x56x56_3taps_stride2/forward_backward" in names
