"""Window attention for the shapes, windows, shifts, memory layouts and dtypes that hypothesis draws."""

from __future__ import annotations

import itertools
import math

import torch
from helpers import (
    Case,
    Inputs,
    assert_results_close,
    exact,
    fused,
    make_inputs,
    plain,
    restride,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from vitfast.functional import window_attention

DTYPES = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])
ORDERS = st.sampled_from(list(itertools.permutations(range(5))))

properties = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,  # the same examples in every run
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def _axis(draw):
    """(size of the query map, window, shift, ratio) along one axis."""
    ratio = draw(st.sampled_from([1, 1, 1, 2, 3]))
    window = ratio * draw(st.integers(1, 9 // ratio))
    shift = ratio * draw(st.integers(0, window // ratio - 1))
    return ratio * draw(st.integers(1, 18 // ratio)), window, shift, ratio


@st.composite
def _cases(draw):
    sizes, windows, shifts, ratios = zip(draw(_axis()), draw(_axis()), strict=True)
    heads, dim = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    return Case(
        size=sizes,
        window=windows,
        shift=shifts,
        heads=heads,
        dim=dim,
        ratio=ratios,
        bias=draw(st.sampled_from([None, "shared", "per head"])),
        # small maps in many images, so that errors are means over many numbers
        batch=draw(st.integers(1, 2)) * math.ceil(512 / (sizes[0] * sizes[1] * dim)),
        scale=draw(st.none() | st.floats(-1, 1)),
        packed=ratios == (1, 1) and draw(st.booleans()),
    )


@st.composite
def _relaid(draw, x):
    """The values of x in another memory layout: dimensions permuted, then perhaps a slice of a larger tensor."""
    x = restride(x, draw(ORDERS))
    dim = draw(st.none() | st.integers(0, 4))
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
    assert_results_close(fused(case, inputs), plain(case, inputs), exact(case, inputs))


@properties
@given(case=_cases(), dtype=DTYPES, data=st.data())
def test_any_layout(instruction_set, case, dtype, data):
    """The values of the results do not depend on where the inputs lie in memory beyond the order of a sum."""
    case = case.but(packed=False)
    inputs = make_inputs(case, dtype)
    relaid = Inputs(*(data.draw(_relaid(t)) for t in inputs[:3]), inputs.bias, data.draw(_relaid(inputs.grad)))
    assert all(torch.equal(a, b) for a, b in zip(relaid, inputs, strict=True) if a is not None)
    assert_results_close(fused(case, relaid), plain(case, inputs), exact(case, inputs))


@properties
@given(case=_cases(), order=ORDERS)
def test_output_has_the_layout_of_the_query_whatever_it_is(case, order):
    inputs = make_inputs(case, torch.float32)
    query = restride(inputs.query, order)
    output = window_attention(query, inputs.key, inputs.value, inputs.bias, **case.options)
    assert output.stride() == torch.empty_like(query).stride()


@properties
@given(case=_cases(), seed=st.integers(0, 2**32 - 1))
def test_a_constant_value_comes_back(case, seed):
    """The weights of a token sum to 1, whatever the scores."""
    inputs = make_inputs(case, torch.float64, seed)
    output = window_attention(*inputs[:2], torch.full_like(inputs.value, 3.0), inputs.bias, **case.options)
    assert_close(output, torch.full_like(output, 3.0))


@properties
@given(case=_cases(), constant=st.floats(-20, 20), seed=st.integers(0, 2**32 - 1))
def test_a_constant_in_the_bias_changes_nothing(case, constant, seed):
    inputs = make_inputs(case.but(bias="shared"), torch.float64, seed)
    output = window_attention(*inputs[:4], **case.options)
    moved = window_attention(*inputs[:3], inputs.bias + constant, **case.options)
    assert_close(moved, output)


@properties
@given(case=_cases(), dtype=DTYPES)
def test_an_image_alone_gives_the_same_bits(instruction_set, case, dtype):
    inputs = make_inputs(case, dtype)
    together = window_attention(*inputs[:4], **case.options)
    alone = window_attention(*(t[-1:] for t in inputs[:3]), inputs.bias, **case.options)
    assert torch.equal(alone, together[-1:])
