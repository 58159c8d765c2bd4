"""The definition of window attention against two independent ones, and its written-out derivatives against autograd."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from helpers import Case, assert_results_close, exact, make_inputs, plain
from torch.testing import assert_close

from vitfast import reference

DEFINITION_CASES = [
    Case(size=(14, 14), shift=(3, 3), dim=8),
    Case(size=(8, 8), window=(4, 4), dim=5, bias="shared"),
    Case(size=(13, 9), shift=(2, 5), dim=8),
    Case(size=(1, 1), window=(7, 7), shift=(3, 3), dim=4),
    Case(size=(5, 15), window=(3, 5), shift=(0, 4), dim=4),
    Case(size=(6, 3), window=(1, 1), dim=4),
    Case(size=(4, 6), window=(12, 9), shift=(11, 1), dim=4),
    Case(size=(8, 12), window=(4, 4), shift=(2, 2), ratio=(2, 2), dim=8),
    Case(size=(6, 10), window=(6, 4), shift=(0, 2), ratio=(3, 2), dim=8, bias="shared"),
    Case(size=(10, 6), window=(4, 4), shift=(2, 0), ratio=(1, 2), dim=8, bias=None, scale=-0.3),
    Case(size=(7, 7), dim=4, batch=0),
]


@pytest.mark.parametrize("case", DEFINITION_CASES, ids=str)
def test_definition_is_a_loop_over_windows(case):
    inputs = make_inputs(case)
    ours = plain(case, inputs)
    literal = exact(case, inputs)
    for name, result, expected in zip(ours._fields, ours, literal, strict=True):
        if expected is not None:
            assert_close(result, expected, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


def swin_region_mask(size, window, shift):
    """(windows, N, N): 0 where two tokens of a rolled window were neighbours on the map, -inf elsewhere."""
    regions = torch.zeros(size)
    row_cuts = (
        slice(0, -window[0]),
        slice(-window[0], -shift[0] or None),
        slice(-shift[0], None) if shift[0] else None,
    )
    column_cuts = (
        slice(0, -window[1]),
        slice(-window[1], -shift[1] or None),
        slice(-shift[1], None) if shift[1] else None,
    )
    pairs = itertools.product([c for c in row_cuts if c], [c for c in column_cuts if c])
    for region, (rows, columns) in enumerate(pairs):
        regions[rows, columns] = region
    regions = cut_windows(regions[None, :, :, None], window)[:, :, 0]
    same = regions[:, :, None] == regions[:, None, :]
    return torch.zeros(same.shape, dtype=torch.float64).masked_fill(~same, float("-inf"))


def cut_windows(x, window):
    """(B, H, W, C) -> (B * windows, N, C)."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // window[0], window[0], width // window[1], window[1], channels)
    return x.transpose(2, 3).reshape(-1, window[0] * window[1], channels)


def swin_attention(query, key, value, bias, window, shift):
    """Roll, partition, attention with the region mask, reverse, roll back: as published, for maps of whole windows."""
    batch, height, width, heads, dim = query.shape
    rolled = [torch.roll(t, (-shift[0], -shift[1]), (1, 2)).flatten(3) for t in (query, key, value)]
    q, k, v = (cut_windows(t, window).unflatten(-1, (heads, dim)).transpose(1, 2) for t in rolled)
    scores = dim**-0.5 * q @ k.transpose(-1, -2) + bias
    mask = swin_region_mask((height, width), window, shift)
    scores = scores.unflatten(0, (batch, -1)) + mask[:, None]
    out = (scores.softmax(-1).flatten(0, 1) @ v).transpose(1, 2)
    out = out.reshape(batch, height // window[0], width // window[1], *window, heads, dim)
    out = out.transpose(2, 3).reshape(batch, height, width, heads, dim)
    return torch.roll(out, shift, (1, 2))


@pytest.mark.parametrize(
    ("size", "window", "shift"),
    [
        ((14, 14), (7, 7), (0, 0)),
        ((14, 14), (7, 7), (3, 3)),
        ((8, 12), (4, 4), (2, 1)),
        ((9, 10), (3, 5), (2, 4)),
        ((7, 7), (7, 7), (3, 3)),
        ((8, 8), (4, 2), (0, 1)),
    ],
)
@pytest.mark.parametrize("bias", ["per head", "shared"])
def test_shifted_grid_is_swins_roll_with_region_mask(size, window, shift, bias):
    case = Case(size=size, window=window, shift=shift, dim=6, bias=bias)
    query, key, value, bias, _ = make_inputs(case)
    ours = reference.window_attention(query, key, value, bias, **case.reference_options)
    assert_close(ours, swin_attention(query, key, value, bias, window, shift), rtol=1e-12, atol=1e-12)


DERIVATIVE_CASES = [
    Case(size=(5, 4), window=(3, 3), shift=(1, 2), heads=2, dim=3),
    Case(size=(4, 6), window=(2, 4), shift=(0, 2), heads=2, dim=3, ratio=(2, 2), bias="shared"),
    Case(size=(4, 4), window=(2, 2), heads=1, dim=2, bias=None),
]


def primals_of(case):
    *tensors, grad = make_inputs(case)
    return tuple(t for t in tensors if t is not None), grad


def definition(case):
    return functools.partial(reference.window_attention, **case.reference_options)


def backward_by_autograd(case):
    """(grad, query, key, value[, bias]) -> their gradients, by autograd through the definition."""

    def backward(grad, *primals):
        _, vjp = torch.func.vjp(definition(case), *primals)
        return vjp(grad)

    return backward


def with_bias(tensors):
    return (*tensors, None) if len(tensors) == 3 else tuple(tensors)


@pytest.mark.parametrize("case", DERIVATIVE_CASES, ids=str)
def test_backward_is_autograds(case):
    primals, grad = primals_of(case)
    ours = reference.window_attention_backward(grad, *primals, **case.reference_options)
    assert (ours[3] is None) == (case.bias is None)
    for result, expected in zip(ours, backward_by_autograd(case)(grad, *primals), strict=False):
        assert_close(result, expected, rtol=1e-11, atol=1e-11)


def subsets(count):
    """Which of ``count`` tangents are given: all, none, each alone and each left out."""
    alone = [tuple(i == j for j in range(count)) for i in range(count)]
    return [(True,) * count, (False,) * count, *alone, *(tuple(not given for given in one) for one in alone)]


@pytest.mark.parametrize("case", DERIVATIVE_CASES, ids=str)
def test_tangent_is_forward_mode_autograds(case):
    primals, _ = primals_of(case)
    tangents = tuple(torch.randn_like(t) for t in primals)
    for given in subsets(len(primals)):
        zeroed = tuple(t if g else torch.zeros_like(t) for t, g in zip(tangents, given, strict=True))
        _, expected = torch.func.jvp(definition(case), primals, zeroed)
        some = with_bias([t if g else None for t, g in zip(tangents, given, strict=True)])
        ours = reference.window_attention_tangent(*with_bias(primals), some, **case.reference_options)
        assert_close(ours, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("case", DERIVATIVE_CASES, ids=str)
def test_backward_tangent_is_forward_over_reverse_autograd(case):
    primals, grad = primals_of(case)
    tangents = tuple(torch.randn_like(t) for t in (grad, *primals))
    for given in subsets(len(tangents)):
        zeroed = tuple(t if g else torch.zeros_like(t) for t, g in zip(tangents, given, strict=True))
        _, expected = torch.func.jvp(backward_by_autograd(case), (grad, *primals), zeroed)
        grad_t, *some = [t if g else None for t, g in zip(tangents, given, strict=True)]
        ours = reference.window_attention_backward_tangent(
            grad, *with_bias(primals), grad_t, with_bias(some), **case.reference_options
        )
        assert (ours[3] is None) == (case.bias is None)
        for result, one in zip(ours, expected, strict=False):
            assert_close(result, one, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", DERIVATIVE_CASES, ids=str)
def test_backward_tangent_without_grad_tangent_is_double_backward(case):
    primals, grad = primals_of(case)
    cotangents = tuple(torch.randn_like(t) for t in primals)
    _, vjp = torch.func.vjp(lambda *p: backward_by_autograd(case)(grad, *p), *primals)
    ours = reference.window_attention_backward_tangent(
        grad, *with_bias(primals), None, with_bias(cotangents), **case.reference_options
    )
    for result, expected in zip(ours, vjp(cotangents), strict=False):
        assert_close(result, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", [*DEFINITION_CASES, *DERIVATIVE_CASES], ids=str)
def test_partition_and_reverse_are_inverse(case):
    x = make_inputs(case).query
    windows = reference.window_partition(x, case.window, case.shift)
    assert windows.shape[2:] == (case.heads, case.window[0] * case.window[1], case.dim)
    back = reference.window_reverse(windows, case.size, case.window, case.shift)
    assert_close(back, x, rtol=0, atol=0)


@pytest.mark.parametrize("case", DEFINITION_CASES, ids=str)
def test_weights_times_values_are_the_output(case):
    query, key, value, bias, _ = make_inputs(case)
    weights = reference.window_attention_weights(query, key, bias, **case.reference_options)
    values = reference.window_partition(
        value,
        (case.window[0] // case.ratio[0], case.window[1] // case.ratio[1]),
        (case.shift[0] // case.ratio[0], case.shift[1] // case.ratio[1]),
    )
    output = reference.window_reverse(weights @ values, case.size, case.window, case.shift)
    assert_close(output, reference.window_attention(query, key, value, bias, **case.reference_options))
    sums = weights.sum(-1)
    assert torch.logical_or((sums - 1).abs() < 1e-12, sums == 0).all()
    assert sums.round().sum() == query.shape[:4].numel()  # one row of weights for each token of the map and head


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_dtype_is_kept(dtype):
    case = Case(size=(7, 7), dim=4)
    assert {t.dtype for t in plain(case, make_inputs(case, dtype))} == {dtype}


def test_own_results_satisfy_the_tolerance_rule():
    case = Case(size=(7, 7), dim=4)
    inputs = make_inputs(case, torch.float32)
    results, truth = plain(case, inputs), exact(case, inputs)
    assert_results_close(results, results, truth)
    with pytest.raises(AssertionError, match="output: mean error"):
        assert_results_close(results._replace(output=results.output + 1e-3), results, truth)
    with pytest.raises(AssertionError, match="output: mean error nan"):
        assert_results_close(results._replace(output=results.output * torch.nan), results, truth)
