"""Window attention in Triton, forward and backward.

Inside each window of a feature map, and for each head,

    S = scale * Q K^T + bias        P = softmax(S)        O = P V

and with G the gradient of O and L the natural logarithm of the sum of exp(S) over the keys,

    P = exp(S - L)        dV = P^T G        dP = G V^T        delta = rowsum(P * dP)        dS = P * (dP - delta)
    dQ = scale * dS K        dK = scale * dS^T Q        dbias = sum of dS over the windows

Shapes: Q, G and O (B, H, W, heads, D); K and V (B, H / r, W / r, heads, D); bias (heads or 1, N, M); L and delta
(B, heads, H, W). N = window_h * window_w queries and M = N / r^2 keys make a full window. Any strides; nothing but L is
saved for the backward, and O is not needed there because delta comes from P.

Windows. The grid of windows starts at its ``origin``, ``shift - window`` rows and columns from the map's corner (0
without a shift), and is cut off at the map's edges. Tokens are found by index arithmetic alone: no roll, no partition,
no mask in memory. Their places outside the map are masked, like the padding of every block.

Kernels. Where one tile of queries and keys holds a window (64 of each, or fewer, see `tiling`), a program walks over a
chunk of the windows of one head, and has the bias, or the gradient of it, in registers: ``window_attention_fwd_kernel``
and, for the whole backward, ``window_attention_bwd_kernel``. Larger windows take ``..._fwd_blocks_kernel``, a block of
queries over blocks of keys with an online softmax; ``..._bwd_query_kernel`` for dQ, delta and the sums of the rows of
P, ``..._bwd_key_kernel`` for dK and dV, and ``..._bwd_kernel``, tile by tile, for the bias alone. Channels-first maps
are copied by ``transpose_kernel`` before and after, see `Transposed`. There are no atomics: the partial sums of the
bias's gradient, one per chunk, are added up by `torch.sum`, and the number of chunks depends on the shapes only, so
gradients have the same bits in every run.

Precision. float16 and bfloat16 are multiplied by tensor cores and accumulated in float32; P and dS are rounded to the
input's dtype for their products. A product of float32 is three of TF32 by tensor cores, of the leading halves of both
and of each with what the other leaves: its error is that of float32. float64 is float64 throughout.

Source: the online softmax of Milakov & Gimelshein, arXiv 1805.02867; the recomputation of P from L of Dao,
"FlashAttention-2", arXiv 2307.08691; the windows of Liu et al., "Swin Transformer", ICCV 2021.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import TF32X3, divide_rows, dot, online_softmax, scaled, softmax, statistics_dtype, terms_per_program
from .launch import Launch, Made, pointers_and_strides, run, strides

Pair = tuple[int, int]

# ---- tiles -----------------------------------------------------------------------------------------------------------


@triton.jit
def _window(index, windows):
    """The batch entry of window ``index``, and its row and column in the grid of ``windows``."""
    line = index // windows[1]
    return line // windows[0], line % windows[0], index % windows[1]


@triton.jit
def _program(heads, windows, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """Head, window and first of its TOKENS of this program; heads run fastest, then blocks of tokens, then windows."""
    BLOCKS: tl.constexpr = tl.cdiv(TOKENS, BLOCK)
    pid = tl.program_id(0)
    block = pid // heads
    return (pid % heads).to(tl.int64), _window(block // BLOCKS, windows), block % BLOCKS * BLOCK


@triton.jit
def _tokens(window, grid, start, WINDOW: tl.constexpr, BLOCK: tl.constexpr, OFFSET: tl.constexpr):
    """Batch entry, rows, columns and presence on the map of the tokens start, start + 1, ... of a window. [BLOCK]

    Rows and columns are in the integers OFFSET, as `offset_dtype` chooses them.
    """
    batch, window_row, window_column = window
    height, width, origin_row, origin_column = grid
    place = start + tl.arange(0, BLOCK)
    row = origin_row + window_row * WINDOW[0] + place // WINDOW[1]
    column = origin_column + window_column * WINDOW[1] + place % WINDOW[1]
    inside = (place < WINDOW[0] * WINDOW[1]) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return batch.to(tl.int64), row.to(OFFSET), column.to(OFFSET), inside


@triton.jit
def _tile(ptr, strides, tokens, head, BLOCK_D: tl.constexpr):
    """Pointers into a tensor (B, H, W, heads, D). [BLOCK, BLOCK_D]

    The batch entry and the head are found in 64 bits; from there on OFFSET of `_tokens` is wide enough.
    """
    batch, row, column, _ = tokens
    token = row * strides[1] + column * strides[2]
    element = tl.arange(0, BLOCK_D).to(row.dtype) * strides[4]
    # Rows and columns of the map, rather than of the window, change from window to window: a loop over windows would
    # otherwise keep the offsets of all of its tiles in registers.
    return ptr + batch * strides[0] + head * strides[3] + (token[:, None] + element[None, :])


@triton.jit
def _mask(tokens, D: tl.constexpr, BLOCK_D: tl.constexpr):
    return tokens[3][:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]  # [BLOCK, BLOCK_D]


@triton.jit
def _load(
    ptr, strides, tokens, head,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHANNELS_FIRST: tl.constexpr,
):  # fmt: skip
    """The vectors of the tokens in one head, zero outside the map. [BLOCK, BLOCK_D]"""
    tile, mask = _tile(ptr, strides, tokens, head, BLOCK_D), _mask(tokens, D, BLOCK_D)
    if CHANNELS_FIRST:  # neighbouring threads take what lies side by side in memory, along the last dimension
        return tl.trans(tl.load(tl.trans(tile), mask=tl.trans(mask), other=0.0))
    else:
        return tl.load(tile, mask=mask, other=0.0)


@triton.jit
def _store(
    ptr, strides, tokens, head, value,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHANNELS_FIRST: tl.constexpr,
):  # fmt: skip
    tile, mask = _tile(ptr, strides, tokens, head, BLOCK_D), _mask(tokens, D, BLOCK_D)
    value = value.to(ptr.dtype.element_ty)
    if CHANNELS_FIRST:
        tl.store(tl.trans(tile), tl.trans(value), mask=tl.trans(mask))
    else:
        tl.store(tile, value, mask=mask)


@triton.jit
def _row_offsets(tokens, head, heads, grid):
    """Offsets into a contiguous (B, heads, H, W), such as L and delta. [BLOCK]"""
    batch, row, column, _ = tokens
    return ((batch * heads + head) * grid[0] + row) * grid[1] + column


@triton.jit
def _load_bias(
    ptr, strides, head, query_start, key_start,
    N: tl.constexpr, M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """A tile of the bias, zeros if there is none. [BLOCK_N, BLOCK_M]"""
    if ptr is None:
        return tl.zeros([BLOCK_N, BLOCK_M], DTYPE)
    else:
        n = query_start + tl.arange(0, BLOCK_N)[:, None]
        m = key_start + tl.arange(0, BLOCK_M)[None, :]
        offsets = head * strides[0] + n.to(tl.int64) * strides[1] + m.to(tl.int64) * strides[2]
        return tl.load(ptr + offsets, mask=(n < N) & (m < M), other=0.0).to(DTYPE)


@triton.jit
def _scores(q, k, bias, keys, scale, PRECISION: tl.constexpr = TF32X3):
    """S of one tile, -inf wherever a key is outside the map. [BLOCK_N, BLOCK_M]"""
    return tl.where(keys[3][None, :], scaled(dot(q, tl.trans(k), PRECISION), scale) + bias, float("-inf"))


@triton.jit
def _load_lse(ptr, rows, queries):
    """L of the queries. [BLOCK]

    Outside the map, where it was never written, infinity: P is 0 there. It is contracted over the queries in dK and dV.
    """
    return tl.load(ptr + rows, mask=queries[3], other=float("inf"))


@triton.jit
def _probabilities(q, k, bias, lse, keys, scale, PRECISION: tl.constexpr = TF32X3):
    """P of one tile from the saved L; zero wherever a query or a key is outside the map. [BLOCK_N, BLOCK_M]

    The rounding of L scales a row by some 1 + |L| eps, which shows in dP - delta: divide P by the sums of its rows.
    """
    return tl.exp(_scores(q, k, bias, keys, scale, PRECISION) - lse[:, None])


@triton.jit
def _softmax_backward(q, k, v, g, bias, lse, delta, total, keys, scale):
    """P and dS of one tile from the saved L and the sums over whole rows. [BLOCK_N, BLOCK_M]"""
    p = _probabilities(q, k, bias, lse, keys, scale) * divide_rows(1.0, total)[:, None]
    return p, p * (dot(g, tl.trans(v)) - delta[:, None])


# ---- kernels ---------------------------------------------------------------------------------------------------------

# These change from call to call without changing the code that is best for them.
_jit = triton.jit(do_not_specialize=["heads", "window_count", "windows_per_program", "tangents"])


@_jit
def window_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, lse_ptr,
    q_strides, k_strides, v_strides, bias_strides, out_strides,
    query_grid, key_grid, windows, heads, window_count, windows_per_program, scale: tl.float64,
    WINDOW: tl.constexpr, KEY_WINDOW: tl.constexpr, D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr, OFFSET: tl.constexpr, CHANNELS_FIRST: tl.constexpr,
):  # fmt: skip
    """Out and L of a chunk of the ``window_count`` windows, each of which is one tile, for one head.

    Heads run fastest, then chunks.
    """
    N: tl.constexpr = WINDOW[0] * WINDOW[1]
    M: tl.constexpr = KEY_WINDOW[0] * KEY_WINDOW[1]
    pid = tl.program_id(0)
    head = (pid % heads).to(tl.int64)
    first = pid // heads * windows_per_program
    last = tl.minimum(first + windows_per_program, window_count)
    bias = _load_bias(bias_ptr, bias_strides, head, 0, 0, N, M, BLOCK_N, BLOCK_M, DTYPE)
    for index in range(first, last):
        window = _window(index, windows)
        queries = _tokens(window, query_grid, 0, WINDOW, BLOCK_N, OFFSET)
        keys = _tokens(window, key_grid, 0, KEY_WINDOW, BLOCK_M, OFFSET)
        q = _load(q_ptr, q_strides, queries, head, D, BLOCK_D, CHANNELS_FIRST)  # [BLOCK_N, BLOCK_D]
        k = _load(k_ptr, k_strides, keys, head, D, BLOCK_D, CHANNELS_FIRST)  # [BLOCK_M, BLOCK_D]
        v = _load(v_ptr, v_strides, keys, head, D, BLOCK_D, CHANNELS_FIRST)  # [BLOCK_M, BLOCK_D]
        s = _scores(q, k, bias, keys, scale)  # [BLOCK_N, BLOCK_M]
        p, top, total = softmax(s)
        out = dot(p.to(v.dtype), v) * (1.0 / total)[:, None]
        _store(out_ptr, out_strides, queries, head, out, D, BLOCK_D, CHANNELS_FIRST)
        if lse_ptr is not None:
            tl.store(lse_ptr + _row_offsets(queries, head, heads, query_grid), top + tl.log(total), mask=queries[3])


@_jit
def window_attention_fwd_blocks_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, lse_ptr,
    q_strides, k_strides, v_strides, bias_strides, out_strides,
    query_grid, key_grid, windows, heads, scale: tl.float64,
    WINDOW: tl.constexpr, KEY_WINDOW: tl.constexpr, D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr, OFFSET: tl.constexpr, CHANNELS_FIRST: tl.constexpr,
):  # fmt: skip
    """Out and L of one block of queries of one window and head; heads run fastest, then blocks, then windows."""
    N: tl.constexpr = WINDOW[0] * WINDOW[1]
    M: tl.constexpr = KEY_WINDOW[0] * KEY_WINDOW[1]
    head, window, start_n = _program(heads, windows, N, BLOCK_N)
    queries = _tokens(window, query_grid, start_n, WINDOW, BLOCK_N, OFFSET)
    q = _load(q_ptr, q_strides, queries, head, D, BLOCK_D, CHANNELS_FIRST)  # [BLOCK_N, BLOCK_D]

    top = tl.full([BLOCK_N], float("-inf"), DTYPE)  # the largest score so far
    total = tl.zeros([BLOCK_N], DTYPE)  # the sum of exp(score - top) so far
    out = tl.zeros([BLOCK_N, BLOCK_D], DTYPE)
    for start_m in range(0, M, BLOCK_M):
        keys = _tokens(window, key_grid, start_m, KEY_WINDOW, BLOCK_M, OFFSET)
        k = _load(k_ptr, k_strides, keys, head, D, BLOCK_D, CHANNELS_FIRST)  # [BLOCK_M, BLOCK_D]
        v = _load(v_ptr, v_strides, keys, head, D, BLOCK_D, CHANNELS_FIRST)  # [BLOCK_M, BLOCK_D]
        bias = _load_bias(bias_ptr, bias_strides, head, start_n, start_m, N, M, BLOCK_N, BLOCK_M, DTYPE)
        p, decay, top, total = online_softmax(_scores(q, k, bias, keys, scale), top, total)
        out = out * decay[:, None] + dot(p.to(v.dtype), v)

    _store(out_ptr, out_strides, queries, head, out * (1.0 / total)[:, None], D, BLOCK_D, CHANNELS_FIRST)
    if lse_ptr is not None:
        tl.store(lse_ptr + _row_offsets(queries, head, heads, query_grid), top + tl.log(total), mask=queries[3])


@_jit
def window_attention_bwd_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, lse_ptr, delta_ptr, total_ptr, dq_ptr, dk_ptr, dv_ptr, dbias_ptr,
    g_strides, q_strides, k_strides, v_strides, bias_strides, dq_strides, dk_strides, dv_strides,
    query_grid, key_grid, windows, heads, window_count, windows_per_program, scale: tl.float64,
    WINDOW: tl.constexpr, KEY_WINDOW: tl.constexpr, D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr, OFFSET: tl.constexpr, CHANNELS_FIRST: tl.constexpr,
):  # fmt: skip
    """One tile of queries and keys in a chunk of the ``window_count`` windows, for one head.

    Without ``delta_ptr`` the tile is the window, and everything is computed: dQ, dK, dV, and the partial sum of the
    bias's gradient if there is a bias. With ``delta_ptr`` and ``total_ptr``, that partial sum only. ``dbias_ptr`` is
    contiguous, (chunks, heads, N, M). Heads run fastest, then tiles, then chunks.
    """
    N: tl.constexpr = WINDOW[0] * WINDOW[1]
    M: tl.constexpr = KEY_WINDOW[0] * KEY_WINDOW[1]
    TILES_M: tl.constexpr = tl.cdiv(M, BLOCK_M)
    TILES: tl.constexpr = tl.cdiv(N, BLOCK_N) * TILES_M
    pid = tl.program_id(0)
    head = (pid % heads).to(tl.int64)
    chunk = pid // heads // TILES
    tile = pid // heads % TILES
    start_n = tile // TILES_M * BLOCK_N
    start_m = tile % TILES_M * BLOCK_M

    bias = _load_bias(bias_ptr, bias_strides, head, start_n, start_m, N, M, BLOCK_N, BLOCK_M, DTYPE)
    dbias = tl.zeros([BLOCK_N, BLOCK_M], DTYPE)
    first = chunk * windows_per_program
    for index in range(first, tl.minimum(first + windows_per_program, window_count)):
        window = _window(index, windows)
        queries = _tokens(window, query_grid, start_n, WINDOW, BLOCK_N, OFFSET)
        keys = _tokens(window, key_grid, start_m, KEY_WINDOW, BLOCK_M, OFFSET)
        rows = _row_offsets(queries, head, heads, query_grid)  # [BLOCK_N]
        q = _load(q_ptr, q_strides, queries, head, D, BLOCK_D, CHANNELS_FIRST)  # [BLOCK_N, BLOCK_D]
        k = _load(k_ptr, k_strides, keys, head, D, BLOCK_D, CHANNELS_FIRST)  # [BLOCK_M, BLOCK_D]
        v = _load(v_ptr, v_strides, keys, head, D, BLOCK_D, CHANNELS_FIRST)  # [BLOCK_M, BLOCK_D]
        g = _load(g_ptr, g_strides, queries, head, D, BLOCK_D, CHANNELS_FIRST)  # [BLOCK_N, BLOCK_D]
        lse = _load_lse(lse_ptr, rows, queries)
        if delta_ptr is None:
            p = _probabilities(q, k, bias, lse, keys, scale)  # [BLOCK_N, BLOCK_M]
            p *= divide_rows(1.0, tl.sum(p, 1))[:, None]
            dp = dot(g, tl.trans(v))  # [BLOCK_N, BLOCK_M]
            ds = p * (dp - tl.sum(p * dp, 1)[:, None])
            dv = dot(tl.trans(p.to(g.dtype)), g)  # [BLOCK_M, BLOCK_D]
            _store(dv_ptr, dv_strides, keys, head, dv, D, BLOCK_D, CHANNELS_FIRST)
            dq = scaled(dot(ds.to(k.dtype), k), scale)  # [BLOCK_N, BLOCK_D]
            _store(dq_ptr, dq_strides, queries, head, dq, D, BLOCK_D, CHANNELS_FIRST)
            dk = scaled(dot(tl.trans(ds.to(q.dtype)), q), scale)  # [BLOCK_M, BLOCK_D]
            _store(dk_ptr, dk_strides, keys, head, dk, D, BLOCK_D, CHANNELS_FIRST)
        else:
            delta = tl.load(delta_ptr + rows, mask=queries[3], other=0.0)
            total = tl.load(total_ptr + rows, mask=queries[3], other=0.0)
            _, ds = _softmax_backward(q, k, v, g, bias, lse, delta, total, keys, scale)
        dbias += ds

    if dbias_ptr is not None:
        n = start_n + tl.arange(0, BLOCK_N)[:, None]
        m = start_m + tl.arange(0, BLOCK_M)[None, :]
        offsets = ((chunk * heads + head) * N + n) * M + m
        tl.store(dbias_ptr + offsets, dbias, mask=(n < N) & (m < M))


@_jit
def window_attention_bwd_query_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, lse_ptr, delta_ptr, total_ptr, dq_ptr,
    g_strides, q_strides, k_strides, v_strides, bias_strides, dq_strides,
    query_grid, key_grid, windows, heads, scale: tl.float64,
    WINDOW: tl.constexpr, KEY_WINDOW: tl.constexpr, D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr, OFFSET: tl.constexpr, CHANNELS_FIRST: tl.constexpr,
):  # fmt: skip
    """dQ, delta and the sums of the rows of P of one block of queries; programs in the order of the forward."""
    N: tl.constexpr = WINDOW[0] * WINDOW[1]
    M: tl.constexpr = KEY_WINDOW[0] * KEY_WINDOW[1]
    head, window, start_n = _program(heads, windows, N, BLOCK_N)
    queries = _tokens(window, query_grid, start_n, WINDOW, BLOCK_N, OFFSET)
    rows = _row_offsets(queries, head, heads, query_grid)  # [BLOCK_N]
    q = _load(q_ptr, q_strides, queries, head, D, BLOCK_D, CHANNELS_FIRST)  # [BLOCK_N, BLOCK_D]
    g = _load(g_ptr, g_strides, queries, head, D, BLOCK_D, CHANNELS_FIRST)  # [BLOCK_N, BLOCK_D]
    lse = _load_lse(lse_ptr, rows, queries)

    # Two passes over the keys: one pass would have to subtract delta from sums that cancel.
    delta = tl.zeros([BLOCK_N], DTYPE)
    total = tl.zeros([BLOCK_N], DTYPE)
    for start_m in range(0, M, BLOCK_M):
        keys = _tokens(window, key_grid, start_m, KEY_WINDOW, BLOCK_M, OFFSET)
        k = _load(k_ptr, k_strides, keys, head, D, BLOCK_D, CHANNELS_FIRST)  # [BLOCK_M, BLOCK_D]
        v = _load(v_ptr, v_strides, keys, head, D, BLOCK_D, CHANNELS_FIRST)  # [BLOCK_M, BLOCK_D]
        bias = _load_bias(bias_ptr, bias_strides, head, start_n, start_m, N, M, BLOCK_N, BLOCK_M, DTYPE)
        p = _probabilities(q, k, bias, lse, keys, scale)  # [BLOCK_N, BLOCK_M]
        delta += tl.sum(p * dot(g, tl.trans(v)), 1)
        total += tl.sum(p, 1)
    delta = divide_rows(delta, total)
    tl.store(delta_ptr + rows, delta, mask=queries[3])
    tl.store(total_ptr + rows, total, mask=queries[3])

    dq = tl.zeros([BLOCK_N, BLOCK_D], DTYPE)
    for start_m in range(0, M, BLOCK_M):
        keys = _tokens(window, key_grid, start_m, KEY_WINDOW, BLOCK_M, OFFSET)
        k = _load(k_ptr, k_strides, keys, head, D, BLOCK_D, CHANNELS_FIRST)  # [BLOCK_M, BLOCK_D]
        v = _load(v_ptr, v_strides, keys, head, D, BLOCK_D, CHANNELS_FIRST)  # [BLOCK_M, BLOCK_D]
        bias = _load_bias(bias_ptr, bias_strides, head, start_n, start_m, N, M, BLOCK_N, BLOCK_M, DTYPE)
        _, ds = _softmax_backward(q, k, v, g, bias, lse, delta, total, keys, scale)  # [BLOCK_N, BLOCK_M]
        dq += dot(ds.to(k.dtype), k)
    _store(dq_ptr, dq_strides, queries, head, scaled(dq, scale), D, BLOCK_D, CHANNELS_FIRST)


@_jit
def window_attention_bwd_key_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, lse_ptr, delta_ptr, total_ptr, dk_ptr, dv_ptr,
    g_strides, q_strides, k_strides, v_strides, bias_strides, dk_strides, dv_strides,
    query_grid, key_grid, windows, heads, scale: tl.float64,
    WINDOW: tl.constexpr, KEY_WINDOW: tl.constexpr, D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr, OFFSET: tl.constexpr, CHANNELS_FIRST: tl.constexpr,
):  # fmt: skip
    """dK and dV of one block of keys; heads run fastest, then blocks, then windows."""
    N: tl.constexpr = WINDOW[0] * WINDOW[1]
    M: tl.constexpr = KEY_WINDOW[0] * KEY_WINDOW[1]
    head, window, start_m = _program(heads, windows, M, BLOCK_M)
    keys = _tokens(window, key_grid, start_m, KEY_WINDOW, BLOCK_M, OFFSET)
    k = _load(k_ptr, k_strides, keys, head, D, BLOCK_D, CHANNELS_FIRST)  # [BLOCK_M, BLOCK_D]
    v = _load(v_ptr, v_strides, keys, head, D, BLOCK_D, CHANNELS_FIRST)  # [BLOCK_M, BLOCK_D]

    dk = tl.zeros([BLOCK_M, BLOCK_D], DTYPE)
    dv = tl.zeros([BLOCK_M, BLOCK_D], DTYPE)
    for start_n in range(0, N, BLOCK_N):
        queries = _tokens(window, query_grid, start_n, WINDOW, BLOCK_N, OFFSET)
        rows = _row_offsets(queries, head, heads, query_grid)  # [BLOCK_N]
        q = _load(q_ptr, q_strides, queries, head, D, BLOCK_D, CHANNELS_FIRST)  # [BLOCK_N, BLOCK_D]
        g = _load(g_ptr, g_strides, queries, head, D, BLOCK_D, CHANNELS_FIRST)  # [BLOCK_N, BLOCK_D]
        bias = _load_bias(bias_ptr, bias_strides, head, start_n, start_m, N, M, BLOCK_N, BLOCK_M, DTYPE)
        lse = _load_lse(lse_ptr, rows, queries)
        delta = tl.load(delta_ptr + rows, mask=queries[3], other=0.0)
        total = tl.load(total_ptr + rows, mask=queries[3], other=0.0)
        p, ds = _softmax_backward(q, k, v, g, bias, lse, delta, total, keys, scale)  # [BLOCK_N, BLOCK_M]
        dv += dot(tl.trans(p.to(g.dtype)), g)
        dk += dot(tl.trans(ds.to(q.dtype)), q)
    _store(dk_ptr, dk_strides, keys, head, scaled(dk, scale), D, BLOCK_D, CHANNELS_FIRST)
    _store(dv_ptr, dv_strides, keys, head, dv, D, BLOCK_D, CHANNELS_FIRST)


@triton.jit
def transpose_kernel(
    planes_ptr, vectors_ptr, batch_stride, channel_stride, channels, tokens,
    TO_VECTORS: tl.constexpr, CHANNELS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Copies planes, (B, channels, tokens) with contiguous tokens, to contiguous vectors (B, tokens, channels) or back.

    Each side is read or written along its own contiguous dimension. Blocks of tokens run fastest, then those of
    channels, then the batch.
    """
    pid = tl.program_id(0)
    blocks, groups = tl.cdiv(tokens, TOKENS), tl.cdiv(channels, CHANNELS)
    token = pid % blocks * TOKENS + tl.arange(0, TOKENS)
    channel = pid // blocks % groups * CHANNELS + tl.arange(0, CHANNELS)
    batch = (pid // blocks // groups).to(tl.int64)
    planes_ptr += batch * batch_stride + (channel.to(tl.int64)[:, None] * channel_stride + token[None, :])
    vectors_ptr += (batch * tokens + token[:, None]) * channels + channel[None, :]
    exists = (channel < channels)[:, None] & (token < tokens)[None, :]  # [CHANNELS, TOKENS]
    if TO_VECTORS:
        tl.store(vectors_ptr, tl.trans(tl.load(planes_ptr, mask=exists)), mask=tl.trans(exists))
    else:
        tl.store(planes_ptr, tl.trans(tl.load(vectors_ptr, mask=tl.trans(exists))), mask=exists)


# ---- launches --------------------------------------------------------------------------------------------------------


class Tiling(NamedTuple):
    """Block sizes, and the warps that share a block."""

    block_n: int
    block_m: int
    block_d: int
    num_warps: int


def tiling(n: int, m: int, d: int, dtype: torch.dtype) -> Tiling:
    """The blocks for windows of n queries and m keys of d elements: as many tokens, up to 64, as registers can hold.

    Four warps share a block, which multiply by one instruction on Hopper. float64 is multiplied without tensor cores:
    each thread reads whole rows and columns, and more threads are what keeps it from spilling.
    """
    block_d = max(16, triton.next_power_of_2(d))
    tile_bytes = 8192 if dtype == torch.float64 else 16384
    limit = max(16, min(64, tile_bytes // (block_d * dtype.itemsize)))
    block_n, block_m = (min(limit, max(SMALLEST_BLOCK, triton.next_power_of_2(size))) for size in (n, m))
    num_warps = max(block_n // 8, 8 if block_d >= 64 else 1) if dtype == torch.float64 else 4
    return Tiling(block_n, block_m, block_d, num_warps)


FORWARD_PROGRAMS = 2048
"""How many programs of the forward share the windows, if there are as many: each takes some windows, so that the bias
is loaded for all of them at once, and they are more than run at the same time, so that they end together."""


SMALLEST_BLOCK = 16  # tokens


def is_planes(x: Tensor) -> bool:
    """Whether each element of the vectors is a contiguous plane of the map, at equal distances."""
    _, _, width, _, dim = x.shape
    _, row, column, head, element = x.stride()
    return column == 1 and row == width and head == dim * element


class Transposed:
    """Channels-first maps as contiguous ones, (B, H, W, heads, D), and the launches that copy them.

    A window's rows of a few elements are slow to load, and there is a better way: both copies and the attention in
    between take a third of the time. Windows of one small tile are as fast as they are.
    """

    def __init__(self, wanted: bool):
        self._wanted = wanted
        self.before: list[Launch] = []
        self.after: list[Launch] = []

    def read(self, x: Tensor) -> Tensor:
        """What kernels read for x."""
        return self._copied(x, self.before, to_vectors=True)

    def written(self, x: Tensor) -> Tensor:
        """What kernels write for x."""
        return self._copied(x, self.after, to_vectors=False)

    def _copied(self, x: Tensor, launches: list[Launch], to_vectors: bool) -> Tensor:
        if not self._wanted:
            return x
        vectors = x.new_empty(x.shape)
        batch, height, width, heads, dim = x.shape
        channels, tokens, block = heads * dim, height * width, 64
        arguments = {
            "planes_ptr": x,
            "vectors_ptr": vectors,
            "batch_stride": x.stride(0),
            "channel_stride": x.stride(4),
            "channels": channels,
            "tokens": tokens,
            "TO_VECTORS": to_vectors,
            "CHANNELS": block,
            "TOKENS": block,
        }
        programs = batch * triton.cdiv(channels, block) * triton.cdiv(tokens, block)
        launches.append(Launch(transpose_kernel, programs, arguments, num_warps=8, num_stages=1))
        return vectors


def transposed(window_size: Pair, *tensors: Tensor) -> Transposed:
    """The copies of a call on these tensors."""
    worth = window_size[0] * window_size[1] > SMALLEST_BLOCK
    return Transposed(worth and all(is_channels_first(x) and is_planes(x) for x in tensors))


def is_channels_first(x: Tensor) -> bool:
    """Whether neighbours on the map are closer in memory than the elements of a vector."""
    return x.stride(2) < x.stride(4)


def offset_dtype(tensors: list[Tensor]) -> tl.dtype:
    """The integers that count the elements between two tokens of one map and head in any of ``tensors``.

    int32 if they can, which takes half the registers of int64.
    """
    spans = []
    for tensor in tensors:
        _, height, width, _, d = tensor.shape[-5:]
        _, row, column, _, element = tensor.stride()[-5:]
        spans.append((height - 1) * row + (width - 1) * column + (d - 1) * element)
    return tl.int32 if max(spans) < 2**31 else tl.int64


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    window_size: Pair,
    shift: Pair,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """O in the layout of ``query``, and L, which is empty, (0,), if it is not asked for."""
    batch, height, width, heads, _ = query.shape
    out = torch.empty_like(query)
    lse = query.new_empty((batch, heads, height, width) if return_lse else (0,), dtype=statistics_dtype(query.dtype))
    if out.numel():
        tensors = query, key, value, bias, out, lse if return_lse else None
        run(forward_launches, *tensors, window_size=window_size, shift=shift, scale=scale)
    return out, lse


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    window_size: Pair,
    shift: Pair,
    scale: float,
) -> Tensor | None:
    """Writes the gradients of query, key and value into the tensors given for them, and returns that of the bias."""
    if not query.numel():
        for tensor in (grad_query, grad_key, grad_value):
            tensor.zero_()
        return None if bias is None else torch.zeros_like(bias, memory_format=torch.contiguous_format)
    grads = grad_query, grad_key, grad_value
    # L is contiguous already, unless vmap made it a view
    inputs = grad, query, key, value, bias, lse.contiguous()
    partial = run(backward_launches, *inputs, *grads, window_size=window_size, shift=shift, scale=scale)
    if partial is None:
        return None
    return partial.sum(0) if bias.shape[0] == query.shape[3] else partial.sum((0, 1)).unsqueeze(0)


def forward_launches(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
    *,
    window_size: Pair,
    shift: Pair,
    scale: float,
) -> Made:
    """The launches that fill ``out``, and ``lse`` unless it is None."""
    copies = transposed(window_size, query, key, value, out)
    query, key, value = map(copies.read, (query, key, value))
    call = Call(query, key, bias, window_size, shift, scale)
    tensors = {"q": query, "k": key, "v": value, "out": copies.written(out)}
    arguments = {"bias_ptr": bias, "lse_ptr": lse}
    if call.blocks_n * call.blocks_m > 1:
        kernel, programs = window_attention_fwd_blocks_kernel, call.windows * call.blocks_n
    else:
        per_program = terms_per_program(call.windows, call.heads, FORWARD_PROGRAMS)
        arguments |= {"window_count": call.windows, "windows_per_program": per_program}
        kernel, programs = window_attention_fwd_kernel, triton.cdiv(call.windows, per_program)
    return [*copies.before, call.launch(kernel, programs, tensors, num_stages=2, **arguments), *copies.after], None


def backward_launches(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    *,
    window_size: Pair,
    shift: Pair,
    scale: float,
) -> Made:
    """The launches that fill the gradients, and the partial sums they leave for the bias, (chunks, heads, N, M)."""
    copies = transposed(window_size, grad, query, key, value, grad_query, grad_key, grad_value)
    grad, query, key, value = map(copies.read, (grad, query, key, value))
    grad_query, grad_key, grad_value = map(copies.written, (grad_query, grad_key, grad_value))
    call = Call(query, key, bias, window_size, shift, scale)
    tensors = {"g": grad, "q": query, "k": key, "v": value}
    outputs = {"dq": grad_query, "dk": grad_key, "dv": grad_value}
    tiles = call.blocks_n * call.blocks_m
    per_program = terms_per_program(call.windows, call.heads * tiles, call.most_programs)
    chunks = triton.cdiv(call.windows, per_program)
    partial = None if bias is None else lse.new_empty((chunks, call.heads, call.n, call.m))
    whole = tiles == 1
    delta, total = (None, None) if whole else (torch.empty_like(lse), torch.empty_like(lse))
    saved = {"bias_ptr": bias, "lse_ptr": lse, "delta_ptr": delta, "total_ptr": total}
    launches = []
    if not whole:
        launches = [
            call.launch(
                window_attention_bwd_query_kernel, call.windows * call.blocks_n, tensors | {"dq": grad_query}, **saved
            ),
            call.launch(
                window_attention_bwd_key_kernel,
                call.windows * call.blocks_m,
                tensors | {"dk": grad_key, "dv": grad_value},
                **saved,
            ),
        ]
    if whole or bias is not None:
        launches.append(
            call.launch(
                window_attention_bwd_kernel,
                chunks * tiles,
                tensors | (outputs if whole else dict.fromkeys(outputs)),
                **saved,
                dbias_ptr=partial,
                num_stages=2 if query.dtype.itemsize == 2 else 1,  # more of float32 has no room in shared memory
                window_count=call.windows,
                windows_per_program=per_program,
            )
        )
    return [*copies.before, *launches, *copies.after], partial


def bias_strides(bias: Tensor) -> tuple[int, ...]:
    """`strides` of a bias or of tangents of it, 0 along the heads if these share it."""
    heads, *others = strides(bias, 3)
    return 0 if bias.shape[-3] == 1 else heads, *others


class Call:
    """What the launches of one call have in common: the windows, the tiles and the arguments made of them."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        bias: Tensor | None,
        window_size: Pair,
        shift: Pair,
        scale: float,
        choose: Callable[..., Tiling] = tiling,
    ):
        query_map, key_map = query.shape[1:3], key.shape[1:3]
        ratio = [size // key_size for size, key_size in zip(query_map, key_map, strict=True)]
        # of the grid of windows: rows and columns of the first full window that lie before the map
        before = [-s % w for s, w in zip(shift, window_size, strict=True)]
        grid = [triton.cdiv(size + b, w) for size, b, w in zip(query_map, before, window_size, strict=True)]
        key_window = [w // r for w, r in zip(window_size, ratio, strict=True)]
        key_before = [b // r for b, r in zip(before, ratio, strict=True)]
        self.heads, d = query.shape[3:]
        self.windows = query.shape[0] * grid[0] * grid[1]
        self.n, self.m = window_size[0] * window_size[1], key_window[0] * key_window[1]
        tile = choose(self.n, self.m, d, query.dtype)
        self.blocks_n, self.blocks_m = triton.cdiv(self.n, tile.block_n), triton.cdiv(self.m, tile.block_m)
        self.num_warps = tile.num_warps
        # of those that add up a sum: small tiles take more of them to fill a GPU, and less memory for each
        self.most_programs = 4096 if tile.block_n * tile.block_m <= 1024 else 1024
        self.arguments: dict[str, Any] = {
            "bias_strides": None if bias is None else bias_strides(bias),
            "query_grid": (*query_map, *(-b for b in before)),
            "key_grid": (*key_map, *(-b for b in key_before)),
            "windows": tuple(grid),
            "heads": self.heads,
            "scale": scale,
            "WINDOW": tuple(window_size),
            "KEY_WINDOW": tuple(key_window),
            "D": d,
            "BLOCK_N": tile.block_n,
            "BLOCK_M": tile.block_m,
            "BLOCK_D": tile.block_d,
            "DTYPE": tl.float64 if query.dtype == torch.float64 else tl.float32,
            "CHANNELS_FIRST": is_channels_first(query),
        }

    def launch(
        self,
        kernel: Any,
        programs_per_head: int,
        tensors: dict[str, Tensor | None],
        num_stages: int = 1,
        **arguments: Any,
    ) -> Launch:
        """A launch on ``tensors`` of (B, H, W, heads, D), each of which becomes a pointer and its strides."""
        offset = offset_dtype([tensor for tensor in tensors.values() if tensor is not None])
        return Launch(
            kernel,
            programs_per_head * self.heads,
            pointers_and_strides(tensors, 5) | self.arguments | {"OFFSET": offset} | arguments,
            num_warps=self.num_warps,
            num_stages=num_stages,
        )
