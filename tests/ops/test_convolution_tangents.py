"""Tangents of convolutions with 3x3 and 1x1 filters, against PyTorch's convolutions of each."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close_to_reference

import vitfast
from vitfast.ops import convolution

K = 3
# images, inputs, outputs, height, width, filter, padding
CASES = {
    "even map": (2, 16, 32, 8, 6, 3, 1),
    "odd map": (2, 48, 16, 7, 9, 3, 1),
    "several blocks of channels": (1, 80, 144, 4, 4, 3, 1),
    "several blocks of tiles": (3, 16, 16, 14, 13, 3, 1),
    "without padding": (2, 16, 16, 6, 5, 3, 0),
    "wide padding": (2, 32, 16, 3, 4, 3, 2),
    "single tile": (1, 16, 16, 2, 2, 3, 1),
    "single pixel": (1, 16, 16, 3, 3, 3, 0),
    "pixels": (2, 16, 32, 5, 3, 1, 0),
    "any channels": (2, 5, 3, 2, 3, 1, 0),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def tensors(case, dtype=torch.float32):
    """x, weight and the gradient of the output, and their tangents."""
    images, inputs, outputs, height, width, size, padding = case
    grown = 2 * padding - size + 1
    shapes = (
        (images, inputs, height, width),
        (outputs, inputs, size, size),
        (images, outputs, height + grown, width + grown),
    )
    generator = torch.Generator().manual_seed(0)
    primals = [torch.randn(shape, generator=generator) for shape in shapes]
    tangents = [torch.randn(K, *shape, generator=generator) for shape in shapes]
    return tuple(t.to(dtype) for t in primals), tuple(t.to(dtype) for t in tangents), padding


def definitions(primals, tangents, padding):
    """The tangents of output, input gradient and weight gradient, by PyTorch, a vector at a time; None is zero."""
    x, weight, grad = primals

    def convolve(x, weight):
        return F.conv2d(x, weight, padding=padding)

    def input_gradient(grad, weight):
        return torch.nn.grad.conv2d_input(x.shape, weight, grad, padding=padding)

    def weight_gradient(grad, x):
        return torch.nn.grad.conv2d_weight(x, weight.shape, grad, padding=padding)

    def both(product, a, b, a_t, b_t):
        return sum(product(*pair) for pair in ((a_t, b), (a, b_t)) if pair[0] is not None and pair[1] is not None)

    each = []
    for k in range(K):
        x_t, weight_t, grad_t = (None if t is None else t[k] for t in tangents)
        each.append(
            (
                both(convolve, x, weight, x_t, weight_t),
                both(input_gradient, grad, weight, grad_t, weight_t),
                both(weight_gradient, grad, x, grad_t, x_t),
            )
        )
    return [
        torch.stack(results) if isinstance(results[0], torch.Tensor) else None for results in zip(*each, strict=True)
    ]


def computed(primals, tangents, padding):
    (x, weight, grad), (x_t, weight_t, grad_t) = primals, tangents
    nothing = x_t is None, weight_t is None, grad_t is None
    return [
        None if nothing[0] and nothing[1] else convolution.output_tangents(x, weight, x_t, weight_t, padding),
        None
        if nothing[2] and nothing[1]
        else convolution.input_gradient_tangents(grad, weight, grad_t, weight_t, padding),
        None
        if nothing[2] and nothing[0]
        else convolution.weight_gradient_tangents(grad, x, weight, grad_t, x_t, padding),
    ]


def check(primals, tangents, padding):
    def widened(tensors):
        return tuple(None if t is None else t.double() for t in tensors)

    results = computed(primals, tangents, padding)
    plain = definitions(primals, tangents, padding)
    exact = definitions(widened(primals), widened(tangents), padding)
    for name, *values in zip(("output", "input gradient", "weight gradient"), results, plain, exact, strict=True):
        if values[2] is None:
            assert values[0] is None
        else:
            assert_close_to_reference(*values, name=name)
    return results


@cases
def test_are_exact(case, instruction_set):
    results = check(*tensors(case))
    assert all(t.stride(-3) == 1 for t in results[:2])


@cases
@pytest.mark.parametrize("absent", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=str)
def test_absent_tangents(case, absent):
    primals, tangents, padding = tensors(case)
    check(primals, tuple(None if i in absent else t for i, t in enumerate(tangents)), padding)


@pytest.mark.parametrize("case", [CASES["odd map"], CASES["pixels"]], ids=["3x3", "1x1"])
def test_layouts(case):
    """Channels last, parts of larger tensors, one map for all, and filters that lie in long vectors."""
    (x, weight, grad), (x_t, weight_t, grad_t), padding = tensors(case)
    expected = computed((x, weight, grad), (x_t, weight_t, grad_t), padding)
    vectors = torch.cat([torch.randn(K, 7), weight_t.flatten(1), torch.randn(K, 2)], 1)
    weight_t = vectors[:, 7:-2].view(weight_t.shape)
    padded = torch.cat([x_t, x_t], 4)[..., : x_t.shape[4]]
    channels_last = x.contiguous(memory_format=torch.channels_last)
    strided = weight.contiguous(memory_format=torch.channels_last)
    found = computed((channels_last, strided, grad.flip(0).flip(0)), (padded, weight_t, grad_t), padding)
    for result, before in zip(found, expected, strict=True):
        torch.testing.assert_close(result, before, rtol=1e-5, atol=1e-5)
    alike = x_t[:1].expand(K, *x.shape)
    check((x, weight, grad), (alike, weight_t, grad_t), padding)


def test_same_bits_with_any_number_of_threads(threads):
    arguments = tensors(CASES["several blocks of channels"])
    threads(1)
    first = computed(*arguments)
    for count in (2, 3, 8):
        threads(count)
        for result, before in zip(computed(*arguments), first, strict=True):
            assert torch.equal(result, before)


def serves(weight, in_size=(8, 8), stride=(1, 1), padding=(1, 1), dilation=(1, 1), transposed=False, groups=1):
    x = torch.empty(1, 1, *in_size, device=weight.device)
    return convolution.serves(x, weight, stride, padding, dilation, transposed, groups)


def test_what_is_left_to_pytorch():
    weight, pointwise = torch.empty(16, 32, 3, 3), torch.empty(5, 3, 1, 1)
    assert serves(weight)
    assert serves(weight, (7, 7), padding=(0, 0))
    assert serves(weight, (7, 7), padding=(0,))  # what PyTorch makes of "valid"
    with vitfast.backend("reference"):
        assert not serves(weight)
    assert not convolution.serves(torch.empty(0, 32, 8, 8), weight, (1, 1), (1, 1), (1, 1), False, 1)
    assert serves(pointwise, (1, 1), padding=(0, 0))
    for options in (
        {"stride": (2, 2)},
        {"stride": (1, 2)},
        {"dilation": (2, 2)},
        {"padding": (1, 0)},
        {"padding": (3, 3)},
        {"transposed": True},
        {"groups": 2},
        {"in_size": (0, 8)},
        {"in_size": (1, 1)},
        {"in_size": (3, 1)},
    ):
        assert not serves(weight, **options), options
    assert not serves(pointwise)  # of a wider map than the input
    assert not serves(pointwise, padding=(0, 0), stride=(2, 2))
    assert not serves(weight.double())
    assert not serves(torch.empty(16, 24, 3, 3))
    assert not serves(torch.empty(16, 16, 5, 5), padding=(2, 2))
    assert not serves(torch.empty(16, 16, 3), (8, 8), (1,), (1,), (1,))
    assert not serves(torch.empty(16, 16, 3, 3, device="meta"))


def test_direct_calls_keep_within_bounds():
    (x, weight, grad), (x_t, weight_t, grad_t), padding = tensors(CASES["even map"])
    last = convolution.channels_last
    x, grad, x_t, grad_t = map(last, (x, grad, x_t, grad_t))
    out, filters = torch.empty_like(grad_t), torch.empty_like(weight_t)
    conv, gradient = torch.ops.vitfast.conv3x3, torch.ops.vitfast.conv3x3_weight_gradient
    conv(x_t, weight, x, weight_t, padding, False, out)
    gradient(x_t, grad, x, grad_t, padding, filters)
    for error, arguments in (
        ("smaller than the maps", (x_t, weight, x, weight_t, 0, False, out)),
        ("padding must be", (x_t, weight, x, weight_t, 3, False, out)),
        ("filters must be", (x_t, weight, x, weight_t, padding, True, out)),
        ("filters must be", (x_t, weight.double(), x, weight_t, padding, False, out)),
        ("must be contiguous", (x_t, weight.mT, x, weight_t, padding, False, out)),
        ("one shape", (x_t, weight, x[:1], weight_t, padding, False, out)),
        ("maps must be float32", (x_t[:2], weight, x, weight_t, padding, False, out)),
        ("maps must be float32", (x_t.double(), weight, x, weight_t, padding, False, out)),
        ("adjacent", (x_t.contiguous(), weight, x, weight_t, padding, False, out)),
        ("out must be dense", (x_t, weight, x, weight_t, padding, False, last(torch.cat([out, out], 3))[..., :8, :])),
        ("there must be a map", (x_t, None, None, weight_t, padding, False, out)),
    ):
        with pytest.raises(RuntimeError, match=error):
            conv(*arguments)
    for error, arguments in (
        ("smaller than the maps", (x_t, grad, x, grad_t, 0, filters)),
        ("filters must be", (x_t, grad, x, grad_t, padding, filters[:, :1])),
        ("out must be", (x_t, grad, x, grad_t, padding, filters[0])),
        ("there must be a map", (x_t, None, x, None, padding, filters)),
    ):
        with pytest.raises(RuntimeError, match=error):
            gradient(*arguments)
