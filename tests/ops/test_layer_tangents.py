"""The kernels for tangents of normalisations and GELU, against the formulas of `vitfast.reference`."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close_to_reference

from vitfast import reference
from vitfast.ops import layers
from vitfast.ops.layers import (
    Products,
    batch_norm_backward_tangents,
    batch_norm_tangents,
    gelu_backward_tangents,
    gelu_tangents,
    layer_norm_backward_tangents,
    layer_norm_tangents,
)

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
K, ROWS = 3, 70


def tensors(*shapes, dtype):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def layer_norm_case(channels, dtype, weighted=True):
    x, grad, x_t, grad_t, weight, weight_t, bias_t = tensors(
        *((ROWS, channels), (ROWS, channels), (K, ROWS, channels), (K, ROWS, channels)),
        *((channels,), (K, channels), (K, channels)),
        dtype=dtype,
    )
    mean, variance = x.mean(1, keepdim=True), x.var(1, keepdim=True, correction=0)
    primals = (x, mean, (variance + 1e-5).rsqrt(), weight if weighted else None)
    return primals, grad, grad_t, x_t, weight_t if weighted else None, bias_t if weighted else None


def check(results, definition, tangents, primals):
    """Of all tangents, against the definition of each in the same dtype and in float64."""

    def defined(widen):
        wide = [None if t is None else widen(t) for t in tangents]
        given = [None if p is None else widen(p) for p in primals]
        each = [definition(*given, *(None if t is None else t[k] for t in wide)) for k in range(K)]
        each = [one if isinstance(one, tuple) else (one,) for one in each]
        return [torch.stack(results) for results in zip(*each, strict=True)]

    results = results if isinstance(results, tuple) else (results,)
    for i, (result, plain, exact) in enumerate(
        zip(results, defined(lambda t: t), defined(torch.Tensor.double), strict=True)
    ):
        if result.dtype == torch.float64:
            torch.testing.assert_close(result, plain, rtol=1e-11, atol=1e-12)
        else:
            assert_close_to_reference(result, plain, exact, name=f"result {i}")


@dtypes
@pytest.mark.parametrize("channels", [1, 2, 7, 8, 15, 16, 17, 31, 32, 48, 100, 192])
def test_layer_norm(channels, dtype, instruction_set):
    primals, grad, grad_t, x_t, weight_t, bias_t = layer_norm_case(channels, dtype)
    output = (x_t, weight_t, bias_t)
    check(layer_norm_tangents(*primals, *output), reference.layer_norm_tangent, output, primals)
    gradients = (grad_t, x_t, weight_t)
    results = layer_norm_backward_tangents(grad, *primals, *gradients)
    check(results, reference.layer_norm_backward_tangent, gradients, (grad, *primals))


def test_reference_of_layer_norm_is_its_derivative():
    """The formulas themselves, against PyTorch's forward mode of its own layer normalisation and of its backward."""
    (x, mean, inverse, weight), grad, grad_t, x_t, weight_t, bias_t = layer_norm_case(9, torch.float64)

    def output(x, weight, bias):
        return torch.nn.functional.layer_norm(x, (9,), weight, bias)

    def gradients(grad, x, weight):
        return torch.func.vjp(output, x, weight, torch.zeros(9, dtype=torch.float64))[1](grad)

    bias = torch.zeros_like(weight)
    expected = torch.func.jvp(output, (x, weight, bias), (x_t[0], weight_t[0], bias_t[0]))[1]
    found = reference.layer_norm_tangent(x, mean, inverse, weight, x_t[0], weight_t[0], bias_t[0])
    torch.testing.assert_close(found, expected)
    expected = torch.func.jvp(gradients, (grad, x, weight), (grad_t[0], x_t[0], weight_t[0]))[1]
    found = reference.layer_norm_backward_tangent(grad, x, mean, inverse, weight, grad_t[0], x_t[0], weight_t[0])
    torch.testing.assert_close(found, expected)


def batch_norm_case(shape, dtype, last=True, weighted=True):
    """Maps whose channels come last in memory, or not, and their tangents."""

    def laid_out(maps):
        return maps.movedim(-3, -1).contiguous().movedim(-1, -3) if last and len(shape) == 4 else maps

    channels = shape[1]
    x, grad, x_t, grad_t, mean, inverse, weight, weight_t, bias_t = tensors(
        *(shape, shape, (K, *shape), (K, *shape), (channels,), (channels,), (channels,), (K, channels), (K, channels)),
        dtype=dtype,
    )
    x, grad, x_t, grad_t = map(laid_out, (x, grad, x_t, grad_t))
    primals = (x, mean, inverse.abs() + 0.1, weight if weighted else None)
    return primals, grad, grad_t, x_t, weight_t if weighted else None, bias_t if weighted else None


@dtypes
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize(
    "shape", [(2, c, 5, 7) for c in (1, 3, 8, 15, 16, 17, 48, 100)] + [(70, 20), (3, 5, 6)], ids=str
)
def test_batch_norm(shape, last, dtype, instruction_set):
    primals, grad, grad_t, x_t, weight_t, bias_t = batch_norm_case(shape, dtype, last)
    output = (x_t, weight_t, bias_t)
    check(batch_norm_tangents(*primals, *output), reference.batch_norm_tangent, output, primals)
    gradients = (grad_t, x_t, weight_t)
    results = batch_norm_backward_tangents(grad, *primals, *gradients)
    check(results, reference.batch_norm_backward_tangent, gradients, (grad, *primals))
    assert results[0].shape == x_t.shape
    if last and shape[2:] == (5, 7):
        assert all(t.is_contiguous(memory_format=torch.channels_last) for t in results[0])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("absent", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("name", ["layer_norm", "batch_norm"])
def test_absent_tangents(name, absent, weighted):
    case = {"layer_norm": (layer_norm_case, 20), "batch_norm": (batch_norm_case, (2, 20, 3, 3))}[name]
    primals, grad, grad_t, x_t, weight_t, bias_t = case[0](case[1], torch.float64, weighted=weighted)
    output = [None if i in absent else t for i, t in enumerate((x_t, weight_t, bias_t))]
    if any(t is not None for t in output):
        results = getattr(layers, f"{name}_tangents")(*primals, *output)
        check(results, getattr(reference, f"{name}_tangent"), output, primals)
    gradients = [None if i in absent else t for i, t in enumerate((grad_t, x_t, weight_t))]
    if any(t is not None for t in gradients):
        results = getattr(layers, f"{name}_backward_tangents")(grad, *primals, *gradients)
        check(results, getattr(reference, f"{name}_backward_tangent"), gradients, (grad, *primals))


def test_reference_of_batch_norm_is_its_derivative():
    (x, mean, inverse, weight), grad, grad_t, x_t, weight_t, bias_t = batch_norm_case((2, 9, 3, 4), torch.float64)

    def output(x, weight, bias):
        return torch.nn.functional.batch_norm(x, mean, inverse**-2, weight, bias, eps=0.0)

    def gradients(grad, x, weight):
        return torch.func.vjp(output, x, weight, torch.zeros_like(weight))[1](grad)

    bias = torch.zeros_like(weight)
    expected = torch.func.jvp(output, (x, weight, bias), (x_t[0], weight_t[0], bias_t[0]))[1]
    found = reference.batch_norm_tangent(x, mean, inverse, weight, x_t[0], weight_t[0], bias_t[0])
    torch.testing.assert_close(found, expected)
    expected = torch.func.jvp(gradients, (grad, x, weight), (grad_t[0], x_t[0], weight_t[0]))[1]
    found = reference.batch_norm_backward_tangent(grad, x, mean, inverse, weight, grad_t[0], x_t[0], weight_t[0])
    torch.testing.assert_close(found, expected)


def test_direct_calls_of_the_operator_stay_within_bounds():
    """Whoever calls the operator itself gets an error, and no access to what is not his."""
    run, f = torch.ops.vitfast.normalization_tangents, torch.ones
    x, vector, tangents = f(2, 4), f(4), f(3, 2, 4)
    run(x, vector, vector, True, None, None, tangents, None, None, None, 3, f(3, 2, 4), None, None, None)
    huge = 2**62
    for count in (-1, 2, 4, huge, huge + 1):
        with pytest.raises(RuntimeError, match="normalization_tangents"):
            run(x, vector, vector, True, None, None, tangents, None, None, None, count, f(3, 2, 4), None, None, None)
        empty = f(count, 0) if count >= huge else f(0)
        with pytest.raises(RuntimeError, match="normalization_tangents"):
            run(x, vector, vector, True, None, None, None, None, None, None, count, empty, None, None, None)
    for wrong in (
        (x, f(2), vector, True),  # statistics of rows
        (x, vector, vector, False),  # statistics of channels
        (x.mT, vector, vector, True),
        (f(2, 4, 1), vector, vector, True),
        (x, vector.double(), vector, True),
        (x.half(), vector.half(), vector.half(), True),
    ):
        with pytest.raises(RuntimeError, match="normalization_tangents"):
            run(*wrong, None, None, tangents, None, None, None, 3, f(3, 2, 4), None, None, None)
    with pytest.raises(RuntimeError, match="need grad"):
        run(x, vector, vector, True, None, None, tangents, None, None, None, 3, None, f(3, 2, 4), None, None)


@dtypes
@pytest.mark.parametrize("size", [1, 5, 16, 33, 1024, 1025, 5000])
def test_gelu(size, dtype, instruction_set):
    x, grad, x_t, grad_t = tensors((size,), (size,), (K, size), (K, size), dtype=dtype)
    x[1::4] *= 5
    check(gelu_tangents(x, x_t), reference.gelu_tangent, (x_t,), (x,))
    for tangents in ((grad_t, x_t), (grad_t, None), (None, x_t)):
        results = gelu_backward_tangents(grad, x, *tangents)
        check(results, reference.gelu_backward_tangent, tangents, (grad, x))


def test_reference_of_gelu_is_its_derivative():
    x, grad, x_t, grad_t = tensors((9,), (9,), (9,), (9,), dtype=torch.float64)

    def gradient(grad, x):
        return torch.func.vjp(torch.nn.functional.gelu, x)[1](grad)[0]

    expected = torch.func.jvp(torch.nn.functional.gelu, (x,), (x_t,))[1]
    torch.testing.assert_close(reference.gelu_tangent(x, x_t), expected)
    expected = torch.func.jvp(gradient, (grad, x), (grad_t, x_t))[1]
    torch.testing.assert_close(reference.gelu_backward_tangent(grad, x, grad_t, x_t), expected)


@pytest.mark.parametrize(
    ("compute", "case"),
    [
        (layer_norm_backward_tangents, layer_norm_case(48, torch.float32)),
        (batch_norm_backward_tangents, batch_norm_case((2, 48, 9, 8), torch.float32)),
    ],
    ids=["layer norm", "batch norm"],
)
def test_same_bits_with_any_number_of_threads(compute, case, threads):
    primals, grad, grad_t, x_t, weight_t, _ = case
    threads(1)
    first = compute(grad, *primals, grad_t, x_t, weight_t)
    for count in (2, 3):
        threads(count)
        for result, before in zip(compute(grad, *primals, grad_t, x_t, weight_t), first, strict=True):
            assert torch.equal(result, before)


def test_lower_precision_is_left_to_the_formulas():
    primals, grad, grad_t, x_t, weight_t, bias_t = layer_norm_case(16, torch.bfloat16)
    assert layer_norm_tangents(*primals, x_t, weight_t, bias_t).dtype == torch.bfloat16
    assert gelu_backward_tangents(grad, primals[0], grad_t, x_t).dtype == torch.bfloat16
    primals, grad, grad_t, x_t, weight_t, bias_t = batch_norm_case((2, 16, 3, 3), torch.bfloat16)
    assert batch_norm_tangents(*primals, x_t, weight_t, bias_t).dtype == torch.bfloat16
    assert batch_norm_backward_tangents(grad, *primals, grad_t, x_t, weight_t)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("columns", "dtype"), [(4, torch.float64), (16, torch.float32)], ids=str)
def test_sums_of_products(order, begun, transposed, columns, dtype):
    shapes = (7, 5), (5, columns), (K, 7, 5), (K, 5, columns), (K, 1, columns)
    a, b, a_t, b_t, start = tensors(*shapes, dtype=dtype)
    if transposed:
        a, a_t = (t.mT.contiguous().mT for t in (a, a_t))  # of which float32 goes to the kernel of weight gradients
        if columns == 4:
            b_t = b_t.mT.contiguous().mT
    total = Products(K, 7, columns)
    total.begin(start if begun else None)
    for i in order:
        total.add(*((a_t, b), (a, b_t))[i])
    expected = a_t @ b + a @ b_t
    torch.testing.assert_close(total.total(), expected + start if begun else expected)
