"""Arguments of `attention` and `attention_qkvpacked`: every mistake raises an error that names what was expected, what
came, and the way out; what is allowed works. Direct calls of the operators with wrong arguments raise as well.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import vitfast
from vitfast.functional import attention, attention_qkvpacked

B, HEADS, N, M, D = 2, 3, 5, 6, 4
QUERY, KEY = (B, HEADS, N, D), (B, HEADS, M, D)


def tensors(**changes):
    """Valid arguments of `attention` but for ``changes``."""
    return {
        "query": torch.randn(QUERY),
        "key": torch.randn(KEY),
        "value": torch.randn(KEY),
        "bias": torch.randn(HEADS, N, M),
    } | changes


def packed(**changes):
    """Valid arguments of `attention_qkvpacked` but for ``changes``."""
    return {"qkv": torch.randn(B, N, 3, HEADS, D), "bias": torch.randn(HEADS, N, N)} | changes


def raises(error, *parts):
    """`pytest.raises` of a message that holds all ``parts``, in this order."""
    return pytest.raises(error, match="(?s)" + ".*".join(map(re.escape, parts)))


@pytest.fixture(params=["cpu", "reference"], autouse=True)
def _backend(request):
    """Errors do not depend on the implementation."""
    with vitfast.backend(request.param):
        yield


def test_arguments_that_the_others_change_are_valid():
    assert attention(**tensors()).shape == QUERY
    assert attention_qkvpacked(**packed()).shape == (B, N, HEADS, D)


# ---- tensors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "expected"), [("query", "N"), ("key", "M"), ("value", "M")])
@pytest.mark.parametrize("shape", [(), (4,), (3, 5, 4), (1, 2, 3, 5, 4)], ids=str)
def test_wrong_rank(name, expected, shape):
    with raises(ValueError, name, f"(B, heads, {expected}, D)", str(shape)):
        attention(**tensors(**{name: torch.randn(shape)}))


@pytest.mark.parametrize("shape", [(B, N, 3 * HEADS * D), (B, N, 4, 3, D), QUERY, (B, 3, N, HEADS, D)], ids=str)
def test_wrong_shape_of_packed_inputs(shape):
    with raises(ValueError, "qkv", "(B, N, 3, heads, D)", str(shape), ".unflatten(-1, (3, heads, D))"):
        attention_qkvpacked(**packed(qkv=torch.randn(shape), bias=None))


@pytest.mark.parametrize("shape", [(B, HEADS, M, D + 1), (B, HEADS, M + 1, D)], ids=str)
def test_key_and_value_of_different_shapes(shape):
    with raises(ValueError, "key and value", str(KEY), str(shape)):
        attention(**tensors(value=torch.randn(shape)))


@pytest.mark.parametrize("shape", [(B + 1, HEADS, M, D), (1, HEADS, M, D), (B, 1, M, D), (B, HEADS, M, 2 * D)], ids=str)
def test_query_and_key_that_differ_in_batch_heads_or_dim(shape):
    other = torch.randn(shape)
    with raises(ValueError, "query and key must agree in B, heads and D", str(QUERY), str(shape), ".expand()"):
        attention(**tensors(key=other, value=other))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("name", ["query", "key", "value", "bias"])
def test_tensors_that_are_not_floating_point(name, dtype):
    wrong = tensors()[name].to(dtype)
    way_out = "torch.where(mask, 0.0, -torch.inf)" if name == "bias" and dtype == torch.bool else ".float()"
    with raises(TypeError, name, "float32, float64, float16 or bfloat16", str(dtype), way_out):
        attention(**tensors(**{name: wrong}))


def test_the_way_out_of_a_mask_of_booleans():
    arguments = tensors()
    mask = torch.rand(N, M) > 0.3
    mask[:, 0] = True
    with pytest.raises(TypeError, match="bias"):
        attention(**arguments | {"bias": mask})
    output = attention(**arguments | {"bias": torch.where(mask, 0.0, -torch.inf)})
    expected = scaled_dot_product_attention(arguments["query"], arguments["key"], arguments["value"], attn_mask=mask)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float8_e4m3fn], ids=str)
def test_packed_tensors_of_unsupported_dtypes(dtype):
    with raises(TypeError, "qkv", "float32, float64, float16 or bfloat16", str(dtype)):
        attention_qkvpacked(torch.zeros(B, N, 3, HEADS, D).to(dtype))


@pytest.mark.parametrize("name", ["key", "value", "bias"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_mixed_dtypes(name, dtype):
    wrong = tensors()[name].to(dtype)
    with raises(TypeError, name, "the dtype of query, torch.float32", str(dtype), ".to(torch.float32)"):
        attention(**tensors(**{name: wrong}))


@pytest.mark.parametrize("bias_dtype", [torch.float64, torch.bfloat16], ids=str)
def test_bias_beside_float16_is_float16_or_float32(bias_dtype):
    x, bias = torch.randn(QUERY, dtype=torch.float16), torch.randn(N, N)
    for allowed in (torch.float16, torch.float32):
        assert attention(x, x, x, bias.to(allowed)).dtype == torch.float16
    with raises(TypeError, "bias", "torch.float16", str(bias_dtype)):
        attention(x, x, x, bias.to(bias_dtype))


@pytest.mark.parametrize("name", ["key", "value", "bias"])
def test_tensors_on_two_devices(name):
    wrong = tensors()[name].to("meta")
    with raises(ValueError, "one device", "query is on cpu", f"{name} on meta"):
        attention(**tensors(**{name: wrong}))


@pytest.mark.parametrize(
    "wrong", [None, 1.0, [[1.0]], np.zeros(QUERY, dtype=np.float32)], ids=lambda w: type(w).__name__
)
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_arguments_that_are_no_tensors(name, wrong):
    with raises(TypeError, name, "torch.Tensor", type(wrong).__name__):
        attention(**tensors(**{name: wrong}))


def test_bias_that_is_no_tensor():
    with raises(TypeError, "bias", "torch.Tensor", "float"):
        attention(**tensors(bias=1.0))


def test_sparse_tensor():
    with raises(TypeError, "query must be a dense tensor", "to_dense"):
        attention(**tensors(query=torch.randn(QUERY).to_sparse()))


@pytest.mark.parametrize("name", ["attention", "packed"])
def test_head_dimension_of_zero(name):
    with raises(ValueError, "head dimension D must be at least 1"):
        if name == "packed":
            attention_qkvpacked(torch.randn(B, N, 3, HEADS, 0))
        else:
            attention(*(torch.randn(B, HEADS, N, 0) for _ in range(3)))


# ---- bias ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [
        *[(M + 1,), (N,), (M, N), (N, 2), (2, N, M), (HEADS, 1, N), (0, N, M), (B, 1, N, 0)],
        *[(B + 1, HEADS, N, M), (HEADS, B, N, M), (1, B, HEADS, N, M), (1, 1, 1, 1, 1)],
    ],
    ids=str,
)
def test_bias_that_does_not_broadcast(shape):
    expected = str((B, HEADS, N, M))
    with raises(ValueError, "bias must broadcast to (B, heads, N, M) = ", expected, str(shape), "1 or the full size"):
        attention(**tensors(bias=torch.randn(shape)))


def test_bias_of_packed_inputs_that_does_not_broadcast():
    with raises(ValueError, "bias must broadcast", str((B, HEADS, N, N)), str((HEADS, N, M))):
        attention_qkvpacked(**packed(bias=torch.randn(HEADS, N, M)))


@pytest.mark.parametrize(
    "shape", [(), (1,), (M,), (N, 1), (N, M), (1, M), (HEADS, 1, 1), (1, N, M), (B, 1, 1, M), (B, HEADS, N, M)], ids=str
)
def test_biases_that_broadcast(shape):
    arguments = tensors(bias=torch.randn(shape, requires_grad=True))
    output = attention(**arguments)
    query, key, value, bias = arguments.values()
    expected = scaled_dot_product_attention(query, key, value, attn_mask=bias.expand(B, HEADS, N, M))
    torch.testing.assert_close(output, expected)
    grads = [torch.autograd.grad(result.sin().sum(), bias)[0] for result in (output, expected)]
    assert grads[0].shape == bias.shape
    torch.testing.assert_close(*grads)


# ---- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [torch.tensor(1.0), "1", 1j, [1.0]], ids=repr)
def test_scale_that_is_no_number(wrong):
    with raises(TypeError, "scale must be a Python number or None", type(wrong).__name__):
        attention(**tensors(scale=wrong))
    with raises(TypeError, "scale must be a Python number or None", type(wrong).__name__):
        attention_qkvpacked(**packed(scale=wrong))


@pytest.mark.parametrize("scale", [None, 0, 0.0, 2, -1.5, np.float32(0.5)])
def test_scales(scale):
    """0 is a scale, not a missing one."""
    query, key, value, _ = tensors().values()
    expected = scaled_dot_product_attention(query, key, value, scale=D**-0.5 if scale is None else float(scale))
    torch.testing.assert_close(attention(query, key, value, scale=scale), expected)


@pytest.mark.parametrize("wrong", [None, 1, 0, "yes", torch.tensor(True)], ids=repr)
def test_is_causal_that_is_no_truth_value(wrong):
    with raises(TypeError, "is_causal must be True or False", repr(wrong)):
        attention(**tensors(is_causal=wrong))


@pytest.mark.parametrize("wrong", [None, "0.1", torch.tensor(0.1), 1j], ids=repr)
def test_dropout_that_is_no_number(wrong):
    with raises(TypeError, "dropout_p must be a Python number", type(wrong).__name__):
        attention(**tensors(dropout_p=wrong))


@pytest.mark.parametrize("wrong", [-0.1, 1, 1.0, 1.5, float("nan"), float("inf"), True], ids=repr)
def test_dropout_out_of_range(wrong):
    with raises(ValueError, "dropout_p must be at least 0 and smaller than 1", str(wrong)):
        attention_qkvpacked(**packed(dropout_p=wrong))


@pytest.mark.parametrize("function", [attention, attention_qkvpacked])
def test_options_are_keywords(function):
    with pytest.raises(TypeError, match="positional"):
        function(*(torch.randn(QUERY) for _ in range(4)), 1.0)


def test_parameters_and_subclasses_are_tensors():
    assert attention(**tensors(bias=torch.nn.Parameter(torch.randn(1, N, M)))).requires_grad


# ---- direct calls of the operators ---------------------------------------------------------------------------------


def operator_arguments(**changes):
    arguments = tensors(bias=torch.randn(1, HEADS, N, M))
    return arguments | {"scale": 1.0, "return_lse": True} | changes


def backward_arguments(**changes):
    arguments = operator_arguments()
    del arguments["return_lse"]
    statistics = {"out": torch.randn(QUERY), "lse": torch.zeros(B, HEADS, N)}
    return {"grad": torch.randn(QUERY), **arguments, **statistics} | changes


WRONG_FOR_BOTH = {
    "rank": {"query": torch.randn(HEADS, N, D)},
    "scalar": {"key": torch.tensor(1.0)},
    "dtype": {"value": torch.randn(KEY, dtype=torch.float64)},
    "integers": {name: torch.ones(KEY, dtype=torch.int32) for name in ("query", "key", "value")},
    "batch": {"key": torch.randn(B + 1, HEADS, M, D), "value": torch.randn(B + 1, HEADS, M, D)},
    "heads": {"key": torch.randn(B, 1, M, D), "value": torch.randn(B, 1, M, D)},
    "key shape": {"key": torch.randn(B, HEADS, M, D - 1)},
    "value tokens": {"value": torch.randn(B, HEADS, M + 1, D)},
    "bias keys": {"bias": torch.randn(1, HEADS, N, 1)},
    "bias queries": {"bias": torch.randn(1, HEADS, N + 1, M)},
    "bias heads": {"bias": torch.randn(1, HEADS + 1, N, M)},
    "bias batch": {"bias": torch.randn(B + 1, 1, N, M)},
    "bias rank": {"bias": torch.randn(N, M)},
    "bias dtype": {"bias": torch.randn(1, HEADS, N, M).half()},
    "no tensor": {"query": None},
}
WRONG_FOR_BACKWARD = {
    "grad shape": {"grad": torch.randn(B, HEADS, N, D + 1)},
    "grad rank": {"grad": torch.randn(4)},
    "grad dtype": {"grad": torch.randn(QUERY).double()},
    "out shape": {"out": torch.randn(B, HEADS, N + 1, D)},
    "out rank": {"out": torch.randn(4)},
    "out dtype": {"out": torch.randn(QUERY).double()},
    "lse size": {"lse": torch.zeros(B, HEADS, N - 1)},
    "no lse": {"lse": torch.zeros(0)},
    "lse dtype": {"lse": torch.zeros(B, HEADS, N, dtype=torch.float64)},
    "lse strides": {"lse": torch.zeros(1).expand(B, HEADS, N)},
}


@pytest.mark.parametrize("changes", WRONG_FOR_BOTH.values(), ids=WRONG_FOR_BOTH.keys())
def test_operator_called_with_wrong_arguments(changes):
    with pytest.raises((RuntimeError, TypeError)):
        torch.ops.vitfast.attention(**operator_arguments(**changes))


@pytest.mark.parametrize(
    "changes", [*WRONG_FOR_BOTH.values(), *WRONG_FOR_BACKWARD.values()], ids=[*WRONG_FOR_BOTH, *WRONG_FOR_BACKWARD]
)
def test_backward_operator_called_with_wrong_arguments(changes):
    with pytest.raises((RuntimeError, TypeError)):
        torch.ops.vitfast.attention_backward(**backward_arguments(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"qkv": torch.randn(B, N, 2, HEADS, D)},
        {"qkv": torch.randn(QUERY)},
        {"qkv": torch.ones(B, N, 3, HEADS, D, dtype=torch.int64)},
        {"bias": torch.randn(1, HEADS, N, N + 1)},
        {"bias": torch.randn(N, N)},
    ],
    ids=["parts", "rank", "dtype", "bias", "bias rank"],
)
def test_packed_operators_called_with_wrong_arguments(changes):
    arguments = {"qkv": torch.randn(B, N, 3, HEADS, D), "bias": None, "scale": 1.0} | changes
    with pytest.raises(RuntimeError):
        torch.ops.vitfast.attention_qkvpacked(**arguments, return_lse=True)
    out, lse = torch.randn(B, N, HEADS, D), torch.zeros(B, HEADS, N)
    with pytest.raises(RuntimeError):
        torch.ops.vitfast.attention_qkvpacked_backward(grad=torch.randn(B, N, HEADS, D), out=out, lse=lse, **arguments)


def test_operators_called_with_right_arguments():
    output, lse = torch.ops.vitfast.attention(**operator_arguments())
    assert output.shape == QUERY
    assert lse.shape == (B, HEADS, N)
    grads = torch.ops.vitfast.attention_backward(**backward_arguments(out=output, lse=lse))
    assert [g.shape for g in grads] == [torch.Size(s) for s in (QUERY, KEY, KEY, (1, HEADS, N, M))]


def test_logsumexp_is_that_of_the_scores():
    arguments = operator_arguments()
    scores = arguments["query"] @ arguments["key"].mT + arguments["bias"]
    torch.testing.assert_close(torch.ops.vitfast.attention(**arguments)[1], scores.logsumexp(-1))
    assert torch.ops.vitfast.attention(**arguments | {"return_lse": False})[1].shape == (0,)
