"""The kernels for tangents of both attentions, K at once, against the formulas of `vitfast.reference`."""

from __future__ import annotations

import functools

import attention_cases
import helpers
import pytest
import torch
from attention_cases import Case as Sequence
from helpers import Case as Window
from helpers import assert_close_to_reference

from vitfast import _C
from vitfast.ops import attention, window_attention
from vitfast.ops._tangents import Batch, count_of

SEQUENCES = [
    Sequence(queries=65, dim=64, heads=2, bias=None),
    Sequence(queries=49, dim=32, bias="hnm"),
    Sequence(queries=17, keys=70, dim=20, bias="bm"),
    Sequence(queries=130, keys=150, dim=16, heads=2, bias="bhnm", scale=0.7),
    Sequence(queries=16, dim=8, bias="m", packed=True),
    Sequence(queries=33, dim=16, bias=None, packed=True),
    Sequence(queries=1, keys=1, dim=1, bias="hnm"),
]
WINDOWS = [
    Window(),
    Window(shift=(3, 3), packed=True),
    Window(size=(9, 11), window=(4, 5), shift=(1, 2), heads=2, dim=12, bias="shared"),
    Window(size=(8, 8), window=(4, 4), ratio=(2, 2), heads=2, dim=16, bias="shared"),
    Window(size=(20, 10), window=(10, 10), heads=1, dim=16, batch=1),
    Window(size=(5, 5), window=(8, 8), shift=(4, 4), heads=1, dim=8, bias=None),
]
CASES = [*SEQUENCES, *WINDOWS]
NAMES = ("query", "key", "value", "bias", "grad")

cases = pytest.mark.parametrize("case", CASES, ids=str)
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=lambda d: str(d).removeprefix("torch.")
)


def inputs_of(case, dtype, seed=0):
    """Tensors of a case; the bias is in the dtype of the scores, as the operators hand it to the kernels."""
    made = (attention_cases if isinstance(case, Sequence) else helpers).make_inputs(case, dtype, seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return made._replace(bias=None if made.bias is None else made.bias.to(wide))


def tangents_of(case, dtype, count, absent=()):
    many = zip(*(inputs_of(case, dtype, 1 + k) for k in range(count)), strict=True)
    named = dict(zip(NAMES, many, strict=True))
    return {name: None if name in absent or ts[0] is None else torch.stack(ts) for name, ts in named.items()}


def packed_with(case, tensors, batches=0):
    """(query, key, value) of a case as the operators take them; ``batches`` dimensions are in front."""
    if not case.packed:
        return tensors
    if tensors[0] is None:
        return (None,)
    if isinstance(case, Sequence):
        return (torch.stack([t.transpose(-3, -2) for t in tensors], dim=2 + batches),)
    return (torch.stack(tensors, dim=3 + batches),)


def calls_of(case, primals, tangents, swap):
    """(rule, spec, primals, tangents) of the tangent of the output, and of those of the gradients."""
    module = attention if isinstance(case, Sequence) else window_attention
    scale = case.reference_options["scale"]
    spec = (
        module.Spec(scale, "cpu") if module is attention else module.Spec(case.window, case.shift, scale, backend="cpu")
    )
    qkv = packed_with(case, primals[:3])
    qkv_t = packed_with(case, [tangents[name] for name in NAMES[:3]], 1)
    grad, grad_t = (swap(t) for t in (primals.grad, tangents["grad"]))
    yield module.OUTPUT, spec, (primals.bias, *qkv), (tangents["bias"], *qkv_t)
    yield module.GRADIENTS, spec, (primals.bias, grad, *qkv), (tangents["bias"], grad_t, *qkv_t)


def swap_of(case):
    """Brings a gradient into the layout of the output."""
    if isinstance(case, Sequence) and case.packed:
        return lambda t: t if t is None else t.transpose(-3, -2)
    return lambda t: t


def results_of(case, primals, tangents, run):
    calls = calls_of(case, primals, tangents, swap_of(case))
    return [result for call in calls if any(t is not None for t in call[3]) for result in run(*call)]


def by_kernel(rule, spec, primals, tangents):
    return rule.kernel(spec, primals, tangents)


def by_definition(rule, spec, primals, tangents):
    count = count_of(tangents)
    each = [rule.definition(spec, primals, [None if t is None else t[k] for t in tangents]) for k in range(count)]
    return [torch.stack(results) for results in zip(*each, strict=True)]


def assert_matches_definition(case, dtype, tangents, primals=None):
    primals = inputs_of(case, dtype) if primals is None else primals
    fused = results_of(case, primals, tangents, by_kernel)
    plain = results_of(case, primals, tangents, by_definition)
    if dtype == torch.float64:
        torch.testing.assert_close(fused, plain, rtol=1e-11, atol=1e-11)
        return
    wide = {name: None if t is None else t.double() for name, t in tangents.items()}
    exact = results_of(case, primals.map(torch.Tensor.double), wide, by_definition)
    for i, results in enumerate(zip(fused, plain, exact, strict=True)):
        assert_close_to_reference(*results, name=f"result {i}")


@cases
@dtypes
def test_all_tangents(case, dtype, instruction_set):
    assert_matches_definition(case, dtype, tangents_of(case, dtype, 3))


@pytest.mark.parametrize("case", [SEQUENCES[2], SEQUENCES[3], WINDOWS[2]], ids=str)
@pytest.mark.parametrize(
    "absent",
    [
        *(("query",), ("key",), ("value",), ("bias",), ("grad",)),
        *(("query", "key"), ("query", "key", "bias"), ("value", "grad"), ("query", "key", "value", "bias")),
        *(("query", "key", "value", "grad"), ("query", "value", "bias", "grad"), ("key", "value", "bias", "grad")),
    ],
    ids="-".join,
)
def test_a_tangent_of_none_is_zero(case, absent):
    assert_matches_definition(case, torch.float64, tangents_of(case, torch.float64, 2, absent))


@pytest.mark.parametrize("tokens", range(1, 36))
def test_every_remainder_of_the_tokens(tokens, instruction_set):
    case = Sequence(queries=tokens, dim=16, heads=1, batch=1, bias="nm")
    assert_matches_definition(case, torch.float32, tangents_of(case, torch.float32, 2))


@pytest.mark.parametrize("dim", [1, 3, 15, 16, 17, 31, 33, 48])
def test_every_remainder_of_the_head_dimension(dim, instruction_set):
    for case in (Sequence(queries=20, dim=dim, bias="nm"), Window(size=(4, 6), window=(4, 3), dim=dim)):
        assert_matches_definition(case, torch.float32, tangents_of(case, torch.float32, 2))


@pytest.mark.parametrize("order", [(0, 3, 1, 2, 4), (0, 1, 2, 4, 3), (4, 3, 2, 1, 0)], ids=str)
def test_any_strides(order, instruction_set):
    """Of primals, and of tangents with K anywhere."""
    case = Sequence(queries=20, keys=30, dim=16, bias="hnm")
    primals, tangents = inputs_of(case, torch.float32), tangents_of(case, torch.float32, 2)
    strided = {name: helpers.restride(t, order) for name, t in tangents.items()}
    assert_matches_definition(case, torch.float32, strided, primals.map(lambda t: helpers.restride(t, (3, 1, 0, 2))))


def test_tangents_that_are_expanded(instruction_set):
    case = Sequence(queries=20, dim=16, bias="hnm")
    tangents = {name: t[:1].expand(3, *t.shape[1:]) for name, t in tangents_of(case, torch.float32, 1).items()}
    assert_matches_definition(case, torch.float32, tangents)


@pytest.mark.parametrize("case", [Sequence(queries=33, dim=16, bias="hnm"), Window(shift=(2, 3))], ids=str)
def test_minus_infinity_in_the_bias_forbids_a_pair(case, instruction_set):
    primals = inputs_of(case, torch.float32)
    primals.bias[..., 1::3] = -torch.inf
    assert_matches_definition(case, torch.float32, tangents_of(case, torch.float32, 2), primals)


def test_large_scores_do_not_overflow(instruction_set):
    case = Sequence(queries=33, dim=16, bias="hnm")
    primals = inputs_of(case, torch.float32)
    primals = primals._replace(query=primals.query * 300)
    assert_matches_definition(case, torch.float32, tangents_of(case, torch.float32, 2), primals)


@pytest.mark.parametrize("case", [Sequence(queries=0), Sequence(batch=0), Window(batch=0), Window(heads=0)], ids=str)
def test_empty_inputs(case):
    primals, tangents = inputs_of(case, torch.float32), tangents_of(case, torch.float32, 2)
    for result in results_of(case, primals, tangents, by_kernel):
        assert result.shape[0] == 2
        assert not result.any()


@pytest.mark.parametrize("case", [SEQUENCES[3], SEQUENCES[4], WINDOWS[0], WINDOWS[2]], ids=str)
def test_same_bits_with_any_number_of_threads(case, threads):
    primals, tangents = inputs_of(case, torch.float32), tangents_of(case, torch.float32, 2)
    threads(1)
    first = results_of(case, primals, tangents, by_kernel)
    for count in (2, 3):
        threads(count)
        for result, before in zip(results_of(case, primals, tangents, by_kernel), first, strict=True):
            assert torch.equal(result, before)


@pytest.mark.parametrize("case", [SEQUENCES[3], WINDOWS[2]], ids=str)
def test_a_tangent_does_not_depend_on_the_others(case):
    primals, tangents = inputs_of(case, torch.float32), tangents_of(case, torch.float32, 3)
    together = results_of(case, primals, tangents, by_kernel)
    for k in range(3):
        alone = results_of(case, primals, {name: t[k : k + 1] for name, t in tangents.items()}, by_kernel)
        for result, single in zip(together, alone, strict=True):
            assert torch.equal(result[k], single[0])


def test_scratch_is_linear_in_the_tokens(threads):
    threads(1)
    peaks = []
    for tokens in (500, 2000):
        case = Sequence(queries=tokens, heads=1, dim=16, batch=1, bias="m")
        run = functools.partial(
            results_of, case, inputs_of(case, torch.float32), tangents_of(case, torch.float32, 4), by_kernel
        )
        _C.reset_scratch_bytes()
        run()
        peaks.append(_C.scratch_bytes())
    assert 0 < peaks[1] <= 4 * peaks[0]


@pytest.mark.parametrize("wrong", ["shape", "dtype", "count"])
@pytest.mark.parametrize("case", [Sequence(queries=5, dim=4, bias=None), Window(bias=None)], ids=str)
def test_operators_refuse_what_does_not_fit(case, wrong):
    primals, tangents = inputs_of(case, torch.float32), tangents_of(case, torch.float32, 2, ("bias",))
    key = tangents["key"]
    tangents["key"] = {"shape": key[..., 1:], "dtype": key.double(), "count": key[:1]}[wrong]
    with pytest.raises(RuntimeError, match=r"tangents must be \(K, \*shape of the primal\)"):
        results_of(case, primals, tangents, by_kernel)


# ---- where they are called ------------------------------------------------------------------------------------------


@pytest.fixture
def batches(monkeypatch):
    """How many tangents each call of a kernel had."""
    seen = []
    forward = Batch.forward

    def counted(rule, spec, count, *tensors):
        seen.append(next(len(t) for t in tensors[count:] if t is not None))
        return forward(rule, spec, count, *tensors)

    counted.__signature__ = forward.__signature__
    monkeypatch.setattr(Batch, "forward", staticmethod(counted))
    return seen


def scalar(query):
    from vitfast.functional import attention

    return attention(query, query.sin(), query).sin().sum()


def test_all_vectors_of_a_hessian_product_take_one_call(batches):
    query = torch.randn(2, 3, 17, 16)
    gradient = torch.func.grad(scalar)
    torch.vmap(lambda v: torch.func.jvp(gradient, (query,), (v,))[1])(torch.randn(5, *query.shape))
    assert batches == [5, 5]


def test_nested_maps_take_one_call(batches):
    query, vectors = torch.randn(2, 3, 17, 16), torch.randn(2, 3, 2, 3, 17, 16)
    gradient = torch.func.grad(scalar)
    torch.vmap(torch.vmap(lambda v: torch.func.jvp(gradient, (query,), (v,))[1]))(vectors)
    assert batches == [6, 6]


def test_double_backward_is_fused(batches):
    query = torch.randn(2, 3, 17, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(scalar(query), query, create_graph=True)
    torch.autograd.grad(gradient.sin().sum(), query)
    assert batches == [1, 1]


def test_mapped_primals_are_left_to_the_definition():
    queries, vectors = torch.randn(2, 2, 3, 17, 16), torch.randn(2, 2, 3, 17, 16)

    def product(query, vector):
        return torch.func.jvp(torch.func.grad(scalar), (query,), (vector,))[1]

    each = torch.stack([product(*pair) for pair in zip(queries, vectors, strict=True)])
    torch.testing.assert_close(torch.vmap(product)(queries, vectors), each)
