"""The Triton kernels of window attention on a GPU, against a float64 loop over windows."""

from __future__ import annotations

import pytest
import torch
from gpu_checks import (
    MARKS,
    assert_autocast_is_right,
    assert_same_when_compiled,
    assert_second_derivatives_are_exact,
    assert_vmap_shares_the_primal,
    on_cpu,
    on_gpu,
)
from helpers import LAYOUTS, Case, Results, assert_results_close, exact, fused, make_inputs, plain, restride
from tangent_checks import WINDOW_ATTENTION, sliced_tangents, tangents_last, with_tangents

from vitfast import reference
from vitfast.functional import window_attention, window_attention_qkvpacked
from vitfast.kernels import window_attention as kernels
from vitfast.ops import backend as backend_module

pytestmark = MARKS

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CASES = [
    Case(size=(14, 14), shift=(3, 3)),
    Case(size=(56, 56), shift=(3, 3), batch=4),
    Case(size=(14, 14), shift=(3, 3), packed=True),
    Case(size=(13, 9), shift=(2, 5), dim=16, packed=True),
    Case(size=(13, 9), shift=(2, 5), dim=20, bias="shared"),
    Case(size=(6, 3), window=(1, 1), dim=16),
    Case(size=(8, 8), window=(4, 4), dim=64, bias="shared"),
    Case(size=(14, 14), heads=6, dim=64, bias="shared"),
    Case(size=(17, 15), window=(8, 8), shift=(4, 4), bias=None),
    Case(size=(14, 14), dim=128),
    Case(size=(19, 18), window=(9, 9), shift=(4, 1), dim=20),
    Case(size=(2, 3), window=(9, 9), shift=(2, 3), dim=16),
    Case(size=(24, 24), window=(12, 12), shift=(6, 6), packed=True),
    Case(size=(24, 24), window=(12, 12), shift=(6, 6), bias="shared", dim=64),
    Case(size=(8, 12), window=(4, 4), shift=(2, 2), ratio=(2, 2), dim=20, bias="shared"),
    Case(size=(20, 10), window=(10, 10), shift=(4, 2), ratio=(2, 2)),
    Case(size=(14, 14), scale=30.0),
    Case(batch=0),
    Case(size=(0, 7), bias="shared"),
]


def assert_fused_is_right(case, inputs):
    """Holds the kernels to the tolerance rule, with plain PyTorch on the GPU for comparison."""
    results, plain_results = fused(case, inputs), plain(case.but(packed=False), inputs)
    assert_results_close(on_cpu(results), on_cpu(plain_results), exact(case, inputs.map(lambda t: t.cpu())))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward(case, dtype):
    assert_fused_is_right(case, on_gpu(make_inputs(case, dtype)))


@pytest.mark.parametrize("case", [CASES[0], CASES[10]], ids=str)
def test_float64_is_computed_in_float64(case):
    assert_fused_is_right(case, on_gpu(make_inputs(case, torch.float64)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_bias_beside_lower_precision(dtype):
    case = CASES[0]
    inputs = on_gpu(make_inputs(case, dtype))
    bias = inputs.bias.float().requires_grad_()
    out = window_attention(*inputs[:3], bias, **case.options)
    (grad,) = torch.autograd.grad(out, bias, inputs.grad)
    assert out.dtype == dtype
    assert grad.dtype == torch.float32
    assert torch.equal(grad.to(dtype), fused(case, inputs).bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, dtype):
    case = Case(size=(10, 9), shift=(3, 0), heads=2)
    inputs = on_gpu(make_inputs(case, dtype))
    assert_fused_is_right(case, inputs.map(lambda t: LAYOUTS[layout](t) if t.dim() == 5 else t.mT.contiguous().mT))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [(7, 7), (12, 12)], ids=["one block", "several blocks"])
def test_backward_writes_every_gradient_and_nothing_else(window, dtype):
    case = Case(size=(13, 9), window=window, shift=(2, 5), dim=20)
    inputs = on_gpu(make_inputs(case, dtype))
    bias = inputs.bias.float()
    options = case.window, case.shift, case.reference_options["scale"]
    out, lse = kernels.forward(*inputs[:3], bias, *options, return_lse=True)
    grads = [LAYOUTS["sliced_dim"](torch.full_like(t, torch.nan)) for t in inputs[:3]]
    bias_grad = kernels.backward(inputs.grad, *inputs[:3], bias, lse, *grads, *options)
    plain_results, exact_results = plain(case, inputs), exact(case, inputs.map(lambda t: t.cpu()))
    results = Results(out, *grads, bias_grad.to(dtype))
    assert_results_close(on_cpu(results), on_cpu(plain_results), exact_results)
    for view in grads:
        whole = torch.empty(0, dtype=dtype, device=view.device).set_(view.untyped_storage())
        assert whole.isnan().sum() == whole.numel() - view.numel()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(size=(56, 56), shift=(3, 3), batch=16),
        Case(size=(56, 56), shift=(3, 3), batch=16, bias="shared", packed=True),
        Case(size=(48, 48), window=(12, 12), shift=(6, 6), batch=8),
    ],
    ids=str,
)
def test_deterministic(case, dtype):
    """The same bits in every run, at sizes that fill the GPU and where programs add up several windows."""
    inputs = on_gpu(make_inputs(case, dtype))
    first = fused(case, inputs)
    for _ in range(3):
        for one, other in zip(first, fused(case, inputs), strict=True):
            assert torch.equal(one, other)


def test_packed_projection_gets_one_packed_gradient():
    case = Case(size=(14, 14), shift=(3, 3))
    inputs = on_gpu(make_inputs(case, torch.bfloat16))
    projection = torch.stack(inputs[:3], dim=3).flatten(3).requires_grad_()
    qkv = projection.unflatten(-1, (3, case.heads, case.dim))
    window_attention_qkvpacked(qkv, inputs.bias, **case.options).backward(inputs.grad)
    expected = torch.stack(fused(case.but(packed=True), inputs)[1:4], dim=3).flatten(3)
    assert torch.equal(projection.grad, expected)


@pytest.mark.parametrize("far", [0, 1], ids=["batch entries", "rows"])
def test_more_than_2_to_31_elements_apart(far):
    """Two batch entries, or two rows of one window, so far apart that an offset between them needs 64 bits."""
    case = Case(size=(2, 2), window=(2, 2), heads=1, dim=16)
    inputs = on_gpu(make_inputs(case, torch.bfloat16))
    strides = list(inputs.query.stride())
    strides[far] = 2**31
    memory = torch.zeros(2**31 + inputs.query.numel(), dtype=torch.bfloat16, device="cuda")  # 4 GiB
    query = memory.as_strided(inputs.query.shape, strides).copy_(inputs.query)
    assert_fused_is_right(case, inputs._replace(query=query))


def test_default_backend_of_a_gpu_is_triton(monkeypatch):
    monkeypatch.setattr(backend_module, "_forced", None)
    assert backend_module.choose("window_attention", ("cpu", "triton"), torch.device("cuda")) == "triton"


# ---- tangents --------------------------------------------------------------------------------------------------------


def gpu_tangents(case, dtype, count=3):
    return (x.map(lambda t: t.cuda()) for x in with_tangents(make_inputs(case, dtype), count))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case.batch and 0 not in case.size], ids=str)
def test_tangents(case, dtype):
    WINDOW_ATTENTION.assert_right(case, *gpu_tangents(case, dtype))


@pytest.mark.parametrize("case", [CASES[0], CASES[10]], ids=str)
def test_tangents_in_float64(case):
    WINDOW_ATTENTION.assert_right(case, *gpu_tangents(case, torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["query", "key", "value", "bias", "grad"])
@pytest.mark.parametrize("window", [(4, 4), (7, 7), (12, 12)], ids=["one block", "blocks of queries", "blocks"])
def test_tangents_of_zero(window, name, dtype):
    case = Case(size=(13, 9), window=window, shift=(2, 3), heads=2)
    inputs, tangents = gpu_tangents(case, dtype)
    alone = type(tangents)(*(None for _ in tangents))._replace(**{name: getattr(tangents, name)})
    for some in (alone, tangents._replace(**{name: None})):
        WINDOW_ATTENTION.assert_right(case, inputs, some)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tangents_of_tensors_in_any_layout(layout, dtype):
    case = Case(size=(10, 9), shift=(3, 0), heads=2)
    inputs, tangents = gpu_tangents(case, dtype)
    strided = inputs.map(lambda t: LAYOUTS[layout](t) if t.dim() == 5 else t.mT.contiguous().mT)
    moved = tangents._replace(
        query=tangents_last(tangents.query),
        key=sliced_tangents(tangents.key),
        value=restride(tangents.value, (1, 4, 5, 0, 3, 2)),
        grad=tangents.grad[:1].expand_as(tangents.grad),
    )
    WINDOW_ATTENTION.assert_right(case, strided, moved)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [(4, 4), (7, 7), (12, 12)], ids=["one block", "blocks of queries", "blocks"])
def test_one_result_does_not_depend_on_the_other(window, dtype):
    case = Case(size=(13, 9), window=window, shift=(2, 3), heads=2)
    WINDOW_ATTENTION.assert_one_result_does_not_depend_on_the_other(case, *gpu_tangents(case, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", ["shared", "per head"])
def test_tangents_are_deterministic(bias, dtype):
    case = Case(size=(56, 56), shift=(3, 3), batch=4, bias=bias)
    inputs, tangents = gpu_tangents(case, dtype)
    first = WINDOW_ATTENTION.by_kernels(case, inputs, tangents)
    for _ in range(3):
        for one, other in zip(first, WINDOW_ATTENTION.by_kernels(case, inputs, tangents), strict=True):
            assert torch.equal(one, other)


# ---- derivatives, torch.compile, autocast ----------------------------------------------------------------------------

SMALL = [
    Case(size=(8, 8), window=(4, 4), shift=(2, 2), heads=2, dim=16),
    Case(size=(9, 10), window=(9, 9), shift=(4, 1), heads=1, dim=16, batch=1, bias="shared"),
    Case(size=(8, 8), window=(4, 4), heads=2, dim=16, bias=None, packed=True),
]
small = pytest.mark.parametrize("case", SMALL, ids=str)


def gpu_arguments(case, dtype):
    """(query, key, value[, bias]), or (qkv[, bias]) if the case is packed."""
    *tensors, bias, _ = on_gpu(make_inputs(case, dtype))
    tensors = [torch.stack(tensors, dim=3)] if case.packed else tensors
    return tuple(tensors) if bias is None else (*tensors, bias)


def fused_function(case):
    operator = window_attention_qkvpacked if case.packed else window_attention
    return lambda *tensors: operator(*tensors, **case.options)


def plain_function(case):
    def plain_attention(*tensors):
        if case.packed:
            tensors = (*tensors[0].unbind(3), *tensors[1:])
        return reference.window_attention(*tensors, **case.reference_options)

    return plain_attention


@small
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compile(case, dtype):
    assert_same_when_compiled(fused_function(case), gpu_arguments(case, dtype))


@small
def test_double_backward(case):
    assert_second_derivatives_are_exact(fused_function(case), plain_function(case), gpu_arguments(case, torch.float64))


@small
@pytest.mark.parametrize("count", [1, 3])
def test_hessian_vector_products_share_the_kernels(case, count):
    assert_vmap_shares_the_primal(fused_function(case), gpu_arguments(case, torch.float64), count)


class Block(torch.nn.Module):
    """A projection and a learned bias around the operator, as models have it."""

    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(64, 192)
        self.proj = torch.nn.Linear(64, 64)
        self.bias = torch.nn.Parameter(torch.randn(2, 49, 49))

    def forward(self, x):
        """(B, H, W, 64) -> (B, H, W, 64)."""
        qkv = self.qkv(x).unflatten(-1, (3, 2, 32))
        return self.proj(window_attention_qkvpacked(qkv, self.bias, window_size=7, shift=3).flatten(3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype):
    assert_autocast_is_right(Block().cuda(), torch.randn(2, 14, 14, 64, device="cuda"), dtype)
