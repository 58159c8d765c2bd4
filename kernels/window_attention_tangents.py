"""Tangents of window attention in Triton, of its output and of its gradients, along K directions at once.

Inside each window, and for each head, the formulas are those of attention_tangents.py:

    S. = scale * (Q. K^T + Q K.^T) + bias.        mu. = rowsum(P * S.)
    P. = P * (S. - mu.)        O. = P. V + P V.

    dP. = G. V^T + G V.^T        delta. = rowsum(P. * dP + P * dP.)
    dS. = P. * (dP - delta) + P * (dP. - delta.)
    dQ. = scale * (dS. K + dS K.)        dK. = scale * (dS.^T Q + dS^T Q.)        dV. = P.^T G + P^T G.
    dbias. = sum of dS. over the windows

Shapes: those of window_attention.py, with K in front of every tangent; mu. and delta. (B, heads, K, H, W). Any strides.
A tangent that is None is zero, and what it would be multiplied by is not computed. Nothing is saved by the forward.

Kernels. ``window_attention_rows_kernel`` finds what belongs to no tangent, once for all: the largest score of each
query, the sum of exp(S - largest), and delta. ``window_attention_tangents_query_kernel`` takes a block of queries twice
over blocks of keys: for mu. and delta., then for O. and dQ.. ``window_attention_tangents_key_kernel`` takes a block of
keys over blocks of queries for dK. and dV., and ``window_attention_tangents_kernel`` adds up dS. for the bias, tile by
tile, over a chunk of the windows. In 16 bits, this last kernel does the work of the first two as well where one block
of keys holds those of a window, and all the work where one block of queries holds them too. A program has one tangent,
for the reason given in attention_tangents.py.

Precision is that of window_attention.py, but float32 is multiplied without tensor cores, for whose split operands there
are too few registers. Tiles of vectors are tuples of one part, which the functions of attention.py take.

Source: none; the formulas are those of vitfast/reference/window_attention.py.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import _multiply, _products, _zeros
from .attention_tangents import _add_product_tangent, _load_rows, _products_tangent, _store_rows
from .common import (
    divide_rows,
    online_softmax,
    scaled,
    softmax,
    statistics_dtype,
    tangents_to_fill,
    terms_per_program,
)
from .launch import Made, run
from .window_attention import (
    Call,
    Pair,
    Tiling,
    _jit,
    _load,
    _load_bias,
    _probabilities,
    _program,
    _row_offsets,
    _scores,
    _store,
    _tokens,
    _window,
    bias_strides,
    is_channels_first,
)

# ---- tiles -----------------------------------------------------------------------------------------------------------


@triton.jit
def _load_tangent(
    ptr, strides, t, tokens, head,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHANNELS_FIRST: tl.constexpr,
):  # fmt: skip
    """The vectors of the tokens of one head in tangent t, one part or, if it is None, none. [BLOCK, BLOCK_D]"""
    if ptr is None:
        return ()
    else:
        return (_load(ptr + t * strides[5], strides, tokens, head, D, BLOCK_D, CHANNELS_FIRST),)


@triton.jit
def _store_tangent(
    ptr, strides, t, tokens, head, tile,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHANNELS_FIRST: tl.constexpr,
):  # fmt: skip
    _store(ptr + t * strides[5], strides, tokens, head, tile[0], D, BLOCK_D, CHANNELS_FIRST)


@triton.jit
def _scores_tangent(
    q, k, q_t, k_t, bias_t_ptr, bias_t_strides, t, head, start_n, start_m, scale,
    N: tl.constexpr, M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """S. of one tile in tangent t. [BLOCK_N, BLOCK_M]"""
    s_t = scaled(_products_tangent(q, k, q_t, k_t, DTYPE), scale)
    if bias_t_ptr is None:
        return s_t
    else:
        bias_t_ptr += t * bias_t_strides[3]
        return s_t + _load_bias(bias_t_ptr, bias_t_strides, head, start_n, start_m, N, M, BLOCK_N, BLOCK_M, DTYPE)


# ---- kernels ---------------------------------------------------------------------------------------------------------


@_jit
def window_attention_tangents_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, g_t_ptr, q_t_ptr, k_t_ptr, v_t_ptr, bias_t_ptr,
    top_ptr, total_ptr, delta_ptr, mean_t_ptr, delta_t_ptr, out_t_ptr, dq_t_ptr, dk_t_ptr, dv_t_ptr, dbias_t_ptr,
    g_strides, q_strides, k_strides, v_strides, bias_strides,
    g_t_strides, q_t_strides, k_t_strides, v_t_strides, bias_t_strides,
    out_t_strides, dq_t_strides, dk_t_strides, dv_t_strides,
    query_grid, key_grid, windows, heads, tangents, window_count, windows_per_program, scale: tl.float64,
    WHOLE_ROWS: tl.constexpr,
    WINDOW: tl.constexpr, KEY_WINDOW: tl.constexpr, D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr, OFFSET: tl.constexpr, CHANNELS_FIRST: tl.constexpr,
):  # fmt: skip
    """One tile of queries and keys in a chunk of the ``window_count`` windows, for one head and tangent.

    With WHOLE_ROWS the tile has all keys of a window: O. unless ``out_t_ptr`` is None, and unless ``g_ptr`` is None dQ.
    and the partial sum of dbias., if there is a bias, and dK. and dV. if the tile has all queries too; if it has not,
    ``top_ptr`` and those behind it are written for the kernel of the keys. Without WHOLE_ROWS they are read, and give
    the partial sum of dbias. only. ``dbias_t_ptr`` is contiguous, (chunks, K, heads, N, M). Heads run fastest, then
    tangents, then tiles, then chunks.
    """
    N: tl.constexpr = WINDOW[0] * WINDOW[1]
    M: tl.constexpr = KEY_WINDOW[0] * KEY_WINDOW[1]
    TILES_M: tl.constexpr = tl.cdiv(M, BLOCK_M)
    TILES: tl.constexpr = tl.cdiv(N, BLOCK_N) * TILES_M
    pid = tl.program_id(0)
    head = (pid % heads).to(tl.int64)
    t = (pid // heads % tangents).to(tl.int64)
    tile = pid // heads // tangents % TILES
    chunk = pid // heads // tangents // TILES
    start_n = tile // TILES_M * BLOCK_N
    start_m = tile % TILES_M * BLOCK_M

    bias = _load_bias(bias_ptr, bias_strides, head, start_n, start_m, N, M, BLOCK_N, BLOCK_M, DTYPE)
    dbias_t = tl.zeros([BLOCK_N, BLOCK_M], DTYPE)
    index = chunk * windows_per_program
    end = tl.minimum(index + windows_per_program, window_count)
    while index < end:
        window = _window(index, windows)
        queries = _tokens(window, query_grid, start_n, WINDOW, BLOCK_N, OFFSET)
        keys = _tokens(window, key_grid, start_m, KEY_WINDOW, BLOCK_M, OFFSET)
        rows = _row_offsets(queries, head, heads, query_grid)  # [BLOCK_N]
        q = (_load(q_ptr, q_strides, queries, head, D, BLOCK_D, CHANNELS_FIRST),)  # [BLOCK_N, BLOCK_D]
        k = (_load(k_ptr, k_strides, keys, head, D, BLOCK_D, CHANNELS_FIRST),)  # [BLOCK_M, BLOCK_D]
        v = (_load(v_ptr, v_strides, keys, head, D, BLOCK_D, CHANNELS_FIRST),)  # [BLOCK_M, BLOCK_D]
        if WHOLE_ROWS:
            s = _scores(q[0], k[0], bias, keys, scale, "ieee")  # [BLOCK_N, BLOCK_M]
            p, top, total = softmax(s)
            # a query outside the map has no part in any sum over the queries
            p *= tl.where(queries[3], 1.0 / total, 0.0)[:, None]
        else:
            top, inverse = _load_rows(top_ptr, total_ptr, rows, queries[3])
            p = _probabilities(q[0], k[0], bias, top, keys, scale, "ieee") * inverse[:, None]
        if g_ptr is not None:
            g = (_load(g_ptr, g_strides, queries, head, D, BLOCK_D, CHANNELS_FIRST),)  # [BLOCK_N, BLOCK_D]
            dp = _products(g, v, "ieee")  # [BLOCK_N, BLOCK_M]
            delta = tl.sum(p * dp, 1) if WHOLE_ROWS else tl.load(delta_ptr + rows, mask=queries[3], other=0.0)
            dp -= delta[:, None]
        rows_t = _row_offsets(queries, head * tangents + t, heads * tangents, query_grid)
        q_t = _load_tangent(q_t_ptr, q_t_strides, t, queries, head, D, BLOCK_D, CHANNELS_FIRST)
        k_t = _load_tangent(k_t_ptr, k_t_strides, t, keys, head, D, BLOCK_D, CHANNELS_FIRST)
        v_t = _load_tangent(v_t_ptr, v_t_strides, t, keys, head, D, BLOCK_D, CHANNELS_FIRST)
        s_t = _scores_tangent(
            q, k, q_t, k_t, bias_t_ptr, bias_t_strides, t, head, start_n, start_m, scale,
            N, M, BLOCK_N, BLOCK_M, DTYPE,
        )  # fmt: skip
        mean_t = tl.sum(p * s_t, 1) if WHOLE_ROWS else tl.load(mean_t_ptr + rows_t, mask=queries[3], other=0.0)
        p_t = p * (s_t - mean_t[:, None])
        if out_t_ptr is not None:
            out_t = _add_product_tangent(_zeros((BLOCK_D,), BLOCK_N, DTYPE), p, p_t, v, v_t)
            _store_tangent(out_t_ptr, out_t_strides, t, queries, head, out_t, D, BLOCK_D, CHANNELS_FIRST)
        if g_ptr is not None:
            g_t = _load_tangent(g_t_ptr, g_t_strides, t, queries, head, D, BLOCK_D, CHANNELS_FIRST)
            dp_t = _products_tangent(g, v, g_t, v_t, DTYPE)
            if WHOLE_ROWS:
                delta_t = tl.sum(p_t * dp + p * dp_t, 1)
            else:
                delta_t = tl.load(delta_t_ptr + rows_t, mask=queries[3], other=0.0)
            ds_t = p_t * dp + p * (dp_t - delta_t[:, None])
            if WHOLE_ROWS and top_ptr is not None:
                tl.store(mean_t_ptr + rows_t, mean_t, mask=queries[3])
                tl.store(delta_t_ptr + rows_t, delta_t, mask=queries[3])
                if t == 0:  # the others belong to no tangent
                    _store_rows(top_ptr, total_ptr, delta_ptr, rows, queries[3], top, total, delta)
            if dq_t_ptr is not None:
                dq_t = _add_product_tangent(_zeros((BLOCK_D,), BLOCK_N, DTYPE), p * dp, ds_t, k, k_t)
                dq_t = _multiply(dq_t, tl.full([], scale, DTYPE))
                _store_tangent(dq_t_ptr, dq_t_strides, t, queries, head, dq_t, D, BLOCK_D, CHANNELS_FIRST)
            if dk_t_ptr is not None:
                zeros = _zeros((BLOCK_D,), BLOCK_M, DTYPE)
                dv_t = _add_product_tangent(zeros, tl.trans(p), tl.trans(p_t), g, g_t)
                _store_tangent(dv_t_ptr, dv_t_strides, t, keys, head, dv_t, D, BLOCK_D, CHANNELS_FIRST)
                dk_t = _add_product_tangent(zeros, tl.trans(p * dp), tl.trans(ds_t), q, q_t)
                dk_t = _multiply(dk_t, tl.full([], scale, DTYPE))
                _store_tangent(dk_t_ptr, dk_t_strides, t, keys, head, dk_t, D, BLOCK_D, CHANNELS_FIRST)
            if dbias_t_ptr is not None:
                dbias_t += ds_t
        index += 1

    if dbias_t_ptr is not None:
        n = start_n + tl.arange(0, BLOCK_N)[:, None]
        m = start_m + tl.arange(0, BLOCK_M)[None, :]
        offsets = (((chunk * tangents + t) * heads + head) * N + n) * M + m
        tl.store(dbias_t_ptr + offsets, dbias_t, mask=(n < N) & (m < M))


@_jit
def window_attention_rows_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, top_ptr, total_ptr, delta_ptr,
    g_strides, q_strides, k_strides, v_strides, bias_strides,
    query_grid, key_grid, windows, heads, scale: tl.float64,
    WINDOW: tl.constexpr, KEY_WINDOW: tl.constexpr, D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr, OFFSET: tl.constexpr, CHANNELS_FIRST: tl.constexpr,
):  # fmt: skip
    """The largest score of each query of a block, the sum of exp(S - largest), and unless ``g_ptr`` is None delta."""
    N: tl.constexpr = WINDOW[0] * WINDOW[1]
    M: tl.constexpr = KEY_WINDOW[0] * KEY_WINDOW[1]
    head, window, start_n = _program(heads, windows, N, BLOCK_N)
    queries = _tokens(window, query_grid, start_n, WINDOW, BLOCK_N, OFFSET)
    q = _load(q_ptr, q_strides, queries, head, D, BLOCK_D, CHANNELS_FIRST)  # [BLOCK_N, BLOCK_D]
    if g_ptr is not None:
        g = (_load(g_ptr, g_strides, queries, head, D, BLOCK_D, CHANNELS_FIRST),)  # [BLOCK_N, BLOCK_D]

    top = tl.full([BLOCK_N], float("-inf"), DTYPE)
    total = tl.zeros([BLOCK_N], DTYPE)
    delta = tl.zeros([BLOCK_N], DTYPE)
    for start_m in range(0, M, BLOCK_M):
        keys = _tokens(window, key_grid, start_m, KEY_WINDOW, BLOCK_M, OFFSET)
        k = _load(k_ptr, k_strides, keys, head, D, BLOCK_D, CHANNELS_FIRST)  # [BLOCK_M, BLOCK_D]
        bias = _load_bias(bias_ptr, bias_strides, head, start_n, start_m, N, M, BLOCK_N, BLOCK_M, DTYPE)
        p, decay, top, total = online_softmax(_scores(q, k, bias, keys, scale, "ieee"), top, total)
        if g_ptr is not None:
            v = (_load(v_ptr, v_strides, keys, head, D, BLOCK_D, CHANNELS_FIRST),)  # [BLOCK_M, BLOCK_D]
            delta = delta * decay + tl.sum(p * _products(g, v, "ieee"), 1)

    rows = _row_offsets(queries, head, heads, query_grid)  # [BLOCK_N]
    _store_rows(top_ptr, total_ptr, delta_ptr, rows, queries[3], top, total, divide_rows(delta, total))


@_jit
def window_attention_tangents_query_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, g_t_ptr, q_t_ptr, k_t_ptr, v_t_ptr, bias_t_ptr,
    top_ptr, total_ptr, delta_ptr, mean_t_ptr, delta_t_ptr, out_t_ptr, dq_t_ptr,
    g_strides, q_strides, k_strides, v_strides, bias_strides,
    g_t_strides, q_t_strides, k_t_strides, v_t_strides, bias_t_strides, out_t_strides, dq_t_strides,
    query_grid, key_grid, windows, heads, tangents, scale: tl.float64,
    WINDOW: tl.constexpr, KEY_WINDOW: tl.constexpr, D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr, OFFSET: tl.constexpr, CHANNELS_FIRST: tl.constexpr,
):  # fmt: skip
    """O. of one block of queries and one tangent, unless ``out_t_ptr`` is None, and unless ``g_ptr`` is None dQ..

    With dQ. also mu. and delta.. Heads run fastest, then tangents, then blocks, then windows.
    """
    N: tl.constexpr = WINDOW[0] * WINDOW[1]
    M: tl.constexpr = KEY_WINDOW[0] * KEY_WINDOW[1]
    head_t, window, start_n = _program(heads * tangents, windows, N, BLOCK_N)
    head, t = head_t % heads, head_t // heads
    queries = _tokens(window, query_grid, start_n, WINDOW, BLOCK_N, OFFSET)
    rows = _row_offsets(queries, head, heads, query_grid)  # [BLOCK_N]
    q = (_load(q_ptr, q_strides, queries, head, D, BLOCK_D, CHANNELS_FIRST),)  # [BLOCK_N, BLOCK_D]
    q_t = _load_tangent(q_t_ptr, q_t_strides, t, queries, head, D, BLOCK_D, CHANNELS_FIRST)  # [BLOCK_N, BLOCK_D]
    top, inverse = _load_rows(top_ptr, total_ptr, rows, queries[3])
    if g_ptr is not None:
        g = (_load(g_ptr, g_strides, queries, head, D, BLOCK_D, CHANNELS_FIRST),)  # [BLOCK_N, BLOCK_D]
        g_t = _load_tangent(g_t_ptr, g_t_strides, t, queries, head, D, BLOCK_D, CHANNELS_FIRST)  # [BLOCK_N, BLOCK_D]
        delta = tl.load(delta_ptr + rows, mask=queries[3], other=0.0)

    # Two passes over the keys: one pass would have to subtract mu. and delta. from sums that cancel.
    mean_t = tl.zeros([BLOCK_N], DTYPE)
    delta_t = tl.zeros([BLOCK_N], DTYPE)
    for start_m in range(0, M, BLOCK_M):
        keys = _tokens(window, key_grid, start_m, KEY_WINDOW, BLOCK_M, OFFSET)
        k = (_load(k_ptr, k_strides, keys, head, D, BLOCK_D, CHANNELS_FIRST),)  # [BLOCK_M, BLOCK_D]
        k_t = _load_tangent(k_t_ptr, k_t_strides, t, keys, head, D, BLOCK_D, CHANNELS_FIRST)  # [BLOCK_M, BLOCK_D]
        bias = _load_bias(bias_ptr, bias_strides, head, start_n, start_m, N, M, BLOCK_N, BLOCK_M, DTYPE)
        p = _probabilities(q[0], k[0], bias, top, keys, scale, "ieee") * inverse[:, None]
        s_t = _scores_tangent(
            q, k, q_t, k_t, bias_t_ptr, bias_t_strides, t, head, start_n, start_m, scale,
            N, M, BLOCK_N, BLOCK_M, DTYPE,
        )  # fmt: skip
        mean_t += tl.sum(p * s_t, 1)
        if g_ptr is not None:
            v = (_load(v_ptr, v_strides, keys, head, D, BLOCK_D, CHANNELS_FIRST),)  # [BLOCK_M, BLOCK_D]
            v_t = _load_tangent(v_t_ptr, v_t_strides, t, keys, head, D, BLOCK_D, CHANNELS_FIRST)  # [BLOCK_M, BLOCK_D]
            dp = _products(g, v, "ieee") - delta[:, None]
            # The rows of P * (dP - delta) add up to 0, so S. may stand here for S. - mu., which is not known yet.
            delta_t += tl.sum(p * (s_t * dp + _products_tangent(g, v, g_t, v_t, DTYPE)), 1)

    out_t = _zeros((BLOCK_D,), BLOCK_N, DTYPE)
    dq_t = _zeros((BLOCK_D,), BLOCK_N, DTYPE)
    for start_m in range(0, M, BLOCK_M):
        keys = _tokens(window, key_grid, start_m, KEY_WINDOW, BLOCK_M, OFFSET)
        k = (_load(k_ptr, k_strides, keys, head, D, BLOCK_D, CHANNELS_FIRST),)  # [BLOCK_M, BLOCK_D]
        k_t = _load_tangent(k_t_ptr, k_t_strides, t, keys, head, D, BLOCK_D, CHANNELS_FIRST)  # [BLOCK_M, BLOCK_D]
        v = (_load(v_ptr, v_strides, keys, head, D, BLOCK_D, CHANNELS_FIRST),)  # [BLOCK_M, BLOCK_D]
        v_t = _load_tangent(v_t_ptr, v_t_strides, t, keys, head, D, BLOCK_D, CHANNELS_FIRST)  # [BLOCK_M, BLOCK_D]
        bias = _load_bias(bias_ptr, bias_strides, head, start_n, start_m, N, M, BLOCK_N, BLOCK_M, DTYPE)
        p = _probabilities(q[0], k[0], bias, top, keys, scale, "ieee") * inverse[:, None]
        s_t = _scores_tangent(
            q, k, q_t, k_t, bias_t_ptr, bias_t_strides, t, head, start_n, start_m, scale,
            N, M, BLOCK_N, BLOCK_M, DTYPE,
        )  # fmt: skip
        p_t = p * (s_t - mean_t[:, None])
        if out_t_ptr is not None:
            out_t = _add_product_tangent(out_t, p, p_t, v, v_t)
        if g_ptr is not None:
            dp = _products(g, v, "ieee") - delta[:, None]
            dp_t = _products_tangent(g, v, g_t, v_t, DTYPE) - delta_t[:, None]
            dq_t = _add_product_tangent(dq_t, p * dp, p_t * dp + p * dp_t, k, k_t)

    if out_t_ptr is not None:
        _store_tangent(out_t_ptr, out_t_strides, t, queries, head, out_t, D, BLOCK_D, CHANNELS_FIRST)
    if g_ptr is not None:
        dq_t = _multiply(dq_t, tl.full([], scale, DTYPE))
        _store_tangent(dq_t_ptr, dq_t_strides, t, queries, head, dq_t, D, BLOCK_D, CHANNELS_FIRST)
        rows_t = _row_offsets(queries, head * tangents + t, heads * tangents, query_grid)
        tl.store(mean_t_ptr + rows_t, mean_t, mask=queries[3])
        tl.store(delta_t_ptr + rows_t, delta_t, mask=queries[3])


@_jit
def window_attention_tangents_key_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, g_t_ptr, q_t_ptr, k_t_ptr, v_t_ptr, bias_t_ptr,
    top_ptr, total_ptr, delta_ptr, mean_t_ptr, delta_t_ptr, dk_t_ptr, dv_t_ptr,
    g_strides, q_strides, k_strides, v_strides, bias_strides,
    g_t_strides, q_t_strides, k_t_strides, v_t_strides, bias_t_strides, dk_t_strides, dv_t_strides,
    query_grid, key_grid, windows, heads, tangents, scale: tl.float64,
    WINDOW: tl.constexpr, KEY_WINDOW: tl.constexpr, D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr, OFFSET: tl.constexpr, CHANNELS_FIRST: tl.constexpr,
):  # fmt: skip
    """dK. and dV. of one block of keys and one tangent; heads run fastest, then tangents, then blocks, then windows."""
    N: tl.constexpr = WINDOW[0] * WINDOW[1]
    M: tl.constexpr = KEY_WINDOW[0] * KEY_WINDOW[1]
    head_t, window, start_m = _program(heads * tangents, windows, M, BLOCK_M)
    head, t = head_t % heads, head_t // heads
    keys = _tokens(window, key_grid, start_m, KEY_WINDOW, BLOCK_M, OFFSET)
    k = (_load(k_ptr, k_strides, keys, head, D, BLOCK_D, CHANNELS_FIRST),)  # [BLOCK_M, BLOCK_D]
    v = (_load(v_ptr, v_strides, keys, head, D, BLOCK_D, CHANNELS_FIRST),)  # [BLOCK_M, BLOCK_D]
    k_t = _load_tangent(k_t_ptr, k_t_strides, t, keys, head, D, BLOCK_D, CHANNELS_FIRST)  # [BLOCK_M, BLOCK_D]
    v_t = _load_tangent(v_t_ptr, v_t_strides, t, keys, head, D, BLOCK_D, CHANNELS_FIRST)  # [BLOCK_M, BLOCK_D]

    dk_t = _zeros((BLOCK_D,), BLOCK_M, DTYPE)
    dv_t = _zeros((BLOCK_D,), BLOCK_M, DTYPE)
    for start_n in range(0, N, BLOCK_N):
        queries = _tokens(window, query_grid, start_n, WINDOW, BLOCK_N, OFFSET)
        q = (_load(q_ptr, q_strides, queries, head, D, BLOCK_D, CHANNELS_FIRST),)  # [BLOCK_N, BLOCK_D]
        g = (_load(g_ptr, g_strides, queries, head, D, BLOCK_D, CHANNELS_FIRST),)  # [BLOCK_N, BLOCK_D]
        q_t = _load_tangent(q_t_ptr, q_t_strides, t, queries, head, D, BLOCK_D, CHANNELS_FIRST)  # [BLOCK_N, BLOCK_D]
        g_t = _load_tangent(g_t_ptr, g_t_strides, t, queries, head, D, BLOCK_D, CHANNELS_FIRST)  # [BLOCK_N, BLOCK_D]
        rows = _row_offsets(queries, head, heads, query_grid)  # [BLOCK_N]
        top, inverse = _load_rows(top_ptr, total_ptr, rows, queries[3])
        delta = tl.load(delta_ptr + rows, mask=queries[3], other=0.0)
        rows_t = _row_offsets(queries, head * tangents + t, heads * tangents, query_grid)
        mean_t = tl.load(mean_t_ptr + rows_t, mask=queries[3], other=0.0)
        delta_t = tl.load(delta_t_ptr + rows_t, mask=queries[3], other=0.0)
        bias = _load_bias(bias_ptr, bias_strides, head, start_n, start_m, N, M, BLOCK_N, BLOCK_M, DTYPE)
        p = _probabilities(q[0], k[0], bias, top, keys, scale, "ieee") * inverse[:, None]
        s_t = _scores_tangent(
            q, k, q_t, k_t, bias_t_ptr, bias_t_strides, t, head, start_n, start_m, scale,
            N, M, BLOCK_N, BLOCK_M, DTYPE,
        )  # fmt: skip
        p_t = p * (s_t - mean_t[:, None])
        dv_t = _add_product_tangent(dv_t, tl.trans(p), tl.trans(p_t), g, g_t)
        dp = _products(g, v, "ieee") - delta[:, None]
        ds_t = p_t * dp + p * (_products_tangent(g, v, g_t, v_t, DTYPE) - delta_t[:, None])
        dk_t = _add_product_tangent(dk_t, tl.trans(p * dp), tl.trans(ds_t), q, q_t)
    dk_t = _multiply(dk_t, tl.full([], scale, DTYPE))
    _store_tangent(dk_t_ptr, dk_t_strides, t, keys, head, dk_t, D, BLOCK_D, CHANNELS_FIRST)
    _store_tangent(dv_t_ptr, dv_t_strides, t, keys, head, dv_t, D, BLOCK_D, CHANNELS_FIRST)


# ---- launches --------------------------------------------------------------------------------------------------------


def tiling(n: int, m: int, d: int, dtype: torch.dtype, channels_first: bool) -> Tiling:
    """The blocks for windows of n queries and m keys of d elements: 16 queries, and as many keys as registers can hold.

    Eight tensors are loaded for a tile. In channels-first maps each element has a pointer of its own, so that half as
    many keys fit into the registers of as many threads. Without tensor cores blocks are smaller for the reason given in
    window_attention.py. What the compiler reports of spills decided the numbers (see compile.py).
    """
    tensor_cores = dtype.itemsize == 2
    block_d = max(16, triton.next_power_of_2(d))
    limit = min(64, 4096 // block_d) if tensor_cores else 1024 // block_d
    block_m = max(16, min(limit, triton.next_power_of_2(m)))
    num_warps = max(1, min(8, block_m * block_d // 512)) if tensor_cores else 8
    if tensor_cores and channels_first:
        block_m = max(16, min(block_m, 2048 // block_d))
    return Tiling(16, block_m, block_d, num_warps)


def tangents(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    grad: Tensor | None,
    grad_t: Tensor | None,
    query_t: Tensor | None,
    key_t: Tensor | None,
    value_t: Tensor | None,
    bias_t: Tensor | None,
    window_size: Pair,
    shift: Pair,
    scale: float,
    *,
    want_output: bool,
    want_gradients: bool,
) -> tuple[Tensor | None, ...]:
    """Tangents of the output and of the gradients of query, key, value and bias, or None for what is not wanted.

    All have K in front, as each ``*_t`` has that is not None, which one of them must not be. ``grad``, the gradient of
    the output, and ``grad_t`` matter to the gradients only. The tangents of the bias's gradient are in the dtype of the
    scores, and None without a bias; the others have the dtype of the primal, and its order of dimensions in memory.
    """
    count = next(len(t) for t in (grad_t, query_t, key_t, value_t, bias_t) if t is not None)
    outputs = tangents_to_fill(count, query, key, value, want_output, want_gradients)
    if not (count and query.numel()):
        if want_gradients and bias is not None:
            return *outputs, bias.new_zeros((count, *bias.shape), dtype=statistics_dtype(query.dtype))
        return *outputs, None
    inputs = query, key, value, bias, grad, grad_t, query_t, key_t, value_t, bias_t
    partial = run(tangents_launches, *inputs, *outputs, window_size=window_size, shift=shift, scale=scale)
    if partial is None:
        return *outputs, None
    return *outputs, partial.sum(0) if bias.shape[0] == query.shape[3] else partial.sum((0, 2)).unsqueeze(1)


def tangents_launches(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    grad: Tensor | None,
    grad_t: Tensor | None,
    query_t: Tensor | None,
    key_t: Tensor | None,
    value_t: Tensor | None,
    bias_t: Tensor | None,
    output_t: Tensor | None,
    query_grad_t: Tensor | None,
    key_grad_t: Tensor | None,
    value_grad_t: Tensor | None,
    *,
    window_size: Pair,
    shift: Pair,
    scale: float,
) -> Made:
    """The launches that fill the tangents of the output and of the gradients, and the partial sums for the bias.

    ``output_t`` is None if it is not wanted, the other three if the gradients are not. The partial sums are
    (chunks, K, heads, N, M).
    """
    choose = functools.partial(tiling, channels_first=is_channels_first(query))
    call = Call(query, key, bias, window_size, shift, scale, choose)
    gradients = query_grad_t is not None
    if not gradients:
        grad = grad_t = None
    count = len(query_grad_t if gradients else output_t)
    statistics = statistics_dtype(query.dtype)
    primals = {"g": grad, "q": query, "k": key, "v": value}
    tensors = primals | {"g_t": grad_t, "q_t": query_t, "k_t": key_t, "v_t": value_t}
    arguments = {
        "bias_ptr": bias,
        "bias_t_ptr": bias_t,
        "bias_t_strides": None if bias_t is None else bias_strides(bias_t),
        "tangents": count,
    }
    tiles = call.blocks_n * call.blocks_m
    whole_rows = call.blocks_m == 1 and query.dtype.itemsize == 2
    whole = whole_rows and call.blocks_n == 1
    rows = dict.fromkeys(("top_ptr", "total_ptr", "delta_ptr", "mean_t_ptr", "delta_t_ptr"))
    if not whole_rows or (gradients and not whole):
        batch, height, width = query.shape[:3]
        for name in rows:
            of_tangents = (count,) if name in ("mean_t_ptr", "delta_t_ptr") else ()
            if gradients or name in ("top_ptr", "total_ptr"):
                rows[name] = query.new_empty((batch, call.heads, *of_tangents, height, width), dtype=statistics)
    arguments |= rows
    launches = []

    def add(kernel: Any, programs_per_head: int, outputs: dict[str, Tensor | None], **others: Any) -> None:
        launches.append(call.launch(kernel, programs_per_head, tensors | outputs, **arguments, **others))

    queries = {"out_t": output_t, "dq_t": query_grad_t}
    keys = {"dk_t": key_grad_t, "dv_t": value_grad_t}
    if not whole_rows:
        primal_rows = {name: rows[name] for name in ("top_ptr", "total_ptr", "delta_ptr")}
        programs = call.windows * call.blocks_n
        launches.append(call.launch(window_attention_rows_kernel, programs, primals, bias_ptr=bias, **primal_rows))
        add(window_attention_tangents_query_kernel, count * programs, queries)
    bias_grad = gradients and bias is not None
    partial = None
    windows_per_program = 1
    if bias_grad:
        windows_per_program = terms_per_program(call.windows, call.heads * count * tiles)
        chunks = triton.cdiv(call.windows, windows_per_program)
        partial = query.new_empty((chunks, count, call.heads, call.n, call.m), dtype=statistics)
    if whole_rows or bias_grad:
        outputs = (queries if whole_rows else dict.fromkeys(queries)) | (keys if whole else dict.fromkeys(keys))
        add(
            window_attention_tangents_kernel,
            triton.cdiv(call.windows, windows_per_program) * tiles * count,
            outputs,
            dbias_t_ptr=partial,
            window_count=call.windows,
            windows_per_program=windows_per_program,
            WHOLE_ROWS=whole_rows,
        )
    if gradients and not whole:
        add(window_attention_tangents_key_kernel, count * call.windows * call.blocks_m, keys)
    return launches, partial
