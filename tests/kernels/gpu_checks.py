"""What the kernels of every operator are held to on a GPU, beside their results."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_close_to_reference
from torch.testing import assert_close

import vitfast

MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU; run by `make gpu-test`"),
    pytest.mark.usefixtures("triton_on_gpu"),
]
"""The marks of a file of tests on a GPU."""


def on_cpu(results):
    return type(results)(*(None if t is None else t.cpu() for t in results))


def on_gpu(inputs):
    return inputs.map(lambda t: t.cuda())


def _leaves(tensors):
    return tuple(t.detach().clone().requires_grad_() for t in tensors)


def assert_same_when_compiled(function, tensors):
    """Output and gradients of ``function``, compiled as one graph, are those it has without."""

    def output_and_gradients(run):
        leaves = _leaves(tensors)
        output = run(*leaves)
        return output.detach(), torch.autograd.grad(output.square().sum(), leaves)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True)
    assert_close(output_and_gradients(compiled), output_and_gradients(function))


def assert_second_derivatives_are_exact(fused, plain, tensors):
    """The double backward of ``fused`` is that of ``plain``, the same function by PyTorch operations alone."""

    def second_order(function):
        leaves = _leaves(tensors)
        first = torch.autograd.grad(function(*leaves).sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    assert_close(second_order(fused), second_order(plain))


def assert_vmap_shares_the_primal(function, tensors, count):
    """``count`` Hessian-vector products in one vmap, over the first of the tensors, are those of as many calls."""
    first, *rest = tensors
    gradient = torch.func.grad(lambda t: function(t, *rest).sin().sum())

    def product(tangent):
        return torch.func.jvp(gradient, (first,), (tangent,))[1]

    tangents = torch.randn(count, *first.shape, dtype=first.dtype, device=first.device)
    assert_close(torch.func.vmap(product)(tangents), torch.stack([product(tangent) for tangent in tangents]))


def assert_autocast_is_right(module, x, dtype):
    """Gradients of the module's parameters, float32 all of them, under autocast to ``dtype``: the tolerance rule."""

    def gradients(module, x):
        module.zero_grad()
        module(x).double().square().sum().backward()
        return [p.grad.clone() for p in module.parameters()]

    def under_autocast():
        with torch.autocast(x.device.type, dtype=dtype):
            assert module(x).dtype == dtype
            return gradients(module, x)

    results = under_autocast()
    with vitfast.backend("reference"):
        plain = under_autocast()
        exact = gradients(copy.deepcopy(module).double(), x.double())
    for result, one, truth in zip(results, plain, exact, strict=True):
        assert result.dtype == torch.float32
        assert_close_to_reference(result.to(dtype).cpu(), one.to(dtype).cpu(), truth.cpu())
