"""Derivatives of graphs that call the registered operators: none is zero that should not be.

Exported programs and graphs of `make_fx` hold the operators themselves, below the rules that `vitfast.functional` gives
them. And derivatives under autocast, which are formulas: autocast must not change their precision.
"""

from __future__ import annotations

import pytest
import torch
from torch.autograd.functional import hessian
from torch.func import grad, jvp
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

import vitfast
from vitfast import functional, reference

TAPS = torch.tensor([0.25, 0.5, 0.25])


def maps(x: torch.Tensor) -> torch.Tensor:
    """(2, 2, 9, 8) as a map of windows, (B, H, W, heads, D)."""
    return x.reshape(2, 3, 3, 2, 8)


def window_qkvpacked(x):
    return functional.window_attention_qkvpacked(torch.stack((maps(x), maps(x).sin(), maps(x).cos()), 3), window_size=2)


def window_with_bias(x):
    bias = x.flatten()[: 2 * 4 * 4].reshape(2, 4, 4)
    return functional.window_attention(maps(x), maps(x), maps(x), bias, window_size=2, shift=1)


def attention_with_bias(x):
    return functional.attention(x, x.sin(), x.cos(), x[0, :, :, :1] * x[1, :, None, :, 1])


def attention_qkvpacked(x):
    return functional.attention_qkvpacked(x.reshape(2, 3, 3, 2, 8))


def blur(x):
    return functional.blur_pool2d(x, TAPS, stride=2)


def blur_with_prologue(x):
    return functional.blur_pool2d(x, TAPS, scale=x[0, :, 0, 0], shift=x[1, :, 1, 1], activation="relu")


FUNCTIONS = [
    window_qkvpacked,
    window_with_bias,
    attention_with_bias,
    attention_qkvpacked,
    blur,
    blur_with_prologue,
]
functions = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)


def made(function):
    """A point, a direction, and there in plain PyTorch: the tangent, the gradient of a scalar, and its tangent."""
    x = torch.randn(2, 2, 9, 8, dtype=torch.float64)
    direction = torch.randn_like(x)
    with vitfast.backend("reference"):
        tangent = jvp(function, (x,), (direction,))[1]
        gradient, product = jvp(grad(scalar(function)), (x,), (direction,))
    return x, direction, tangent, gradient, product


def scalar(function):
    return lambda x: function(x).sin().square().sum()


@functions
def test_tangents_of_a_traced_graph(function):
    x, direction, tangent, *_ = made(function)
    traced = make_fx(function)(x)
    assert_close(jvp(traced, (x,), (direction,))[1], tangent)


@functions
def test_hessian_vector_products_of_a_traced_gradient(function):
    x, direction, _, gradient, product = made(function)
    traced = make_fx(grad(scalar(function)))(x)
    assert_close(jvp(traced, (x,), (direction,)), (gradient, product))


@functions
def test_tangents_of_the_call_of_a_dual_tensor(function):
    x, direction, tangent, *_ = made(function)
    with torch.autograd.forward_ad.dual_level():
        output = function(torch.autograd.forward_ad.make_dual(x, direction))
        assert_close(torch.autograd.forward_ad.unpack_dual(output).tangent, tangent)


@functions
def test_batched_rows_of_a_hessian(function):
    """``vectorize=True`` maps over cotangents by the older vmap, which has fewer rules."""
    x = made(function)[0]
    with vitfast.backend("reference"):
        expected = hessian(scalar(function), x)
    assert_close(hessian(scalar(function), x, vectorize=True), expected)


class Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@functions
def test_a_program_exported_without_gradients_has_all_derivatives(function):
    x, direction, tangent, gradient, _ = made(function)
    with torch.no_grad():
        program = torch.export.export(Module(function), (x,)).module()
    assert_close(jvp(program, (x,), (direction,))[1], tangent)
    if function is blur_with_prologue:  # says that it records none
        with pytest.raises(RuntimeError, match="records no gradient through a prologue"):
            program(x.clone().requires_grad_())
        return
    leaf = x.clone().requires_grad_()
    assert_close(torch.autograd.grad(scalar(program)(leaf), leaf)[0], gradient)


@pytest.mark.parametrize("function", FUNCTIONS[:4], ids=lambda function: function.__name__)
def test_autocast_does_not_change_the_precision_of_derivatives(function):
    x, direction = torch.randn(2, 2, 2, 9, 8).unbind(0)
    leaf = x.clone().requires_grad_()

    def derivatives():
        tangent = jvp(function, (x,), (direction,))[1]
        gradient, product = jvp(grad(scalar(function)), (x,), (direction,))
        (first,) = torch.autograd.grad(scalar(function)(leaf), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first, leaf, direction)
        with vitfast.backend("reference"):
            output = function(x)
        return function(x), output, tangent, gradient, product, second

    expected = derivatives()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = derivatives()
    for value, plain in zip(found, expected, strict=True):
        assert value.dtype == torch.float32
        assert_close(value, plain)


@pytest.mark.parametrize("shift", [0, 2, 3, 5, 2**31 - 2])
@pytest.mark.parametrize("size", [(3, 3), (4, 9)])
def test_windows_larger_than_the_map_are_as_cheap_as_the_map(size, shift):
    """Without a bias: padded to full windows, the map would not fit into any memory."""
    window = 2**31 - 1
    x, direction = torch.randn(2, 1, *size, 2, 4, dtype=torch.float64).unbind(0)

    def function(x):
        return functional.window_attention(x, x.sin(), x.cos(), window_size=window, shift=shift)

    output, tangent = jvp(function, (x,), (direction,))
    small = {"window_size": (11, 11), "shift": (min(shift, 10),) * 2, "scale": 0.5}
    expected = jvp(lambda x: reference.window_attention(x, x.sin(), x.cos(), **small), (x,), (direction,))
    assert_close((output, tangent), expected)
