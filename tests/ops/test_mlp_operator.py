"""The fused MLP against its definition: values, gradients, derivatives of every kind, and what traces or casts it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from derivatives import (
    USES,
    assert_double_backward_of_any_subset,
    assert_gradients_of_any_subset,
    assert_third_derivatives_are_exact,
    assert_transform_is_exact,
    leaves,
)
from helpers import assert_close_to_reference
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import vitfast
from vitfast import reference
from vitfast.bench import memory
from vitfast.functional import mlp
from vitfast.ops import mlp as operator

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
NAMES = ("output", "x", "weight1", "bias1", "weight2", "bias2")


def make(shape=(3, 5), channels=6, hidden=11, outputs=4, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def normal(*size, scale=1.0):
        return (scale * torch.randn(*size, generator=generator, dtype=torch.float64)).to(dtype)

    return (
        normal(*shape, channels),
        normal(hidden, channels, scale=max(channels, 1) ** -0.5),
        normal(hidden),
        normal(outputs, hidden, scale=max(hidden, 1) ** -0.5),
        normal(outputs),
    )


def small(seed=0):
    return make((2,), 2, 3, 2, seed)


def output_and_gradients(function, tensors, grad):
    tensors = leaves(tensors)
    output = function(*tensors)
    return output.detach(), *torch.autograd.grad(output, tensors, grad)


def assert_as_exact_as_pytorch(tensors, grad):
    """The output and all gradients, by the tolerance rule."""
    exact = output_and_gradients(reference.mlp, tuple(t.double() for t in tensors), grad.double())
    plain = output_and_gradients(reference.mlp, tensors, grad)
    for name, *values in zip(NAMES, output_and_gradients(mlp, tensors, grad), plain, exact, strict=True):
        assert_close_to_reference(*values, name=name)


# ---- values and gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_backward(dtype, instruction_set):
    tensors = make((2, 50), 24, 100, 24, dtype=dtype)
    assert_as_exact_as_pytorch(tensors, torch.randn(2, 50, 24).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [operator.BLOCK_ROWS - 1, 3 * operator.BLOCK_ROWS - 100, 5 * operator.BLOCK_ROWS + 3])
def test_rows_go_through_in_blocks(rows, dtype):
    tensors = make((rows,), 8, 20, 8, dtype=dtype)
    assert_as_exact_as_pytorch(tensors, torch.randn(rows, 8).to(dtype))


@pytest.mark.parametrize("rows", [0, 1, 2047, 2048, 3071, 3073, 100_000])
def test_blocks_cover_the_rows(rows):
    blocks = list(operator._blocks(torch.empty(rows, 0)))
    assert [row for block in blocks for row in range(block.start, block.stop)] == list(range(rows))
    sizes = [block.stop - block.start for block in blocks]
    assert max(sizes, default=0) <= 1.5 * operator.BLOCK_ROWS
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("hidden", [1, 7, 16, 33])
def test_every_remainder_of_the_hidden_width(hidden, instruction_set):
    assert_as_exact_as_pytorch(make((3,), 5, hidden, 2, dtype=torch.float32), torch.randn(3, 2))


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3), (), (1,), (2, 3, 4)], ids=str)
def test_any_leading_dimensions(shape):
    tensors, grad = make(shape), torch.randn(*shape, 4, dtype=torch.float64)
    for ours, theirs in zip(
        output_and_gradients(mlp, tensors, grad), output_and_gradients(reference.mlp, tensors, grad), strict=True
    ):
        assert_close(ours, theirs)


def test_without_biases():
    x, weight1, _, weight2, _ = make()
    assert_close(mlp(x, weight1, None, weight2, None), reference.mlp(x, weight1, None, weight2, None))
    ours, theirs = (
        torch.autograd.grad(f(a, b, None, c, None).sin().sum(), (a, b, c))
        for f, (a, b, c) in ((mlp, leaves((x, weight1, weight2))), (reference.mlp, leaves((x, weight1, weight2))))
    )
    assert_close(ours, theirs)


def test_strides():
    x, weight1, bias1, weight2, bias2 = make((4, 5))
    others = (weight1.t().contiguous().t(), bias1, weight2.t().contiguous().t(), bias2)
    for relaid in (x.transpose(0, 1), x[:1].expand(4, 5, 6), x.flip(0)[::2]):
        grad = torch.ones((), dtype=torch.float64).expand(*relaid.shape[:2], 4)
        for ours, theirs in zip(
            output_and_gradients(mlp, (relaid, *others), grad),
            output_and_gradients(reference.mlp, (relaid, *others), grad),
            strict=True,
        ):
            assert_close(ours, theirs)


def test_gelu_and_its_derivative_everywhere(instruction_set):
    x = torch.cat((torch.linspace(-15, 15, 300_001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30])))
    grad, out = torch.ones_like(x), torch.empty_like(x)
    torch.ops.vitfast.gelu_backward(x, out, grad)
    exact = x.double().requires_grad_()
    plain = x.clone().requires_grad_()
    assert_close_to_reference(out, F.gelu(x), F.gelu(exact).detach())
    (exact_grad,), (plain_grad,) = (torch.autograd.grad(F.gelu(t).sum(), t) for t in (exact, plain))
    assert_close_to_reference(grad, plain_grad, exact_grad)
    assert (out.double() - F.gelu(exact)).abs().max() < 2e-6  # at 15, where a rounding is 1e-6
    again = torch.empty_like(x)
    torch.ops.vitfast.gelu(x, again)
    assert torch.equal(again, out)


def test_gelu_at_infinity(instruction_set):
    x, out = torch.tensor([torch.inf, -torch.inf, torch.nan]), torch.empty(3)
    torch.ops.vitfast.gelu(x, out)
    assert_close(out, torch.tensor([torch.inf, torch.nan, torch.nan]), equal_nan=True)  # as the formula


def test_results_do_not_depend_on_the_threads(threads):
    tensors, grad = make((5000,), 8, 32, 8, dtype=torch.float32), torch.randn(5000, 8)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(output_and_gradients(mlp, tensors, grad))
    for other in results[1:]:
        assert_close(other, results[0])


# ---- memory --------------------------------------------------------------------------------------------------------


def test_hidden_values_are_not_in_memory_at_once():
    rows = 10 * operator.BLOCK_ROWS
    tensors = make((rows,), 8, 64, 8, dtype=torch.float32)
    hidden = 4 * rows * 64

    def evaluate():
        return (mlp(*tensors),)

    def train():
        inputs = leaves(tensors)
        return torch.autograd.grad(mlp(*inputs).sum(), inputs)

    assert memory.extra_bytes(evaluate, torch.device("cpu")) < 0.25 * hidden
    assert (
        memory.extra_bytes(train, torch.device("cpu")) < 1.6 * hidden
    )  # one copy and some blocks; PyTorch needs three


# ---- derivatives ---------------------------------------------------------------------------------------------------


def test_gradcheck():
    assert gradcheck(
        mlp, leaves(make()), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )


def test_gradgradcheck():
    assert gradgradcheck(mlp, leaves(small()), check_fwd_over_rev=True, check_rev_over_rev=True)


def test_gradgradcheck_without_biases():
    x, weight1, _, weight2, _ = small()
    assert gradgradcheck(lambda a, b, c: mlp(a, b, None, c, None), leaves((x, weight1, weight2)))


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__.removeprefix("use_"))
def test_transforms(use):
    assert_transform_is_exact(use, mlp, reference.mlp, small)


def test_third_derivatives():
    assert_third_derivatives_are_exact(mlp, reference.mlp, small)


def test_gradients_of_any_subset():
    assert_gradients_of_any_subset(mlp, reference.mlp, make)


def test_double_backward_of_any_subset():
    assert_double_backward_of_any_subset(mlp, reference.mlp, make)


def test_many_gradients_at_once():
    tensors = leaves(make())
    output = mlp(*tensors)
    grads = torch.randn(3, *output.shape, dtype=torch.float64)
    batched = torch.autograd.grad(output, tensors, grads, retain_graph=True, is_grads_batched=True)
    for i, grad in enumerate(grads):
        one = torch.autograd.grad(output, tensors, grad, retain_graph=True)
        for ours, theirs in zip((b[i] for b in batched), one, strict=True):
            assert_close(ours, theirs)


# ---- what traces, recomputes or casts ------------------------------------------------------------------------------


def test_compiles_without_graph_breaks():
    torch._dynamo.reset()
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    tensors, grad = make(), torch.randn(3, 5, 4, dtype=torch.float64)
    for ours, theirs in zip(
        output_and_gradients(compiled, tensors, grad), output_and_gradients(reference.mlp, tensors, grad), strict=True
    ):
        assert_close(ours, theirs)


def test_exports():
    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return mlp(*tensors)

    tensors = make()
    program = torch.export.export(Module(), tensors)
    assert_close(program.module()(*tensors), reference.mlp(*tensors))


def test_make_fx_traces_it():
    tensors = make()
    graph = make_fx(mlp, tracing_mode="fake")(*tensors)
    assert_close(graph(*make(seed=1)), reference.mlp(*make(seed=1)))


def test_autocast():
    tensors = make(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = mlp(*tensors), reference.mlp(*tensors)
        mixed = mlp(tensors[0].bfloat16(), *tensors[1:])
    assert ours.dtype == mixed.dtype == torch.bfloat16
    assert torch.equal(ours, theirs)


def test_activation_checkpointing():
    tensors, grad = make(), torch.randn(3, 5, 4, dtype=torch.float64)

    def checkpointed(*arguments):
        return checkpoint(mlp, *arguments, use_reentrant=False)

    for ours, theirs in zip(
        output_and_gradients(checkpointed, tensors, grad), output_and_gradients(mlp, tensors, grad), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_changing_what_was_saved_is_noticed():
    tensors = leaves(make())
    output = mlp(*tensors)
    with torch.no_grad():
        tensors[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("backend", ["reference", "triton", "cuda"])
def test_every_other_backend_leaves_it_to_pytorch(backend, monkeypatch):
    monkeypatch.setattr(operator, "_forward", None)
    with vitfast.backend(backend):
        assert_close(mlp(*make()), reference.mlp(*make()))


# ---- bad arguments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({0: [1.0]}, TypeError, "x must be a torch.Tensor; got list"),
        ({1: torch.zeros(11, 5)}, TypeError, "weight1 must have the dtype of x, torch.float64; got torch.float32"),
        ({1: torch.zeros(11, 5).double()}, ValueError, r"weight1 must have the shape \(11, 6\)"),
        ({2: torch.zeros(10).double()}, ValueError, r"bias1 must have the shape \(11,\)"),
        ({3: torch.zeros(4, 6).double()}, ValueError, r"weight2 must have the shape \(4, 11\)"),
        ({4: torch.zeros(4, 1).double()}, ValueError, r"bias2 must have the shape \(4,\)"),
        ({0: torch.zeros(3, 6, dtype=torch.int64)}, TypeError, "x must be float32, float64, float16 or bfloat16"),
        ({3: torch.zeros(4, 11, device="meta").double()}, ValueError, "all tensors must be on one device"),
        ({0: torch.tensor(1.0).double()}, ValueError, r"weight1 must have the shape \(11, 0\)"),
        ({1: torch.tensor(1.0).double()}, ValueError, "weight1 must be a matrix"),
    ],
)
def test_bad_arguments(change, error, message):
    tensors = list(make())
    for index, tensor in change.items():
        tensors[index] = tensor
    with pytest.raises(error, match=message):
        mlp(*tensors)


@pytest.mark.parametrize("sizes", [((5,), 8, 0, 16), ((5,), 0, 16, 3)], ids=str)
def test_layers_without_columns(sizes):
    tensors = make(*sizes, dtype=torch.float32)
    grad = torch.randn(*sizes[0], sizes[3])
    found = output_and_gradients(mlp, tensors, grad)
    for value, expected in zip(found, output_and_gradients(reference.mlp, tensors, grad), strict=True):
        assert_close(value, expected)
