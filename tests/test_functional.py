"""Arguments of the functional interface: every mistake raises an error that names what was expected, what came, and the
way out; what is allowed works. Direct calls of the operators with wrong arguments raise as well.
"""

from __future__ import annotations

import doctest
import re

import numpy as np
import pytest
import torch

import vitfast
from vitfast import functional
from vitfast.functional import window_attention, window_attention_qkvpacked, window_attention_weights

B, H, W, HEADS, D = 2, 6, 8, 3, 4
MAP = (B, H, W, HEADS, D)
TOKENS = 4  # of a 2x2 window


def tensors(**changes):
    """Valid arguments of `window_attention` but for ``changes``."""
    query, key, value = (torch.randn(MAP) for _ in range(3))
    bias = torch.randn(HEADS, TOKENS, TOKENS)
    return {"query": query, "key": key, "value": value, "bias": bias, "window_size": 2} | changes


def packed(**changes):
    """Valid arguments of `window_attention_qkvpacked` but for ``changes``."""
    return {
        "qkv": torch.randn(B, H, W, 3, HEADS, D),
        "bias": torch.randn(HEADS, TOKENS, TOKENS),
        "window_size": 2,
    } | changes


def raises(error, *parts):
    """`pytest.raises` of a message that holds all ``parts``, in this order."""
    return pytest.raises(error, match="(?s)" + ".*".join(map(re.escape, parts)))


@pytest.fixture(params=["cpu", "reference"], autouse=True)
def _backend(request):
    """Errors do not depend on the implementation."""
    with vitfast.backend(request.param):
        yield


def test_arguments_that_the_others_change_are_valid():
    assert window_attention(**tensors()).shape == MAP
    assert window_attention_qkvpacked(**packed()).shape == MAP


# ---- tensors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("shape", [(), (4,), (6, 8, 3, 4), (1, 2, 6, 8, 3, 4)], ids=str)
def test_wrong_rank(name, shape):
    with raises(ValueError, name, "(B, H, W, heads, D)", str(shape)):
        window_attention(**tensors(**{name: torch.randn(shape)}))


@pytest.mark.parametrize("shape", [(B, H, W, 3 * HEADS * D), (B, H, W, 4, 3, D), MAP, (B, H, W, 2, HEADS, D)], ids=str)
def test_wrong_shape_of_packed_inputs(shape):
    with raises(ValueError, "qkv", "(B, H, W, 3, heads, D)", str(shape), ".unflatten(-1, (3, heads, D))"):
        window_attention_qkvpacked(**packed(qkv=torch.randn(shape)))


def test_key_and_value_of_different_shapes():
    with raises(ValueError, "key and value", str(MAP), str((B, H, W, HEADS, D + 1))):
        window_attention(**tensors(value=torch.randn(B, H, W, HEADS, D + 1)))


@pytest.mark.parametrize(
    "shape", [(B + 1, H, W, HEADS, D), (1, H, W, HEADS, D), (B, H, W, HEADS + 1, D), (B, H, W, HEADS, 2 * D)], ids=str
)
def test_query_and_key_that_differ_in_batch_heads_or_dim(shape):
    other = torch.randn(shape)
    with raises(ValueError, "query and key must agree in B, heads and D", str(MAP), str(shape)):
        window_attention(**tensors(key=other, value=other))


@pytest.mark.parametrize(
    ("key_size", "axis"), [((4, W), "H"), ((H, 3), "W"), ((2 * H, W), "H"), ((H, 2 * W), "W"), ((0, W), "H")], ids=str
)
def test_key_map_that_is_not_a_whole_fraction(key_size, axis):
    other = torch.randn(B, *key_size, HEADS, D)
    with raises(ValueError, f"{axis} of query must be a multiple of {axis} of key", str(MAP), str(tuple(other.shape))):
        window_attention(**tensors(key=other, value=other))


def test_empty_query_map_beside_a_full_key_map():
    query = torch.randn(B, 0, W, HEADS, D)
    key = torch.randn(MAP)
    with pytest.raises(ValueError, match="H of query"):
        window_attention(query, key, key, window_size=2)


@pytest.mark.parametrize(("window", "shift"), [(3, 0), (4, 1), ((2, 3), 0), ((4, 4), (2, 1))], ids=str)
def test_key_ratio_that_does_not_divide_window_or_shift(window, shift):
    other = torch.randn(B, H // 2, W // 2, HEADS, D)
    with raises(
        ValueError, "keys 2 times smaller", "a window and a shift that 2 divides", "window_size = ", "shift = "
    ):
        window_attention(torch.randn(MAP), other, other, window_size=window, shift=shift)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("name", ["query", "key", "value", "bias"])
def test_tensors_that_are_not_floating_point(name, dtype):
    wrong = tensors()[name].to(dtype)
    way_out = "torch.where(mask, 0.0, -torch.inf)" if name == "bias" and dtype == torch.bool else ".float()"
    with raises(TypeError, name, "float32, float64, float16 or bfloat16", str(dtype), way_out):
        window_attention(**tensors(**{name: wrong}))


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float8_e4m3fn], ids=str)
def test_packed_tensors_of_unsupported_dtypes(dtype):
    with raises(TypeError, "qkv", "float32, float64, float16 or bfloat16", str(dtype)):
        window_attention_qkvpacked(torch.zeros(B, H, W, 3, HEADS, D).to(dtype), window_size=2)


@pytest.mark.parametrize("name", ["key", "value", "bias"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_mixed_dtypes(name, dtype):
    wrong = tensors()[name].to(dtype)
    with raises(TypeError, name, "the dtype of query, torch.float32", str(dtype), ".to(torch.float32)"):
        window_attention(**tensors(**{name: wrong}))


@pytest.mark.parametrize("bias_dtype", [torch.float64, torch.bfloat16], ids=str)
def test_bias_beside_float16_is_float16_or_float32(bias_dtype):
    x = torch.randn(MAP, dtype=torch.float16)
    bias = torch.randn(HEADS, TOKENS, TOKENS)
    for allowed in (torch.float16, torch.float32):
        assert window_attention(x, x, x, bias.to(allowed), window_size=2).dtype == torch.float16
    with raises(TypeError, "bias", "torch.float16", str(bias_dtype)):
        window_attention(x, x, x, bias.to(bias_dtype), window_size=2)


@pytest.mark.parametrize("name", ["key", "value", "bias"])
def test_tensors_on_two_devices(name):
    wrong = tensors()[name].to("meta")
    with raises(ValueError, "one device", "query is on cpu", f"{name} on meta"):
        window_attention(**tensors(**{name: wrong}))


@pytest.mark.parametrize("wrong", [None, 1.0, [[1.0]], np.zeros(MAP, dtype=np.float32)], ids=lambda w: type(w).__name__)
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_arguments_that_are_no_tensors(name, wrong):
    with raises(TypeError, name, "torch.Tensor", type(wrong).__name__):
        window_attention(**tensors(**{name: wrong}))
    if name != "value":
        arguments = tensors(**{name: wrong})
        del arguments["value"]
        with raises(TypeError, name, "torch.Tensor", type(wrong).__name__):
            window_attention_weights(**arguments)


def test_bias_that_is_no_tensor():
    with raises(TypeError, "bias", "torch.Tensor", "float"):
        window_attention(**tensors(bias=1.0))


@pytest.mark.parametrize(
    "shape", [(2, 4, 4), (HEADS, 4, 5), (HEADS, 5, 4), (4, 4), (1, HEADS, 4, 4), (HEADS, 9, 9), (0, 4, 4)], ids=str
)
def test_bias_of_the_wrong_size(shape):
    expected = (str((HEADS, TOKENS, TOKENS)), str((1, TOKENS, TOKENS)), "shared", "window_size = (2, 2)", str(shape))
    with raises(ValueError, "bias must have the shape", *expected):
        window_attention(**tensors(bias=torch.randn(shape)))
    with raises(ValueError, "bias must have the shape", *expected):
        window_attention_qkvpacked(**packed(bias=torch.randn(shape)))


def test_bias_of_a_smaller_key_map_has_fewer_columns():
    key = torch.randn(B, H // 2, W // 2, HEADS, D)
    with raises(ValueError, str((HEADS, 4, 1)), str((HEADS, 4, 4))):
        window_attention(**tensors(key=key, value=key))


def test_head_dimension_of_zero():
    empty = torch.randn(B, H, W, HEADS, 0)
    with raises(ValueError, "head dimension D must be at least 1", str(tuple(empty.shape))):
        window_attention(empty, empty, empty, window_size=2)


# ---- window, shift, scale ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [0, -1, (0, 7), (7, -3)], ids=str)
def test_window_out_of_range(window):
    with raises(ValueError, "window_size must be at least 1", str(window)):
        window_attention(**tensors(window_size=window, bias=None))


@pytest.mark.parametrize("window", [2**31, 2**62, 2**70, (7, 2**63 - 1)], ids=str)
def test_window_whose_tokens_cannot_be_counted(window):
    with raises(ValueError, "window_size must be at most 2147483647", str(window)):
        window_attention(**tensors(window_size=window, bias=None))


def test_largest_window_is_the_whole_map():
    arguments = tensors(bias=None)
    with vitfast.backend("cpu"):
        result = window_attention(**arguments | {"window_size": 2**31 - 1})
    torch.testing.assert_close(result, window_attention(**arguments | {"window_size": (H, W)}))


def test_operator_refuses_a_window_whose_number_of_tokens_overflows():
    x, window = torch.randn(MAP), [7, 7905747460161236407]  # 7 times this is 1 modulo 2^64
    with pytest.raises(RuntimeError, match="window_size < 2"):
        torch.ops.vitfast.window_attention(x, x, x, torch.zeros(1, 1, 1), window, [0, 0], 1.0, True)


def test_sparse_tensor():
    arguments = tensors()
    with raises(TypeError, "query must be a dense tensor", "to_dense"):
        window_attention(**arguments | {"query": arguments["query"].to_sparse()})


@pytest.mark.parametrize(
    ("window", "shift"), [(2, 2), (2, -1), (4, (0, 4)), ((2, 4), 2), ((4, 2), (-1, 0)), (7, 100)], ids=str
)
def test_shift_out_of_range(window, shift):
    with raises(ValueError, "shift must be at least 0 and smaller than window_size = ", str(shift), "s + window_size"):
        window_attention(**tensors(window_size=window, shift=shift, bias=None))


@pytest.mark.parametrize(
    "wrong", [2.0, "2", None, True, (2,), (2, 2, 2), (2, 2.0), (True, 2), torch.tensor(2)], ids=repr
)
@pytest.mark.parametrize("name", ["window_size", "shift"])
def test_windows_and_shifts_that_are_no_integers(name, wrong):
    with raises(TypeError, f"{name} must be an integer or a pair of integers (rows, columns)"):
        window_attention(**(tensors(bias=None) | {name: wrong}))


@pytest.mark.parametrize("wrong", [torch.tensor(1.0), "1", 1j, [1.0]], ids=repr)
def test_scale_that_is_no_number(wrong):
    with raises(TypeError, "scale must be a Python number or None", type(wrong).__name__):
        window_attention(**tensors(scale=wrong))


def test_window_size_is_needed():
    arguments = tensors()
    del arguments["window_size"]
    with pytest.raises(TypeError, match="window_size"):
        window_attention(**arguments)


def test_options_are_keywords():
    with pytest.raises(TypeError, match="positional"):
        window_attention(*(torch.randn(MAP) for _ in range(3)), None, 2)


# ---- what is allowed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [None, 0, 0.0, 2, -1.5])
def test_scales(scale):
    """0 is a scale, not a missing one."""
    arguments = tensors(bias=None)
    query, key, value = (
        arguments[name].unflatten(1, (-1, 2)).unflatten(3, (-1, 2)) for name in ("query", "key", "value")
    )
    q, k, v = (t.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5) for t in (query, key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, scale=D**-0.5 if scale is None else float(scale)
    )
    output = window_attention(**arguments, scale=scale)
    expected = expected.unflatten(4, (2, 2)).permute(0, 1, 4, 2, 5, 3, 6).reshape(MAP)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("window", [2, (2, 2), [2, 2], torch.Size((2, 2))], ids=repr)
def test_ways_to_write_a_window(window):
    arguments = tensors()
    torch.testing.assert_close(window_attention(**arguments | {"window_size": window}), window_attention(**arguments))


def test_window_larger_than_the_map_is_global_attention():
    query, key, value = (torch.randn(MAP) for _ in range(3))
    output = window_attention(query, key, value, window_size=(H + 1, W + 5))
    q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in (query, key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(MAP)
    torch.testing.assert_close(output, expected)


def test_numpy_integers_are_integers():
    arguments = tensors()
    with_numpy = window_attention(**arguments | {"window_size": np.int64(2), "shift": np.int32(1)})
    torch.testing.assert_close(with_numpy, window_attention(**arguments, shift=1))


def test_numpy_scale():
    arguments = tensors()
    torch.testing.assert_close(
        window_attention(**arguments, scale=np.float32(0.5)), window_attention(**arguments, scale=0.5)
    )


def test_parameters_and_subclasses_are_tensors():
    arguments = tensors(bias=torch.nn.Parameter(torch.randn(1, TOKENS, TOKENS)))
    assert window_attention(**arguments).requires_grad


# ---- the attention maps --------------------------------------------------------------------------------------------


def test_weights_of_full_windows_reproduce_the_output():
    arguments = tensors()
    value = arguments.pop("value")
    weights = window_attention_weights(**arguments)
    assert weights.shape == (B, (H // 2) * (W // 2), HEADS, TOKENS, TOKENS)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    values = vitfast.reference.window_partition(value, (2, 2), (0, 0))
    output = vitfast.reference.window_reverse(weights @ values, (H, W), (2, 2), (0, 0))
    torch.testing.assert_close(output, window_attention(**arguments, value=value))


def test_weights_outside_the_map_are_zero():
    x = torch.randn(1, 3, 3, 1, 4)
    weights = window_attention_weights(x, x, window_size=2, shift=1)
    sums = weights.sum(-1)
    assert weights.shape == (1, 4, 1, 4, 4)
    assert ((sums - 1).abs() < 1e-6).sum() == 9  # one row for each token
    assert (sums == 0).sum() == 16 - 9
    assert ((weights != 0).sum(-2) > 0).sum() == 9  # one column for each token


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": torch.randn(6, 8, 3, 4)}, ValueError, "query must have the shape"),
        ({"key": torch.randn(B, 4, W, HEADS, D)}, ValueError, "H of query must be a multiple"),
        ({"key": torch.randn(B, H, W, HEADS, D + 1)}, ValueError, "must agree in B, heads and D"),
        ({"key": torch.randn(B + 1, H, W, HEADS, D)}, ValueError, "must agree in B, heads and D"),
        ({"bias": torch.randn(2, 4, 4)}, ValueError, "bias must have the shape"),
        ({"shift": 2}, ValueError, "shift must be at least 0"),
        ({"scale": "1"}, TypeError, "scale must be a Python number"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_in_the_arguments_of_weights(changes, error, message):
    arguments = tensors()
    del arguments["value"]
    with pytest.raises(error, match=message):
        window_attention_weights(**arguments | changes)


# ---- direct calls of the operators ---------------------------------------------------------------------------------


def operator_arguments(**changes):
    arguments = {name: torch.randn(MAP) for name in ("query", "key", "value")}
    options = {
        "bias": torch.randn(HEADS, 4, 4),
        "window_size": [2, 2],
        "shift": [0, 0],
        "scale": 1.0,
        "return_lse": True,
    }
    return arguments | options | changes


def backward_arguments(**changes):
    arguments = operator_arguments()
    del arguments["return_lse"]
    return {"grad": torch.randn(MAP), **arguments, "lse": torch.zeros(B, HEADS, H, W)} | changes


WRONG_FOR_BOTH = {
    "rank": {"query": torch.randn(H, W, HEADS, D)},
    "scalar": {"key": torch.tensor(1.0)},
    "dtype": {"value": torch.randn(MAP, dtype=torch.float64)},
    "integers": {name: torch.ones(MAP, dtype=torch.int32) for name in ("query", "key", "value")},
    "batch": {"key": torch.randn(B + 1, H, W, HEADS, D), "value": torch.randn(B + 1, H, W, HEADS, D)},
    "key shape": {"key": torch.randn(B, H, W, HEADS, D - 1)},
    "key map": {"key": torch.randn(B, 4, W, HEADS, D), "value": torch.randn(B, 4, W, HEADS, D)},
    "larger key map": {"key": torch.randn(B, 2 * H, W, HEADS, D), "value": torch.randn(B, 2 * H, W, HEADS, D)},
    "empty key map": {"key": torch.randn(B, 0, W, HEADS, D), "value": torch.randn(B, 0, W, HEADS, D)},
    "bias size": {"bias": torch.randn(HEADS, 4, 3)},
    "bias heads": {"bias": torch.randn(HEADS + 1, 4, 4)},
    "bias rank": {"bias": torch.randn(4, 4)},
    "bias dtype": {"bias": torch.randn(HEADS, 4, 4).half()},
    "window of zero": {"window_size": [0, 2], "bias": None},
    "negative window": {"window_size": [-2, 2], "bias": None},
    "huge window": {"window_size": [2**62, 2**62]},
    "window of one number": {"window_size": [2]},
    "window of three numbers": {"window_size": [2, 2, 2]},
    "shift": {"shift": [2, 0]},
    "negative shift": {"shift": [-1, 0]},
    "shift of no numbers": {"shift": []},
    "no tensor": {"query": None},
}
WRONG_FOR_BACKWARD = {
    "grad shape": {"grad": torch.randn(B, H, W, HEADS, D + 1)},
    "grad rank": {"grad": torch.randn(4)},
    "grad dtype": {"grad": torch.randn(MAP).double()},
    "lse size": {"lse": torch.zeros(B, HEADS, H, W - 1)},
    "no lse": {"lse": torch.zeros(0)},
    "lse dtype": {"lse": torch.zeros(B, HEADS, H, W, dtype=torch.float64)},
    "lse strides": {"lse": torch.zeros(1).expand(B, HEADS, H, W)},
}


@pytest.mark.parametrize("changes", WRONG_FOR_BOTH.values(), ids=WRONG_FOR_BOTH.keys())
def test_operator_called_with_wrong_arguments(changes):
    with pytest.raises((RuntimeError, TypeError)):
        torch.ops.vitfast.window_attention(**operator_arguments(**changes))


@pytest.mark.parametrize(
    "changes", [*WRONG_FOR_BOTH.values(), *WRONG_FOR_BACKWARD.values()], ids=[*WRONG_FOR_BOTH, *WRONG_FOR_BACKWARD]
)
def test_backward_operator_called_with_wrong_arguments(changes):
    with pytest.raises((RuntimeError, TypeError)):
        torch.ops.vitfast.window_attention_backward(**backward_arguments(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"qkv": torch.randn(B, H, W, 2, HEADS, D)},
        {"qkv": torch.randn(MAP)},
        {"qkv": torch.ones(B, H, W, 3, HEADS, D, dtype=torch.int64)},
        {"bias": torch.randn(HEADS, 4, 5)},
        {"window_size": [0, 0]},
        {"shift": [0, 5]},
    ],
    ids=["parts", "rank", "dtype", "bias", "window", "shift"],
)
def test_packed_operators_called_with_wrong_arguments(changes):
    arguments = {
        "qkv": torch.randn(B, H, W, 3, HEADS, D),
        "bias": None,
        "window_size": [2, 2],
        "shift": [0, 0],
        "scale": 1.0,
    } | changes
    with pytest.raises(RuntimeError):
        torch.ops.vitfast.window_attention_qkvpacked(**arguments, return_lse=True)
    with pytest.raises(RuntimeError):
        torch.ops.vitfast.window_attention_qkvpacked_backward(
            grad=torch.randn(MAP), lse=torch.zeros(B, HEADS, H, W), **arguments
        )


def test_operators_called_with_right_arguments():
    output, lse = torch.ops.vitfast.window_attention(**operator_arguments())
    assert output.shape == MAP
    assert lse.shape == (B, HEADS, H, W)
    grads = torch.ops.vitfast.window_attention_backward(**backward_arguments(lse=lse))
    assert [g.shape for g in grads] == [torch.Size(MAP)] * 3 + [torch.Size((HEADS, 4, 4))]


# ---- documentation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", functional.__all__)
def test_public_functions_are_documented(name):
    function = getattr(functional, name)
    assert any(
        shape in function.__doc__
        for shape in ("(B, H, W", "(B, windows", "(B, heads, N", "(B, N", "(B, C, H, W)", "(..., C)")
    )
    assert function.__module__ == "vitfast.functional"


def test_examples_of_the_docstrings():
    results = doctest.testmod(functional, extraglobs={"torch": torch})
    assert results.attempted > 0
    assert results.failed == 0
