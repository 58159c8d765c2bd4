"""The operators as functions: documented, with every argument checked."""

from __future__ import annotations

import math
from numbers import Integral, Real

import torch
from torch import Tensor

from vitfast import reference
from vitfast.ops import attention as _attention
from vitfast.ops import blur_pool as _blur_pool
from vitfast.ops import mlp as _mlp
from vitfast.ops import window_attention as _window_attention
from vitfast.ops._rules import is_autocast
from vitfast.reference.blur_pool import ACTIVATIONS, PADDING_MODES

__all__ = [
    "attention",
    "attention_qkvpacked",
    "blur_pool2d",
    "mlp",
    "window_attention",
    "window_attention_qkvpacked",
    "window_attention_weights",
]

_LARGEST_WINDOW = 2**31 - 1  # so that the number of a window's tokens fits into 64 bits
_LARGEST_BLUR = 7  # taps of a blur kernel, each way
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
) -> Tensor:
    r"""Multi-head attention, fused.

    For each head, :math:`O = \mathrm{softmax}(\mathrm{scale} \cdot Q K^T + \mathrm{bias})\, V`.

    Args:
        query: (B, heads, N, D), any strides.
        key: (B, heads, M, D).
        value: the shape of ``key``.
        bias: added to the scores: any shape that broadcasts to (B, heads, N, M), a learned position bias as well as a
            mask that holds -inf where a query must not see a key. Its dtype is the query's, or float32 beside float16
            and bfloat16. Its gradient is summed over the dimensions that are broadcast.
        scale: factor of the scores; D^-0.5 if None.
        is_causal: query i sees the keys j <= i only, whatever N and M are.
        dropout_p: probability with which each attention weight is zero, 0 <= dropout_p < 1; the others are divided by
            1 - dropout_p. It holds whether a model trains or not: pass 0 in evaluation.

    Returns:
        (B, heads, N, D) in the dtype of ``query``. From the kernels it is laid out such that merging the heads,
        ``output.transpose(1, 2).flatten(2)``, copies nothing. A query without keys gets zeros where M = 0, and NaN
        where its bias is -inf for every key.

    float32 and float64 are computed with their own precision; float16 and bfloat16 in float32. Differentiable any
    number of times with respect to all four tensors, in reverse and forward mode; gradients are deterministic. The
    memory of the output, its gradients, `torch.func.jvp` and a double backward is linear in N and M, but for a bias of
    N x M elements
    and its gradient. Calls with ``is_causal`` or ``dropout_p`` have no kernel: they are computed exactly, by plain
    PyTorch, in memory quadratic in the tokens, as are calls under nested forward mode and forward mode inside of
    `torch.compile`.

    Raises:
        TypeError: a tensor is not floating point, dtypes differ, or an option has the wrong type.
        ValueError: ranks, shapes or devices do not fit, or ``dropout_p`` is out of range.
        BackendError: `vitfast.backend` forces a kernel on a call with ``is_causal`` or ``dropout_p``.

    Source: Vaswani et al., "Attention Is All You Need", NeurIPS 2017; Dao et al., "FlashAttention", NeurIPS 2022.

    >>> q, k = torch.randn(2, 3, 197, 64), torch.randn(2, 3, 50, 64)
    >>> attention(q, k, k, bias=torch.zeros(3, 1, 50)).shape
    torch.Size([2, 3, 197, 64])
    """
    _check_tensors(query=query, key=key, value=value, bias=bias)
    _check_sequences(query, key, value)
    bias = _check_score_bias(bias, query.dtype, (*query.shape[:3], key.shape[2]))
    options = _check_options(is_causal, dropout_p)
    return _attention.attention((query, key, value), bias, _check_scale(scale, query), *options)


def attention_qkvpacked(
    qkv: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
) -> Tensor:
    """`attention` of a packed projection: reads and differentiates it in place, without splitting it.

    Args:
        qkv: (B, N, 3, heads, D), query, key and value in this order: the output of one linear layer,
            ``linear(x).unflatten(-1, (3, heads, D))``. Its gradient is written packed too.
        bias, scale, is_causal, dropout_p: as in `attention`.

    Returns:
        (B, N, heads, D), contiguous: ``.flatten(2)`` merges the heads without a copy.

    Raises:
        TypeError, ValueError, BackendError: as `attention`.
    """
    _check_tensors(qkv=qkv, bias=bias)
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(
            f"qkv must have the shape (B, N, 3, heads, D); got {tuple(qkv.shape)}. "
            "The output of a linear layer becomes that with .unflatten(-1, (3, heads, D))"
        )
    batch, tokens, _, heads, _ = qkv.shape
    bias = _check_score_bias(bias, qkv.dtype, (batch, heads, tokens, tokens))
    options = _check_options(is_causal, dropout_p)
    return _attention.attention((qkv,), bias, _check_scale(scale, qkv), *options)


def blur_pool2d(
    x: Tensor,
    kernel: Tensor,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | tuple[int, int, int, int] | None = None,
    padding_mode: str = "reflect",
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    norm: tuple[Tensor | None, Tensor | None, Tensor, Tensor, float] | None = None,
    activation: str | None = None,
    temperature: float = 10.0,
) -> Tensor:
    r"""Blur pooling: every channel is correlated with one kernel and subsampled, fused with what comes before it.

    :math:`y[o, p] = \sum_{i,j} k[i, j] \; u[s o + i - \mathrm{top}, s p + j - \mathrm{left}]` of the padded map
    :math:`u = \mathrm{activation}(\mathrm{scale} \cdot x + \mathrm{shift})`. Without the three, u is x.

    Args:
        x: (B, C, H, W), contiguous or channels_last, which are read and written as they are; others are copied.
        kernel: (K,) for the outer product of K taps with themselves, or (K, L), of 1 to 7 taps each way. The kernel is
            taken as it is: taps that keep the mean of a map sum to 1. A separable one is applied as two of one
            dimension.
        stride: one integer or (rows, columns).
        padding: places added to the map, as one integer, (rows, columns), or (left, right, top, bottom) in the order of
            `torch.nn.functional.pad`. None adds K - 1 in all, the larger half after the map: the output then has
            ceil(H / stride) rows and ceil(W / stride) columns.
        padding_mode: "reflect", "replicate", "circular", "zeros", or "none" for no padding. Margins larger than the map
            repeat the pattern.
        scale: (C,), in the dtype of x, or float32 beside float16 and bfloat16.
        shift: (C,), likewise.
        norm: a batch normalisation in evaluation mode in place of scale and shift, (weight, bias, running_mean,
            running_var, eps), the tensors as scale, weight and bias or None: scale is weight / sqrt(running_var + eps),
            and shift is bias - scale * running_mean.
        activation: None, "relu", "relu6", or "tanh_relu" for relu(temperature * tanh(z / temperature)).
        temperature: of "tanh_relu".

    Returns:
        (B, C, floor((H + top + bottom - K) / stride) + 1, likewise), in the dtype and memory format of ``x``.

    float16 and bfloat16 accumulate in float32. Differentiable any number of times with respect to x and the tensors of
    the prologue, in reverse and forward mode; blurs of gradients and tangents are fused too. A kernel that needs a
    gradient is served by plain PyTorch.

    Raises:
        TypeError: a tensor is not floating point, or dtypes differ.
        ValueError: shapes or devices do not fit, or an option has a value that cannot be.

    Sources: Zhang, "Making Convolutional Networks Shift-Invariant Again", ICML 2019; Park & Kim, "Blurs Behave Like
    Ensembles", ICML 2022.

    >>> taps = torch.tensor([0.25, 0.5, 0.25])
    >>> blur_pool2d(torch.randn(8, 64, 56, 56), taps, stride=2).shape
    torch.Size([8, 64, 28, 28])
    """
    _check_blur_tensors(x, kernel)
    affine, eps = _check_affine(x, scale, shift, norm)
    if kernel.dim() == 1:
        kernel = torch.outer(kernel, kernel)
    sides = _check_padding(padding, padding_mode, kernel)
    _check_blur_size(x, kernel, sides)
    spec = _blur_pool.Spec(
        _check_stride(stride),
        sides,
        "zeros" if padding_mode == "none" else padding_mode,
        eps,
        activation,
        _check_activation(activation, temperature),
    )
    return _blur_pool.blur_pool2d(x, kernel, affine, spec)


def mlp(x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None) -> Tensor:
    r"""The feed-forward part of a transformer, fused: two linear layers with a GELU between them.

    :math:`\mathrm{GELU}(x W_1^T + b_1)\, W_2^T + b_2` with the exact :math:`\mathrm{GELU}(h) = h\, \Phi(h)`.

    Args:
        x: (..., C).
        weight1: (hidden, C), as in `torch.nn.Linear`.
        bias1: (hidden,) or None.
        weight2: (D, hidden).
        bias2: (D,) or None.

    Returns:
        (..., D) in the dtype of ``x``.

    On the CPU the hidden values of all rows are never in memory at once, except for those before the activation where
    a gradient is recorded. Differentiable any number of times with respect to all five tensors, in reverse and forward
    mode; what goes beyond a plain backward is plain PyTorch, as is everything on other devices, under `torch.compile`
    and under autocast.

    Raises:
        TypeError: a tensor is not floating point, or dtypes differ outside of autocast.
        ValueError: ranks, shapes or devices do not fit.

    Source: Vaswani et al., "Attention Is All You Need", NeurIPS 2017; Hendrycks and Gimpel, "Gaussian Error Linear
    Units", arXiv 1606.08415.

    >>> layer1, layer2 = torch.nn.Linear(96, 384), torch.nn.Linear(384, 96)
    >>> mlp(torch.randn(8, 56, 56, 96), layer1.weight, layer1.bias, layer2.weight, layer2.bias).shape
    torch.Size([8, 56, 56, 96])
    """
    given = {"x": x, "weight1": weight1, "bias1": bias1, "weight2": weight2, "bias2": bias2}
    given = {name: tensor for name, tensor in given.items() if tensor is not None or not name.startswith("bias")}
    if not (isinstance(x, Tensor) and is_autocast(x.device)):  # which casts them itself
        _check_tensors(None, **given)
    for name in ("weight1", "weight2"):
        if given[name].dim() != 2:
            raise ValueError(
                f"{name} must be a matrix, as in torch.nn.Linear; got the shape {tuple(given[name].shape)}"
            )
    expected = {"weight1": (len(weight1), x.shape[-1] if x.dim() else 0), "bias1": (len(weight1),)}
    expected |= {"weight2": (len(weight2), len(weight1)), "bias2": (len(weight2),)}
    for name, tensor in given.items():
        if name != "x" and tuple(tensor.shape) != expected[name]:
            raise ValueError(
                f"{name} must have the shape {expected[name]}, where x is (..., C), weight1 (hidden, C) and weight2 "
                f"(D, hidden); got {tuple(tensor.shape)} beside x {tuple(x.shape)}, weight1 {tuple(weight1.shape)} and "
                f"weight2 {tuple(weight2.shape)}"
            )
    return _mlp.mlp(x, weight1, bias1, weight2, bias2)


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    *,
    window_size: int | tuple[int, int],
    shift: int | tuple[int, int] = 0,
    scale: float | None = None,
) -> Tensor:
    r"""Multi-head self-attention inside the windows of a feature map, fused.

    In each window and for each head, :math:`O = \mathrm{softmax}(\mathrm{scale} \cdot Q K^T + \mathrm{bias})\, V`.

    Args:
        query: (B, H, W, heads, D), any strides: a channels-first map (B, heads * D, H, W) is passed without a copy as
            ``x.unflatten(1, (heads, D)).permute(0, 3, 4, 1, 2)``.
        key: (B, H / r, W / r, heads, D), with an integer r that divides H, W, the window and the shift; mostly r = 1.
        value: the shape of ``key``.
        bias: added to the scores: (heads, N, M), or (1, N, M) for one shared by all heads, with N queries and M keys in
            a full window, row by row. Its dtype is the query's, or float32 beside float16 and bfloat16.
        window_size: tokens of a window, as one integer or (rows, columns). H and W need not be multiples of it: the
            windows at the edges then hold fewer tokens.
        shift: 0 <= shift < window_size, one integer or (rows, columns): Swin's cyclic shift with its region mask.
            Nothing is rolled: that mask leaves precisely the windows of a grid moved by ``shift``.
        scale: factor of the scores; D^-0.5 if None.

    Returns:
        (B, H, W, heads, D) in the dtype and the memory layout of ``query``.

    float32 and float64 are computed with their own precision; float16 and bfloat16 accumulate in float32.
    Differentiable any number of times with respect to all four tensors, in reverse and forward mode; gradients are
    deterministic.

    Raises:
        TypeError: a tensor is not floating point, or dtypes differ.
        ValueError: ranks, shapes or devices do not fit, or the window or shift is out of range.

    Source: Liu et al., "Swin Transformer", ICCV 2021; Park & Kim, "How Do Vision Transformers Work?", ICLR 2022.

    >>> x = torch.randn(2, 14, 14, 3, 32)
    >>> window_attention(x, x, x, window_size=7, shift=3).shape
    torch.Size([2, 14, 14, 3, 32])
    """
    _check_tensors(query=query, key=key, value=value, bias=bias)
    _check_maps(query=query, key=key, value=value)
    window, offset = _check_window(window_size, shift)
    ratio = _check_ratio(query, key, window, offset)
    bias = _check_bias(bias, query, window, ratio)
    if bias is None:
        window, offset = _cropped(window, offset, query)
    return _window_attention.window_attention((query, key, value), bias, window, offset, _check_scale(scale, query))


def window_attention_qkvpacked(
    qkv: Tensor,
    bias: Tensor | None = None,
    *,
    window_size: int | tuple[int, int],
    shift: int | tuple[int, int] = 0,
    scale: float | None = None,
) -> Tensor:
    """`window_attention` of a packed projection: reads and differentiates it in place, without splitting it.

    Args:
        qkv: (B, H, W, 3, heads, D), query, key and value in this order: the output of one linear layer,
            ``linear(x).unflatten(-1, (3, heads, D))``. Its gradient is written packed too.
        bias, window_size, shift, scale: as in `window_attention`.

    Returns:
        (B, H, W, heads, D).

    Raises:
        TypeError, ValueError: as `window_attention`.
    """
    _check_tensors(qkv=qkv, bias=bias)
    if qkv.dim() != 6 or qkv.shape[3] != 3:
        raise ValueError(
            f"qkv must have the shape (B, H, W, 3, heads, D); got {tuple(qkv.shape)}. "
            "The output of a linear layer becomes that with .unflatten(-1, (3, heads, D))"
        )
    window, offset = _check_window(window_size, shift)
    bias = _check_bias(bias, qkv, window, (1, 1))
    if bias is None:
        window, offset = _cropped(window, offset, qkv)
    return _window_attention.window_attention((qkv,), bias, window, offset, _check_scale(scale, qkv))


def window_attention_weights(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None = None,
    *,
    window_size: int | tuple[int, int],
    shift: int | tuple[int, int] = 0,
    scale: float | None = None,
) -> Tensor:
    """The attention maps that `window_attention` never writes: (B, windows, heads, N, M), windows row by row.

    Exact and differentiable, by plain PyTorch, with the arguments of `window_attention`. Places of an edge window that
    lie outside the map are zero. Sums of the other rows are 1.
    """
    _check_tensors(query=query, key=key, bias=bias)
    _check_maps(query=query, key=key)
    window, offset = _check_window(window_size, shift)
    ratio = _check_ratio(query, key, window, offset)
    bias = _check_bias(bias, query, window, ratio)
    return reference.window_attention_weights(
        query, key, bias, window_size=window, shift=offset, scale=_check_scale(scale, query)
    )


def _check_tensors(bias: Tensor | None, **tensors: Tensor) -> None:
    """Types, dtypes and devices; ``bias`` may be float32 beside lower precision."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        _check_tensor(name, tensor, first_name, first)
    if bias is not None:
        _check_tensor("bias", bias, first_name, first, may_be_float32=True)


def _check_tensor(name: str, tensor: Tensor, first_name: str, first: Tensor, may_be_float32: bool = False) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(tensor).__name__}")
    if tensor.dtype not in _FLOATS:
        mask = name == "bias" and tensor.dtype == torch.bool
        way_out = (
            "A mask that is True for what a query may see becomes a bias with torch.where(mask, 0.0, -torch.inf)"
            if mask
            else "Convert it with .float()"
        )
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16; got {tensor.dtype}. {way_out}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor; got {tensor.layout}. Convert it with .to_dense()")
    if tensor.device != first.device:
        raise ValueError(
            f"all tensors must be on one device; {first_name} is on {first.device} and {name} on {tensor.device}"
        )
    mixed = may_be_float32 and tensor.dtype == torch.float32 and first.dtype in (torch.float16, torch.bfloat16)
    if tensor.dtype != first.dtype and not mixed:
        raise TypeError(
            f"{name} must have the dtype of {first_name}, {first.dtype}; got {tensor.dtype}. "
            f"Convert it with .to({first.dtype})"
        )


def _check_sequences(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Ranks and shapes of (B, heads, tokens, D)."""
    for name, tensor, tokens in (("query", query, "N"), ("key", key, "M"), ("value", value, "M")):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have the shape (B, heads, {tokens}, D); got {tuple(tensor.shape)}")
    if key.shape != value.shape:
        raise ValueError(f"key and value must have one shape; got {tuple(key.shape)} and {tuple(value.shape)}")
    if (*query.shape[:2], query.shape[3]) != (*key.shape[:2], key.shape[3]):
        raise ValueError(
            "query and key must agree in B, heads and D of (B, heads, N, D) and (B, heads, M, D); "
            f"got {tuple(query.shape)} and {tuple(key.shape)}. Copies of a head or an entry of the batch are made with "
            ".expand() or .repeat_interleave()"
        )


def _check_maps(query: Tensor, key: Tensor, value: Tensor | None = None) -> None:
    """Ranks and shapes, but for the height and width of the key map."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor is not None and tensor.dim() != 5:
            raise ValueError(f"{name} must have the shape (B, H, W, heads, D); got {tuple(tensor.shape)}")
    if value is not None and key.shape != value.shape:
        raise ValueError(f"key and value must have one shape; got {tuple(key.shape)} and {tuple(value.shape)}")
    if (query.shape[0], *query.shape[3:]) != (key.shape[0], *key.shape[3:]):
        raise ValueError(
            "query and key must agree in B, heads and D of (B, H, W, heads, D); "
            f"got {tuple(query.shape)} and {tuple(key.shape)}"
        )


def integer_pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) from one integer or a pair of them; a TypeError that speaks of ``name`` for anything else."""
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) == 2 and type(pair[0]) is int and type(pair[1]) is int:  # the checks below take microseconds
        return pair
    if len(pair) != 2 or not all(isinstance(v, (Integral, torch.SymInt)) and not isinstance(v, bool) for v in pair):
        raise TypeError(f"{name} must be an integer or a pair of integers (rows, columns); got {value!r}")
    return tuple(v if isinstance(v, torch.SymInt) else int(v) for v in pair)


def _check_window(window_size, shift) -> tuple[tuple[int, int], tuple[int, int]]:
    window, offset = integer_pair("window_size", window_size), integer_pair("shift", shift)
    if min(window) < 1:
        raise ValueError(f"window_size must be at least 1; got {window_size}")
    if max(window) > _LARGEST_WINDOW:
        raise ValueError(
            f"window_size must be at most {_LARGEST_WINDOW}; got {window_size}. A window as large as the map covers it"
        )
    if any(not 0 <= s < w for s, w in zip(offset, window, strict=True)):
        raise ValueError(
            f"shift must be at least 0 and smaller than window_size = {window}; got {shift}. "
            "A shift by s + window_size is the same as one by s"
        )
    return window, offset


def _cropped(window: tuple[int, int], shift: tuple[int, int], maps: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
    """A window and shift that cut maps (B, H, W, ...) into the same pieces, with windows no larger than the map.

    A window far larger than its map costs a kernel nothing, but plain PyTorch pads maps to full windows.
    """
    if torch.compiler.is_compiling():  # sizes may be symbols, which a comparison would bind
        return window, shift
    pairs = [_cropped_axis(w, s, size) for w, s, size in zip(window, shift, maps.shape[1:3], strict=True)]
    return tuple(w for w, _ in pairs), tuple(s for _, s in pairs)


def _cropped_axis(window: int, shift: int, size: int) -> tuple[int, int]:
    if window <= size or size == 0:
        return window, shift
    if shift == 0 or shift >= size:  # one window holds all
        return size, 0
    larger = max(shift, size - shift)  # of two windows
    return larger, shift % larger


def _check_ratio(query: Tensor, key: Tensor, window: tuple[int, int], shift: tuple[int, int]) -> tuple[int, int]:
    """By how much the key map is smaller than the query map, in rows and columns."""
    ratio = []
    for axis, size, key_size, w, s in zip("HW", query.shape[1:3], key.shape[1:3], window, shift, strict=True):
        r = size // key_size if key_size else 1
        if r == 0 or size != r * key_size:
            raise ValueError(
                f"{axis} of query must be a multiple of {axis} of key; got {tuple(query.shape)} and {tuple(key.shape)}"
            )
        if w % r or s % r:
            raise ValueError(
                f"keys {r} times smaller than queries along {axis} need a window and a shift that {r} divides; "
                f"got window_size = {window} and shift = {shift}"
            )
        ratio.append(r)
    return tuple(ratio)


def _check_bias(bias: Tensor | None, query: Tensor, window: tuple[int, int], ratio: tuple[int, int]) -> Tensor | None:
    """The bias in the dtype the scores are computed in."""
    if bias is None:
        return None
    heads, n = query.shape[-2], window[0] * window[1]
    expected = (heads, n, n // (ratio[0] * ratio[1]))
    if bias.dim() != 3 or tuple(bias.shape[1:]) != expected[1:] or bias.shape[0] not in (1, heads):
        raise ValueError(
            f"bias must have the shape {expected}, or (1, {expected[1]}, {expected[2]}) to be shared by all heads, "
            f"for {heads} heads and window_size = {window}; got {tuple(bias.shape)}"
        )
    dtype = _score_dtype(query.dtype)
    return bias if bias.dtype == dtype else bias.to(dtype)  # which takes a microsecond even so


def _check_score_bias(bias: Tensor | None, dtype: torch.dtype, scores: tuple[int, ...]) -> Tensor | None:
    """The bias as (B or 1, heads or 1, N or 1, M), in the dtype the scores, (B, heads, N, M), are computed in."""
    if bias is None:
        return None
    missing = 4 - bias.dim()
    if missing < 0 or any(size not in (1, full) for size, full in zip(bias.shape, scores[missing:], strict=True)):
        raise ValueError(
            f"bias must broadcast to (B, heads, N, M) = {tuple(scores)}; got {tuple(bias.shape)}. "
            "Dimensions are matched from the last, and each is 1 or the full size"
        )
    bias = bias.to(_score_dtype(dtype)).reshape(*(1,) * missing, *bias.shape)
    return bias.expand(*bias.shape[:3], scores[3])


def _score_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that scores of tensors of ``dtype`` are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_options(is_causal: bool, dropout_p: float) -> tuple[bool, float]:
    if not isinstance(is_causal, bool):
        raise TypeError(f"is_causal must be True or False; got {is_causal!r}")
    if not isinstance(dropout_p, Real):
        raise TypeError(f"dropout_p must be a Python number; got {type(dropout_p).__name__}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be at least 0 and smaller than 1; got {dropout_p}")
    return is_causal, float(dropout_p)


def _check_scale(scale: float | None, query: Tensor) -> float:
    if query.shape[-1] == 0:
        raise ValueError(f"the head dimension D must be at least 1; got {tuple(query.shape)}")
    if scale is None:
        return query.shape[-1] ** -0.5
    if not isinstance(scale, Real) or isinstance(scale, bool):
        raise TypeError(f"scale must be a Python number or None; got {type(scale).__name__}")
    return float(scale)


def _check_blur_tensors(x: Tensor, kernel: Tensor) -> None:
    _check_tensor("x", x, "x", x)
    _check_tensor("kernel", kernel, "kernel", kernel)  # of any precision
    if x.dim() != 4:
        raise ValueError(
            f"x must have the shape (B, C, H, W); got {tuple(x.shape)}. One image becomes a batch with .unsqueeze(0)"
        )
    if 0 in x.shape[2:]:
        raise ValueError(f"x must have at least one row and one column; got {tuple(x.shape)}")
    if kernel.dim() not in (1, 2) or not all(1 <= taps <= _LARGEST_BLUR for taps in kernel.shape):
        raise ValueError(
            f"kernel must have the shape (K,) or (K, L), with 1 to {_LARGEST_BLUR} taps each way; "
            f"got {tuple(kernel.shape)}. Larger ones are torch.nn.functional.conv2d with groups=C"
        )
    if kernel.device != x.device:
        raise ValueError(f"all tensors must be on one device; x is on {x.device} and kernel on {kernel.device}")


def _check_blur_size(x: Tensor, kernel: Tensor, sides: tuple[int, int, int, int]) -> None:
    left, right, top, bottom = sides
    height, width = x.shape[2] + top + bottom, x.shape[3] + left + right
    rows, columns = kernel.shape
    if height < rows or width < columns:
        axis, size, taps = ("H", height, rows) if height < rows else ("W", width, columns)
        raise ValueError(
            f"the padded map must be at least as large as the kernel; along {axis} it has {size} places for "
            f"{taps} taps: x is {tuple(x.shape)}, the kernel {tuple(kernel.shape)}, padding {sides}"
        )


def _check_affine(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, norm: tuple | None
) -> tuple[_blur_pool.Affine, float]:
    """The tensors of a blur's prologue, and the normalisation's eps."""
    if norm is None:
        _check_per_channel("scale", scale, x)
        _check_per_channel("shift", shift, x)
        return _blur_pool.Affine(scale, shift), 0.0
    if scale is not None or shift is not None:
        raise ValueError("norm takes the place of scale and shift: pass either norm or these two")
    if not isinstance(norm, (tuple, list)) or len(norm) != 5:
        got = f"{len(norm)} values" if isinstance(norm, (tuple, list)) else type(norm).__name__
        raise TypeError(f"norm must be (weight, bias, running_mean, running_var, eps); got {got}")
    *tensors, eps = norm
    if not isinstance(eps, Real) or not eps >= 0:
        raise ValueError(f"eps of norm must be a number, and not negative; got {eps!r}")
    for name, tensor in zip(("weight", "bias", "running_mean", "running_var"), tensors, strict=True):
        if tensor is None and name.startswith("running"):
            raise TypeError(f"{name} of norm must be a torch.Tensor: without it there is no evaluation mode")
        _check_per_channel(f"{name} of norm", tensor, x)
    return _blur_pool.Affine(*tensors), float(eps)


def _check_per_channel(name: str, tensor: Tensor | None, x: Tensor) -> None:
    if tensor is None:
        return
    _check_tensor(name, tensor, "x", x, may_be_float32=True)
    if tensor.dim() != 1 or len(tensor) != x.shape[1]:
        raise ValueError(
            f"{name} must have one value per channel, the shape ({x.shape[1]},); got {tuple(tensor.shape)}"
        )


def _check_stride(stride) -> tuple[int, int]:
    pair = integer_pair("stride", stride)
    if min(pair) < 1:
        raise ValueError(f"stride must be at least 1; got {stride}")
    return pair


def _check_padding(padding, mode: str, kernel: Tensor) -> tuple[int, int, int, int]:
    """(left, right, top, bottom)."""
    if mode not in PADDING_MODES and mode != "none":
        raise ValueError(f"padding_mode must be one of {', '.join((*PADDING_MODES, 'none'))}; got {mode!r}")
    if mode == "none":
        if padding not in (None, 0) and any(integer_pair("padding", padding)):
            raise ValueError(f"padding_mode='none' takes no padding; got padding={padding}")
        return (0, 0, 0, 0)
    if padding is None:
        rows, columns = kernel.shape
        return ((columns - 1) // 2, columns // 2, (rows - 1) // 2, rows // 2)
    if isinstance(padding, (tuple, list)) and len(padding) == 4:
        sides = (*integer_pair("padding", padding[:2]), *integer_pair("padding", padding[2:]))
    else:
        rows, columns = integer_pair("padding", padding)
        sides = (columns, columns, rows, rows)
    if min(sides) < 0:
        raise ValueError(f"padding must not be negative; got {padding}. A smaller map is a slice of x")
    return sides


def _check_activation(activation: str | None, temperature: float) -> float:
    """The temperature."""
    if activation not in ACTIVATIONS:
        names = ", ".join(repr(name) for name in ACTIVATIONS)
        raise ValueError(f"activation must be one of {names}; got {activation!r}")
    if type(temperature) is not float and (isinstance(temperature, bool) or not isinstance(temperature, Real)):
        raise TypeError(f"temperature must be a number; got {temperature!r}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite; got {temperature}")
    return float(temperature)
