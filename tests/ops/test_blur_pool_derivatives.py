"""The differentiation contract of blur pooling, and what traces or casts it."""

from __future__ import annotations

import pytest
import torch
from derivatives import (
    USES,
    TangentsAreNotLost,
    Work,
    assert_double_backward_of_any_subset,
    assert_gradients_of_any_subset,
    assert_third_derivatives_are_exact,
    assert_transform_is_exact,
    directions,
    gradient,
    leaves,
)
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import vitfast
from vitfast import reference
from vitfast.functional import blur_pool2d

KERNEL = torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.2, 0.4]], dtype=torch.float64)
OPTIONS = {
    "plain": {"stride": 2},
    "replicate": {"padding_mode": "replicate", "padding": (2, 1, 0, 3)},
    "relu": {"stride": (1, 2), "activation": "relu"},
    "tanh_relu": {"stride": 2, "activation": "tanh_relu", "temperature": 1.5, "padding_mode": "zeros"},
    "norm": {"stride": 2, "activation": "relu"},
}
PROLOGUE = {"relu": ("scale", "shift"), "tanh_relu": ("scale", "shift"), "norm": ("weight", "bias", "mean", "variance")}
NO_PROLOGUE = (None, None, None, None, 0.0, 0, 1.0)  # of the registered operators


@pytest.fixture(params=list(OPTIONS))
def name(request):
    return request.param


def maker(name, size=(3, 4), channels=2):
    """Seed -> arguments: x, and the tensors of a prologue."""

    def make(seed=0):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(1, channels, *size, generator=generator, dtype=torch.float64)
        values = torch.randn(4, channels, generator=generator, dtype=torch.float64)
        values = (values[0] + 1.5, values[1], values[2], values[3].sigmoid() + 0.4)  # whose cosine is positive too
        return (x, *values[: len(PROLOGUE.get(name, ()))])

    return make


def fused(name):
    def function(x, *values):
        if name == "norm":
            return blur_pool2d(x, KERNEL, norm=(*values, 1e-3), **OPTIONS[name])
        return blur_pool2d(x, KERNEL, **dict(zip(PROLOGUE.get(name, ()), values, strict=True)), **OPTIONS[name])

    return function


def plain(name):
    function = fused(name)

    def definition(*tensors):
        with vitfast.backend("reference"):
            return function(*tensors)

    return definition


def test_gradcheck(name):
    make = maker(name)
    assert gradcheck(fused(name), leaves(make()), check_batched_grad=True)
    assert gradcheck(
        fused(name),
        leaves(make()),
        check_forward_ad=True,
        check_backward_ad=False,
        check_batched_forward_grad=True,
        check_undefined_grad=False,
    )


def test_gradgradcheck(name):
    assert gradgradcheck(fused(name), leaves(maker(name)()), check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__.removeprefix("use_"))
def test_transforms(use, name):
    assert_transform_is_exact(use, fused(name), plain(name), maker(name))


def test_third_derivatives(name):
    assert_third_derivatives_are_exact(fused(name), plain(name), maker(name))


def test_parts_of_the_inputs(name):
    assert_gradients_of_any_subset(fused(name), plain(name), maker(name))
    assert_double_backward_of_any_subset(fused(name), plain(name), maker(name))


def test_tangents_are_one_launch(name):
    """K Hessian-vector products call as many kernels as one."""
    make = maker(name)

    def calls(count):
        primals, vectors = make(), directions(make, count)
        launched = []

        class Names(Work):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                launched.append(str(function))
                return super().__torch_dispatch__(function, types, args, kwargs)

        with Names():
            vmap(lambda *v: jvp(gradient(fused(name)), primals, v)[1])(*vectors)
        return [call for call in launched if call.startswith("vitfast.")]

    assert len(calls(1)) == len(calls(8)) > 0


def test_kernel_that_is_differentiated_is_served_by_pytorch():
    x, kernel = torch.randn(1, 2, 5, 5, dtype=torch.float64), KERNEL.clone().requires_grad_()
    assert gradcheck(lambda k: blur_pool2d(x, k, stride=2), (kernel,), check_forward_ad=True)
    many = torch.stack([KERNEL, -KERNEL])
    expected = torch.stack([blur_pool2d(x, k) for k in many])
    assert_close(vmap(lambda k: blur_pool2d(x, k))(many), expected)
    assert_close(torch.func.jvp(lambda k: blur_pool2d(x, k), (KERNEL,), (KERNEL,))[1], blur_pool2d(x, KERNEL))


class TestTangentsAreNotLost(TangentsAreNotLost):
    @pytest.fixture(params=list(OPTIONS))
    def function(self, request):
        _, *values = maker(request.param)()
        return lambda x: fused(request.param)(x, *values)

    @pytest.fixture
    def primal(self):
        return torch.randn(1, 2, 3, 4, dtype=torch.float64)


def test_transposed_reference_is_the_transpose():
    for mode in ("zeros", "reflect", "replicate", "circular"):
        options = {"stride": (2, 3), "padding": (2, 1, 4, 0), "padding_mode": mode}
        x = torch.randn(2, 3, 7, 6, dtype=torch.float64)
        y = reference.blur_pool2d(x, KERNEL, **options)
        g = torch.randn_like(y)
        assert_close((y * g).sum(), (x * reference.blur_pool2d_transposed(g, KERNEL, (7, 6), **options)).sum())


# ---- compilation, export, autocast, checkpoints ----------------------------------------------------------------------


@pytest.fixture
def _fresh_dynamo():
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_compile(name, channels_last):
    tensors = maker(name, (8, 9), 4)()
    if channels_last:
        tensors = (tensors[0].contiguous(memory_format=torch.channels_last), *tensors[1:])
    compiled = torch.compile(fused(name), fullgraph=True, backend="aot_eager")
    some, others = leaves(tensors), leaves(tensors)
    found, expected = compiled(*some), fused(name)(*others)
    assert_close(found, expected)
    assert found.stride() == expected.stride()
    grad = torch.randn_like(expected)
    for a, b in zip(torch.autograd.grad(found, some, grad), torch.autograd.grad(expected, others, grad), strict=True):
        assert_close(a, b)
    with torch.no_grad():
        assert_close(compiled(*tensors), expected)


@pytest.mark.usefixtures("_fresh_dynamo")
def test_compile_with_inductor_and_dynamic_sizes():
    compiled = torch.compile(fused("tanh_relu"), fullgraph=True, dynamic=True)
    for size in ((8, 9), (11, 14)):
        some, others = leaves(maker("tanh_relu", size)()), leaves(maker("tanh_relu", size)())
        found, expected = compiled(*some), fused("tanh_relu")(*others)
        assert_close(found, expected)
        found.sum().backward()
        expected.sum().backward()
        assert_close(some[0].grad, others[0].grad)


def test_traced_double_backward():
    (x,) = maker("plain")()

    def penalty(x):
        (slope,) = torch.autograd.grad(
            torch.ops.vitfast.blur_pool2d(x, KERNEL, [2, 2], [1, 1, 0, 1], 1, *NO_PROLOGUE).sin().sum(),
            x,
            create_graph=True,
        )
        return torch.autograd.grad(slope.square().sum(), x)[0]

    def same(x):
        (slope,) = torch.autograd.grad(fused("plain")(x).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), x)[0]

    leaf = x.clone().requires_grad_()
    assert_close(make_fx(penalty)(leaf)(leaf), same(leaf))


def test_operator_refuses_gradients_through_a_prologue():
    x = torch.randn(1, 2, 5, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"call vitfast\.functional"):
        torch.ops.vitfast.blur_pool2d(x, KERNEL, [1, 1], [1, 1, 1, 1], 0, None, None, None, None, 0.0, 1, 1.0)


def test_opcheck():
    (x,) = maker("plain", (6, 7))()
    arguments = (KERNEL, [2, 2], [1, 1, 0, 1], 1, *NO_PROLOGUE)
    torch.library.opcheck(torch.ops.vitfast.blur_pool2d.default, (x.requires_grad_(), *arguments))


def test_export():
    class Model(torch.nn.Module):
        def forward(self, x):
            return fused("plain")(x)

    (x,) = maker("plain")()
    exported = torch.export.export(Model(), (x,))
    assert_close(exported.module()(x), fused("plain")(x))


def test_checkpoint(name):
    some, others = leaves(maker(name)()), leaves(maker(name)())
    checkpoint(fused(name), *some, use_reentrant=False).sin().sum().backward()
    fused(name)(*others).sin().sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(some, others, strict=True))


def test_autocast(name):
    tensors = tuple(t.float() for t in maker(name)())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(fused(name)(*tensors), fused(name)(*tensors))
        assert fused(name)(*tensors).dtype == torch.float32


@pytest.mark.parametrize("pack", [torch.clone, lambda t: t.contiguous().clone()], ids=["clone", "contiguous"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_what_is_saved_may_be_laid_out_otherwise(channels_last, pack):
    """Hooks on saved tensors return copies, such as those that keep them on another device."""
    x = torch.randn(2, 3, 8, 18, dtype=torch.float64)
    x = x.to(memory_format=torch.channels_last)[..., ::2] if channels_last else x.transpose(2, 3)
    x.requires_grad_()
    options = {"stride": 2, "activation": "relu"}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = blur_pool2d(x, KERNEL, **options)
    with vitfast.backend("reference"):
        expected = torch.autograd.grad(blur_pool2d(x, KERNEL, **options).square().sum(), x)[0]
    assert_close(torch.autograd.grad(output.square().sum(), x)[0], expected)
