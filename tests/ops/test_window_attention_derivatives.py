"""The differentiation contract of window attention: every use is exact, and whatever is not supported raises."""

from __future__ import annotations

import functools

import pytest
import torch
from derivatives import (
    USES,
    TangentsAreNotLost,
    assert_double_backward_of_any_subset,
    assert_gradients_of_any_subset,
    assert_primal_work_is_done_once,
    assert_third_derivatives_are_exact,
    assert_transform_is_exact,
    everything,
    leaves,
    loss,
)
from helpers import Case, make_inputs
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, jvp, vmap
from torch.testing import assert_close

import vitfast
from vitfast import reference
from vitfast.functional import window_attention, window_attention_qkvpacked, window_attention_weights

CASES = [
    Case(size=(3, 4), window=(2, 2), shift=(1, 1), heads=2, dim=2, batch=1),
    Case(size=(3, 2), window=(2, 2), shift=(0, 1), heads=2, dim=2, batch=1, bias="shared", packed=True),
    Case(size=(3, 4), window=(2, 3), shift=(1, 2), heads=1, dim=3, batch=1, bias=None, packed=True),
    Case(size=(4, 2), window=(4, 2), shift=(2, 0), heads=2, dim=2, batch=1, ratio=(2, 1), bias="shared", scale=0.8),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


def fused(case):
    """(query, key, value[, bias]) or (qkv[, bias]) -> output, by vitfast."""
    return functools.partial(window_attention_qkvpacked if case.packed else window_attention, **case.options)


def plain(case):
    """The same by PyTorch operations alone."""

    def attention(*tensors):
        if case.packed:
            tensors = (*tensors[0].unbind(3), *tensors[1:])
        return reference.window_attention(*tensors, **case.reference_options)

    return attention


def tensors_of(case, seed=0):
    *tensors, bias, _ = make_inputs(case, seed=seed)
    if case.packed:
        tensors = [torch.stack(tensors, dim=3)]
    return tuple(tensors) if bias is None else (*tensors, bias)


def maker(case):
    """Seed -> arguments of the case."""
    return functools.partial(tensors_of, case)


# ---- against finite differences ------------------------------------------------------------------------------------


@cases
def test_gradcheck(case):
    assert gradcheck(fused(case), leaves(tensors_of(case)), check_batched_grad=True, fast_mode=False)


@cases
def test_gradcheck_forward_mode(case):
    assert gradcheck(
        fused(case),
        leaves(tensors_of(case)),
        check_forward_ad=True,
        check_backward_ad=False,
        check_batched_forward_grad=True,
        check_undefined_grad=False,
    )


@cases
def test_gradgradcheck(case):
    assert gradgradcheck(fused(case), leaves(tensors_of(case)), check_fwd_over_rev=True, check_rev_over_rev=True)


def test_gradgradcheck_of_batched_gradients():
    case = CASES[0].but(size=(2, 2), heads=1)
    assert gradgradcheck(fused(case), leaves(tensors_of(case)), check_batched_grad=True)


@cases
def test_weights_gradcheck(case):
    case = case.but(packed=False)
    query, key, _, *bias = tensors_of(case)
    weights = functools.partial(window_attention_weights, **case.options)
    assert gradcheck(weights, leaves((query, key, *bias)), check_forward_ad=True)


@cases
def test_third_derivatives(case):
    assert_third_derivatives_are_exact(fused(case), plain(case), maker(case))


# ---- torch.func: every transform and its nestings, against the same transform of plain PyTorch ---------------------


@cases
@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__.removeprefix("use_"))
def test_functional_transforms_are_exact(use, case):
    assert_transform_is_exact(use, fused(case), plain(case), maker(case))


def test_functional_call_of_a_model_with_a_learned_bias():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = torch.nn.Linear(4, 12)
            self.bias = torch.nn.Parameter(torch.randn(2, 4, 4))

        def forward(self, x):
            qkv = self.qkv(x).unflatten(-1, (3, 2, 2))
            return window_attention_qkvpacked(qkv, self.bias, window_size=2, shift=1).flatten(3)

    block = Block().double()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
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


# ---- the K-batched rule does the primal work once ------------------------------------------------------------------


@cases
def test_primal_work_is_done_once_for_all_tangents(case):
    assert_primal_work_is_done_once(fused(case), maker(case), "window_attention")


# ---- no tangent is lost --------------------------------------------------------------------------------------------


def public_functions():
    """(name, function of one tensor) for each tensor that each public function takes."""
    case = Case(size=(5, 6), window=(3, 3), shift=(1, 2), heads=2, dim=3)
    inputs = make_inputs(case)
    tensors = {"query": inputs.query, "key": inputs.key, "value": inputs.value, "bias": inputs.bias}
    qkv = torch.stack(inputs[:3], dim=3)
    for name, tensor in tensors.items():
        yield (
            f"window_attention:{name}",
            tensor,
            lambda t, n=name: window_attention(**(tensors | {n: t}), **case.options),
        )
    yield "qkvpacked:qkv", qkv, lambda t: window_attention_qkvpacked(t, inputs.bias, **case.options)
    yield "qkvpacked:bias", inputs.bias, lambda t: window_attention_qkvpacked(qkv, t, **case.options)
    for name in ("query", "key", "bias"):
        rest = {n: tensors[n] for n in ("query", "key", "bias")}
        yield (
            f"weights:{name}",
            tensors[name],
            lambda t, n=name, r=rest: window_attention_weights(**(r | {n: t}), **case.options),
        )


@pytest.mark.parametrize(("function", "primal"), [pytest.param(f, t, id=name) for name, t, f in public_functions()])
class TestTangentsAreNotLost(TangentsAreNotLost):
    pass


# ---- parts of the inputs, and of the graph -------------------------------------------------------------------------


@cases
def test_gradients_of_any_subset_of_the_inputs(case):
    assert_gradients_of_any_subset(fused(case), plain(case), maker(case))


@cases
def test_double_backward_of_any_subset_of_the_inputs(case):
    assert_double_backward_of_any_subset(fused(case), plain(case), maker(case))


def test_gradient_penalty_trains_through_the_backward():
    """backward() of a loss that contains a gradient, with the leaf's gradient accumulated."""
    case = CASES[0]

    def penalty(attention):
        some = leaves(tensors_of(case))
        first = torch.autograd.grad(loss(attention)(*some), some, create_graph=True)
        (loss(attention)(*some) + sum(g.square().sum() for g in first)).backward()
        return [t.grad for t in some]

    assert_close(penalty(fused(case)), penalty(plain(case)))


def test_graph_is_used_twice_when_kept():
    case = CASES[0]
    some = leaves(tensors_of(case))
    scalar = loss(fused(case))(*some)
    first = torch.autograd.grad(scalar, some, retain_graph=True)
    assert_close(torch.autograd.grad(scalar, some), first, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(scalar, some)


def test_inputs_changed_in_place_before_the_backward_are_noticed():
    case = CASES[0]
    query, *rest = leaves(tensors_of(case))
    query = query * 1
    output = fused(case)(query, *rest)
    query.data_ptr()
    with torch.no_grad():
        query.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_no_graph_where_none_is_wanted():
    tensors = leaves(tensors_of(CASES[0]))
    with torch.no_grad():
        assert not fused(CASES[0])(*tensors).requires_grad
    with torch.inference_mode():
        output = fused(CASES[0])(*tensors)
    assert output.is_inference()
    assert_close(torch.as_tensor(output).clone(), plain(CASES[0])(*tensors).detach())


def test_anomaly_mode():
    case = CASES[0]
    with torch.autograd.detect_anomaly(check_nan=True):
        ours = torch.autograd.grad(loss(fused(case))(*(some := leaves(tensors_of(case)))), some)
    assert_close(ours, grad(loss(plain(case)), everything(maker(case)))(*tensors_of(case)))
