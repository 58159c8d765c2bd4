"""Blur pooling reads nothing beyond its maps: they begin or end at pages that nobody may touch."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from vitfast.functional import blur_pool2d

_PAGE = mmap.PAGESIZE
_PAGES = 16  # between the two that are protected


class FencedMemory:
    """Some pages between two whose first touch ends the process."""

    def __init__(self):
        self._map = mmap.mmap(-1, (_PAGES + 2) * _PAGE)
        self._begin = ctypes.addressof(ctypes.c_char.from_buffer(self._map)) + _PAGE
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for fence in (self._begin - _PAGE, self._begin + _PAGES * _PAGE):
            assert protect(fence, _PAGE, 0) == 0

    def copy(self, x: Tensor, at_end: bool) -> Tensor:
        """x, laid out as it is, next to one of the fences."""
        address = self._begin + (_PAGES * _PAGE - x.nbytes if at_end else 0)
        values = torch.frombuffer((ctypes.c_char * x.nbytes).from_address(address), dtype=x.dtype)
        return values.as_strided(x.shape, x.stride()).copy_(x)


@pytest.fixture(scope="module")
def fenced() -> Iterator[FencedMemory]:
    if not sys.platform.startswith("linux"):
        pytest.skip("pages are protected by Linux's mprotect")
    return FencedMemory()


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_maps_between_protected_pages(dtype, channels_last, instruction_set, fenced):
    generator = torch.Generator().manual_seed(0)
    sizes, activations = ((1, 1), (5, 7), (14, 14), (9, 33)), (None, "relu", "tanh_relu")
    cases = itertools.product(sizes, (1, 3, 20), (1, 2, 3, 5), (1, 2, 3), ("zeros", "circular"), activations)
    for number, ((height, width), channels, taps, stride, mode, activation) in enumerate(cases):
        x = torch.randn(1, channels, height, width, generator=generator).to(dtype)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        x = fenced.copy(x, at_end=number % 2 == 0).requires_grad_()
        kernel = torch.rand(taps, taps, generator=generator) if number % 5 == 0 else torch.rand(taps)
        out = blur_pool2d(x, kernel.to(dtype), stride=stride, padding_mode=mode, activation=activation)
        gradient = torch.ones_like(out)
        assert out.isfinite().all()
        (from_map,) = torch.autograd.grad(out, x, gradient, retain_graph=True)
        if gradient.nbytes <= _PAGES * _PAGE - x.nbytes:  # beside x, at the other fence
            (from_fence,) = torch.autograd.grad(out, x, fenced.copy(gradient, at_end=number % 2 == 1))
            assert torch.equal(from_map, from_fence)
