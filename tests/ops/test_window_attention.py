"""The kernels of window attention, forward and backward, against the exact results; on every instruction set."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from helpers import (
    LAYOUTS,
    Case,
    Inputs,
    Results,
    assert_close_to_reference,
    assert_results_close,
    exact,
    expanded_along,
    expected,
    fused,
    make_inputs,
    plain,
)

from vitfast import _C
from vitfast.functional import window_attention, window_attention_qkvpacked

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))

CASES = [
    # the ordinary: whole windows, Swin's shift, every kind of bias, packed or not
    Case(shift=(3, 3)),
    Case(shift=(3, 3), packed=True),
    Case(size=(14, 21), bias="shared", packed=True),
    Case(size=(8, 8), window=(4, 4), shift=(2, 2), bias=None),
    # maps that windows do not fill
    Case(size=(1, 1), shift=(3, 3), dim=16, batch=16),
    Case(size=(1, 17), shift=(0, 6), dim=16, batch=16),
    Case(size=(7, 13), shift=(3, 0), bias="shared"),
    Case(size=(15, 14), shift=(1, 5), dim=20, packed=True),
    Case(size=(17, 15), window=(8, 8), shift=(4, 4), heads=1),
    Case(size=(13, 17), window=(3, 5), shift=(2, 4), dim=8, packed=True),
    Case(size=(5, 4), window=(16, 9), shift=(15, 1), dim=8, batch=8),
    # head dimensions that no vector divides
    Case(size=(7, 7), dim=1, scale=1.5, batch=16),
    Case(size=(7, 7), shift=(2, 2), dim=5, heads=1, packed=True),
    Case(size=(8, 7), dim=20, bias="shared"),
    Case(size=(7, 9), shift=(1, 1), dim=48),
    Case(size=(9, 7), shift=(1, 1), dim=64, packed=True),
    # windows of one, two and few tokens
    Case(size=(3, 5), window=(1, 1), dim=8, bias="shared"),
    Case(size=(5, 6), window=(2, 2), shift=(1, 1), dim=16, packed=True),
    Case(size=(6, 6), window=(1, 4), shift=(0, 3), dim=5, bias=None),
    # keys on a smaller map
    Case(size=(16, 16), window=(8, 8), shift=(4, 4), ratio=(2, 2)),
    Case(size=(14, 12), window=(4, 4), shift=(2, 2), ratio=(2, 2), dim=5, bias="shared"),
    Case(size=(9, 14), window=(3, 4), shift=(1, 2), ratio=(1, 2), dim=16),
    Case(size=(7, 7), ratio=(7, 7), dim=8, bias=None),
    # scales: none, zero, negative
    Case(size=(7, 7), scale=0.0),
    Case(size=(7, 7), scale=-0.7, packed=True),
    # one window that holds more scores than any tile
    Case(size=(17, 15), window=(17, 15), batch=1, heads=1),
    # enough windows for the bias's gradient to be summed in several parts
    Case(size=(32, 34), window=(2, 2), shift=(1, 1), heads=2, dim=4),
    Case(size=(33, 32), window=(2, 2), heads=2, dim=4, bias="shared", packed=True),
    # more heads than a backward takes in turn, and not a multiple of them
    Case(size=(9, 8), window=(4, 4), shift=(2, 1), heads=7, dim=16, packed=True),
]


@dtypes
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward(case, dtype, instruction_set):
    inputs, plain_results, exact_results = expected(case, dtype)
    assert_results_close(fused(case, inputs), plain_results, exact_results)


@pytest.mark.parametrize("size", [1, 7, 13, 14, 15, 17])
@pytest.mark.parametrize("window", [1, 2, 4, 7, 8])
def test_every_shift_of_every_size(size, window):
    for shift in range(window):
        case = Case(size=(size, 9), window=(window, 3), shift=(shift, shift % 3), heads=4, dim=5, batch=4)
        inputs, plain_results, exact_results = expected(case, torch.float32)
        assert_results_close(fused(case, inputs), plain_results, exact_results)


@pytest.mark.parametrize("dim", range(1, 68, 3))
def test_every_remainder_of_the_head_dimension(dim, instruction_set):
    case = Case(size=(7, 8), window=(3, 3), shift=(1, 1), heads=2, dim=dim, batch=4)
    inputs, plain_results, exact_results = expected(case, torch.float32)
    assert_results_close(fused(case, inputs), plain_results, exact_results)


@pytest.mark.parametrize("tokens", range(1, 36))
def test_every_remainder_of_the_tokens_of_a_window(tokens, instruction_set):
    case = Case(size=(4, tokens), window=(1, tokens), heads=2, dim=9, batch=16)
    inputs, plain_results, exact_results = expected(case, torch.float32)
    assert_results_close(fused(case, inputs), plain_results, exact_results)


# ---- memory layouts ------------------------------------------------------------------------------------------------

LAYOUT_CASE = Case(size=(9, 8), window=(4, 4), shift=(2, 1), dim=20)


def relaid(inputs, layout):
    return Inputs(*(LAYOUTS[layout](t) for t in inputs[:3]), inputs.bias, LAYOUTS[layout](inputs.grad))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dim", [16, 20])
def test_layouts(layout, dim, dtype, instruction_set):
    case = LAYOUT_CASE.but(dim=dim)
    inputs, plain_results, exact_results = expected(case, dtype)
    assert_results_close(fused(case, relaid(inputs, layout)), plain_results, exact_results)


@pytest.mark.parametrize(
    "names", [*zip(LAYOUTS, [*LAYOUTS][1:], [*LAYOUTS][2:], [*LAYOUTS][3:], strict=False)], ids="-".join
)
def test_layouts_mix(names):
    inputs, plain_results, exact_results = expected(LAYOUT_CASE, torch.float32)
    tensors = (*inputs[:3], inputs.grad)
    query, key, value, grad = (LAYOUTS[name](t) for name, t in zip(names, tensors, strict=True))
    mixed = Inputs(query, key, value, inputs.bias.mT.contiguous().mT, grad)
    assert_results_close(fused(LAYOUT_CASE, mixed), plain_results, exact_results)


# Windows of 4x4 tokens that fill a channels-first map have a kernel of their own with AVX-512.
SQUARES = Case(size=(8, 8), window=(4, 4), dim=16)


@dtypes
@pytest.mark.parametrize("bias", [None, "shared", "per head"], ids=str)
@pytest.mark.parametrize("size", [(4, 4), (8, 8), (16, 4), (4, 20), (8, 28)], ids=str)
def test_squares_of_a_channels_first_map(size, bias, dtype, instruction_set):
    case = SQUARES.but(size=size, bias=bias)
    inputs, plain_results, exact_results = expected(case, dtype)
    assert_results_close(fused(case, relaid(inputs, "channels_first")), plain_results, exact_results)


@pytest.mark.parametrize("dim", [1, 3, 8, 33, 64])
@pytest.mark.parametrize("scale", [None, -0.7], ids=str)
def test_squares_of_every_head_dimension(dim, scale):
    case = SQUARES.but(dim=dim, scale=scale)
    inputs, plain_results, exact_results = expected(case, torch.float32)
    assert_results_close(fused(case, relaid(inputs, "channels_first")), plain_results, exact_results)


@pytest.mark.parametrize("name", ["batch_last", "channels_first_sliced", "channels_first_cropped", "contiguous"])
def test_squares_where_one_or_all_maps_are_laid_out_otherwise(name):
    inputs, plain_results, exact_results = expected(SQUARES, torch.float32)
    names = ("query", "key", "value", "grad")
    for which in (*((n,) for n in names), names):
        mixed = relaid(inputs, "channels_first")
        mixed = mixed._replace(**{n: LAYOUTS[name](getattr(inputs, n)) for n in which})
        assert_results_close(fused(SQUARES, mixed), plain_results, exact_results)


def test_squares_without_gradients():
    """Nothing is written to the statistics that only a backward needs."""
    inputs = relaid(make_inputs(SQUARES, torch.float32), "channels_first")
    output = window_attention(*inputs[:4], **SQUARES.options)
    assert torch.equal(output, fused(SQUARES, inputs).output)


def test_squares_of_packed_inputs():
    inputs, plain_results, exact_results = expected(SQUARES, torch.float32)
    qkv = torch.stack([t.permute(0, 3, 4, 1, 2) for t in inputs[:3]], 1)  # (B, 3, heads, D, H, W)
    qkv = qkv.permute(0, 4, 5, 1, 2, 3).requires_grad_()
    bias = inputs.bias.clone().requires_grad_()
    output = window_attention_qkvpacked(qkv, bias, **SQUARES.options)
    qkv_grad, bias_grad = torch.autograd.grad(output, (qkv, bias), inputs.grad)
    assert_results_close(Results(output.detach(), *qkv_grad.unbind(3), bias_grad), plain_results, exact_results)


@pytest.mark.parametrize("dims", [(0,), (1,), (3,), (4,), (0, 3)], ids=str)
def test_expanded_squares(dims):
    inputs = relaid(make_inputs(SQUARES, torch.float32), "channels_first")
    expanded = [expanded_along(tensor, dims) for tensor in (*inputs[:3], inputs.grad)]
    inputs = Inputs(*expanded[:3], inputs.bias, expanded[3])
    assert_results_close(fused(SQUARES, inputs), plain(SQUARES, inputs), exact(SQUARES, inputs))


def test_squares_with_forbidden_pairs():
    inputs = forbid(make_inputs(SQUARES, torch.float32), torch.ones(16, 16).triu(1).bool())
    results = fused(SQUARES, relaid(inputs, "channels_first"))
    assert all(t.isfinite().all() for t in results)
    assert_results_close(results, plain(SQUARES, inputs), exact(SQUARES, inputs))
    inputs = forbid(inputs, (torch.arange(16) == 5)[:, None])  # a row without any key
    for result, one in zip(fused(SQUARES, relaid(inputs, "channels_first")), plain(SQUARES, inputs), strict=True):
        torch.testing.assert_close(result, one, equal_nan=True)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("which", ["query", "key", "value", "grad"])
def test_poison_stays_in_its_square(which, poison):
    case = SQUARES.but(size=(8, 12), bias=None)
    clean = relaid(make_inputs(case, torch.float32), "channels_first")
    poisoned = clean.map(torch.clone)
    getattr(poisoned, which)[1, 5, 6, 1, 4] = poison
    touched = torch.zeros(clean.query.shape[:4], dtype=torch.bool)
    touched[1, 4:8, 4:8, 1] = True
    results = fused(case, poisoned)
    for result, before in zip(results[:4], fused(case, clean)[:4], strict=True):
        assert torch.equal(result[~touched], before[~touched])
    assert not results.query[touched].isfinite().all()


@pytest.mark.parametrize(
    "order", [(0, 1, 2, 3, 4, 5), (0, 3, 4, 5, 1, 2), (3, 0, 4, 1, 2, 5), (0, 4, 3, 5, 2, 1)], ids=str
)
def test_layouts_of_packed_inputs(order, instruction_set):
    inputs, plain_results, exact_results = expected(LAYOUT_CASE, torch.float32)
    qkv = torch.stack(inputs[:3], dim=3)
    qkv = qkv.permute(order).contiguous().permute(torch.tensor(order).argsort().tolist()).requires_grad_()
    bias = inputs.bias.clone().requires_grad_()
    output = window_attention_qkvpacked(qkv, bias, **LAYOUT_CASE.options)
    qkv_grad, bias_grad = torch.autograd.grad(output, (qkv, bias), inputs.grad)
    assert qkv_grad.stride() == qkv.stride()
    results = Results(output.detach(), *qkv_grad.unbind(3), bias_grad)
    assert_results_close(results, plain_results, exact_results)


@pytest.mark.parametrize("layout", ["contiguous", "heads_first", "channels_first", "width_first", "batch_last"])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_output_has_the_layout_of_the_query(layout, needs_grad):
    inputs = make_inputs(LAYOUT_CASE, torch.float32)
    query = LAYOUTS[layout](inputs.query).requires_grad_(needs_grad)
    output = window_attention(query, inputs.key, inputs.value, inputs.bias, **LAYOUT_CASE.options)
    assert output.stride() == query.stride()
    if needs_grad:
        (grad,) = torch.autograd.grad(output, query, inputs.grad)
        assert grad.stride() == query.stride()


def test_channels_first_map_needs_no_copy():
    x = torch.randn(2, 3 * 8, 14, 14)
    tokens = x.unflatten(1, (3, 8)).permute(0, 3, 4, 1, 2)
    assert tokens.data_ptr() == x.data_ptr()
    output = window_attention(tokens, tokens, tokens, window_size=7, shift=3)
    back = output.permute(0, 3, 4, 1, 2).flatten(1, 2)
    assert back.is_contiguous()
    assert back.data_ptr() == output.data_ptr()


@pytest.mark.parametrize("dims", [(0,), (1,), (3,), (4,), (1, 2), (0, 1, 2, 3, 4)], ids=str)
def test_expanded_inputs(dims, instruction_set):
    """Tensors with strides of zero; each gradient is that of the expanded tensor."""
    case = LAYOUT_CASE
    inputs = make_inputs(case, torch.float32)
    expanded = [expanded_along(tensor, dims) for tensor in (*inputs[:3], inputs.grad)]
    bias = inputs.bias[:1].expand(inputs.bias.shape)
    inputs = Inputs(*expanded[:3], bias, expanded[3])
    assert all(t.stride(dims[0]) == 0 for t in inputs[:3])
    assert_results_close(fused(case, inputs), plain(case, inputs), exact(case, inputs))


def test_one_tensor_as_query_key_and_value():
    case = LAYOUT_CASE
    inputs, _, _ = expected(case, torch.float32)
    same = Inputs(inputs.query, inputs.query, inputs.query, inputs.bias, inputs.grad)
    x = inputs.query.clone().requires_grad_()
    output = window_attention(x, x, x, inputs.bias, **case.options)
    (grad,) = torch.autograd.grad(output, x, inputs.grad)
    plain_results, exact_results = plain(case, same), exact(case, same)
    assert_close_to_reference(output, plain_results.output, exact_results.output)
    assert_close_to_reference(grad, sum(plain_results[1:4]), sum(exact_results[1:4]))


def test_slice_of_a_projection_with_other_parts_between():
    """Query, key and value as views of one linear layer's output, as most models hold them."""
    case = Case(size=(7, 9), shift=(3, 2), dim=16)
    inputs, plain_results, exact_results = expected(case, torch.float32)
    whole = torch.cat([t.flatten(3) for t in inputs[:3]], dim=-1)
    parts = [t.unflatten(-1, (case.heads, case.dim)) for t in whole.chunk(3, dim=-1)]
    assert not parts[0].is_contiguous()
    assert_results_close(fused(case, Inputs(*parts, *inputs[3:])), plain_results, exact_results)


# ---- large tensors -------------------------------------------------------------------------------------------------


def far_apart(x, dim):
    """The same values 2^31 elements apart along ``dim``, in memory that is mapped but never touched."""
    stride = 2**31
    place = [0] * x.dim()
    rest = [i for i in range(x.dim()) if i != dim]
    place[dim] = stride
    for i, size in zip(rest, x.select(dim, 0).contiguous().stride(), strict=True):
        place[i] = size
    lazy = torch.from_numpy(np.zeros((x.shape[dim] - 1) * stride + x.select(dim, 0).numel(), dtype=np.float16))
    return lazy.as_strided(x.shape, place).copy_(x)


@pytest.mark.parametrize(("size", "dim"), [((5, 4), 0), ((2, 5), 1), ((5, 2), 2)])
def test_strides_beyond_32_bits(size, dim):
    case = Case(size=size, window=(2, 2), shift=(1, 1), heads=2, dim=4)
    inputs, plain_results, exact_results = expected(case, torch.float16)
    far = Inputs(*(far_apart(t, dim) for t in inputs[:3]), inputs.bias, far_apart(inputs.grad, dim))
    query, key, value = (t.requires_grad_() for t in far[:3])
    output = window_attention(query, key, value, inputs.bias, **case.options)
    grads = torch.autograd.grad(output, (query, key, value), far.grad)
    for result, one, truth in zip((output, *grads), plain_results, exact_results, strict=False):
        assert_close_to_reference(result, one, truth)


def test_packed_strides_beyond_32_bits():
    case = Case(size=(5, 4), window=(2, 2), shift=(1, 1), heads=2, dim=4, batch=1)
    inputs, plain_results, exact_results = expected(case, torch.float16)
    qkv = far_apart(torch.stack(inputs[:3], dim=3), 3).requires_grad_()
    output = window_attention_qkvpacked(qkv, inputs.bias, **case.options)
    (grad,) = torch.autograd.grad(output, qkv, inputs.grad)
    for result, one, truth in zip((output, *grad.unbind(3)), plain_results, exact_results, strict=False):
        assert_close_to_reference(result, one, truth)


@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    """An output of 4 GiB, from inputs that are one image seen many times."""
    torch.use_deterministic_algorithms(False)  # do not fill 4 GiB with NaN
    case = Case(size=(16, 16), window=(4, 4), shift=(2, 2), heads=4, dim=64, batch=1)
    inputs = make_inputs(case, torch.float16)
    times = 2**31 // inputs.query.numel() + 2
    many = [t.expand(times, *t.shape[1:]) for t in inputs[:3]]
    output = window_attention(*many, inputs.bias, **case.options)
    assert output.numel() > 2**31
    single = window_attention(*inputs[:4], **case.options)
    for index in (0, times // 2, times - 2, times - 1):
        assert torch.equal(output[index], single[0])


# ---- nothing forgotten, nothing else touched -----------------------------------------------------------------------


def test_uninitialised_memory_is_poisoned():
    """The fixture of conftest.py that lets the other tests see unwritten results works where the kernels allocate."""
    assert torch.empty_like(torch.ones(8)).isnan().all()
    assert torch.ones(8).new_empty(4).isnan().all()


@pytest.mark.parametrize("shape", [(0, 7, 7, 2, 8), (2, 0, 7, 2, 8), (2, 7, 0, 2, 8), (2, 7, 7, 0, 8)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_empty_inputs(shape, with_bias):
    query, key, value = (torch.randn(shape, requires_grad=True) for _ in range(3))
    bias = torch.randn(shape[3], 49, 49, requires_grad=True) if with_bias else None
    output = window_attention(query, key, value, bias, window_size=7, shift=3)
    assert output.shape == shape
    output.sum().backward()
    assert query.grad.shape == key.grad.shape == value.grad.shape == shape
    if with_bias:
        assert torch.equal(bias.grad, torch.zeros_like(bias))


def test_empty_packed_inputs():
    qkv = torch.randn(0, 7, 7, 3, 2, 8, requires_grad=True)
    bias = torch.randn(1, 49, 49, requires_grad=True)
    output = window_attention_qkvpacked(qkv, bias, window_size=7)
    assert output.shape == (0, 7, 7, 2, 8)
    output.sum().backward()
    assert qkv.grad.shape == qkv.shape
    assert torch.equal(bias.grad, torch.zeros_like(bias))


@dtypes
def test_inputs_are_only_read(dtype):
    case = LAYOUT_CASE
    inputs = make_inputs(case, dtype)
    before = inputs.map(torch.clone)
    fused(case, inputs)
    for tensor, copy in zip(inputs, before, strict=True):
        assert torch.equal(tensor, copy)


def windows_of_token(case, y, x):
    """True for the tokens of the window that holds token (y, x)."""
    rows = (torch.arange(case.size[0]) - case.shift[0]).div(case.window[0], rounding_mode="floor")
    columns = (torch.arange(case.size[1]) - case.shift[1]).div(case.window[1], rounding_mode="floor")
    return (rows == rows[y])[:, None] & (columns == columns[x])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("which", ["query", "key", "value", "grad"])
def test_poison_stays_in_its_window_and_head(which, poison, instruction_set):
    case = Case(size=(10, 9), window=(4, 4), shift=(1, 2), heads=2, dim=9, bias=None)
    inputs = make_inputs(case, torch.float32)
    clean = fused(case, inputs)
    poisoned = inputs.map(torch.clone)
    getattr(poisoned, which)[1, 5, 3, 1, 4] = poison
    results = fused(case, poisoned)
    touched = torch.zeros(inputs.query.shape[:4], dtype=torch.bool)
    touched[1, :, :, 1] = windows_of_token(case, 5, 3)
    for name, result, before in zip(Results._fields, results[:4], clean[:4], strict=False):
        assert torch.equal(result[~touched], before[~touched]), name
    if which in ("query", "key"):  # a row of scores, or all rows, have no softmax
        assert results.output[1, 5, 3, 1].isnan().all()
    assert not results.query[touched].isfinite().all()


@pytest.mark.parametrize("largest", [1e4, 1e30], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_large_scores_do_not_overflow(largest, dtype, instruction_set):
    case = Case(size=(7, 7), dim=8, scale=largest)
    inputs, plain_results, exact_results = expected(case, dtype)
    results = fused(case, inputs)
    assert all(t.isfinite().all() for t in results)
    assert_close_to_reference(results.output, plain_results.output, exact_results.output)


def test_large_bias_does_not_overflow(instruction_set):
    case = Case(size=(9, 7), shift=(3, 3), dim=8)
    inputs = make_inputs(case, torch.float32)
    inputs = inputs._replace(bias=1e4 * inputs.bias)
    assert_results_close(fused(case, inputs), plain(case, inputs), exact(case, inputs))


def forbid(inputs, pairs):
    """The inputs with a bias of -inf where ``pairs``, (N, M), is true."""
    return inputs._replace(bias=inputs.bias.masked_fill(pairs, float("-inf")))


@dtypes
@pytest.mark.parametrize("shift", [(0, 0), (2, 1)], ids=str)
def test_minus_infinity_in_the_bias_forbids_a_pair(shift, dtype, instruction_set):
    """Each token sees only itself and those before it: in windows at the edge, tokens outside the map see none."""
    case = Case(size=(8, 8), window=(4, 4), shift=shift, dim=8)
    inputs = forbid(make_inputs(case, dtype), torch.ones(16, 16).triu(1).bool())
    results = fused(case, inputs)
    assert all(t.isfinite().all() for t in results)
    assert_results_close(results, plain(case, inputs), exact(case, inputs))


def test_row_without_any_key_is_nan_as_in_plain_pytorch(instruction_set):
    case = Case(size=(8, 8), window=(4, 4), shift=(2, 2), dim=8, bias="shared")
    inputs = forbid(make_inputs(case, torch.float32), (torch.arange(16) == 5)[:, None])
    for result, one in zip(fused(case, inputs), plain(case, inputs), strict=True):
        torch.testing.assert_close(result, one, equal_nan=True)


# ---- determinism and resources -------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("bias", [None, "shared", "per head"], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
def test_same_bits_in_every_run_with_any_number_of_threads(dtype, bias, packed, threads):
    """Threads cut the heads that a backward takes in turn, and the runs of windows, anywhere."""
    case = Case(size=(40, 41), window=(4, 4), shift=(2, 2), heads=7, dim=16, batch=3, bias=bias, packed=packed)
    inputs = make_inputs(case, dtype)
    assert_same_bits_with_any_number_of_threads(case, inputs, threads)


@pytest.mark.parametrize("bias", [None, "shared", "per head"], ids=str)
def test_same_bits_of_squares_with_any_number_of_threads(bias, threads):
    case = SQUARES.but(size=(20, 36), heads=7, batch=3, bias=bias)
    inputs = relaid(make_inputs(case, torch.float32), "channels_first")
    assert_same_bits_with_any_number_of_threads(case, inputs, threads)


def assert_same_bits_with_any_number_of_threads(case, inputs, threads):
    threads(1)
    first = fused(case, inputs)
    for count in (1, 2, 3, 5):
        threads(count)
        for result, before in zip(fused(case, inputs), first, strict=True):
            assert before is None or torch.equal(result, before)


def swin_stages():
    return [
        Case(size=(56, 56), shift=(3, 3), heads=3, batch=8),
        Case(size=(28, 28), shift=(3, 3), heads=6, batch=8),
        Case(size=(14, 14), shift=(3, 3), heads=12, batch=8),
        Case(size=(7, 7), heads=24, batch=8),
    ]


def scratch_of(run):
    _C.reset_scratch_bytes()
    run()
    return _C.scratch_bytes()


@pytest.mark.parametrize("case", swin_stages(), ids=str)
def test_scratch_of_the_forward_is_under_a_hundredth_of_the_scores(case, threads):
    threads(1)
    inputs = make_inputs(case, torch.float32)
    scores = case.batch * case.heads * case.size[0] * case.size[1] * 49 * 4
    assert 0 < scratch_of(lambda: window_attention(*inputs[:4], **case.options)) < scores / 100


@pytest.mark.parametrize("case", swin_stages(), ids=str)
def test_scratch_of_the_backward_is_that_of_one_map(case, threads):
    """It does not grow with the batch, the map, or more heads than the three that are taken in turn."""
    threads(1)
    one = Case(size=(14, 14), shift=case.shift, heads=3, batch=1)  # with a window of every kind
    results = [scratch_of(functools.partial(fused, c, make_inputs(c, torch.float32))) for c in (one, case)]
    assert results[0] == results[1]


def test_scratch_shows_that_set_num_threads_is_honoured(threads):
    case = Case(size=(56, 56), batch=8)
    inputs = make_inputs(case, torch.float32)
    run = functools.partial(window_attention, *inputs[:4], **case.options)
    peaks = {}
    for count in (1, 2):
        threads(count)
        peaks[count] = scratch_of(run)
    assert peaks[1] > 0
    assert peaks[2] in (peaks[1], 2 * peaks[1])  # two threads may by chance take turns, but never are there three
