"""Linear layers by kernels: the numbers, the derivatives and the exceptions are those of PyTorch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from derivatives import (
    USES,
    assert_double_backward_of_any_subset,
    assert_gradients_of_any_subset,
    assert_transform_is_exact,
    leaves,
)
from helpers import assert_close_to_reference
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import vitfast
from vitfast.ops import _extension
from vitfast.ops import linear as operator
from vitfast.ops.linear import linear


def make(shape=(2, 3), channels=5, outputs=4, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    sizes = ((*shape, channels), (outputs, channels), (outputs,))
    return tuple(torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes)


def output_and_gradients(function, tensors, grad):
    tensors = leaves(tensors)
    output = function(*tensors)
    return output.detach(), *torch.autograd.grad(output, tensors, grad)


@pytest.mark.parametrize(
    "sizes", [((197,), 96, 288), ((3, 7, 7), 33, 17), ((1,), 1, 1), ((2, 500), 64, 5), ((2, 300), 600, 64)], ids=str
)
def test_is_as_exact_as_pytorchs(sizes):
    tensors = make(*sizes, dtype=torch.float32)
    grad = torch.randn(*sizes[0], sizes[2])
    exact = output_and_gradients(F.linear, tuple(t.double() for t in tensors), grad.double())
    plain = output_and_gradients(F.linear, tensors, grad)
    for values in zip(output_and_gradients(linear, tensors, grad), plain, exact, strict=True):
        assert_close_to_reference(*values)


class Called(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("change", "kernel"),
    [
        (lambda x, weight, bias: (x, weight, bias), True),
        (lambda x, weight, bias: (x, weight.t().contiguous().t(), None), True),
        (lambda x, weight, bias: (x, weight[:15], bias[:15]), False),
        (lambda x, weight, bias: (x, weight[:, :5].clone()[:, ::2], bias), False),
        (lambda x, weight, bias: (x, weight, bias[:1]), False),
        (lambda x, weight, bias: (x.double(), weight.double(), bias.double()), False),
        (lambda x, weight, bias: (x, weight, torch.stack([bias, bias], 1)[:, 0]), False),
    ],
    ids=[
        "whole vectors",
        "transposed",
        "15 columns",
        "weight of steps",
        "one bias for all",
        "float64",
        "bias of steps",
    ],
)
def test_what_the_kernel_serves(change, kernel):
    x, weight, bias = change(*make(outputs=16, dtype=torch.float32))
    x = x[..., : weight.shape[1]].contiguous()
    with Called() as called, torch.no_grad():
        found = linear(x, weight, bias)
    assert ("matrix_sum" in called.names) == kernel
    assert_close(found, F.linear(x, weight, bias))


def test_processors_without_wide_vectors_are_left_to_pytorch():
    extension = _extension.require()
    extension.set_instruction_set("baseline")
    try:
        with Called() as called:
            linear(*make(outputs=16, dtype=torch.float32))
    finally:
        extension.set_instruction_set(None)
    assert "matrix_sum" not in called.names


@pytest.mark.parametrize("channels", [0, 5, 16])
@pytest.mark.parametrize("shape", [(0,), (2, 0, 3), (), (2, 3)], ids=str)
def test_shapes_at_the_edge(shape, channels):
    tensors, grad = make(shape, channels, dtype=torch.float32), torch.randn(*shape, 4)
    for ours, theirs in zip(
        output_and_gradients(linear, tensors, grad), output_and_gradients(F.linear, tensors, grad), strict=True
    ):
        assert_close(ours, theirs)


def test_strides_and_no_bias():
    x, weight, _ = make((4, 5), dtype=torch.float32)
    for relaid in (x.transpose(0, 1), x[:1].expand(4, 5, 5), x.flip(0)[::2]):
        for matrix in (weight, weight.t().contiguous().t()):
            assert_close(linear(relaid, matrix, None), F.linear(relaid, matrix))


def test_expanded_gradients():
    tensors = make(dtype=torch.float32)
    ours, theirs = (
        torch.autograd.grad(f(*inputs).sum(), inputs)
        for f, inputs in ((linear, leaves(tensors)), (F.linear, leaves(tensors)))
    )
    assert_close(ours, theirs)


def small(seed=0):
    return make(seed=seed)


# The derivatives are taken in float64, where the product is PyTorch's but the rules are those of float32.
@pytest.fixture
def _own_rules(monkeypatch):
    monkeypatch.setattr(operator, "_DTYPE", torch.float64)


@pytest.mark.usefixtures("_own_rules")
@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__.removeprefix("use_"))
def test_transforms(use):
    assert_transform_is_exact(use, linear, F.linear, small)


@pytest.mark.usefixtures("_own_rules")
def test_gradients_of_any_subset():
    assert_gradients_of_any_subset(linear, F.linear, small)
    assert_double_backward_of_any_subset(linear, F.linear, small)


@pytest.mark.usefixtures("_own_rules")
def test_gradcheck():
    options = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(linear, leaves(make()), **options)
    assert torch.autograd.gradgradcheck(linear, leaves(make()), check_fwd_over_rev=True)


def test_autocast_and_compile():
    tensors = make(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(*tensors).dtype == torch.bfloat16
    torch._dynamo.reset()
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    assert_close(compiled(*tensors), F.linear(*tensors))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_other_dtypes_are_pytorchs(dtype):
    tensors = make(dtype=dtype)
    assert torch.equal(linear(*tensors), F.linear(*tensors))


def test_forced_reference_is_pytorchs():
    tensors = make(dtype=torch.float32)
    with vitfast.backend("reference"):
        assert torch.equal(linear(*tensors), F.linear(*tensors))


# ---- gradients of weights and biases ---------------------------------------------------------------------------------


def gradients(grad, x, weight=None, bias=None):
    """Those of weight and bias by the operator, added to given ones."""
    add = weight is not None
    if not add:
        weight, bias = torch.full((grad.shape[1], x.shape[1]), torch.nan), torch.full((grad.shape[1],), torch.nan)
    torch.ops.vitfast.weight_gradient(grad, x, None, None, weight, bias, add)
    return weight, bias


@pytest.mark.parametrize("rows", [1, 511, 512, 513, 1100])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 16), (9, 48), (17, 64), (289, 96), (300, 208), (40, 784)])
def test_gradients_of_weights(rows, outputs, inputs):
    grad, x = torch.randn(rows, outputs), torch.randn(rows, inputs)
    weight, bias = gradients(grad, x)
    exact = grad.double().t() @ x.double()
    assert_close_to_reference(weight, grad.t() @ x, exact)
    assert_close_to_reference(bias, grad.sum(0), grad.double().sum(0))
    more_weight, more_bias = gradients(grad, x, torch.ones_like(weight), torch.ones_like(bias))
    assert_close_to_reference(more_weight, 1 + grad.t() @ x, 1 + exact)
    assert_close_to_reference(more_bias, 1 + grad.sum(0), 1 + grad.double().sum(0))


def test_gradients_of_weights_in_all_instruction_sets(instruction_set):
    grad, x = torch.randn(300, 77), torch.randn(300, 112)
    weight, bias = gradients(grad, x)
    assert_close_to_reference(weight, grad.t() @ x, grad.double().t() @ x.double())
    assert_close_to_reference(bias, grad.sum(0), grad.double().sum(0))


def test_gradients_of_weights_from_rows_that_are_apart():
    grad, x = torch.randn(300, 3, 40)[:, 1], torch.randn(600, 80)[::2, 16:64]
    weight, bias = gradients(grad, x)
    assert_close_to_reference(weight, grad.t() @ x, grad.double().t() @ x.double())
    assert_close_to_reference(bias, grad.sum(0), grad.double().sum(0))
    alone = torch.empty(40, 48)
    torch.ops.vitfast.weight_gradient(grad, x, None, None, alone, None, False)
    assert torch.equal(alone, weight)


@pytest.mark.parametrize("shared", ["none", "grad", "x"])
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 1, 16), (513, 40, 208), (700, 300, 48)])
def test_sums_of_two_terms_for_k_at_once(rows, outputs, inputs, shared):
    grad, x, grad2, x2 = (torch.randn(3, rows, columns) for columns in (outputs, inputs) * 2)
    if shared == "grad":
        grad2 = grad2[0]
    elif shared == "x":
        x = x[0]
    weight, bias = torch.ones(3, outputs, inputs), torch.ones(3, outputs)

    def sums(*factors):
        grad, x, grad2, x2 = factors
        return grad.mT @ x + grad2.mT @ x2, grad.sum(-2).expand(3, -1)

    results = zip(sums(grad, x, grad2, x2), sums(*(f.double() for f in (grad, x, grad2, x2))), strict=True)
    (weight_plain, weight_exact), (bias_plain, bias_exact) = results
    torch.ops.vitfast.weight_gradient(grad, x, grad2, x2, weight, bias, False)
    assert_close_to_reference(weight, weight_plain, weight_exact)
    assert_close_to_reference(bias, bias_plain, bias_exact)
    torch.ops.vitfast.weight_gradient(grad, x, grad2, x2, weight, bias, True)
    assert_close_to_reference(weight, 2 * weight_plain, 2 * weight_exact)
    assert_close_to_reference(bias, 2 * bias_plain, 2 * bias_exact)


def test_gradients_of_weights_are_the_same_for_any_number_of_threads(threads):
    grad, x = torch.randn(1000, 200), torch.randn(1000, 96)
    found = []
    for count in (1, 2, 5):
        threads(count)
        found.append(gradients(grad, x))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_the_kernel_is_called():
    grad, x = torch.randn(5, 3), torch.randn(5, 16)
    assert operator.has_gradient_kernel(grad, x)
    for others in (
        (grad.double(), x.double()),
        (grad, x[:, 1:]),
        (grad, x.t().contiguous().t()),
        (grad[:0], x[:0]),
        (grad, x[:, :0]),
    ):
        assert not operator.has_gradient_kernel(*others)


@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("channels", [16, 17])
def test_parameter_gradients_of_blocks(channels, needed):
    grad, x = torch.randn(20, 3), torch.randn(20, channels)
    sums = (None, None)
    with torch.no_grad():
        for block in (slice(0, 7), slice(7, 20)):
            sums = operator.parameter_gradients(grad[block], x[block], needed, sums)
    plain = grad.t() @ x, grad.sum(0)
    exact = grad.double().t() @ x.double(), grad.double().sum(0)
    for is_needed, value, *others in zip(needed, sums, plain, exact, strict=True):
        assert (value is not None) == is_needed
        if is_needed:
            assert_close_to_reference(value, *others)


@pytest.mark.parametrize(
    "changes",
    [
        {"grad": torch.randn(6, 3)},
        {"grad": torch.empty(0, 3), "x": torch.empty(0, 16)},
        {"grad": torch.randn(5, 3).double()},
        {"x": torch.randn(5, 17), "weight": torch.empty(3, 17)},
        {"x": torch.randn(16, 5).t()},
        {"weight": torch.empty(3, 32)},
        {"weight": torch.empty(16, 3).t()},
        {"bias": torch.empty(4)},
        {"bias": torch.empty(3).double()},
        {"grad2": torch.randn(5, 3)},
        {"grad2": torch.randn(4, 3), "x2": torch.randn(4, 16)},
        {"grad": torch.randn(2, 5, 3)},
        {"weight": torch.empty(2, 3, 16)},  # whose bias would have K in front
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_the_operator_itself_stays_within_bounds(changes):
    arguments = {"grad": torch.randn(5, 3), "x": torch.randn(5, 16), "grad2": None, "x2": None}
    arguments |= {"weight": torch.empty(3, 16), "bias": torch.empty(3), "add": False}
    torch.ops.vitfast.weight_gradient(**arguments)
    with pytest.raises(RuntimeError, match="vitfast::weight_gradient"):
        torch.ops.vitfast.weight_gradient(**(arguments | changes))
