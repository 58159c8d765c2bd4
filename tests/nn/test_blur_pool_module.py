"""Blur pooling modules against those of timm, and against their definitions."""

from __future__ import annotations

import copy
import doctest

import libraries  # noqa: F401
import pytest
import torch
import torch.nn.functional as F
from kornia.filters import BlurPool2D, MaxBlurPool2D
from timm.layers import BlurPool2d as TimmBlurPool2d
from torch.testing import assert_close

from vitfast.nn import BlurPool2d, MaxBlurPool2d, blur_pool


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("filt_size", [2, 3, 4, 5, 7])
@pytest.mark.parametrize("pad_mode", ["reflect", "replicate", "circular", "constant"])
@pytest.mark.parametrize("channels", [None, 6])
def test_results_of_timm(channels, pad_mode, filt_size, stride):
    arguments = (channels, filt_size, stride, pad_mode)
    x = torch.randn(2, 6, 13, 16, dtype=torch.float64)
    ours, theirs = BlurPool2d(*arguments).double(), TimmBlurPool2d(*arguments).double()
    assert_close(ours(x), theirs(x))
    assert_close(ours.to(torch.float32)(x.float()), theirs.float()(x.float()))


@pytest.mark.parametrize("filt_size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_same_padding_keeps_the_size(filt_size, stride):
    """As antialiased-cnns: (K - 1) // 2 places before the map, K // 2 after it."""
    x = torch.randn(2, 3, 9, 8)
    pool = BlurPool2d(filt_size=filt_size, stride=stride, padding="same")
    before, after = (filt_size - 1) // 2, filt_size // 2
    padded = F.pad(x, (before, after, before, after), mode="reflect")
    expected = F.conv2d(padded, pool.kernel.expand(3, 1, -1, -1), stride=stride, groups=3)
    assert_close(pool(x), expected)
    assert expected.shape[2:] == (-(-9 // stride), -(-8 // stride))


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("filt_size", [1, 2, 3, 4, 5, 7])
def test_results_of_kornia(filt_size, stride):
    x = torch.randn(2, 6, 13, 16, dtype=torch.float64)
    options = {"filt_size": filt_size, "stride": stride, "pad_mode": "zeros", "padding": "same"}
    assert_close(BlurPool2d(**options).double()(x), BlurPool2D(filt_size, stride)(x))
    assert_close(MaxBlurPool2d(3, **options).double()(x), MaxBlurPool2D(filt_size, stride, max_pool_size=3)(x))


def test_zero_padding_as_a_convolution_has_it():
    """As kornia before version 0.9."""
    x = torch.randn(2, 3, 9, 8)
    for taps in (3, 4, 5):
        pool = BlurPool2d(filt_size=taps, pad_mode="zeros", padding=(taps - 1) // 2)
        weight = pool.kernel.expand(3, 1, -1, -1)
        assert_close(pool(x), F.conv2d(x, weight, stride=2, padding=(taps - 1) // 2, groups=3))


def test_kernels():
    assert_close(BlurPool2d().kernel, torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16)
    assert_close(BlurPool2d(filt_size=2, kernel="box").kernel, torch.full((2, 2), 0.25))
    assert_close(BlurPool2d(kernel=(1, 3)).kernel, torch.tensor([[1.0, 3], [3, 9]]) / 16)
    own = torch.randn(2, 3)
    pool = BlurPool2d(kernel=own, padding=1)
    assert torch.equal(pool.kernel, own)
    assert pool.kernel is not own
    x = torch.randn(1, 1, 6, 6)
    assert_close(pool(x), F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), own[None, None], stride=2))


def test_kernel_is_no_parameter_and_not_in_the_state_dict():
    pool = BlurPool2d(8)
    assert not list(pool.parameters())
    assert not pool.state_dict()
    assert pool.double().kernel.dtype == torch.float64
    assert "3x3 taps" in repr(pool)


def test_taps_that_are_a_parameter_are_copied_as_numbers():
    blur = BlurPool2d(kernel=torch.nn.Parameter(torch.tensor([0.25, 0.5, 0.25])))
    assert not blur.kernel.requires_grad
    copy.deepcopy(blur)


def test_no_padding():
    x = torch.randn(2, 3, 9, 8)
    expected = BlurPool2d(padding=0, pad_mode="zeros")(x)
    assert_close(BlurPool2d(pad_mode="none")(x), expected)


@pytest.mark.parametrize("padding", [0, 1])
def test_max_blur_pool(padding):
    x = torch.randn(2, 3, 12, 11, requires_grad=True)
    pool = MaxBlurPool2d(3, pool_padding=padding, filt_size=4, pad_mode="replicate")
    expected = BlurPool2d(filt_size=4, pad_mode="replicate")(F.max_pool2d(x, 3, stride=1, padding=padding))
    assert_close(pool(x), expected)
    assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (pool(x), expected)))
    assert "pool_size=3" in repr(pool)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "channels must be an integer", {"channels": 1.5}),
        (ValueError, "filt_size must be an integer from 1 to 7", {"filt_size": 8}),
        (ValueError, "kernel must be 'pascal'", {"kernel": "gauss"}),
        (ValueError, "must not sum to 0", {"kernel": (1, -1)}),
        (ValueError, "padding must be 'same'", {"padding": "valid"}),
        (TypeError, "stride must be an integer", {"stride": 0.5}),
    ],
)
def test_bad_options(error, message, arguments):
    with pytest.raises(error, match=message):
        BlurPool2d(**arguments)


def test_bad_inputs():
    with pytest.raises(ValueError, match="x must have 4 channels"):
        BlurPool2d(4)(torch.randn(2, 3, 8, 8))
    with pytest.raises(ValueError, match="padding_mode must be one of"):
        BlurPool2d(pad_mode="mirror")(torch.randn(2, 3, 8, 8))


def test_examples():
    names = {"torch": torch, "BlurPool2d": BlurPool2d, "MaxBlurPool2d": MaxBlurPool2d}
    assert doctest.testmod(blur_pool, extraglobs=names).failed == 0
