"""The differentiation contract of window attention: every use is exact, and whatever is not supported raises."""

from __future__ import annotations

import functools
from collections import Counter

import pytest
import torch
from helpers import Case, make_inputs
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

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


def loss(attention):
    """A scalar whose derivatives of every order depend on all of the output."""

    def scalar(*tensors):
        output = attention(*tensors)
        weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
        return (weights * output + output.sin()).square().sum()

    return scalar


def leaves(tensors):
    return tuple(t.clone().requires_grad_() for t in tensors)


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
    def third(attention):
        f = loss(attention)
        for _ in range(3):
            f = sum_of_gradients(f)
        return f(*tensors_of(case))

    def sum_of_gradients(f):
        return lambda *tensors: sum(g.square().sum() for g in grad(f, everything(case))(*tensors))

    assert_close(third(fused(case)), third(plain(case)))


# ---- torch.func: every transform and its nestings, against the same transform of plain PyTorch ---------------------


def everything(case):
    """The argument numbers of the tensors of a case."""
    return tuple(range((1 if case.packed else 3) + (case.bias is not None)))


def directions(case, count=None, seed=1):
    """Tangents of the tensors of a case; ``count`` of them stacked if it is given."""
    stacked = [tensors_of(case, seed + i) for i in range(1 if count is None else count)]
    return stacked[0] if count is None else tuple(torch.stack(ts) for ts in zip(*stacked, strict=True))


def use_grad(attention, case):
    return grad(loss(attention), everything(case))(*tensors_of(case))


def use_vjp(attention, case):
    output, pull = vjp(attention, *tensors_of(case))
    return output, pull(output.cos())


def use_jvp(attention, case):
    return jvp(attention, tensors_of(case), directions(case))


def use_jacrev(attention, case):
    return jacrev(attention, everything(case))(*tensors_of(case))


def use_jacfwd(attention, case):
    return jacfwd(attention, everything(case))(*tensors_of(case))


def use_hessian(attention, case):
    return hessian(loss(attention), everything(case))(*tensors_of(case))


def use_jacfwd_of_jacfwd(attention, case):
    return jacfwd(jacfwd(loss(attention)))(*tensors_of(case))


def use_jacrev_of_jacrev(attention, case):
    return jacrev(jacrev(loss(attention)))(*tensors_of(case))


def use_jacrev_of_jacfwd(attention, case):
    return jacrev(jacfwd(loss(attention)))(*tensors_of(case))


def gradient(attention, case):
    return grad(loss(attention), everything(case))


def use_jvp_of_grad(attention, case):
    return jvp(gradient(attention, case), tensors_of(case), directions(case))


def use_vjp_of_grad(attention, case):
    _, pull = vjp(gradient(attention, case), *tensors_of(case))
    return pull(directions(case))


def use_vmap_jvp_grad(attention, case):
    primals = tensors_of(case)

    def product(*vectors):
        return jvp(gradient(attention, case), primals, vectors)[1]

    return vmap(product)(*directions(case, 3))


def use_vmap_vjp_grad(attention, case):
    _, pull = vjp(gradient(attention, case), *tensors_of(case))
    return vmap(lambda *vectors: pull(vectors))(*directions(case, 3))


def use_vmap_jvp(attention, case):
    primals = tensors_of(case)
    return vmap(lambda *vectors: jvp(attention, primals, vectors)[1])(*directions(case, 3))


def use_vmap_vjp(attention, case):
    output, pull = vjp(attention, *tensors_of(case))
    return vmap(pull)(torch.stack([output.cos(), output, output.sin()]))


def use_jvp_of_jvp(attention, case):
    def tangent(*tensors):
        return jvp(attention, tensors, directions(case))[1]

    return jvp(tangent, tensors_of(case), directions(case, seed=2))


def use_grad_of_jvp(attention, case):
    """Reverse over forward."""

    def slope(*tensors):
        return jvp(loss(attention), tensors, directions(case))[1]

    return grad(slope, everything(case))(*tensors_of(case))


def use_jvp_of_jvp_of_grad(attention, case):
    def product(*tensors):
        return jvp(gradient(attention, case), tensors, directions(case))[1]

    return jvp(product, tensors_of(case), directions(case, seed=2))


def use_grad_of_grad_of_grad(attention, case):
    f = loss(attention)
    for _ in range(3):
        f = functools.partial(lambda g, *tensors: grad(g)(*tensors).square().sum(), f)
    return f(*tensors_of(case))


def use_vmap(attention, case):
    return vmap(attention)(*directions(case, 3))


def use_vmap_over_last_dimensions(attention, case):
    stacked = [t.movedim(0, -1) for t in directions(case, 3)]
    return vmap(attention, in_dims=-1, out_dims=2)(*stacked)


def use_vmap_over_one_at_a_time(attention, case):
    tensors, many = tensors_of(case), directions(case, 3)
    results = []
    for i in everything(case):
        mixed = [many[j] if j == i else t for j, t in enumerate(tensors)]
        results.append(vmap(attention, in_dims=tuple(0 if j == i else None for j in everything(case)))(*mixed))
    return results


def use_vmap_of_vmap(attention, case):
    outer = [torch.stack([t, t.cos()]) for t in directions(case, 3)]
    return vmap(vmap(attention))(*outer)


def use_vmap_of_grad(attention, case):
    """Gradients of each sample."""
    return vmap(gradient(attention, case))(*directions(case, 3))


def use_vmap_of_grad_over_one_at_a_time(attention, case):
    tensors, many = tensors_of(case), directions(case, 3)
    results = []
    for i in everything(case):
        mixed = [many[j] if j == i else t for j, t in enumerate(tensors)]
        in_dims = tuple(0 if j == i else None for j in everything(case))
        results.append(vmap(gradient(attention, case), in_dims=in_dims)(*mixed))
    return results


def use_grad_of_vmap(attention, case):
    def total(*tensors):
        return vmap(loss(attention))(*tensors).sum()

    return grad(total, everything(case))(*directions(case, 3))


def use_vmap_of_jvp_of_grad(attention, case):
    """A Hessian-vector product of each sample."""
    vectors = directions(case)

    def product(*tensors):
        return jvp(gradient(attention, case), tensors, vectors)[1]

    return vmap(product)(*directions(case, 3, seed=3))


def use_jvp_twice_of_a_pullback(attention, case):
    """The forward has left before forward mode begins."""
    output, pull = vjp(attention, *tensors_of(case))

    def tangent(cotangent):
        return jvp(lambda c: pull(c.sin()), (cotangent,), (output,))[1]

    return jvp(tangent, (output,), (output.cos(),))


USES = [function for name, function in list(globals().items()) if name.startswith("use_")]


@cases
@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__.removeprefix("use_"))
def test_functional_transforms_are_exact(use, case):
    expected = use(plain(case), case)
    assert (
        max(t.abs().max() for t in torch.utils._pytree.tree_leaves(expected)) > 1e-3
    )  # nothing is right by being zero
    assert_close(use(fused(case), case), expected)


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


class Work(TorchDispatchMode):
    """Counts the elements that softmaxes and the kernels of vitfast read."""

    def __init__(self):
        super().__init__()
        self.elements = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if "softmax" in name or name.startswith("vitfast."):
            self.elements[name] += sum(t.numel() for t in args if isinstance(t, torch.Tensor))
        return function(*args, **(kwargs or {}))


@cases
def test_primal_work_is_done_once_for_all_tangents(case):
    def work_for(count):
        primals, vectors = tensors_of(case), directions(case, count)
        with Work() as work:
            vmap(lambda *v: jvp(gradient(fused(case), case), primals, v)[1])(*vectors)
        return work.elements

    once = work_for(1)
    assert any(name.startswith("vitfast.window_attention") and "backward" in name for name in once)
    assert any("softmax" in name for name in once)
    assert work_for(16) == once


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


def central_difference(function, primal, tangent):
    step = 1e-6
    return (function(primal + step * tangent) - function(primal - step * tangent)) / (2 * step)


@pytest.mark.parametrize(("function", "primal"), [pytest.param(f, t, id=name) for name, t, f in public_functions()])
class TestTangentsAreNotLost:
    @pytest.fixture
    def tangent(self, primal):
        return torch.randn_like(primal)

    @pytest.fixture
    def expected(self, function, primal, tangent):
        difference = central_difference(function, primal, tangent)
        assert difference.abs().max() > 1e-2
        return difference

    def check(self, result, expected):
        assert_close(result, expected, rtol=1e-6, atol=1e-7)

    def test_jvp(self, function, primal, tangent, expected):
        self.check(jvp(function, (primal,), (tangent,))[1], expected)

    @pytest.mark.parametrize("needs_grad", [False, True])
    def test_dual_tensors(self, function, primal, tangent, expected, needs_grad):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(primal.clone().requires_grad_(needs_grad), tangent)
            result = forward_ad.unpack_dual(function(dual)).tangent
        assert result is not None
        self.check(result, expected)

    def test_dual_tensors_without_grad_mode(self, function, primal, tangent, expected):
        with torch.no_grad(), forward_ad.dual_level():
            result = forward_ad.unpack_dual(function(forward_ad.make_dual(primal, tangent))).tangent
        assert result is not None
        self.check(result, expected)

    def test_dual_level_around_a_tensor_that_needs_grad(self, function, primal, tangent, expected):
        """Tangents of the gradient: forward over reverse by hand."""

        def slope(t):
            t = t.detach().requires_grad_() if not t.requires_grad else t
            return torch.autograd.grad(function(t).square().sum(), t)[0]

        with forward_ad.dual_level():
            leaf = primal.clone().requires_grad_()
            result = forward_ad.unpack_dual(slope(forward_ad.make_dual(leaf, tangent))).tangent
        assert result is not None
        self.check(result, central_difference(slope, primal, tangent))

    def test_vmap_of_jvp_without_batched_primal(self, function, primal, tangent, expected):
        tangents = torch.stack([tangent, -2 * tangent])
        result = vmap(lambda t: jvp(function, (primal,), (t,))[1])(tangents)
        self.check(result, torch.stack([expected, -2 * expected]))

    def test_reference_backend(self, function, primal, tangent, expected):
        with vitfast.backend("reference"):
            self.check(jvp(function, (primal,), (tangent,))[1], expected)

    def test_inside_torch_compile(self, function, primal, tangent, expected):
        torch._dynamo.reset()
        compiled = torch.compile(lambda p, t: jvp(function, (p,), (t,))[1], backend="aot_eager", fullgraph=True)
        self.check(compiled(primal, tangent), expected)

    def test_dual_tensors_given_to_a_compiled_function(self, function, primal, tangent, expected):
        """Compiled before without tangents, so that a stale graph would lose them."""
        torch._dynamo.reset()
        compiled = torch.compile(function, backend="aot_eager")
        compiled(primal)
        with forward_ad.dual_level():
            result = forward_ad.unpack_dual(compiled(forward_ad.make_dual(primal, tangent))).tangent
        assert result is not None
        self.check(result, expected)


# ---- parts of the inputs, and of the graph -------------------------------------------------------------------------


@cases
def test_gradients_of_any_subset_of_the_inputs(case):
    tensors = tensors_of(case)
    expected = grad(loss(plain(case)), everything(case))(*tensors)
    for chosen in range(1, 2 ** len(tensors)):
        some = [t.clone().requires_grad_(bool(chosen >> i & 1)) for i, t in enumerate(tensors)]
        loss(fused(case))(*some).backward()
        for i, (tensor, one) in enumerate(zip(some, expected, strict=True)):
            if chosen >> i & 1:
                assert_close(tensor.grad, one)
            else:
                assert tensor.grad is None


@cases
def test_double_backward_of_any_subset_of_the_inputs(case):
    tensors = tensors_of(case)

    def second_order(attention, chosen):
        some = [t.clone().requires_grad_(bool(chosen >> i & 1)) for i, t in enumerate(tensors)]
        leaves = [t for t in some if t.requires_grad]
        first = torch.autograd.grad(loss(attention)(*some), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    for chosen in range(1, 2 ** len(tensors)):
        assert_close(second_order(fused(case), chosen), second_order(plain(case), chosen))


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
    assert_close(ours, grad(loss(plain(case)), everything(case))(*tensors_of(case)))
