"""Run by test_attention_triton.py with TRITON_INTERPRET=1: the kernels against the exact results.

bfloat16 is left to the tests on a GPU: the interpreter multiplies it wrongly. Blocks of float32 are 32 tokens at most.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attention_cases import LAYOUTS, Case, assert_results_close, exact, expected, fused, make_inputs, plain
from helpers import Inputs, Results, restride
from tangent_checks import ATTENTION, sliced_tangents, tangents_last, with_tangents

import vitfast
from vitfast.kernels import attention as kernels
from vitfast.kernels import attention_tangents
from vitfast.kernels.common import statistics_dtype, terms_per_program

CASES = [
    Case(queries=33, keys=40, heads=2, dim=20, bias="hnm"),
    Case(queries=40, keys=33, heads=2, dim=48, batch=1, bias="bhnm"),
    Case(queries=18, heads=2, dim=80, bias="m", packed=True),
    Case(queries=35, keys=5, heads=1, dim=16, bias=None),
    Case(queries=1, keys=34, heads=2, dim=5, bias="bhm"),
    Case(queries=34, keys=1, heads=2, dim=8, bias="bn"),
    Case(queries=17, heads=1, dim=130, batch=1, bias=None, packed=True),
    Case(queries=20, heads=2, dim=16, scale=0.0),
    Case(queries=20, heads=2, dim=16, scale=-0.7, bias="b"),
]


@pytest.fixture(autouse=True)
def _triton():
    with vitfast.backend("triton"):
        yield


def assert_kernels_are_right(case, inputs):
    assert_results_close(case, inputs, fused(case, inputs), plain(case, inputs), exact(case, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward(case, dtype):
    assert_kernels_are_right(case, make_inputs(case, dtype))


@pytest.mark.parametrize("case", [CASES[0], CASES[4]], ids=str)
def test_float64_is_computed_in_float64(case):
    assert_kernels_are_right(case, make_inputs(case, torch.float64))


def test_float16_in_several_blocks():
    """Blocks of 128 queries and 64 keys forward, 32 keys and 32 queries in the two loops of the backward."""
    case = Case(queries=130, keys=66, heads=1, dim=80, batch=1)
    assert_kernels_are_right(case, make_inputs(case, torch.float16))


BIASES = ["".join(name for i, name in enumerate("bhnm") if chosen >> i & 1) for chosen in range(16)]


@pytest.mark.parametrize("bias", BIASES, ids=lambda bias: bias or "scalar")
def test_every_broadcast_of_the_bias(bias):
    case = Case(queries=18, keys=17, heads=2, dim=8, bias=bias)
    assert_kernels_are_right(case, make_inputs(case, torch.float32))


@pytest.mark.parametrize(("batch", "heads", "bias"), [(4, 2, "hnm"), (2, 4, "bnm"), (2, 2, "nm")])
def test_terms_of_one_chunk_are_added_up(batch, heads, bias, monkeypatch):
    """Each program takes three of the four heads that share a matrix of the bias, which leaves one for the last."""
    case = Case(queries=18, keys=17, heads=heads, dim=8, batch=batch, bias=bias)
    assert terms_per_program(4, parallel=1) == 1
    monkeypatch.setattr(kernels, "terms_per_program", lambda terms, parallel: 3)
    assert_kernels_are_right(case, make_inputs(case, torch.float32))


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
def test_layouts(layout):
    case = Case(queries=17, keys=18, heads=2, dim=20)
    inputs, plain_results, exact_results = expected(case, torch.float32)
    strided = inputs.map(LAYOUTS[layout])
    assert_results_close(case, inputs, fused(case, strided), plain_results, exact_results)


def test_tensors_of_different_layouts():
    case = Case(queries=17, keys=18, heads=2, dim=20)
    inputs, plain_results, exact_results = expected(case, torch.float32)
    mixed = inputs._replace(
        query=LAYOUTS["channels_first"](inputs.query),
        value=LAYOUTS["sliced_heads"](inputs.value),
        bias=inputs.bias.mT.contiguous().mT,
        grad=LAYOUTS["sliced_dim"](inputs.grad),
    )
    assert_results_close(case, inputs, fused(case, mixed), plain_results, exact_results)


@pytest.mark.parametrize("far", [0, 1, 2, 3], ids=["batch", "heads", "tokens", "elements"])
def test_more_than_2_to_31_elements_apart(far):
    case = Case(queries=2, keys=3, heads=2, dim=2)
    inputs, plain_results, exact_results = expected(case, torch.float16)
    strides = list(inputs.key.stride())
    strides[far] = 2**31
    # the operating system gives memory to those parts only that are written
    memory = torch.from_numpy(np.empty(2**31 * (inputs.key.shape[far] - 1) + inputs.key.numel(), np.float16))
    key = memory.as_strided(inputs.key.shape, strides).copy_(inputs.key)
    out, _ = forward(case, inputs._replace(key=key), return_lse=False)
    assert_results_close(case, inputs, plain_results._replace(output=out), plain_results, exact_results)


# ---- biases that forbid keys, and scores that are large --------------------------------------------------------------


def forbid(inputs, rows, columns, value=float("-inf")):
    bias = inputs.bias.clone()
    bias[..., rows, columns] = value
    return inputs._replace(bias=bias)


@pytest.mark.parametrize(
    "columns",
    [slice(0, 32), slice(32, 64), slice(64, 70), slice(0, 70, 3)],
    ids=["first block", "a block between", "last block", "every third key"],
)
def test_forbidding_keys_by_an_infinite_bias(columns):
    case = Case(queries=18, keys=70, heads=1, dim=8, batch=1)
    assert_kernels_are_right(case, forbid(make_inputs(case, torch.float32), slice(None), columns))


def test_a_query_without_keys_is_nan_as_in_plain_pytorch():
    case = Case(queries=18, keys=40, heads=1, dim=8, batch=2, bias="bnm")
    inputs = make_inputs(case, torch.float32)
    inputs.bias[1, :, 5] = float("-inf")
    for result, one in zip(fused(case, inputs), plain(case, inputs), strict=True):
        assert torch.equal(result.isnan(), one.isnan())
        assert one.isnan().any()
        assert not one[0].isnan().any()


@pytest.mark.parametrize("lowest", [-1e9, torch.finfo(torch.float32).min], ids=str)
def test_a_query_without_keys_by_a_finite_bias_sees_all(lowest):
    """Masks of many models are finite numbers, below which scores vanish: what is left is a uniform softmax."""
    case = Case(queries=18, keys=40, heads=1, dim=8, batch=1)
    assert_kernels_are_right(case, forbid(make_inputs(case, torch.float32), 5, slice(None), lowest))


def test_large_scores():
    case = Case(queries=18, keys=40, heads=1, dim=16, scale=30.0)
    assert_kernels_are_right(case, make_inputs(case, torch.float32))


@pytest.mark.parametrize("largest", [1e4, 1e30], ids=str)
def test_large_scores_do_not_overflow(largest):
    case = Case(queries=18, keys=40, heads=1, dim=16, scale=largest)
    assert all(t.isfinite().all() for t in fused(case, make_inputs(case, torch.float32)))


# ---- what is returned, written and read ------------------------------------------------------------------------------


def forward(case, inputs, return_lse):
    query, key, value, bias, _ = inputs
    if bias is not None:
        bias = bias.to(statistics_dtype(query.dtype))
    return kernels.forward(query, key, value, bias, case.reference_options["scale"], return_lse)


@pytest.mark.parametrize("layout", ["contiguous", "channels_first"])
def test_heads_of_a_token_are_side_by_side_in_the_output(layout):
    case = Case(queries=5, heads=2, dim=8)
    inputs = make_inputs(case, torch.float32)
    out, _ = forward(case, inputs._replace(query=LAYOUTS[layout](inputs.query)), return_lse=False)
    assert out.shape == inputs.query.shape
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("bias", [None, "hnm"])
def test_logsumexp(bias):
    case = Case(queries=18, keys=40, heads=2, dim=16, bias=bias)
    inputs = make_inputs(case, torch.float32)
    _, lse = forward(case, inputs, return_lse=True)
    scores = case.dim**-0.5 * inputs.query.double() @ inputs.key.double().mT
    if bias is not None:
        scores = scores + inputs.bias.double()
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse, scores.logsumexp(-1).float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_logsumexp_is_empty_unless_asked_for(dtype):
    case = Case(queries=5, heads=2, dim=8)
    inputs = make_inputs(case, dtype)
    out, lse = forward(case, inputs, return_lse=False)
    again, saved = forward(case, inputs, return_lse=True)
    assert lse.shape == (0,)
    assert saved.shape == (2, 2, 5)
    assert lse.dtype == saved.dtype == statistics_dtype(dtype)
    assert torch.equal(out, again)


@pytest.mark.parametrize("layout", ["sliced_dim", "sliced_tokens", "channels_first_sliced"])
def test_backward_writes_every_gradient_and_nothing_else(layout):
    case = Case(queries=17, keys=18, heads=2, dim=20)
    inputs, plain_results, exact_results = expected(case, torch.float32)
    query, key, value, bias, grad = inputs
    out, lse = forward(case, inputs, return_lse=True)
    grads = [LAYOUTS[layout](torch.full_like(t, torch.nan)) for t in (query, key, value)]
    scale = case.reference_options["scale"]
    bias_grad = kernels.backward(grad, query, key, value, bias, out, lse, *grads, scale)
    assert bias_grad.is_contiguous()
    results = Results(out, *grads, bias_grad)
    assert_results_close(case, inputs, results, plain_results, exact_results)
    for view in grads:
        whole = torch.empty(0).set_(view.untyped_storage())
        assert whole.numel() > view.numel()
        assert whole.isnan().sum() == whole.numel() - view.numel()


def test_bias_gradient_is_empty_without_a_bias():
    case = Case(queries=5, heads=1, dim=8, bias=None)
    query, key, value, _, grad = inputs = make_inputs(case, torch.float32)
    out, lse = forward(case, inputs, return_lse=True)
    grads = [torch.empty_like(t) for t in (query, key, value)]
    assert kernels.backward(grad, query, key, value, None, out, lse, *grads, 1.0).shape == (0,)


@pytest.mark.parametrize("bias", ["nm", "m"])
def test_deterministic(bias):
    case = Case(queries=18, keys=40, heads=2, dim=16, bias=bias)
    inputs = make_inputs(case, torch.float32)
    for first, second in zip(fused(case, inputs), fused(case, inputs), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("bias", [None, "hnm", "m"], ids=str)
@pytest.mark.parametrize("empty", [{"batch": 0}, {"heads": 0}, {"queries": 0, "keys": 5}, {"keys": 0}], ids=str)
def test_empty_inputs(empty, bias):
    case = Case(queries=5, heads=2, dim=8, bias=bias).but(**empty)
    results = fused(case, make_inputs(case, torch.float32))
    shapes = case.shapes()
    assert torch.equal(results.output, torch.zeros(shapes["query"]))
    for name, result in results._asdict().items():
        if name != "output" and result is not None:
            assert torch.equal(result, torch.zeros(shapes[name]))


def test_logsumexp_without_keys():
    case = Case(queries=5, keys=0, heads=2, dim=8, bias=None)
    out, lse = forward(case, make_inputs(case, torch.float32), return_lse=True)
    assert torch.equal(out, torch.zeros(2, 2, 5, 8))
    assert torch.equal(lse, torch.full((2, 2, 5), float("-inf")))


# ---- tangents --------------------------------------------------------------------------------------------------------

TANGENT_CASES = [
    Case(queries=33, keys=18, heads=2, dim=20, bias="hnm"),
    Case(queries=18, keys=33, heads=2, dim=48, batch=1, bias="bhnm"),
    Case(queries=18, heads=2, dim=80, bias="m", packed=True),
    Case(queries=35, keys=5, heads=1, dim=16, bias=None),
    Case(queries=1, keys=34, heads=2, dim=5, bias="bhm"),
    Case(queries=34, keys=1, heads=2, dim=8, bias="bn"),
    Case(queries=17, heads=1, dim=130, batch=1, bias=None),
    Case(queries=20, heads=2, dim=16, scale=0.0),
    Case(queries=20, heads=2, dim=16, scale=-0.7, bias="b"),
]


def tangent_inputs(case, dtype, count=1, given=Inputs._fields):
    return with_tangents(make_inputs(case, dtype), count, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", TANGENT_CASES, ids=str)
def test_tangents(case, dtype):
    ATTENTION.assert_right(case, *tangent_inputs(case, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [None, "hnm", "m"])
def test_several_tangents(bias, dtype):
    case = Case(queries=18, keys=20, heads=2, dim=8, bias=bias)
    ATTENTION.assert_right(case, *tangent_inputs(case, dtype, count=3))


def test_tangents_in_float16_in_several_blocks():
    """Blocks of 64 queries and 16 keys for the queries, of 16 queries and 64 keys for the keys."""
    case = Case(queries=66, keys=70, heads=1, dim=40, batch=1)
    ATTENTION.assert_right(case, *tangent_inputs(case, torch.float16))


@pytest.mark.parametrize("absent", [False, True], ids=["alone", "absent"])
@pytest.mark.parametrize("name", Inputs._fields)
def test_tangents_of_zero(name, absent):
    case = Case(queries=17, keys=18, heads=1, dim=8)
    given = tuple(other for other in Inputs._fields if (other == name) != absent)
    ATTENTION.assert_right(case, *tangent_inputs(case, torch.float32, given=given))


@pytest.mark.parametrize("bias", BIASES, ids=lambda bias: bias or "scalar")
def test_tangents_for_every_broadcast_of_the_bias(bias):
    case = Case(queries=18, keys=17, heads=2, dim=8, bias=bias)
    ATTENTION.assert_right(case, *tangent_inputs(case, torch.float32))


@pytest.mark.parametrize(("batch", "heads", "bias"), [(4, 2, "hnm"), (2, 4, "bnm"), (2, 2, "nm")])
def test_tangents_of_the_terms_of_one_chunk_are_added_up(batch, heads, bias, monkeypatch):
    case = Case(queries=18, keys=17, heads=heads, dim=8, batch=batch, bias=bias)
    monkeypatch.setattr(kernels, "terms_per_program", lambda terms, parallel: 3)
    ATTENTION.assert_right(case, *tangent_inputs(case, torch.float32, count=2))


def test_one_result_does_not_depend_on_the_other():
    case = Case(queries=18, keys=20, heads=1, dim=8)
    ATTENTION.assert_one_result_does_not_depend_on_the_other(case, *tangent_inputs(case, torch.float32))


def test_without_a_bias_there_is_no_tangent_of_its_gradient():
    case = Case(queries=5, heads=1, dim=8, bias=None)
    assert ATTENTION.by_kernels(case, *tangent_inputs(case, torch.float32)).bias is None


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
def test_tangents_of_tensors_in_any_layout(layout):
    case = Case(queries=17, keys=18, heads=2, dim=20)
    inputs, tangents = tangent_inputs(case, torch.float32, count=2)
    strided = inputs.map(LAYOUTS[layout])
    moved = Inputs(
        query=tangents_last(tangents.query),
        key=sliced_tangents(tangents.key),
        value=restride(tangents.value, (1, 2, 0, 4, 3)),
        bias=restride(tangents.bias, (4, 1, 2, 0, 3)),
        grad=tangents.grad[:1].expand_as(tangents.grad),
    )
    ATTENTION.assert_right(case, strided, moved)


def test_tangents_have_the_memory_layout_of_the_primals():
    case = Case(queries=5, heads=2, dim=8, bias="m")
    inputs, tangents = tangent_inputs(case, torch.float32, count=3)
    results = ATTENTION.by_kernels(case, inputs.map(LAYOUTS["tokens_first"]), tangents)
    for result in results[:4]:
        assert result.shape == (3, 2, 2, 5, 8)
        assert result.transpose(2, 3).is_contiguous()


def test_tangents_more_than_2_to_31_elements_apart():
    case = Case(queries=2, keys=3, heads=2, dim=2)
    inputs, tangents = tangent_inputs(case, torch.float16, count=2)
    # the operating system gives memory to those parts only that are written
    memory = torch.from_numpy(np.empty(2**31 + tangents.key.numel(), np.float16))
    strides = (2**31, *tangents.key.stride()[1:])
    far = memory.as_strided(tangents.key.shape, strides).copy_(tangents.key)
    ATTENTION.assert_right(case, inputs, tangents._replace(key=far))


@pytest.mark.parametrize("columns", [slice(0, 20), slice(0, 40, 3)], ids=["first block", "every third key"])
def test_tangents_where_keys_are_forbidden_by_an_infinite_bias(columns):
    case = Case(queries=18, keys=40, heads=1, dim=8, batch=1)
    inputs, tangents = tangent_inputs(case, torch.float32)
    ATTENTION.assert_right(case, forbid(inputs, slice(None), columns), tangents)


def test_tangents_of_a_query_without_keys_are_nan_as_in_plain_pytorch():
    case = Case(queries=18, keys=20, heads=1, dim=8, batch=2, bias="bnm")
    inputs, tangents = tangent_inputs(case, torch.float32)
    inputs.bias[1, :, 5] = float("-inf")
    for result in ATTENTION.by_kernels(case, inputs, tangents):
        assert result[:, 1].isnan().any()
        assert not result[:, 0].isnan().any()


def test_tangents_of_large_scores():
    case = Case(queries=18, keys=40, heads=1, dim=16, scale=30.0)
    ATTENTION.assert_right(case, *tangent_inputs(case, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_tangents_far_from_zero(dtype):
    """All keys are alike, and so are the scores of a query and their tangents: what they differ in must be left."""
    case = Case(queries=18, keys=20, heads=1, dim=16)
    inputs, tangents = tangent_inputs(case, dtype)
    inputs, tangents = inputs._replace(key=inputs.key + 8, value=inputs.value + 8), tangents.map(lambda t: t + 4)
    ATTENTION.assert_right(case, inputs, tangents)


@pytest.mark.parametrize("bias", [None, "hnm", "m"], ids=str)
@pytest.mark.parametrize(
    "empty", [{"batch": 0}, {"heads": 0}, {"queries": 0, "keys": 5}, {"keys": 0}, {"dim": 8}], ids=str
)
def test_tangents_of_empty_inputs(empty, bias):
    """The last of them has no tangents."""
    case = Case(queries=5, heads=2, dim=8, bias=bias).but(**empty)
    count = 0 if "dim" in empty else 2
    inputs, tangents = tangent_inputs(case, torch.float32, count)
    for result, primal in zip(ATTENTION.by_kernels(case, inputs, tangents), (inputs.query, *inputs[:4]), strict=True):
        if primal is not None:
            assert torch.equal(result, torch.zeros(count, *primal.shape))


# ---- blocks ----------------------------------------------------------------------------------------------------------


PARTS = {
    (16,): (1, 8, 16),
    (32,): (17, 20, 32),
    (32, 16): (40, 48),
    (64,): (49, 56, 64),
    (64, 16): (72, 80),
    (64, 32): (96,),
    (128,): (100, 128),
    (128, 32): (160,),
    (256,): (200, 256),
}


@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_parts_of_the_head_dimension(parts):
    assert {kernels.parts(d) for d in PARTS[parts]} == {parts}


KERNELS = [
    kernels.attention_fwd_kernel,
    kernels.attention_bwd_query_kernel,
    kernels.attention_bwd_key_kernel,
    kernels.attention_bwd_bias_kernel,
]
TANGENT_KERNELS = [
    attention_tangents.attention_rows_kernel,
    attention_tangents.attention_tangents_query_kernel,
    attention_tangents.attention_tangents_key_kernel,
    attention_tangents.attention_tangents_bias_kernel,
]


@pytest.mark.parametrize("bias_rows", [False, True], ids=["no rows", "rows"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kernel", KERNELS + TANGENT_KERNELS, ids=lambda kernel: kernel.__name__)
def test_tiling(kernel, dtype, bias_rows):
    tiling = (attention_tangents if kernel in TANGENT_KERNELS else kernels).tiling
    for d in (8, 32, 48, 64, 80, 128, 192, 256):
        for n, m in ((1, 1), (1, 577), (50, 50), (197, 197), (4096, 77), (77, 4096)):
            tile = tiling(kernel, n, m, d, dtype, bias_rows)
            for size, tokens in ((tile.block_n, n), (tile.block_m, m)):
                assert 16 <= size <= 128  # 16 is the least that Triton multiplies
                assert size & (size - 1) == 0
                assert size < max(17, 2 * tokens)  # no block is half empty that could be smaller
            assert tile.num_warps in (1, 2, 4, 8)
