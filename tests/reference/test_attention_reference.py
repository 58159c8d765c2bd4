"""The definition of attention against independent ones, its derivatives against autograd, and their memory."""

from __future__ import annotations

import functools
import importlib

import pytest
import torch
from attention_cases import Case, exact, make_inputs, plain
from derivatives import LargestTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

from vitfast import reference

DEFINITION_CASES = [
    Case(queries=17, dim=8),
    Case(queries=5, keys=11, dim=5, bias="bhnm"),
    Case(queries=11, keys=3, dim=4, bias="m", scale=-0.3),
    Case(queries=6, dim=4, bias="n"),
    Case(queries=6, keys=7, dim=4, bias="b"),
    Case(queries=1, keys=1, dim=1, bias=None),
    Case(queries=4, dim=4, batch=0),
]


@pytest.mark.parametrize("case", DEFINITION_CASES, ids=str)
def test_definition_is_a_loop_over_heads(case):
    inputs = make_inputs(case)
    ours, literal = plain(case, inputs), exact(case, inputs)
    for name, result, expected in zip(ours._fields, ours, literal, strict=True):
        if expected is not None:
            assert_close(result, expected, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (4, 9), (9, 4)])
def test_definition_is_torchs(is_causal, dropout_p, queries, keys):
    """The same mask, aligned at the top left, and from the same seed the same dropout."""
    query, key, value, *_ = make_inputs(Case(queries=queries, keys=keys, dim=4))
    with sdpa_kernel(SDPBackend.MATH):
        torch.manual_seed(1)
        expected = scaled_dot_product_attention(query, key, value, dropout_p=dropout_p, is_causal=is_causal)
    torch.manual_seed(1)
    ours = reference.attention(query, key, value, scale=0.5, is_causal=is_causal, dropout_p=dropout_p)
    assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_causal_mask_adds_to_a_bias():
    query, key, value, bias, _ = make_inputs(Case(queries=6, keys=8, dim=4))
    mask = torch.full((6, 8), -torch.inf, dtype=torch.float64).triu(1)
    expected = scaled_dot_product_attention(query, key, value, attn_mask=bias + mask)
    assert_close(reference.attention(query, key, value, bias, scale=0.5, is_causal=True), expected)


def test_no_keys_give_zeros_as_torchs():
    query, nothing = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 0, 4)
    ours = reference.attention(query, nothing, nothing, torch.randn(3, 5, 1)[..., :0], scale=1.0)
    assert torch.equal(ours, scaled_dot_product_attention(query, nothing, nothing))
    assert torch.equal(ours, torch.zeros_like(query))


# ---- derivatives ---------------------------------------------------------------------------------------------------

DERIVATIVE_CASES = [
    Case(queries=5, heads=2, dim=3),
    Case(queries=4, keys=7, heads=2, dim=3, batch=1, bias="bm"),
    Case(queries=7, keys=4, heads=2, dim=3, bias="n"),
    Case(queries=3, heads=1, dim=2, bias=None),
]


@pytest.fixture(params=[2**22, 20, 1], ids=["one block", "some blocks", "a query a block"])
def _block_scores(request, monkeypatch):
    """How many scores a block has."""
    monkeypatch.setattr(importlib.import_module("vitfast.reference.attention"), "_BLOCK_SCORES", request.param)


derivatives = pytest.mark.usefixtures("_block_scores")
cases = pytest.mark.parametrize("case", DERIVATIVE_CASES, ids=str)


def primals_of(case):
    *tensors, grad = make_inputs(case)
    return tuple(t for t in tensors if t is not None), grad


def definition(case):
    return functools.partial(reference.attention, **case.reference_options)


def backward_by_autograd(case):
    """(grad, query, key, value[, bias]) -> their gradients, by autograd through the definition."""

    def backward(grad, *primals):
        _, vjp = torch.func.vjp(definition(case), *primals)
        return vjp(grad)

    return backward


def with_bias(tensors):
    return (*tensors, None) if len(tensors) == 3 else tuple(tensors)


def subsets(count):
    """Which of ``count`` tangents are given: all, none, each alone and each left out."""
    alone = [tuple(i == j for j in range(count)) for i in range(count)]
    return [(True,) * count, (False,) * count, *alone, *(tuple(not given for given in one) for one in alone)]


@derivatives
@cases
def test_backward_is_autograds(case):
    primals, grad = primals_of(case)
    ours = reference.attention_backward(grad, *primals, **case.reference_options)
    assert (ours[3] is None) == (case.bias is None)
    for result, expected in zip(ours, backward_by_autograd(case)(grad, *primals), strict=False):
        assert_close(result, expected, rtol=1e-11, atol=1e-11)


@derivatives
@cases
def test_tangent_is_forward_mode_autograds(case):
    primals, _ = primals_of(case)
    tangents = tuple(torch.randn_like(t) for t in primals)
    for given in subsets(len(primals)):
        zeroed = tuple(t if g else torch.zeros_like(t) for t, g in zip(tangents, given, strict=True))
        _, expected = torch.func.jvp(definition(case), primals, zeroed)
        some = with_bias([t if g else None for t, g in zip(tangents, given, strict=True)])
        ours = reference.attention_tangent(*with_bias(primals), some, **case.reference_options)
        assert_close(ours, expected, rtol=1e-11, atol=1e-11)


@derivatives
@cases
def test_backward_tangent_is_forward_over_reverse_autograd(case):
    primals, grad = primals_of(case)
    tangents = tuple(torch.randn_like(t) for t in (grad, *primals))
    for given in subsets(len(tangents)):
        zeroed = tuple(t if g else torch.zeros_like(t) for t, g in zip(tangents, given, strict=True))
        _, expected = torch.func.jvp(backward_by_autograd(case), (grad, *primals), zeroed)
        grad_t, *some = [t if g else None for t, g in zip(tangents, given, strict=True)]
        ours = reference.attention_backward_tangent(
            grad, *with_bias(primals), grad_t, with_bias(some), **case.reference_options
        )
        assert (ours[3] is None) == (case.bias is None)
        for result, one in zip(ours, expected, strict=False):
            assert_close(result, one, rtol=1e-10, atol=1e-10)


@derivatives
@cases
def test_backward_tangent_without_grad_tangent_is_double_backward(case):
    primals, grad = primals_of(case)
    cotangents = tuple(torch.randn_like(t) for t in primals)
    _, vjp = torch.func.vjp(lambda *p: backward_by_autograd(case)(grad, *p), *primals)
    ours = reference.attention_backward_tangent(
        grad, *with_bias(primals), None, with_bias(cotangents), **case.reference_options
    )
    for result, expected in zip(ours, vjp(cotangents), strict=False):
        assert_close(result, expected, rtol=1e-10, atol=1e-10)


@derivatives
@pytest.mark.parametrize("which", range(5))
def test_derivatives_batch_only_the_tangent(which):
    """Under vmap over one tangent, with every other tangent there but not batched."""
    case = DERIVATIVE_CASES[0]
    primals, grad = primals_of(case)
    tangents = [torch.randn_like(t) for t in (grad, *primals)]
    many = torch.stack([tangents[which], -2 * tangents[which], tangents[which].cos()])

    def along(t):
        grad_t, *some = [*tangents[:which], t, *tangents[which + 1 :]]
        backward = reference.attention_backward_tangent(grad, *primals, grad_t, tuple(some), **case.reference_options)
        return reference.attention_tangent(*primals, tuple(some), **case.reference_options), *backward

    batched = torch.vmap(along)(many)
    single = [along(t) for t in many]
    assert_close(batched, tuple(torch.stack(results) for results in zip(*single, strict=True)))


# ---- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["tangent", "backward", "backward_tangent"])
def test_derivatives_never_hold_all_scores(run, monkeypatch):
    monkeypatch.setattr(importlib.import_module("vitfast.reference.attention"), "_BLOCK_SCORES", 1000)
    case = Case(queries=300, keys=200, heads=2, dim=2, batch=1, bias="m")
    primals, grad = primals_of(case)
    tangents = tuple(torch.randn_like(t) for t in primals)
    runs = {
        "tangent": lambda: reference.attention_tangent(*primals, tangents, **case.reference_options),
        "backward": lambda: reference.attention_backward(grad, *primals, **case.reference_options),
        "backward_tangent": lambda: reference.attention_backward_tangent(
            grad, *primals, grad, tangents, **case.reference_options
        ),
    }
    with LargestTensor() as largest:
        runs[run]()
    assert 0 < largest.elements <= max(1000, grad.numel())


# ---- dtypes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_dtype_is_kept(dtype):
    case = Case(queries=5, dim=4)
    inputs = make_inputs(case, dtype)
    assert {t.dtype for t in plain(case, inputs)} == {dtype}
    *primals, grad = inputs
    tangents = tuple(primals)
    assert reference.attention_tangent(*primals, tangents, scale=0.5).dtype == dtype
    assert {t.dtype for t in reference.attention_backward(grad, *primals, scale=0.5)} == {dtype}
    results = reference.attention_backward_tangent(grad, *primals, grad, tangents, scale=0.5)
    assert {t.dtype for t in results} == {dtype}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_lower_precision_is_rounded_once(dtype):
    case = Case(queries=7, keys=9, dim=4)
    inputs = make_inputs(case, dtype)
    widened = plain(case, inputs.map(torch.Tensor.float))
    for result, one in zip(plain(case, inputs), widened, strict=True):
        assert torch.equal(result, one.to(dtype))
