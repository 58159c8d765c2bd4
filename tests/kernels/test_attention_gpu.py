"""The Triton kernels of attention on a GPU, against the exact results."""

from __future__ import annotations

import pytest
import torch
from attention_cases import (
    LAYOUTS,
    Case,
    arguments,
    assert_results_close,
    exact,
    fused,
    fused_function,
    make_inputs,
    pack,
    plain,
    plain_function,
)
from gpu_checks import (
    MARKS,
    assert_autocast_is_right,
    assert_same_when_compiled,
    assert_second_derivatives_are_exact,
    assert_vmap_shares_the_primal,
    on_cpu,
    on_gpu,
)
from helpers import Results, restride
from tangent_checks import ATTENTION, sliced_tangents, tangents_last, with_tangents

from vitfast.functional import attention, attention_qkvpacked
from vitfast.kernels import attention as kernels
from vitfast.ops import backend as backend_module

pytestmark = MARKS

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CASES = [
    Case(queries=197, dim=64, bias=None, packed=True),
    Case(queries=197, dim=64),
    Case(queries=50, dim=64, packed=True),
    Case(queries=65, dim=48, bias="bhnm"),
    Case(queries=257, heads=2, dim=80, bias="nm"),
    Case(queries=577, heads=2, dim=64, batch=1, bias="hnm"),
    Case(queries=1, dim=64, bias=None),
    Case(queries=1, keys=577, dim=32, bias="bhm"),
    Case(queries=577, keys=1, dim=32, bias="n"),
    Case(queries=33, keys=300, dim=8, bias="bm"),
    Case(queries=300, keys=33, dim=20, bias="hn"),
    Case(queries=130, dim=5, bias="bnm"),
    Case(queries=130, dim=96, bias="m"),
    Case(queries=130, keys=70, heads=2, dim=128),
    Case(queries=130, heads=2, dim=160, batch=1, packed=True),
    Case(queries=130, heads=2, dim=256, batch=1),
    Case(queries=197, scale=30.0),
    Case(queries=197, scale=-0.7, bias=None),
    Case(batch=0),
    Case(queries=0, keys=5, bias="m"),
    Case(queries=5, keys=0),
]


def assert_fused_is_right(case, inputs):
    """Holds the kernels to the tolerance rule, with plain PyTorch on the GPU for comparison."""
    results, plain_results = on_cpu(fused(case, inputs)), on_cpu(plain(case, inputs))
    inputs = inputs.map(lambda t: t.cpu())
    if case.scores[3] == 0:  # the definition has no largest score there
        assert all(t is None or torch.equal(t, torch.zeros_like(t)) for t in results)
    else:
        assert_results_close(case, inputs, results, plain_results, exact(case, inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward(case, dtype):
    assert_fused_is_right(case, on_gpu(make_inputs(case, dtype)))


@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[13], CASES[15]], ids=str)
def test_float64_is_computed_in_float64(case):
    assert_fused_is_right(case, on_gpu(make_inputs(case, torch.float64)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chosen", range(16))
def test_every_broadcast_of_the_bias(chosen, dtype):
    bias = "".join(name for i, name in enumerate("bhnm") if chosen >> i & 1)
    case = Case(queries=70, keys=90, dim=16, batch=3, bias=bias)
    assert_fused_is_right(case, on_gpu(make_inputs(case, dtype)))


@pytest.mark.parametrize("bias", ["hnm", "m"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_bias_beside_lower_precision(dtype, bias):
    case = Case(queries=65, bias=bias)
    inputs = on_gpu(make_inputs(case, dtype))
    wide = inputs.bias.float().requires_grad_()
    out = attention(*inputs[:3], wide)
    (grad,) = torch.autograd.grad(out, wide, inputs.grad)
    assert out.dtype == dtype
    assert grad.dtype == torch.float32
    assert torch.equal(grad.to(dtype), fused(case, inputs).bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype):
    case = Case(queries=70, keys=90, heads=2, dim=48)
    assert_fused_is_right(case, on_gpu(make_inputs(case, dtype)).map(LAYOUTS[layout]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_writes_every_gradient_and_nothing_else(dtype):
    case = Case(queries=70, keys=90, heads=2, dim=20)
    inputs = on_gpu(make_inputs(case, dtype))
    bias, scale = inputs.bias.float(), case.reference_options["scale"]
    out, lse = kernels.forward(*inputs[:3], bias, scale, return_lse=True)
    grads = [LAYOUTS["sliced_dim"](torch.full_like(t, torch.nan)) for t in inputs[:3]]
    bias_grad = kernels.backward(inputs.grad, *inputs[:3], bias, out, lse, *grads, scale)
    results = on_cpu(Results(out, *grads, bias_grad.to(dtype)))
    inputs_on_cpu = inputs.map(lambda t: t.cpu())
    plain_results, exact_results = on_cpu(plain(case, inputs)), exact(case, inputs_on_cpu)
    assert_results_close(case, inputs_on_cpu, results, plain_results, exact_results)
    for view in grads:
        whole = torch.empty(0, dtype=dtype, device=view.device).set_(view.untyped_storage())
        assert whole.isnan().sum() == whole.numel() - view.numel()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(queries=197, heads=12, dim=64, batch=64),
        Case(queries=197, heads=12, dim=64, batch=64, bias="m", packed=True),
        Case(queries=1000, heads=4, dim=80, batch=4, bias="nm"),
    ],
    ids=str,
)
def test_deterministic(case, dtype):
    """The same bits in every run, at sizes that fill the GPU and where programs add up several heads."""
    inputs = on_gpu(make_inputs(case, dtype))
    first = fused(case, inputs)
    for _ in range(3):
        for one, other in zip(first, fused(case, inputs), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_forbidden_by_an_infinite_bias(dtype):
    case = Case(queries=70, keys=300, heads=2)
    inputs = on_gpu(make_inputs(case, dtype))
    inputs.bias[..., :130] = float("-inf")
    inputs.bias[..., 290:] = float("-inf")
    assert_fused_is_right(case, inputs)


def test_a_query_without_keys_is_nan_as_in_plain_pytorch():
    case = Case(queries=70, keys=90, heads=2, bias="bnm")
    inputs = on_gpu(make_inputs(case, torch.float32))
    inputs.bias[1, :, 5] = float("-inf")
    for result, one in zip(fused(case, inputs), plain(case, inputs), strict=True):
        assert torch.equal(result.isnan(), one.isnan())
        assert not one[0].isnan().any()


@pytest.mark.parametrize("lowest", [-1e9, torch.finfo(torch.float32).min], ids=str)
def test_a_query_without_keys_by_a_finite_bias_sees_all(lowest):
    case = Case(queries=70, keys=90, heads=2)
    inputs = on_gpu(make_inputs(case, torch.float32))
    inputs.bias[:, :, 5] = lowest
    assert_fused_is_right(case, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("largest", [1e4, 1e30], ids=str)
def test_large_scores_do_not_overflow(largest, dtype):
    case = Case(queries=70, keys=300, heads=2, scale=largest)
    assert all(t.isfinite().all() for t in fused(case, on_gpu(make_inputs(case, dtype))))


def test_output_is_laid_out_for_the_merge_of_the_heads():
    inputs = on_gpu(make_inputs(CASES[1], torch.bfloat16))
    assert attention(*inputs[:4]).transpose(1, 2).is_contiguous()
    assert attention_qkvpacked(pack(*inputs[:3]), inputs.bias).is_contiguous()


def test_packed_projection_gets_one_packed_gradient():
    case = Case(queries=197, dim=64)
    inputs = on_gpu(make_inputs(case, torch.bfloat16))
    projection = pack(*inputs[:3]).flatten(2).requires_grad_()
    qkv = projection.unflatten(-1, (3, case.heads, case.dim))
    attention_qkvpacked(qkv, inputs.bias).backward(inputs.grad.transpose(1, 2))
    expected = pack(*fused(case.but(packed=True), inputs)[1:4]).flatten(2)
    assert torch.equal(projection.grad, expected)


@pytest.mark.parametrize("far", [0, 1, 2, 3], ids=["batch", "heads", "tokens", "elements"])
def test_more_than_2_to_31_elements_apart(far):
    case = Case(queries=2, heads=2, dim=2)
    inputs = on_gpu(make_inputs(case, torch.bfloat16))
    strides = list(inputs.key.stride())
    strides[far] = 2**31
    memory = torch.zeros(2**31 + inputs.key.numel(), dtype=torch.bfloat16, device="cuda")  # 4 GiB
    key = memory.as_strided(inputs.key.shape, strides).copy_(inputs.key)
    out, _ = kernels.forward(inputs.query, key, inputs.value, None, 1.0, return_lse=False)
    expected, _ = kernels.forward(*inputs[:3], None, 1.0, return_lse=False)
    assert torch.equal(out, expected)


def test_default_backend_of_a_gpu_is_triton(monkeypatch):
    monkeypatch.setattr(backend_module, "_forced", None)
    assert backend_module.choose("attention", ("cpu", "triton"), torch.device("cuda")) == "triton"


# ---- tangents --------------------------------------------------------------------------------------------------------


def gpu_tangents(case, dtype, count=3):
    return (x.map(lambda t: t.cuda()) for x in with_tangents(make_inputs(case, dtype), count))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if 0 not in case.scores], ids=str)
def test_tangents(case, dtype):
    ATTENTION.assert_right(case, *gpu_tangents(case, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chosen", range(16))
def test_tangents_for_every_broadcast_of_the_bias(chosen, dtype):
    bias = "".join(name for i, name in enumerate("bhnm") if chosen >> i & 1)
    case = Case(queries=70, keys=90, dim=16, batch=3, bias=bias)
    ATTENTION.assert_right(case, *gpu_tangents(case, dtype))


@pytest.mark.parametrize("case", [CASES[1], CASES[3]], ids=str)
def test_tangents_in_float64(case):
    ATTENTION.assert_right(case, *gpu_tangents(case, torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["query", "key", "value", "bias", "grad"])
def test_tangents_of_zero(name, dtype):
    case = Case(queries=70, keys=90, heads=2, dim=48)
    inputs, tangents = gpu_tangents(case, dtype)
    alone = type(tangents)(*(None for _ in tangents))._replace(**{name: getattr(tangents, name)})
    for some in (alone, tangents._replace(**{name: None})):
        ATTENTION.assert_right(case, inputs, some)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tangents_of_tensors_in_any_layout(layout, dtype):
    case = Case(queries=70, keys=90, heads=2, dim=48)
    inputs, tangents = gpu_tangents(case, dtype)
    moved = tangents._replace(
        query=tangents_last(tangents.query),
        key=sliced_tangents(tangents.key),
        value=restride(tangents.value, (1, 2, 0, 4, 3)),
        grad=tangents.grad[:1].expand_as(tangents.grad),
    )
    ATTENTION.assert_right(case, inputs.map(LAYOUTS[layout]), moved)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_result_does_not_depend_on_the_other(dtype):
    case = Case(queries=70, keys=90, heads=2, dim=48)
    ATTENTION.assert_one_result_does_not_depend_on_the_other(case, *gpu_tangents(case, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", ["nm", "m"])
def test_tangents_are_deterministic(bias, dtype):
    case = Case(queries=197, heads=12, dim=64, batch=16, bias=bias)
    inputs, tangents = gpu_tangents(case, dtype)
    first = ATTENTION.by_kernels(case, inputs, tangents)
    for _ in range(3):
        for one, other in zip(first, ATTENTION.by_kernels(case, inputs, tangents), strict=True):
            assert torch.equal(one, other)


# ---- derivatives, torch.compile, autocast ----------------------------------------------------------------------------

SMALL = [
    Case(queries=18, keys=35, heads=2, dim=8),
    Case(queries=18, heads=2, dim=8, bias="m", packed=True),
    Case(queries=18, heads=2, dim=8, bias=None, packed=True),
]
small = pytest.mark.parametrize("case", SMALL, ids=str)


def gpu_arguments(case, dtype):
    return tuple(t.cuda() for t in arguments(case, dtype))


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
        self.bias = torch.nn.Parameter(torch.randn(2, 50, 50))

    def forward(self, x):
        """(B, 50, 64) -> (B, 50, 64)."""
        qkv = self.qkv(x).unflatten(-1, (3, 2, 32))
        return self.proj(attention_qkvpacked(qkv, self.bias).flatten(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype):
    assert_autocast_is_right(Block().cuda(), torch.randn(4, 50, 64, device="cuda"), dtype)
