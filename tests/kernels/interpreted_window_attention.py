"""Run by test_window_attention_triton.py with TRITON_INTERPRET=1: the kernels against a float64 loop over windows.

bfloat16 is left to the tests on a GPU: the interpreter multiplies it wrongly.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import LAYOUTS, Case, Inputs, assert_results_close, exact, expected, fused, make_inputs, plain, restride
from tangent_checks import WINDOW_ATTENTION, sliced_tangents, tangents_last, with_tangents

import vitfast
from vitfast import reference
from vitfast.kernels import window_attention as kernels
from vitfast.kernels import window_attention_tangents
from vitfast.kernels.common import terms_per_program
from vitfast.kernels.launch import Launch

CASES = [
    Case(size=(3, 2), window=(1, 1), heads=2, dim=16),
    Case(size=(5, 6), window=(4, 4), shift=(2, 1), heads=2, dim=20, bias="shared"),
    Case(size=(9, 8), shift=(3, 3), heads=2, dim=32, batch=1),
    Case(size=(8, 9), window=(8, 8), shift=(0, 4), heads=1, dim=16, batch=1, bias=None),
    Case(size=(3, 11), window=(2, 5), shift=(1, 0), heads=1, dim=5, batch=1),
    Case(size=(4, 4), window=(4, 4), heads=1, dim=16, scale=0.0),
    Case(size=(4, 8), window=(4, 4), shift=(2, 2), ratio=(2, 2), heads=2, dim=20, batch=1, bias="shared"),
    Case(size=(6, 8), window=(6, 4), shift=(0, 2), ratio=(3, 2), heads=1, dim=16, batch=1),
    Case(size=(5, 6), window=(4, 4), shift=(2, 1), heads=2, dim=16, batch=1, packed=True),
    # windows of several blocks: 81 tokens; a map at the far end of its only window, whose first keys are all outside;
    # 100 queries and 25 keys; a shared bias
    Case(size=(9, 10), window=(9, 9), shift=(4, 1), heads=1, dim=20, batch=1),
    Case(size=(2, 3), window=(9, 9), shift=(2, 3), heads=2, dim=16, batch=1),
    Case(size=(10, 10), window=(10, 10), ratio=(2, 2), heads=1, dim=16, batch=1, bias=None),
    Case(size=(9, 9), window=(9, 9), heads=2, dim=16, batch=1, bias="shared"),
    Case(size=(7, 7), dim=16, batch=0),
    Case(size=(9, 9), window=(9, 9), dim=16, batch=0, bias="shared"),
    Case(size=(0, 7), dim=16, bias=None),
]


@pytest.fixture(autouse=True)
def _triton():
    with vitfast.backend("triton"):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward(case, dtype):
    inputs, plain_results, exact_results = expected(case, dtype)
    assert_results_close(fused(case, inputs), plain_results, exact_results)


@pytest.mark.parametrize("case", [CASES[1], CASES[10]], ids=str)
def test_float64_is_computed_in_float64(case):
    inputs, plain_results, exact_results = expected(case, torch.float64)
    assert_results_close(fused(case, inputs), plain_results, exact_results)


@pytest.mark.parametrize("window", [(4, 4), (9, 9)], ids=["one block", "several blocks"])
def test_large_scores(window):
    case = Case(size=window, window=window, heads=1, dim=16, scale=30.0)
    inputs, plain_results, exact_results = expected(case, torch.float32)
    assert_results_close(fused(case, inputs), plain_results, exact_results)


def test_excluding_keys_by_an_infinite_bias():
    case = Case(size=(4, 4), window=(4, 4), heads=1, dim=16)
    inputs = make_inputs(case, torch.float32)
    inputs.bias[:, :, ::3] = float("-inf")
    assert_results_close(fused(case, inputs), plain(case, inputs), exact(case, inputs))


@pytest.mark.parametrize("window", [(4, 4), (9, 9)], ids=["one block", "several blocks"])
def test_windows_of_one_chunk_are_added_up(window, monkeypatch):
    """Each program takes three of the windows, which leaves fewer for the last one."""
    case = Case(size=(window[0], window[1] + 1), window=window, shift=(0, 1), heads=1, dim=16)
    assert terms_per_program(4, parallel=1) == 1
    monkeypatch.setattr(kernels, "terms_per_program", lambda terms, parallel, programs=1: 3)
    inputs, plain_results, exact_results = expected(case, torch.float32)
    assert_results_close(fused(case, inputs), plain_results, exact_results)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
def test_strides(layout):
    case = Case(size=(5, 4), window=(4, 4), shift=(2, 0), heads=2, dim=16)
    inputs, plain_results, exact_results = expected(case, torch.float32)
    strided = inputs.map(lambda t: LAYOUTS[layout](t) if t.dim() == 5 else t.mT.contiguous().mT)
    assert_results_close(fused(case, strided), plain_results, exact_results)


COPIED = [
    Case(size=(9, 8), window=(5, 4), shift=(2, 1), heads=2, dim=5),
    Case(size=(10, 10), window=(10, 10), ratio=(2, 2), heads=1, dim=16, batch=1, bias="shared"),
    Case(size=(9, 10), window=(9, 5), heads=3, dim=24, batch=1),  # 90 tokens and 72 channels: two blocks of each
    Case(size=(6, 6), window=(6, 6), heads=2, dim=3, bias=None),
]


@pytest.mark.parametrize("case", COPIED, ids=str)
def test_channels_first_maps_are_copied_there_and_back(case, monkeypatch):
    copies = []
    run = Launch.run
    monkeypatch.setattr(Launch, "run", lambda self: copies.append(self.kernel) or run(self))
    inputs, plain_results, exact_results = expected(case, torch.float32)
    planes = inputs.map(lambda t: LAYOUTS["channels_first"](t) if t.dim() == 5 else t)
    assert_results_close(fused(case, planes), plain_results, exact_results)
    assert copies.count(kernels.transpose_kernel) == 4 + 7


def test_tensors_of_different_layouts():
    case = Case(size=(9, 4), window=(9, 9), heads=2, dim=16, batch=1)
    inputs, plain_results, exact_results = expected(case, torch.float32)
    mixed = inputs._replace(
        query=LAYOUTS["channels_first"](inputs.query),
        value=LAYOUTS["sliced_heads"](inputs.value),
        grad=LAYOUTS["sliced_dim"](inputs.grad),
    )
    assert_results_close(fused(case, mixed), plain_results, exact_results)


def test_output_has_the_memory_layout_of_the_query():
    case = Case(size=(4, 4), window=(4, 4), heads=2, dim=16)
    inputs = make_inputs(case, torch.float32)
    query = LAYOUTS["channels_first"](inputs.query)
    out, _ = forward(case, inputs._replace(query=query), return_lse=False)
    assert out.stride() == query.stride()


def forward(case, inputs, return_lse):
    scale = case.reference_options["scale"]
    return kernels.forward(*inputs[:4], case.window, case.shift, scale, return_lse)


@pytest.mark.parametrize("window", [(4, 4), (9, 9)], ids=["one block", "several blocks"])
def test_logsumexp(window):
    case = Case(size=window, window=window, heads=2, dim=16, batch=1)
    inputs = make_inputs(case, torch.float32)
    _, lse = forward(case, inputs, return_lse=True)
    query, key = (reference.window_partition(t.double(), window, (0, 0)) for t in inputs[:2])
    scores = case.dim**-0.5 * query @ key.mT + inputs.bias.double()
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse, scores.logsumexp(-1).float().reshape(1, 2, *window))


@pytest.mark.parametrize(
    ("dtype", "lse_dtype"),
    [(torch.float16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_logsumexp_is_empty_unless_asked_for(dtype, lse_dtype):
    case = Case(size=(4, 4), window=(4, 4), heads=1, dim=16, bias=None)
    inputs = make_inputs(case, dtype)
    out, lse = forward(case, inputs, return_lse=False)
    assert lse.shape == (0,)
    assert lse.dtype == lse_dtype
    again, lse = forward(case, inputs, return_lse=True)
    assert lse.shape == (case.batch, case.heads, *case.size)
    assert lse.dtype == lse_dtype
    assert torch.equal(out, again)


@pytest.mark.parametrize("window", [(4, 4), (9, 9)], ids=["one block", "several blocks"])
@pytest.mark.parametrize("layout", ["sliced_dim", "sliced_width", "channels_first_sliced"])
def test_backward_writes_every_gradient_and_nothing_else(window, layout):
    case = Case(size=(5, 3), window=window, shift=(1, 2), heads=1, dim=20)
    inputs, plain_results, exact_results = expected(case, torch.float32)
    query, key, value, bias, grad = inputs
    out, lse = forward(case, inputs, return_lse=True)
    grads = [LAYOUTS[layout](torch.full_like(t, torch.nan)) for t in (query, key, value)]
    scale = case.reference_options["scale"]
    bias_grad = kernels.backward(grad, query, key, value, bias, lse, *grads, case.window, case.shift, scale)
    assert_results_close(type(plain_results)(out, *grads, bias_grad), plain_results, exact_results)
    for view in grads:
        whole = torch.empty(0).set_(view.untyped_storage())
        assert whole.numel() > view.numel()
        assert whole.isnan().sum() == whole.numel() - view.numel()


@pytest.mark.parametrize("window", [(4, 4), (9, 9)], ids=["one block", "several blocks"])
def test_deterministic(window):
    case = Case(size=(5, 3), window=window, shift=(2, 1), heads=1, dim=16, bias="shared", batch=1)
    inputs = make_inputs(case, torch.float32)
    for first, second in zip(fused(case, inputs), fused(case, inputs), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("far", [0, 1], ids=["batch entries", "rows"])
def test_more_than_2_to_31_elements_apart(far):
    """Two batch entries, or two rows of one window, so far apart that an offset between them needs 64 bits."""
    case = Case(size=(2, 2), window=(2, 2), heads=1, dim=16)
    inputs, plain_results, exact_results = expected(case, torch.float16)
    strides = list(inputs.query.stride())
    strides[far] = 2**31
    # the operating system gives memory to those parts only that are written
    memory = torch.from_numpy(np.empty(2**31 + inputs.query.numel(), np.float16))
    query = memory.as_strided(inputs.query.shape, strides).copy_(inputs.query)
    assert_results_close(fused(case, inputs._replace(query=query)), plain_results, exact_results)
    rows_apart = kernels.offset_dtype([query]) == kernels.tl.int64
    assert rows_apart == (far == 1)


@pytest.mark.parametrize(
    ("n", "m", "d", "dtype", "whole"),
    [
        (49, 49, 32, torch.bfloat16, True),
        (64, 64, 32, torch.float32, True),
        (64, 64, 128, torch.bfloat16, True),
        (81, 81, 32, torch.float16, False),
        (100, 25, 32, torch.float16, False),
        (1, 1, 5, torch.float64, True),
    ],
)
def test_tiling(n, m, d, dtype, whole):
    tile = kernels.tiling(n, m, d, dtype)
    assert ((tile.block_n >= n) and (tile.block_m >= m)) == whole
    assert tile.block_d >= d
    for size in tile[:3]:
        assert size >= 16  # the least that Triton multiplies
        assert size & (size - 1) == 0
    assert tile.num_warps in (1, 2, 4, 8)


# ---- tangents --------------------------------------------------------------------------------------------------------

TANGENT_CASES = [
    Case(size=(3, 2), window=(1, 1), heads=2, dim=16),
    Case(size=(5, 6), window=(4, 4), shift=(2, 1), heads=2, dim=20, bias="shared"),
    Case(size=(7, 6), shift=(3, 3), heads=1, dim=32, batch=1),
    Case(size=(3, 7), window=(2, 5), shift=(1, 0), heads=1, dim=5, batch=1),
    Case(size=(4, 4), window=(4, 4), heads=1, dim=16, scale=0.0),
    Case(size=(4, 8), window=(4, 4), shift=(2, 2), ratio=(2, 2), heads=2, dim=20, batch=1, bias="shared"),
    Case(size=(6, 8), window=(6, 4), shift=(0, 2), ratio=(3, 2), heads=1, dim=16, batch=1),
    # windows of several blocks: 81 tokens; a map at the far end of its only window, whose first keys are all outside;
    # 100 queries and 25 keys; a shared bias
    Case(size=(9, 5), window=(9, 9), shift=(0, 1), heads=1, dim=20, batch=1),
    Case(size=(2, 3), window=(9, 9), shift=(2, 3), heads=1, dim=16, batch=1),
    Case(size=(10, 10), window=(10, 10), ratio=(2, 2), heads=1, dim=16, batch=1, bias=None),
    Case(size=(6, 6), window=(6, 6), heads=2, dim=16, batch=1, bias="shared"),
]


def tangent_inputs(case, dtype, count=1, given=Inputs._fields):
    return with_tangents(make_inputs(case, dtype), count, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", TANGENT_CASES, ids=str)
def test_tangents(case, dtype):
    WINDOW_ATTENTION.assert_right(case, *tangent_inputs(case, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [None, "shared", "per head"])
def test_several_tangents(bias, dtype):
    case = Case(size=(5, 4), window=(4, 4), shift=(2, 1), heads=2, dim=8, batch=1, bias=bias)
    WINDOW_ATTENTION.assert_right(case, *tangent_inputs(case, dtype, count=3))


@pytest.mark.parametrize("absent", [False, True], ids=["alone", "absent"])
@pytest.mark.parametrize("name", Inputs._fields)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_tangents_of_zero(dtype, name, absent):
    case = Case(size=(5, 4), window=(5, 4), heads=1, dim=8, batch=1)
    given = tuple(other for other in Inputs._fields if (other == name) != absent)
    WINDOW_ATTENTION.assert_right(case, *tangent_inputs(case, dtype, given=given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("window", [(4, 4), (5, 5)], ids=["one block", "several blocks"])
def test_tangents_of_the_windows_of_one_chunk_are_added_up(window, dtype, monkeypatch):
    """Each program takes three of the four windows, which leaves one for the last."""
    case = Case(size=(window[0], window[1] + 1), window=window, shift=(0, 1), heads=1, dim=8)
    monkeypatch.setattr(window_attention_tangents, "terms_per_program", lambda terms, parallel, programs=1: 3)
    WINDOW_ATTENTION.assert_right(case, *tangent_inputs(case, dtype, count=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("window", [(4, 4), (5, 5), (9, 9)], ids=["one block", "blocks of queries", "blocks"])
def test_one_result_does_not_depend_on_the_other(window, dtype):
    case = Case(size=window, window=window, heads=1, dim=8, batch=1)
    WINDOW_ATTENTION.assert_one_result_does_not_depend_on_the_other(case, *tangent_inputs(case, dtype))


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
def test_tangents_of_tensors_in_any_layout(layout):
    case = Case(size=(5, 4), window=(4, 4), shift=(2, 0), heads=2, dim=16, batch=1)
    inputs, tangents = tangent_inputs(case, torch.float16, count=2)
    strided = inputs.map(lambda t: LAYOUTS[layout](t) if t.dim() == 5 else t.mT.contiguous().mT)
    moved = Inputs(
        query=tangents_last(tangents.query),
        key=sliced_tangents(tangents.key),
        value=restride(tangents.value, (1, 4, 5, 0, 3, 2)),
        bias=restride(tangents.bias, (3, 1, 0, 2)),
        grad=tangents.grad[:1].expand_as(tangents.grad),
    )
    WINDOW_ATTENTION.assert_right(case, strided, moved)


@pytest.mark.parametrize("layout", ["contiguous", "channels_first"])
def test_tangents_have_the_memory_layout_of_the_primals(layout):
    case = Case(size=(3, 2), window=(2, 2), heads=2, dim=8, batch=2)
    inputs, tangents = tangent_inputs(case, torch.float32, count=3)
    strided = inputs.map(lambda t: LAYOUTS[layout](t) if t.dim() == 5 else t)
    for result in WINDOW_ATTENTION.by_kernels(case, strided, tangents)[:4]:
        assert result.stride() == (strided.query.numel(), *strided.query.stride())


def test_tangents_more_than_2_to_31_elements_apart():
    case = Case(size=(2, 2), window=(2, 2), heads=1, dim=16)
    inputs, tangents = tangent_inputs(case, torch.float16, count=2)
    # the operating system gives memory to those parts only that are written
    memory = torch.from_numpy(np.empty(2**31 + tangents.query.numel(), np.float16))
    strides = (2**31, *tangents.query.stride()[1:])
    far = memory.as_strided(tangents.query.shape, strides).copy_(tangents.query)
    WINDOW_ATTENTION.assert_right(case, inputs, tangents._replace(query=far))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_tangents_where_keys_are_excluded_by_an_infinite_bias(dtype):
    case = Case(size=(4, 4), window=(4, 4), heads=1, dim=16, batch=1)
    inputs, tangents = tangent_inputs(case, dtype)
    inputs.bias[:, :, ::3] = float("-inf")
    WINDOW_ATTENTION.assert_right(case, inputs, tangents)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_tangents_of_a_query_without_keys_are_nan_as_in_plain_pytorch(dtype):
    case = Case(size=(4, 4), window=(4, 4), heads=2, dim=16, batch=1)
    inputs, tangents = tangent_inputs(case, dtype)
    inputs.bias[1, 5] = float("-inf")
    for result in WINDOW_ATTENTION.by_kernels(case, inputs, tangents)[:4]:
        assert result[..., 1, :].isnan().any()
        assert not result[..., 0, :].isnan().any()


@pytest.mark.parametrize("window", [(4, 4), (9, 9)], ids=["one block", "several blocks"])
def test_tangents_of_large_scores(window):
    case = Case(size=window, window=window, heads=1, dim=16, batch=1, scale=30.0)
    WINDOW_ATTENTION.assert_right(case, *tangent_inputs(case, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_tangents_far_from_zero(dtype):
    """All keys are alike, and so are the scores of a query and their tangents: what they differ in must be left."""
    case = Case(size=(4, 4), window=(4, 4), heads=1, dim=16, batch=1)
    inputs, tangents = tangent_inputs(case, dtype)
    inputs, tangents = inputs._replace(key=inputs.key + 8, value=inputs.value + 8), tangents.map(lambda t: t + 4)
    WINDOW_ATTENTION.assert_right(case, inputs, tangents)


@pytest.mark.parametrize("bias", [None, "shared", "per head"])
@pytest.mark.parametrize("empty", [{"batch": 0}, {"size": (0, 4)}, {"dim": 8}], ids=str)
def test_tangents_of_empty_inputs(empty, bias):
    """The last of them has no tangents."""
    case = Case(size=(4, 4), window=(4, 4), heads=2, dim=8, bias=bias).but(**empty)
    count = 0 if "dim" in empty else 2
    inputs, tangents = tangent_inputs(case, torch.float32, count)
    for result, primal in zip(
        WINDOW_ATTENTION.by_kernels(case, inputs, tangents), (inputs.query, *inputs[:4]), strict=True
    ):
        if primal is None:
            assert result is None
        else:
            assert torch.equal(result, torch.zeros(count, *primal.shape))


@pytest.mark.parametrize("channels_first", [False, True], ids=["channels last", "channels first"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("d", [5, 32, 64, 128, 256])
def test_tiling_of_tangents(d, dtype, channels_first):
    for n, m in ((1, 1), (16, 16), (49, 49), (144, 36)):
        tile = window_attention_tangents.tiling(n, m, d, dtype, channels_first)
        assert tile.block_d >= d
        for size in tile[:3]:
            assert size >= 16  # the least that Triton multiplies
            assert size & (size - 1) == 0
        assert tile.block_m < max(17, 2 * m)
        assert tile.num_warps in (1, 2, 4, 8)
