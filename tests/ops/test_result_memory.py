"""The memory of freed results is kept for later ones, on Linux with PyTorch 2.11 or later."""

from __future__ import annotations

import os
import platform
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import vitfast
from vitfast import _C
from vitfast.functional import (
    attention,
    attention_qkvpacked,
    blur_pool2d,
    window_attention,
    window_attention_qkvpacked,
)

MIB = 1 << 20
BLUR = torch.ones(3, 3) / 9

pytestmark = pytest.mark.skipif(
    platform.system() != "Linux" or tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11),
    reason="memory is not kept here",
)


@pytest.fixture(autouse=True)
def _nothing_kept_before(_poisoned_memory):
    """Poisoned memory comes from PyTorch."""
    _C.poison_scratch(False)
    before = vitfast.keep_result_memory(0)
    vitfast.keep_result_memory(256 * MIB)
    yield
    vitfast.keep_result_memory(before)


def image(mebibytes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(mebibytes, 8, 128, 256).to(dtype)  # 1 MiB each in float32


def blur(x: torch.Tensor) -> torch.Tensor:
    return blur_pool2d(x, BLUR, stride=1, padding=1)


def test_a_freed_result_makes_room_for_the_next():
    x = image(3)
    first = blur(x)
    place, values = first.data_ptr(), first.clone()
    assert _C.kept_result_bytes() == 0
    del first
    assert 3 * MIB <= _C.kept_result_bytes() <= 3.5 * MIB
    second = blur(2 * x)
    assert second.data_ptr() == place
    assert _C.kept_result_bytes() == 0
    torch.testing.assert_close(second, 2 * values)


def test_results_in_use_share_nothing():
    x = image(2)
    results = [blur(x + i) for i in range(4)]
    assert len({result.data_ptr() for result in results}) == 4
    for i, result in enumerate(results):
        assert torch.equal(result, blur(x + i))


def test_a_view_holds_its_memory():
    x = image(2)
    corner = blur(x)[0, 0, :2, :2]
    values = corner.clone()
    assert _C.kept_result_bytes() == 0
    blur(-x)
    assert torch.equal(corner, values)


def test_small_results_come_from_pytorch():
    blur(torch.randn(1, 1, 64, 64))
    assert _C.kept_result_bytes() == 0


def test_the_limit_holds_and_the_oldest_go_first():
    vitfast.keep_result_memory(6 * MIB)
    places = {}
    for size in (2, 3, 4):  # together more than the limit
        result = blur(image(size))
        places[size] = result.data_ptr()
        del result
        assert _C.kept_result_bytes() <= 6 * MIB
    assert blur(image(4)).data_ptr() == places[4]
    assert vitfast.keep_result_memory(0) == 6 * MIB
    assert _C.kept_result_bytes() == 0


def test_a_result_beyond_the_limit_leaves_what_is_kept():
    vitfast.keep_result_memory(4 * MIB)
    blur(image(2))
    kept = _C.kept_result_bytes()
    assert kept > 0
    blur(image(5))  # PyTorch's own
    assert _C.kept_result_bytes() == kept


def test_what_is_in_use_when_the_limit_falls_is_not_kept():
    result = blur(image(3))
    vitfast.keep_result_memory(1 * MIB)
    del result
    assert _C.kept_result_bytes() == 0


def test_without_a_limit_results_are_pytorchs_own():
    x = image(2)
    kept = blur(x)
    with pytest.raises(RuntimeError, match="not resizable"):
        kept.untyped_storage().resize_(0)
    vitfast.keep_result_memory(0)
    for size in (1, 2):
        blur(image(size)).untyped_storage().resize_(0)
    del kept  # freed after the limit went to 0
    assert _C.kept_result_bytes() == 0


def test_a_negative_limit_is_refused():
    with pytest.raises(ValueError, match="0 or more; got -1"):
        vitfast.keep_result_memory(-1)


def step(seed: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Results and gradients of all operators, in several layouts."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype).requires_grad_()  # noqa: E731
    maps = [draw(16, 64, 28, 28) for _ in range(3)]
    tokens = [draw(8, 8, 300, 32) for _ in range(3)]
    pixels = maps[0].contiguous(memory_format=torch.channels_last)
    heads = [m.unflatten(1, (2, 32)).permute(0, 3, 4, 1, 2) for m in maps]
    packed = torch.stack(heads, 3)
    results = [
        window_attention(*heads, window_size=7, shift=3),
        window_attention(*(h.contiguous() for h in heads), window_size=4),
        window_attention(heads[0][:, ::2], *(h[:, 1::2] for h in heads[1:]), window_size=7),  # with holes
        window_attention_qkvpacked(packed, window_size=4),
        attention(*tokens),
        attention_qkvpacked(packed.flatten(1, 2)),
        blur(maps[1]),
        blur(pixels),
    ]
    return [*results, *torch.autograd.grad(sum(r.square().sum() for r in results), (*maps, *tokens))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_results_are_the_same_in_used_memory(dtype):
    vitfast.keep_result_memory(0)
    expected = [step(seed, dtype) for seed in range(3)]
    vitfast.keep_result_memory(256 * MIB)
    for _ in range(3):
        for seed in range(3):
            for result, one in zip(step(seed, dtype), expected[seed], strict=True):
                assert torch.equal(result, one)
                assert result.stride() == one.stride()
                assert result.device == one.device
    assert _C.kept_result_bytes() > 0


def test_threads_share_what_is_kept():
    images = [image(2) + i for i in range(8)]
    expected = [blur(x) for x in images]

    def run(i: int) -> bool:
        return all(torch.equal(blur(images[i]), expected[i]) for _ in range(20))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(run, range(8)))


@torch.inference_mode()
def test_inference_tensors_lie_in_it_too():
    x = image(2)
    place = blur(x).data_ptr()
    result = blur(x)
    assert result.is_inference()
    assert result.data_ptr() == place


def forked(run) -> int:
    """The exit code of a child process that calls ``run``."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if run() else 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_frees_what_it_inherited():
    results = [blur(image(2))]

    def free() -> bool:
        results.clear()
        return 2 * MIB <= _C.kept_result_bytes() < 3 * MIB

    assert forked(free) == 0
    assert _C.kept_result_bytes() == 0


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_may_be_forked_while_threads_take_and_free(threads):
    threads(1)  # a child has no threads of OpenMP
    x, busy = image(1), threading.Event()
    busy.set()

    def churn() -> None:
        while busy.is_set():
            blur(x)

    with ThreadPoolExecutor(2) as pool:
        for _ in range(2):
            pool.submit(churn)
        try:
            for _ in range(20):
                assert forked(lambda: vitfast.keep_result_memory(0) == 256 * MIB) == 0
        finally:
            busy.clear()
