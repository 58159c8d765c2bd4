"""The kernels of attention, forward and backward, against the exact results; on every instruction set."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from attention_cases import (
    LAYOUTS,
    Case,
    assert_results_close,
    exact,
    expected,
    fused,
    make_inputs,
    pack,
    plain,
    unpack,
)
from helpers import Inputs, Results, assert_close_to_reference, expanded_along, restride

import vitfast
from vitfast import _C
from vitfast.functional import attention, attention_qkvpacked

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))

CASES = [
    # the ordinary: the tokens of vision transformers, with and without their class token
    Case(queries=49),
    Case(queries=50, dim=64, bias=None, packed=True),
    Case(queries=64, dim=64, packed=True),
    Case(queries=65, dim=48, bias=None),
    Case(queries=197, heads=2, dim=64, batch=1, bias=None, packed=True),
    Case(queries=257, heads=1, dim=80, batch=1, bias="hnm"),
    Case(queries=577, heads=1, dim=16, batch=1, bias=None),
    # one query, one key, both
    Case(queries=1, keys=1, dim=16, batch=16),
    Case(queries=1, keys=197, dim=16, bias="hm"),
    Case(queries=197, keys=1, dim=16, bias="hn"),
    # fewer and more keys than queries
    Case(queries=9, keys=70, dim=20, bias="bhnm"),
    Case(queries=130, keys=33, dim=24, bias="nm"),
    # more keys than a cache holds scores of
    Case(queries=3, keys=5000, heads=2, dim=16, batch=4, bias="m"),
    Case(queries=40, keys=1500, heads=1, dim=8, batch=1, bias="hnm"),
    Case(queries=1500, keys=40, heads=1, dim=8, batch=1, bias="n"),
    # head dimensions that no vector divides, and the largest
    Case(queries=33, dim=1, scale=1.5, batch=8),
    Case(queries=33, dim=5, heads=1, packed=True),
    Case(queries=31, dim=20, bias="m"),
    Case(queries=17, dim=72),
    Case(queries=18, dim=128, heads=2, packed=True),
    Case(queries=35, dim=256, heads=1),
    # scales: zero, negative
    Case(queries=20, scale=0.0),
    Case(queries=20, scale=-0.7, packed=True),
]


@dtypes
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward(case, dtype, instruction_set):
    inputs, plain_results, exact_results = expected(case, dtype)
    assert_results_close(case, inputs, fused(case, inputs), plain_results, exact_results)


@pytest.mark.parametrize("dim", range(1, 68, 3))
def test_every_remainder_of_the_head_dimension(dim, instruction_set):
    case = Case(queries=19, keys=21, heads=2, dim=dim, batch=4)
    inputs, plain_results, exact_results = expected(case, torch.float32)
    assert_results_close(case, inputs, fused(case, inputs), plain_results, exact_results)


@pytest.mark.parametrize("tokens", range(1, 71))
def test_every_remainder_of_the_tokens(tokens, instruction_set):
    case = Case(queries=tokens, heads=2, dim=9, batch=4)
    inputs, plain_results, exact_results = expected(case, torch.float32)
    assert_results_close(case, inputs, fused(case, inputs), plain_results, exact_results)


@pytest.mark.parametrize("keys", [1, 2, 7, 8, 15, 16, 17, 31, 33, 63, 65, 127, 129, 255, 257, 511, 513, 1025])
@pytest.mark.parametrize("queries", [1, 6, 15, 34])
def test_queries_and_keys_of_different_length(queries, keys):
    case = Case(queries=queries, keys=keys, heads=1, dim=9, batch=2 + 60 // queries, bias="bhnm")
    inputs, plain_results, exact_results = expected(case, torch.float32)
    assert_results_close(case, inputs, fused(case, inputs), plain_results, exact_results)


# ---- biases --------------------------------------------------------------------------------------------------------

BIASES = ["".join(name for i, name in enumerate("bhnm") if chosen >> i & 1) for chosen in range(16)]


@pytest.mark.parametrize("bias", BIASES, ids=lambda bias: bias or "scalar")
@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
def test_every_broadcast_of_the_bias(bias, packed, instruction_set):
    case = Case(queries=18, keys=None if packed else 35, dim=8, bias=bias, packed=packed)
    inputs, plain_results, exact_results = expected(case, torch.float32)
    assert_results_close(case, inputs, fused(case, inputs), plain_results, exact_results)


@pytest.mark.parametrize("dims", range(5))
def test_bias_of_fewer_dimensions(dims):
    """Broadcasting is from the last dimension, and the gradient has the shape that was given."""
    case = Case(queries=5, keys=7, dim=4, bias="bhnm"[4 - dims :])
    inputs, plain_results, exact_results = expected(case, torch.float32)
    query, key, value = inputs[:3]
    bias = inputs.bias.reshape(inputs.bias.shape[4 - dims :]).requires_grad_()
    output = attention(query, key, value, bias)
    assert_close_to_reference(output, plain_results.output, exact_results.output)
    (grad,) = torch.autograd.grad(output, bias, inputs.grad)
    results = plain_results._replace(bias=grad.reshape(inputs.bias.shape))
    assert grad.shape == bias.shape
    assert_results_close(case, inputs, results, plain_results, exact_results)


@pytest.mark.parametrize(
    "relay",
    [lambda b: b.mT.contiguous().mT, lambda b: restride(b, (2, 3, 0, 1)), lambda b: LAYOUTS["sliced_dim"](b)],
    ids=["transposed", "heads innermost", "sliced"],
)
@pytest.mark.parametrize("bias", ["bhnm", "hnm", "hm"])
def test_bias_of_any_strides(relay, bias, instruction_set):
    case = Case(queries=18, keys=35, dim=8, bias=bias)
    inputs, plain_results, exact_results = expected(case, torch.float32)
    inputs = inputs._replace(bias=relay(inputs.bias))
    assert_results_close(case, inputs, fused(case, inputs), plain_results, exact_results)


def test_expanded_bias_gets_a_gradient_for_each_of_its_elements():
    case = Case(queries=18, keys=35, dim=8, bias="bhnm")
    inputs = make_inputs(case, torch.float32)
    inputs = inputs._replace(bias=inputs.bias[:1, :1, :, :1].expand(case.scores))
    assert inputs.bias.stride(0) == inputs.bias.stride(3) == 0
    assert_results_close(case, inputs, fused(case, inputs), plain(case, inputs), exact(case, inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_bias_beside_lower_precision(dtype):
    case = Case(queries=18, dim=8)
    inputs = make_inputs(case, dtype)._replace(bias=make_inputs(case, torch.float32).bias)
    results = fused(case, inputs)
    assert results.bias.dtype == torch.float32
    exact_results = exact(case, inputs)
    for result, one, truth in zip(results[:4], plain(case, inputs)[:4], exact_results[:4], strict=True):
        assert_close_to_reference(result, one, truth)


# ---- memory layouts ------------------------------------------------------------------------------------------------

LAYOUT_CASE = Case(queries=21, keys=34, dim=20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dim", [16, 20])
def test_layouts(layout, dim, dtype, instruction_set):
    case = LAYOUT_CASE.but(dim=dim)
    inputs, plain_results, exact_results = expected(case, dtype)
    relaid = Inputs(*(LAYOUTS[layout](t) for t in inputs[:3]), inputs.bias, LAYOUTS[layout](inputs.grad))
    assert_results_close(case, relaid, fused(case, relaid), plain_results, exact_results)


@pytest.mark.parametrize(
    "names", [*zip(LAYOUTS, [*LAYOUTS][1:], [*LAYOUTS][2:], [*LAYOUTS][3:], strict=False)], ids="-".join
)
def test_layouts_mix(names):
    inputs, plain_results, exact_results = expected(LAYOUT_CASE, torch.float32)
    tensors = (*inputs[:3], inputs.grad)
    query, key, value, grad = (LAYOUTS[name](t) for name, t in zip(names, tensors, strict=True))
    relaid = Inputs(query, key, value, inputs.bias, grad)
    assert_results_close(LAYOUT_CASE, relaid, fused(LAYOUT_CASE, relaid), plain_results, exact_results)


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (0, 2, 3, 4, 1), (2, 0, 3, 1, 4), (0, 3, 2, 1, 4)], ids=str)
def test_layouts_of_packed_inputs(order, instruction_set):
    case = Case(queries=21, dim=20)
    inputs, plain_results, exact_results = expected(case, torch.float32)
    qkv = restride(pack(*inputs[:3]), order).requires_grad_()
    bias = inputs.bias.clone().requires_grad_()
    output = attention_qkvpacked(qkv, bias)
    qkv_grad, bias_grad = torch.autograd.grad(output, (qkv, bias), inputs.grad.transpose(1, 2))
    assert qkv_grad.stride() == qkv.stride()
    results = Results(output.detach().transpose(1, 2), *unpack(qkv_grad), bias_grad)
    assert_results_close(case, inputs, results, plain_results, exact_results)


@pytest.mark.parametrize("layout", ["contiguous", "tokens_first", "channels_first", "batch_last"])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_output_is_laid_out_for_the_merge_of_the_heads(layout, needs_grad):
    inputs = make_inputs(LAYOUT_CASE, torch.float32)
    query = LAYOUTS[layout](inputs.query).requires_grad_(needs_grad)
    output = attention(query, inputs.key, inputs.value, inputs.bias)
    assert output.transpose(1, 2).is_contiguous()
    if needs_grad:
        (grad,) = torch.autograd.grad(output, query, inputs.grad)
        assert grad.stride() == query.stride()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_packed_output_is_contiguous(backend):
    with vitfast.backend(backend):
        assert attention_qkvpacked(torch.randn(2, 9, 3, 4, 8)).is_contiguous()


@pytest.mark.parametrize("dims", [(0,), (1,), (2,), (3,), (1, 2), (0, 1, 2, 3)], ids=str)
def test_expanded_inputs(dims, instruction_set):
    """Tensors with strides of zero; each gradient is that of the expanded tensor."""
    case = LAYOUT_CASE
    inputs = make_inputs(case, torch.float32)
    expanded = [expanded_along(tensor, dims) for tensor in (*inputs[:3], inputs.grad)]
    inputs = Inputs(*expanded[:3], inputs.bias, expanded[3])
    assert all(t.stride(dims[0]) == 0 for t in inputs[:3])
    assert_results_close(case, inputs, fused(case, inputs), plain(case, inputs), exact(case, inputs))


def test_one_tensor_as_query_key_and_value():
    case = Case(queries=21, dim=20)
    inputs, _, _ = expected(case, torch.float32)
    same = Inputs(inputs.query, inputs.query, inputs.query, inputs.bias, inputs.grad)
    x = inputs.query.clone().requires_grad_()
    output = attention(x, x, x, inputs.bias)
    (grad,) = torch.autograd.grad(output, x, inputs.grad)
    plain_results, exact_results = plain(case, same), exact(case, same)
    assert_close_to_reference(output, plain_results.output, exact_results.output)
    assert_close_to_reference(grad, sum(plain_results[1:4]), sum(exact_results[1:4]))


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


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_strides_beyond_32_bits(dim):
    case = Case(queries=3, keys=4, heads=2, dim=4)
    inputs, plain_results, exact_results = expected(case, torch.float16)
    query, key, value = (far_apart(t, dim).requires_grad_() for t in inputs[:3])
    output = attention(query, key, value, inputs.bias)
    # Gradients have the strides of their tensors: one of them at a time, so that little memory is mapped.
    for tensor, one, truth in zip((query, key, value), plain_results[1:4], exact_results[1:4], strict=True):
        (grad,) = torch.autograd.grad(output, tensor, far_apart(inputs.grad, dim), retain_graph=True)
        assert_close_to_reference(grad, one, truth)
    assert_close_to_reference(output, plain_results.output, exact_results.output)


@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    """An output of 4 GiB, from inputs that are one entry of the batch seen many times."""
    torch.use_deterministic_algorithms(False)  # do not fill 4 GiB with NaN
    inputs = make_inputs(Case(queries=16, heads=4, dim=64, batch=1), torch.float16)
    times = 2**31 // inputs.query.numel() + 2
    output = attention(*(t.expand(times, -1, -1, -1) for t in inputs[:3]), inputs.bias)
    assert output.numel() > 2**31
    single = attention(*inputs[:4])
    for index in (0, times // 2, times - 2, times - 1):
        assert torch.equal(output[index], single[0])


# ---- nothing forgotten, nothing else touched -----------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (2, 0, 5, 8), (2, 2, 0, 8)], ids=str)
@pytest.mark.parametrize("bias", [None, "hnm", "m"], ids=str)
def test_empty_inputs(shape, bias):
    batch, heads, tokens, dim = shape
    case = Case(queries=tokens, keys=tokens, heads=heads, dim=dim, batch=batch, bias=bias)
    results = fused(case, make_inputs(case, torch.float32))
    assert results.output.shape == results.query.shape == results.key.shape == results.value.shape == shape
    if bias is not None:
        assert torch.equal(results.bias, torch.zeros(case.shapes()["bias"]))


@pytest.mark.parametrize("bias", [None, "hnm", "n"], ids=str)
def test_no_keys(bias):
    """Zeros, as torch's own attention has it."""
    case = Case(queries=5, keys=0, dim=8, bias=bias)
    results = fused(case, make_inputs(case, torch.float32))
    assert torch.equal(results.output, torch.zeros_like(results.output))
    assert torch.equal(results.query, torch.zeros_like(results.query))
    assert results.key.shape == results.value.shape == (2, 3, 0, 8)
    if bias is not None:
        assert torch.equal(results.bias, torch.zeros(case.shapes()["bias"]))


@pytest.mark.parametrize("bias", [None, "hnm", "m"], ids=str)
def test_no_queries(bias):
    case = Case(queries=0, keys=5, dim=8, bias=bias)
    results = fused(case, make_inputs(case, torch.float32))
    assert results.output.shape == (2, 3, 0, 8)
    assert torch.equal(results.key, torch.zeros_like(results.key))
    assert torch.equal(results.value, torch.zeros_like(results.value))
    if bias is not None:
        assert torch.equal(results.bias, torch.zeros(case.shapes()["bias"]))


def test_empty_packed_inputs():
    qkv = torch.randn(0, 7, 3, 2, 8, requires_grad=True)
    bias = torch.randn(7, 7, requires_grad=True)
    output = attention_qkvpacked(qkv, bias)
    assert output.shape == (0, 7, 2, 8)
    output.sum().backward()
    assert qkv.grad.shape == qkv.shape
    assert torch.equal(bias.grad, torch.zeros_like(bias))


@dtypes
def test_inputs_are_only_read(dtype):
    inputs = make_inputs(LAYOUT_CASE, dtype)
    before = inputs.map(torch.clone)
    fused(LAYOUT_CASE, inputs)
    for tensor, copy in zip(inputs, before, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("which", ["query", "key", "value", "grad"])
def test_poison_stays_in_its_head(which, poison, instruction_set):
    case = Case(queries=19, keys=21, heads=2, dim=9, bias=None)
    inputs = make_inputs(case, torch.float32)
    clean = fused(case, inputs)
    poisoned = inputs.map(torch.clone)
    getattr(poisoned, which)[1, 1, 5, 4] = poison
    results = fused(case, poisoned)
    for name, result, before in zip(Results._fields, results[:4], clean[:4], strict=False):
        for at in ((0, 0), (0, 1), (1, 0)):
            assert torch.equal(result[at], before[at]), name
    assert not results.query[1, 1].isfinite().all()
    if which == "query":  # each query has its own softmax
        others = torch.arange(19) != 5
        assert torch.equal(results.output[1, 1, others], clean.output[1, 1, others])
        assert results.output[1, 1, 5].isnan().all()


@pytest.mark.parametrize("keys", [21, 1500])
@pytest.mark.parametrize("largest", [1e4, 1e30], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_large_scores_do_not_overflow(largest, keys, dtype, instruction_set):
    case = Case(queries=20, keys=keys, heads=2, dim=8, scale=largest)
    inputs, plain_results, exact_results = expected(case, dtype)
    results = fused(case, inputs)
    assert all(t.isfinite().all() for t in results)
    assert_close_to_reference(results.output, plain_results.output, exact_results.output)


@pytest.mark.parametrize("keys", [21, 700])
def test_large_bias_does_not_overflow(keys, instruction_set):
    case = Case(queries=20, keys=keys, heads=2, dim=8)
    inputs = make_inputs(case, torch.float32)
    inputs = inputs._replace(bias=1e4 * inputs.bias)
    assert_results_close(case, inputs, fused(case, inputs), plain(case, inputs), exact(case, inputs))


MASKS = {
    "causal": lambda n, m: torch.ones(n, m).triu(1).bool(),
    "first keys": lambda n, m: (torch.arange(m) < m // 2).expand(n, m),
    "last keys": lambda n, m: (torch.arange(m) >= m // 2).expand(n, m),
    "all keys but one": lambda n, m: (torch.arange(m) != (2 * m) // 3).expand(n, m),
}


@dtypes
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("keys", [40, 1200])
def test_minus_infinity_in_the_bias_forbids_a_pair(mask, keys, dtype, instruction_set):
    case = Case(queries=40, keys=keys, heads=2, dim=8, batch=1)
    inputs = make_inputs(case, dtype)
    inputs = inputs._replace(bias=inputs.bias.masked_fill(MASKS[mask](40, keys), float("-inf")))
    results = fused(case, inputs)
    assert all(t.isfinite().all() for t in results)
    assert_results_close(case, inputs, results, plain(case, inputs), exact(case, inputs))


@pytest.mark.parametrize("keys", [40, 1200])
def test_row_without_any_key_is_nan_as_in_plain_pytorch(keys, instruction_set):
    case = Case(queries=16, keys=keys, heads=2, dim=8, batch=1)
    inputs = make_inputs(case, torch.float32)
    inputs = inputs._replace(bias=inputs.bias.masked_fill((torch.arange(16) == 5)[:, None], float("-inf")))
    for result, one in zip(fused(case, inputs), plain(case, inputs), strict=True):
        torch.testing.assert_close(result, one, equal_nan=True)


# ---- causal masks and dropout: the definition ----------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
def test_causal_attention_is_that_of_a_bias(dtype, packed):
    case = Case(queries=18, dim=8, packed=packed)
    inputs = make_inputs(case, dtype)
    masked = inputs.bias.masked_fill(torch.ones(18, 18).triu(1).bool(), float("-inf"))
    truth = exact(case, inputs._replace(bias=masked))
    one = plain(case, inputs._replace(bias=masked))
    if packed:
        output = attention_qkvpacked(pack(*inputs[:3]), inputs.bias, is_causal=True).transpose(1, 2)
    else:
        output = attention(*inputs[:4], is_causal=True)
    assert_close_to_reference(output, one.output, truth.output)


@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
def test_dropout_is_torchs(packed):
    """Bit by bit the same weights are dropped from the same seed; gradients follow."""
    query, key, value, *_ = make_inputs(Case(queries=18, dim=8))

    def torchs(q, k, v):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=0.4)

    def ours(q, k, v):
        if packed:
            return attention_qkvpacked(pack(q, k, v), dropout_p=0.4).transpose(1, 2)
        return attention(q, k, v, dropout_p=0.4)

    def results(function):
        leaves = [t.clone().requires_grad_() for t in (query, key, value)]
        torch.manual_seed(3)
        output = function(*leaves)
        return output.detach(), *torch.autograd.grad(output.sin().sum(), leaves)

    torch.testing.assert_close(results(ours), results(torchs))


@pytest.mark.parametrize("options", [{"is_causal": True}, {"dropout_p": 0.5}], ids=str)
def test_forced_kernel_without_these_options_is_refused(options):
    x = torch.randn(1, 1, 4, 8)
    with (
        vitfast.backend("cpu"),
        pytest.raises(vitfast.BackendError, match="is_causal or dropout_p has no cpu kernel; it has: reference"),
    ):
        attention(x, x, x, **options)


# ---- determinism and resources -------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("bias", [None, "", "m", "hnm", "bhnm"], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
def test_same_bits_in_every_run_with_any_number_of_threads(dtype, bias, packed, threads):
    case = Case(queries=70, heads=2, dim=16, batch=3, bias=bias, packed=packed)
    inputs = make_inputs(case, dtype)
    threads(1)
    first = fused(case, inputs)
    for count in (1, 2, 3):
        threads(count)
        for result, before in zip(fused(case, inputs), first, strict=True):
            assert before is None or torch.equal(result, before)


def scratch_of(run):
    _C.reset_scratch_bytes()
    run()
    return _C.scratch_bytes()


@pytest.mark.parametrize("with_backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("bias", [None, "m"], ids=str)
def test_scratch_is_linear_in_the_tokens(with_backward, bias, threads):
    threads(1)
    peaks = []
    for tokens in (500, 2000):
        case = Case(queries=tokens, heads=1, dim=16, batch=1, bias=bias)
        inputs = make_inputs(case, torch.float32)
        run = functools.partial(fused, case, inputs) if with_backward else functools.partial(attention, *inputs[:4])
        peaks.append(scratch_of(run))
    assert 0 < peaks[1] <= 4 * peaks[0]


def test_scratch_does_not_grow_with_batch_and_heads(threads):
    threads(1)
    one, many = (Case(queries=197, heads=heads, dim=32, batch=batch, bias=None) for heads, batch in ((1, 1), (3, 2)))
    assert scratch_of(lambda: fused(one, make_inputs(one, torch.float32))) == scratch_of(
        lambda: fused(many, make_inputs(many, torch.float32))
    )
