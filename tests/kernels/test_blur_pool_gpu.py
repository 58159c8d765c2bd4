"""The CUDA kernels of blur pooling on a GPU, against the exact results."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from gpu_checks import (
    assert_autocast_is_right,
    assert_same_when_compiled,
    assert_second_derivatives_are_exact,
    assert_vmap_shares_the_primal,
)
from helpers import assert_close_to_reference

import vitfast
from vitfast.functional import blur_pool2d
from vitfast.nn import Smoothing2d

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU; run by `make gpu-test`"),
    pytest.mark.usefixtures("cuda_kernels"),
]


@pytest.fixture
def cuda_kernels():
    """Forces the kernels, and keeps plain PyTorch, which the tolerance is taken from, at float32's full precision."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    with vitfast.backend("cuda"):
        yield
    torch.backends.cudnn.allow_tf32 = before


DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = [
    (8, 64, 56, 56),
    (2, 256, 56, 56),
    (8, 64, 32, 32),
    (8, 512, 14, 14),
    (3, 5, 33, 47),
    (2, 3, 1, 1),
    (1, 1, 7, 900),
]
BLURS = [
    {"taps": 3, "stride": 2},
    {"taps": 2, "stride": 1},
    {"taps": 4, "stride": 2},
    {"taps": 1, "stride": 1},
    {"taps": 7, "stride": 3},
]
MODES = ["reflect", "replicate", "circular", "zeros"]


def tensors(shape, dtype, channels_last, *, prologue=False):
    generator = torch.Generator("cuda").manual_seed(0)
    normal = lambda *size: torch.randn(size, generator=generator, device="cuda", dtype=torch.float64)  # noqa: E731
    x = 3 * normal(*shape)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    rest = (1 + 0.2 * normal(shape[1]), normal(shape[1])) if prologue else ()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (x.to(dtype), *(t.to(wide) for t in rest))


def results(backend, arguments, dtype, taps, **options):
    """Output and gradients, computed in ``dtype``."""
    leaves = [
        t.detach().to(dtype if i == 0 else torch.promote_types(dtype, torch.float32)).requires_grad_()
        for i, t in enumerate(arguments)
    ]
    x, *rest = leaves
    kernel = torch.arange(1.0, taps + 1, device="cuda")  # not symmetric: a flipped kernel would show
    kernel = kernel / kernel.sum()
    names = dict(zip(("scale", "shift"), rest, strict=False))
    with vitfast.backend(backend):
        out = blur_pool2d(x, kernel, **names, **options)
        grad = torch.linspace(-1, 1, out.numel(), device="cuda", dtype=torch.float64).view(out.shape)
        grads = torch.autograd.grad(out, leaves, grad.to(out.dtype))
    return [out.detach(), *grads]


def assert_right(shape, dtype, channels_last, *, prologue=False, **options):
    arguments = tensors(shape, dtype, channels_last, prologue=prologue)
    ours = results("cuda", arguments, dtype, **options)
    plain = results("reference", arguments, dtype, **options)
    exact = results("reference", arguments, torch.float64, **options)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    assert ours[0].is_contiguous(memory_format=memory_format)
    assert ours[1].is_contiguous(memory_format=memory_format)
    # All values of a map of one place are multiplied by one sum of weights, whose rounding is no average of many.
    roundings = 4 if shape[2:] == (1, 1) else 1
    for name, mine, theirs, truth in zip(("output", "x", "scale", "shift"), ours, plain, exact, strict=False):
        if dtype == torch.float64:  # nothing is more exact
            torch.testing.assert_close(mine, truth, rtol=1e-12, atol=1e-12)
        else:
            assert_close_to_reference(mine.cpu(), theirs.cpu(), truth.cpu(), name, roundings)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blur", BLURS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward(shape, blur, dtype, channels_last):
    assert_right(shape, dtype, channels_last, **blur)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("mode", "padding"), [*product(MODES, [1, (0, 3, 2, 1), (9, 0, 4, 12)])])
def test_padding(mode, padding, channels_last):
    assert_right((2, 6, 5, 8), torch.float32, channels_last, taps=3, stride=2, padding=padding, padding_mode=mode)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("activation", [None, "relu", "relu6", "tanh_relu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prologue(dtype, activation, channels_last):
    for shape in ((8, 64, 14, 14), (3, 5, 33, 47)):
        assert_right(shape, dtype, channels_last, prologue=True, activation=activation, taps=3, stride=2)


@pytest.mark.parametrize("differentiated", [False, True], ids=["constant", "differentiated"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_normalisations(channels_last, differentiated):
    """Without gradients of its tensors, no sums are asked of the kernel."""
    x, weight, bias = tensors((3, 36, 14, 18), torch.float64, channels_last, prologue=True)
    mean, variance = bias.cos(), 0.5 + bias.square()

    def run(backend):
        leaf = x.clone().requires_grad_()
        affine = [t.clone().requires_grad_(differentiated) for t in (weight, bias)]
        leaves = [leaf, *affine] if differentiated else [leaf]
        with vitfast.backend(backend):
            taps = torch.ones(3, device="cuda")
            out = blur_pool2d(leaf, taps, norm=(*affine, mean, variance, 1e-3), activation="relu")
            return [out.detach(), *torch.autograd.grad(out.sin().sum(), leaves)]

    for found, expected in zip(run("cuda"), run("reference"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_sums_are_the_same_in_every_run():
    arguments = tensors((16, 64, 56, 56), torch.float32, False, prologue=True)
    first, second = (results("cuda", arguments, torch.float32, taps=3, stride=1, activation="relu") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_empty_batches():
    x = torch.empty(0, 4, 8, 8, device="cuda", requires_grad=True)
    scale = torch.ones(4, device="cuda", requires_grad=True)
    out = blur_pool2d(x, torch.ones(3, device="cuda"), scale=scale, stride=2)
    out.sum().backward()
    assert out.shape == (0, 4, 4, 4)
    assert torch.equal(scale.grad, torch.zeros_like(scale))


def test_unaligned_maps_and_other_devices_streams():
    storage = torch.randn(2 * 4 * 16 * 16 + 1, device="cuda")
    x = storage[1:].view(2, 4, 16, 16)  # not on a border of 16 bytes
    kernel = torch.tensor([0.25, 0.5, 0.25], device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        out = blur_pool2d(x, kernel, stride=2)
    torch.cuda.synchronize()
    expected = F.conv2d(
        F.pad(x, (1, 1, 1, 1), mode="reflect"), torch.outer(kernel, kernel).expand(4, 1, 3, 3), stride=2, groups=4
    )
    torch.testing.assert_close(out, expected)


def test_more_than_two_to_the_31_values():
    x = torch.zeros(1, 2**15 + 1, 256, 256, device="cuda", dtype=torch.bfloat16)
    x[0, -1] = 1
    out = blur_pool2d(x, torch.tensor([0.5, 0.5], device="cuda"), padding_mode="replicate")
    assert out[0, -1].min() == 1
    assert out[0, -2].max() == 0


KERNEL = torch.tensor([0.25, 0.5, 0.25])


def fused(x, scale, shift):
    return blur_pool2d(x, KERNEL.to(x), stride=2, scale=scale, shift=shift, activation="tanh_relu", temperature=2.0)


def plain(x, scale, shift):
    with vitfast.backend("reference"):
        return fused(x, scale, shift)


def test_contract():
    arguments = tensors((2, 3, 9, 8), torch.float64, False, prologue=True)
    assert_second_derivatives_are_exact(fused, plain, arguments)
    assert_vmap_shares_the_primal(fused, arguments, 3)
    assert_same_when_compiled(fused, arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), Smoothing2d.named("BNTanhBlur", 8)).cuda().eval()
    assert_autocast_is_right(module, torch.randn(4, 3, 16, 16, device="cuda"), dtype)


def test_graph_capture():
    """Nothing waits for the GPU, so that a CUDA graph can hold the call."""
    x, kernel = torch.randn(2, 8, 16, 16, device="cuda"), KERNEL.cuda()
    blur_pool2d(x, kernel)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = blur_pool2d(x, kernel)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(out, blur_pool2d(x, kernel))
