"""The differentiation contract of attention: every use is exact, and whatever is not supported raises."""

from __future__ import annotations

import functools
import importlib

import pytest
import torch
from attention_cases import Case, arguments, fused_function, plain_function
from derivatives import (
    USES,
    LargestTensor,
    TangentsAreNotLost,
    assert_double_backward_of_any_subset,
    assert_gradients_of_any_subset,
    assert_primal_work_is_done_once,
    assert_third_derivatives_are_exact,
    assert_transform_is_exact,
    leaves,
    loss,
)
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.testing import assert_close

import vitfast
from vitfast.functional import attention, attention_qkvpacked

CASES = [
    Case(queries=3, keys=4, heads=2, dim=2, batch=1),
    Case(queries=4, heads=2, dim=2, batch=2, bias="bm", packed=True),
    Case(queries=3, heads=2, dim=3, batch=1, bias=None, packed=True),
    Case(queries=4, keys=2, heads=1, dim=2, batch=2, bias="bhnm", scale=0.8),
    Case(queries=2, keys=3, heads=2, dim=2, batch=2, bias="nm"),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


def maker(case):
    """Seed -> arguments of the case."""
    return lambda seed=0: arguments(case, seed=seed)


# ---- against finite differences ------------------------------------------------------------------------------------


@cases
def test_gradcheck(case):
    assert gradcheck(fused_function(case), leaves(arguments(case)), check_batched_grad=True)


@cases
def test_gradcheck_forward_mode(case):
    assert gradcheck(
        fused_function(case),
        leaves(arguments(case)),
        check_forward_ad=True,
        check_backward_ad=False,
        check_batched_forward_grad=True,
        check_undefined_grad=False,
    )


@cases
def test_gradgradcheck(case):
    assert gradgradcheck(
        fused_function(case), leaves(arguments(case)), check_fwd_over_rev=True, check_rev_over_rev=True
    )


def test_gradgradcheck_of_batched_gradients():
    case = CASES[0].but(queries=2, keys=2, heads=1)
    assert gradgradcheck(fused_function(case), leaves(arguments(case)), check_batched_grad=True)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"dropout_p": 0.4}], ids=["causal", "dropout"])
def test_gradgradcheck_without_a_kernel(options):
    def function(*tensors):
        torch.manual_seed(0)  # the same dropout in every evaluation
        return attention(*tensors, **options)

    tensors = leaves(arguments(CASES[0]))
    assert gradcheck(function, tensors, check_forward_ad=True)
    assert gradgradcheck(function, tensors)


@cases
def test_third_derivatives(case):
    assert_third_derivatives_are_exact(fused_function(case), plain_function(case), maker(case))


# ---- torch.func ----------------------------------------------------------------------------------------------------


@cases
@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__.removeprefix("use_"))
def test_functional_transforms_are_exact(use, case):
    assert_transform_is_exact(use, fused_function(case), plain_function(case), maker(case))


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__.removeprefix("use_"))
def test_functional_transforms_in_blocks_of_queries(use, monkeypatch):
    """The formulas go through three blocks where the definition has all scores at once."""
    monkeypatch.setattr(importlib.import_module("vitfast.reference.attention"), "_BLOCK_SCORES", 8)
    case = CASES[0]
    assert_transform_is_exact(use, fused_function(case), plain_function(case), maker(case))


def test_functional_call_of_a_model_with_a_learned_bias():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = torch.nn.Linear(4, 12)
            self.bias = torch.nn.Parameter(torch.randn(2, 5, 5))

        def forward(self, x):
            return attention_qkvpacked(self.qkv(x).unflatten(-1, (3, 2, 2)), self.bias).flatten(2)

    block = Block().double()
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in block.named_parameters()}
    vectors = {name: torch.randn(5, *p.shape, dtype=torch.float64) for name, p in parameters.items()}

    def gradient(parameters):
        return grad(lambda p: functional_call(block, p, (x,)).square().sum())(parameters)

    def products():
        return vmap(lambda v: jvp(gradient, (parameters,), (v,))[1])(vectors)

    ours = products()
    with vitfast.backend("reference"):
        expected = products()
    assert_close(ours, expected)


@cases
def test_primal_work_is_done_once_for_all_tangents(case):
    assert_primal_work_is_done_once(fused_function(case), maker(case), "attention")


# ---- no tangent is lost --------------------------------------------------------------------------------------------


def public_functions():
    """(name, tensor, function of it) for each tensor that each public function takes."""
    names = ("query", "key", "value", "bias")
    tensors = dict(zip(names, arguments(Case(queries=6, keys=4, heads=2, dim=3)), strict=True))
    for name, tensor in tensors.items():
        yield f"attention:{name}", tensor, lambda t, n=name: attention(**(tensors | {n: t}))
        yield f"causal:{name}", tensor, lambda t, n=name: attention(**(tensors | {n: t}), is_causal=True)
    row = tensors["bias"][0, 0, 0].clone()
    yield "attention:bias of a row", row, lambda t: attention(**(tensors | {"bias": t}))
    qkv, bias = arguments(Case(queries=6, heads=2, dim=3, packed=True))
    yield "qkvpacked:qkv", qkv, lambda t: attention_qkvpacked(t, bias)
    yield "qkvpacked:bias", bias, lambda t: attention_qkvpacked(qkv, t)


@pytest.mark.parametrize(("function", "primal"), [pytest.param(f, t, id=name) for name, t, f in public_functions()])
class TestTangentsAreNotLost(TangentsAreNotLost):
    pass


# ---- parts of the inputs, and of the graph -------------------------------------------------------------------------


@cases
def test_gradients_of_any_subset_of_the_inputs(case):
    assert_gradients_of_any_subset(fused_function(case), plain_function(case), maker(case))


@cases
def test_double_backward_of_any_subset_of_the_inputs(case):
    assert_double_backward_of_any_subset(fused_function(case), plain_function(case), maker(case))


@pytest.mark.parametrize("shape", [(), (4,), (3, 1), (2, 1, 1), (2, 1, 4), (1, 2, 3, 4)], ids=str)
def test_derivatives_of_a_bias_of_any_shape(shape):
    query, key, value, _ = arguments(CASES[0])
    bias = torch.randn(shape, dtype=torch.float64)
    ours = functools.partial(attention, query, key, value)
    plain = functools.partial(torch.nn.functional.scaled_dot_product_attention, query, key, value)

    def products(function):
        gradient = grad(lambda b: function(b).square().sum())
        return gradient(bias), jvp(gradient, (bias,), (bias.cos(),))[1], vmap(gradient)(torch.stack([bias, -bias]))

    assert_close(products(ours), products(lambda b: plain(b.expand(1, 2, 3, 4))))


def test_gradient_penalty_trains_through_the_backward():
    """backward() of a loss that contains a gradient, with the leaf's gradient accumulated."""
    case = CASES[0]

    def penalty(function):
        some = leaves(arguments(case))
        first = torch.autograd.grad(loss(function)(*some), some, create_graph=True)
        (loss(function)(*some) + sum(g.square().sum() for g in first)).backward()
        return [t.grad for t in some]

    assert_close(penalty(fused_function(case)), penalty(plain_function(case)))


@cases
def test_graph_is_used_twice_when_kept(case):
    some = leaves(arguments(case))
    scalar = loss(fused_function(case))(*some)
    first = torch.autograd.grad(scalar, some, retain_graph=True)
    assert_close(torch.autograd.grad(scalar, some), first, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(scalar, some)


def test_inputs_changed_in_place_before_the_backward_are_noticed():
    case = CASES[0]
    query, *rest = leaves(arguments(case))
    query = query * 1
    output = fused_function(case)(query, *rest)
    with torch.no_grad():
        query.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@cases
def test_output_changed_in_place_is_noticed(case):
    """The backward needs it. Where there is none, or of a copy, the change is allowed."""
    function, tensors = fused_function(case), arguments(case)
    expected = plain_function(case)(*tensors) + 1
    assert_close(function(*tensors).add_(1), expected)
    some = leaves(tensors)
    assert_close(function(*some).clone().add_(1).detach(), expected)
    output = function(*some)
    output.add_(1)
    assert_close(output.detach(), expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_no_graph_where_none_is_wanted():
    function, tensors = fused_function(CASES[0]), leaves(arguments(CASES[0]))
    with torch.no_grad():
        assert not function(*tensors).requires_grad
    with torch.inference_mode():
        output = function(*tensors)
    assert output.is_inference()
    assert_close(torch.as_tensor(output).clone(), plain_function(CASES[0])(*tensors).detach())


def test_anomaly_mode():
    case = CASES[0]
    some = leaves(arguments(case))
    with torch.autograd.detect_anomaly(check_nan=True):
        ours = torch.autograd.grad(loss(fused_function(case))(*some), some)
    assert_close(ours, grad(loss(plain_function(case)), (0, 1, 2, 3))(*arguments(case)))


# ---- memory --------------------------------------------------------------------------------------------------------


def forward(function, tensors):
    return function(*tensors)


def backward(function, tensors):
    return torch.autograd.grad(function(*tensors).sum(), tensors)


def tangent(function, tensors):
    return jvp(function, tensors, tensors)


def double_backward(function, tensors):
    first = torch.autograd.grad(function(*tensors).square().sum(), tensors, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), tensors)


def hessian_vector_product(function, tensors):
    gradient = grad(lambda *ts: function(*ts).square().sum(), tuple(range(len(tensors))))
    return jvp(gradient, tensors, tensors)


def pullback(function, tensors):
    output, pull = vjp(function, *tensors)
    return pull(output)


@pytest.mark.parametrize("run", [forward, backward, tangent, double_backward, hessian_vector_product, pullback])
@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
def test_memory_is_linear_in_the_tokens(run, packed, monkeypatch):
    """No tensor is larger than the inputs, but for a block of scores."""
    monkeypatch.setattr(importlib.import_module("vitfast.reference.attention"), "_BLOCK_SCORES", 1000)
    case = Case(queries=300, heads=1, dim=2, batch=1, bias="m", packed=packed)
    tensors = leaves(arguments(case))
    with LargestTensor() as largest:
        run(fused_function(case), tensors)
    assert 0 < largest.elements <= max(1000, 3 * 300 * 2)
