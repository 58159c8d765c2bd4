"""The differentiation contract, in checks that hold any operator to it.

An operator comes as ``attention``, a function of tensors alone, once fused and once as PyTorch operations, and its
arguments as ``make``, a function of a seed.
"""

from __future__ import annotations

import functools
from collections import Counter

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import vitfast


def loss(attention):
    """A scalar whose derivatives of every order depend on all of the output."""

    def scalar(*tensors):
        output = attention(*tensors)
        weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
        return (weights * output + output.sin()).square().sum()

    return scalar


def leaves(tensors):
    return tuple(t.clone().requires_grad_() for t in tensors)


def everything(make):
    """The numbers of all arguments."""
    return tuple(range(len(make())))


def directions(make, count=None, seed=1):
    """Tangents of all arguments; ``count`` of them stacked if it is given."""
    stacked = [make(seed + i) for i in range(1 if count is None else count)]
    return stacked[0] if count is None else tuple(torch.stack(ts) for ts in zip(*stacked, strict=True))


# ---- torch.func: every transform and its nestings, against the same transform of plain PyTorch ---------------------


def use_grad(attention, make):
    return grad(loss(attention), everything(make))(*make())


def use_vjp(attention, make):
    output, pull = vjp(attention, *make())
    return output, pull(output.cos())


def use_jvp(attention, make):
    return jvp(attention, make(), directions(make))


def use_jacrev(attention, make):
    return jacrev(attention, everything(make))(*make())


def use_jacfwd(attention, make):
    return jacfwd(attention, everything(make))(*make())


def use_hessian(attention, make):
    return hessian(loss(attention), everything(make))(*make())


def use_jacfwd_of_jacfwd(attention, make):
    return jacfwd(jacfwd(loss(attention)))(*make())


def use_jacrev_of_jacrev(attention, make):
    return jacrev(jacrev(loss(attention)))(*make())


def use_jacrev_of_jacfwd(attention, make):
    return jacrev(jacfwd(loss(attention)))(*make())


def gradient(attention):
    """The gradient of the loss with respect to all arguments."""
    return lambda *tensors: grad(loss(attention), tuple(range(len(tensors))))(*tensors)


def use_jvp_of_grad(attention, make):
    return jvp(gradient(attention), make(), directions(make))


def use_vjp_of_grad(attention, make):
    _, pull = vjp(gradient(attention), *make())
    return pull(directions(make))


def use_vmap_jvp_grad(attention, make):
    primals = make()

    def product(*vectors):
        return jvp(gradient(attention), primals, vectors)[1]

    return vmap(product)(*directions(make, 3))


def use_vmap_vjp_grad(attention, make):
    _, pull = vjp(gradient(attention), *make())
    return vmap(lambda *vectors: pull(vectors))(*directions(make, 3))


def use_vmap_jvp(attention, make):
    primals = make()
    return vmap(lambda *vectors: jvp(attention, primals, vectors)[1])(*directions(make, 3))


def use_vmap_vjp(attention, make):
    output, pull = vjp(attention, *make())
    return vmap(pull)(torch.stack([output.cos(), output, output.sin()]))


def use_jvp_of_jvp(attention, make):
    def tangent(*tensors):
        return jvp(attention, tensors, directions(make))[1]

    return jvp(tangent, make(), directions(make, seed=2))


def use_grad_of_jvp(attention, make):
    """Reverse over forward."""

    def slope(*tensors):
        return jvp(loss(attention), tensors, directions(make))[1]

    return grad(slope, everything(make))(*make())


def use_jvp_of_jvp_of_grad(attention, make):
    def product(*tensors):
        return jvp(gradient(attention), tensors, directions(make))[1]

    return jvp(product, make(), directions(make, seed=2))


def use_grad_of_grad_of_grad(attention, make):
    f = loss(attention)
    for _ in range(3):
        f = functools.partial(lambda g, *tensors: grad(g)(*tensors).square().sum(), f)
    return f(*make())


def use_vmap(attention, make):
    return vmap(attention)(*directions(make, 3))


def use_vmap_over_last_dimensions(attention, make):
    stacked = [t.movedim(0, -1) for t in directions(make, 3)]
    return vmap(attention, in_dims=-1, out_dims=2)(*stacked)


def use_vmap_over_one_at_a_time(attention, make):
    tensors, many = make(), directions(make, 3)
    results = []
    for i in everything(make):
        mixed = [many[j] if j == i else t for j, t in enumerate(tensors)]
        results.append(vmap(attention, in_dims=tuple(0 if j == i else None for j in everything(make)))(*mixed))
    return results


def use_vmap_of_vmap(attention, make):
    outer = [torch.stack([t, t.cos()]) for t in directions(make, 3)]
    return vmap(vmap(attention))(*outer)


def use_vmap_of_grad(attention, make):
    """Gradients of each sample."""
    return vmap(gradient(attention))(*directions(make, 3))


def use_vmap_of_grad_over_one_at_a_time(attention, make):
    tensors, many = make(), directions(make, 3)
    results = []
    for i in everything(make):
        mixed = [many[j] if j == i else t for j, t in enumerate(tensors)]
        in_dims = tuple(0 if j == i else None for j in everything(make))
        results.append(vmap(gradient(attention), in_dims=in_dims)(*mixed))
    return results


def use_grad_of_vmap(attention, make):
    def total(*tensors):
        return vmap(loss(attention))(*tensors).sum()

    return grad(total, everything(make))(*directions(make, 3))


def use_vmap_of_jvp_of_grad(attention, make):
    """A Hessian-vector product of each sample."""
    vectors = directions(make)

    def product(*tensors):
        return jvp(gradient(attention), tensors, vectors)[1]

    return vmap(product)(*directions(make, 3, seed=3))


def use_jvp_twice_of_a_pullback(attention, make):
    """The forward has left before forward mode begins."""
    output, pull = vjp(attention, *make())

    def tangent(cotangent):
        return jvp(lambda c: pull(c.sin()), (cotangent,), (output,))[1]

    return jvp(tangent, (output,), (output.cos(),))


USES = [function for name, function in list(globals().items()) if name.startswith("use_")]


def assert_transform_is_exact(use, fused, plain, make):
    expected = use(plain, make)
    assert (
        max(t.abs().max() for t in torch.utils._pytree.tree_leaves(expected)) > 1e-3
    )  # nothing is right by being zero
    assert_close(use(fused, make), expected)


def assert_third_derivatives_are_exact(fused, plain, make):
    def sum_of_gradients(f):
        return lambda *tensors: sum(g.square().sum() for g in grad(f, everything(make))(*tensors))

    def third(attention):
        f = loss(attention)
        for _ in range(3):
            f = sum_of_gradients(f)
        return f(*make())

    assert_close(third(fused), third(plain))


# ---- the K-batched rule does the primal work once ------------------------------------------------------------------


class Work(TorchDispatchMode):
    """Counts the elements that softmaxes read, and the calls of the kernels of vitfast."""

    def __init__(self):
        super().__init__()
        self.amount = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if "softmax" in name:
            self.amount[name] += args[0].numel()
        elif name.startswith("vitfast."):
            self.amount[name] += 1
        return function(*args, **(kwargs or {}))


def assert_primal_work_is_done_once(fused, make, operator):
    """For K Hessian-vector products in one vmap, whatever K is; ``operator`` is what the kernels' names begin with."""

    def work_for(count):
        primals, vectors = make(), directions(make, count)
        with Work() as work:
            vmap(lambda *v: jvp(gradient(fused), primals, v)[1])(*vectors)
        return work.amount

    once = work_for(1)
    assert any(name.startswith(f"vitfast.{operator}") and "backward" in name for name in once)
    assert once[f"vitfast.{operator}_tangents.default"] == 2  # of the output and of the gradients
    assert not any("softmax" in name for name in once)
    assert work_for(16) == once


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that operations return."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [t.numel() for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


# ---- no tangent is lost --------------------------------------------------------------------------------------------


def central_difference(function, primal, tangent):
    step = 1e-6
    return (function(primal + step * tangent) - function(primal - step * tangent)) / (2 * step)


class TangentsAreNotLost:
    """Every way to a tangent of ``function``, of one tensor, at ``primal``, against finite differences."""

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


# ---- parts of the inputs -------------------------------------------------------------------------------------------


def assert_gradients_of_any_subset(fused, plain, make):
    tensors = make()
    expected = grad(loss(plain), everything(make))(*tensors)
    for chosen in range(1, 2 ** len(tensors)):
        some = [t.clone().requires_grad_(bool(chosen >> i & 1)) for i, t in enumerate(tensors)]
        loss(fused)(*some).backward()
        for i, (tensor, one) in enumerate(zip(some, expected, strict=True)):
            if chosen >> i & 1:
                assert_close(tensor.grad, one)
            else:
                assert tensor.grad is None


def assert_double_backward_of_any_subset(fused, plain, make):
    tensors = make()

    def second_order(attention, chosen):
        some = [t.clone().requires_grad_(bool(chosen >> i & 1)) for i, t in enumerate(tensors)]
        leaves = [t for t in some if t.requires_grad]
        first = torch.autograd.grad(loss(attention)(*some), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    for chosen in range(1, 2 ** len(tensors)):
        assert_close(second_order(fused, chosen), second_order(plain, chosen))
