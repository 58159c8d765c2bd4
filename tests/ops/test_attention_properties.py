"""Attention for the lengths, biases, memory layouts and dtypes that hypothesis draws."""

from __future__ import annotations

import itertools
import math

import torch
from attention_cases import Case, assert_results_close, exact, fused, fused_function, make_inputs, plain
from helpers import Inputs, restride
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from vitfast.functional import attention

DTYPES = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])
ORDERS = st.sampled_from(list(itertools.permutations(range(4))))
LENGTHS = st.one_of(st.integers(1, 20), st.integers(21, 150))

properties = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,  # the same examples in every run
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def _cases(draw):
    queries, keys, heads, dim = draw(LENGTHS), draw(st.none() | LENGTHS), draw(st.integers(1, 3)), draw(LENGTHS)
    return Case(
        queries=queries,
        keys=keys,
        heads=heads,
        dim=dim,
        # short sequences in a large batch, so that errors are means over many numbers
        batch=draw(st.integers(1, 2)) * math.ceil(256 / (min(queries, keys or queries) * dim)),
        bias=draw(st.none() | st.sets(st.sampled_from("bhn")).map(lambda names: "".join(sorted({*names, "m"})))),
        scale=draw(st.none() | st.floats(-1, 1)),
        packed=keys is None and draw(st.booleans()),
    )


@st.composite
def _relaid(draw, x):
    """The values of x in another memory layout: dimensions permuted, then perhaps a slice of a larger tensor."""
    x = restride(x, draw(ORDERS))
    dim = draw(st.none() | st.integers(0, 3))
    if dim is None:
        return x
    step, before = draw(st.integers(1, 3)), draw(st.integers(0, 2))
    whole = torch.full([*x.shape[:dim], before + step * x.shape[dim], *x.shape[dim + 1 :]], torch.nan, dtype=x.dtype)
    whole = restride(whole, draw(ORDERS))
    view = whole.as_strided(
        x.shape,
        [s * step if i == dim else s for i, s in enumerate(whole.stride())],
        before * whole.stride(dim),
    )
    return view.copy_(x)


@properties
@given(case=_cases(), dtype=DTYPES, seed=st.integers(0, 2**32 - 1))
def test_any_case(instruction_set, case, dtype, seed):
    inputs = make_inputs(case, dtype, seed)
    assert_results_close(case, inputs, fused(case, inputs), plain(case, inputs), exact(case, inputs))


@properties
@given(case=_cases(), dtype=DTYPES, data=st.data())
def test_any_layout(instruction_set, case, dtype, data):
    """The values of the results do not depend on where the inputs lie in memory beyond the order of a sum."""
    case = case.but(packed=False)
    inputs = make_inputs(case, dtype)
    relaid = Inputs(*(None if t is None else data.draw(_relaid(t)) for t in inputs))
    assert all(torch.equal(a, b) for a, b in zip(relaid, inputs, strict=True) if a is not None)
    assert_results_close(case, inputs, fused(case, relaid), plain(case, inputs), exact(case, inputs))


@properties
@given(case=_cases(), seed=st.integers(0, 2**32 - 1))
def test_a_constant_value_comes_back(case, seed):
    """The weights of a query sum to 1, whatever the scores."""
    query, key, value, bias, _ = make_inputs(case, torch.float64, seed)
    output = attention(query, key, torch.full_like(value, 3.0), bias, scale=case.scale)
    assert_close(output, torch.full_like(output, 3.0))


@properties
@given(case=_cases(), constant=st.floats(-20, 20), seed=st.integers(0, 2**32 - 1))
def test_a_constant_in_the_bias_changes_nothing(case, constant, seed):
    inputs = make_inputs(case.but(bias="hnm"), torch.float64, seed)
    output = attention(*inputs[:4], scale=case.scale)
    assert_close(attention(*inputs[:3], inputs.bias + constant, scale=case.scale), output)


@properties
@given(case=_cases(), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_the_order_of_the_keys_does_not_matter(case, seed, data):
    query, key, value, bias, _ = make_inputs(case.but(bias="hnm"), torch.float64, seed)
    order = torch.tensor(data.draw(st.permutations(range(key.shape[2]))))
    permuted = attention(query, key[:, :, order], value[:, :, order], bias[..., order], scale=case.scale)
    assert_close(permuted, attention(query, key, value, bias, scale=case.scale))


@properties
@given(case=_cases(), dtype=DTYPES)
def test_an_entry_of_the_batch_alone_gives_the_same_bits(instruction_set, case, dtype):
    inputs = make_inputs(case, dtype)
    together = attention(*inputs[:4], scale=case.scale)
    bias = inputs.bias if inputs.bias is None or "b" not in case.bias else inputs.bias[-1:]
    alone = attention(*(t[-1:] for t in inputs[:3]), bias, scale=case.scale)
    assert torch.equal(alone, together[-1:])


@properties
@given(case=_cases())
def test_output_has_its_shape_and_no_other(case):
    inputs = make_inputs(case.but(packed=False), torch.float32)
    output = fused_function(case.but(packed=False))(*(t for t in inputs[:4] if t is not None))
    assert output.shape == inputs.query.shape
    assert output.transpose(1, 2).is_contiguous()
