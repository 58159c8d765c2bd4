"""Tangents of attention in Triton, of its output and of its gradients, along K directions at once.

With the quantities of attention.py, and a dot for the tangent of each,

    S. = scale * (Q. K^T + Q K.^T) + bias.        mu. = rowsum(P * S.)
    P. = P * (S. - mu.)        O. = P. V + P V.

    dP. = G. V^T + G V.^T        delta. = rowsum(P. * dP + P * dP.)
    dS. = P. * (dP - delta) + P * (dP. - delta.)
    dQ. = scale * (dS. K + dS K.)        dK. = scale * (dS.^T Q + dS^T Q.)        dV. = P.^T G + P^T G.
    dbias. = dS., summed over the dimensions of 1

Shapes: those of attention.py, with K in front of every tangent; mu. and delta. (B, heads, K, N). Any strides. A tangent
that is None is zero, and what it would be multiplied by is not computed. Nothing is saved by the forward: memory is
linear in N but for the gradient of the bias itself.

Kernels. ``attention_rows_kernel`` finds what belongs to no tangent, once for all: the largest score of each query, the
sum of exp(S - largest), and delta. ``attention_tangents_query_kernel`` takes a block of queries twice over blocks of
keys: for mu. and delta., then for O. and dQ.. ``attention_tangents_key_kernel`` and ``attention_tangents_bias_kernel``
are those of the backward, with dS. in the place of dS. A program has one tangent. Its neighbours have the others, so
what belongs to none comes from the cache, but S and dP are computed again: 2 of the 10 products of a tile. To keep
them for another tangent would take the registers of two more blocks of vectors, two tiles and two sums, and there are
none left (see compile.py).

Precision is that of attention.py, but float32 is multiplied without tensor cores, for whose split operands there are
too few registers; sums of the rows come from P and dP, which are not rounded to 16 bits as O is; and P is taken from
the largest score, one of those that it is subtracted from, instead of from the rounded L.

Source: none; the formulas are those of vitfast/reference/attention.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import (
    Call,
    Tiling,
    _add_product,
    _bias_program,
    _head,
    _jit,
    _load,
    _load_bias,
    _multiply,
    _probabilities,
    _products,
    _program,
    _store,
    _zeros,
    attention_fwd_kernel,
    bias_strides,
    block,
    parts,
)
from .attention import tiling as attention_tiling
from .common import divide_rows, online_softmax, scaled, statistics_dtype, tangents_to_fill
from .launch import Made, run

# ---- tiles -----------------------------------------------------------------------------------------------------------


@triton.jit
def _head_tangent(ptr, strides, t, batch, head):
    """Where one head of tangent t begins."""
    return _head(ptr + t * strides[4], strides, batch, head)


@triton.jit
def _load_tangent(
    ptr, strides, t, batch, head, start, tokens, D: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The vectors of a block of tokens in tangent t, no parts if it is None. [BLOCK, D]"""
    if ptr is None:
        return ()
    else:
        return _load(_head_tangent(ptr, strides, t, batch, head), strides, start, tokens, D, PARTS, BLOCK)


@triton.jit
def _load_bias_tangent(
    ptr, strides, t, batch, head, n, m, N, M, BIAS_ROWS: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """The bias in tangent t; a zero if that is None."""
    if ptr is None:
        return tl.zeros([1, 1], DTYPE)
    else:
        return _load_bias(ptr + t * strides[4], strides, batch, head, n, m, N, M, BIAS_ROWS, DTYPE)


@triton.jit
def _products_tangent(a, b, a_t, b_t, DTYPE: tl.constexpr):
    """The tangent of a b^T; a zero if neither a nor b has one."""
    if len(a_t) == 0:
        if len(b_t) == 0:
            return tl.zeros([1, 1], DTYPE)
        else:
            return _products(a, b_t, "ieee")
    elif len(b_t) == 0:
        return _products(a_t, b, "ieee")
    else:
        return _products(a_t, b, "ieee") + _products(a, b_t, "ieee")


@triton.jit
def _add_product_tangent(tile, weights, weights_t, rows, rows_t):
    """tile + the tangent of weights rows."""
    tile = _add_product(tile, weights_t, rows, "ieee")
    if len(rows_t) == 0:
        return tile
    else:
        return _add_product(tile, weights, rows_t, "ieee")


@triton.jit
def _probabilities_and_scores_tangent(a, b, a_t, b_t, bias, bias_t, seen, top, inverse, scale, DTYPE: tl.constexpr):
    """P and S. of a tile whose scores are a b^T, queries by keys or keys by queries; P is 0 where nothing is seen."""
    s = tl.where(seen, scaled(_products(a, b, "ieee"), scale) + bias, float("-inf"))
    s_t = scaled(_products_tangent(a, b, a_t, b_t, DTYPE), scale) + bias_t
    return _probabilities(s, top) * inverse, s_t


@triton.jit
def _load_rows(top_ptr, total_ptr, rows, exists):
    """The largest score of some queries, and one over the sum of exp(S - largest). [BLOCK_N]

    That of a query that does not exist is infinity: its P is 0.
    """
    top = tl.load(top_ptr + rows, mask=exists, other=float("inf"))
    return top, divide_rows(1.0, tl.load(total_ptr + rows, mask=exists, other=0.0))


@triton.jit
def _store_rows(top_ptr, total_ptr, delta_ptr, rows, exists, top, total, delta):
    tl.store(top_ptr + rows, top, mask=exists)
    tl.store(total_ptr + rows, total, mask=exists)
    if delta_ptr is not None:
        tl.store(delta_ptr + rows, delta, mask=exists)


# ---- kernels ---------------------------------------------------------------------------------------------------------


@_jit
def attention_rows_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, top_ptr, total_ptr, delta_ptr,
    g_strides, q_strides, k_strides, v_strides, bias_strides,
    heads, N, M, scale: tl.float64,
    D: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    BIAS_ROWS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The largest score of each query of a block, the sum of exp(S - largest), and unless ``g_ptr`` is None delta."""
    batch, head, start_n = _program(tl.program_id(0), heads, N, BLOCK_N)
    q = _load(_head(q_ptr, q_strides, batch, head), q_strides, start_n, N, D, PARTS, BLOCK_N)  # [BLOCK_N, D]
    k_ptr = _head(k_ptr, k_strides, batch, head)
    if g_ptr is not None:
        g = _load(_head(g_ptr, g_strides, batch, head), g_strides, start_n, N, D, PARTS, BLOCK_N)  # [BLOCK_N, D]
        v_ptr = _head(v_ptr, v_strides, batch, head)
    n = start_n + tl.arange(0, BLOCK_N)

    top = tl.full([BLOCK_N], float("-inf"), DTYPE)
    total = tl.zeros([BLOCK_N], DTYPE)
    delta = tl.zeros([BLOCK_N], DTYPE)
    for start_m in range(0, M, BLOCK_M):
        k = _load(k_ptr, k_strides, start_m, M, D, PARTS, BLOCK_M)  # [BLOCK_M, D]
        m = start_m + tl.arange(0, BLOCK_M)[None, :]
        bias = _load_bias(bias_ptr, bias_strides, batch, head, n[:, None], m, N, M, BIAS_ROWS, DTYPE)
        s = tl.where(m < M, scaled(_products(q, k, "ieee"), scale) + bias, float("-inf"))  # [BLOCK_N, BLOCK_M]
        p, decay, top, total = online_softmax(s, top, total)
        if g_ptr is not None:
            v = _load(v_ptr, v_strides, start_m, M, D, PARTS, BLOCK_M)  # [BLOCK_M, D]
            delta = delta * decay + tl.sum(p * _products(g, v, "ieee"), 1)

    rows = (batch * heads + head) * N + n
    _store_rows(top_ptr, total_ptr, delta_ptr, rows, n < N, top, total, divide_rows(delta, total))


@_jit
def attention_tangents_query_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, g_t_ptr, q_t_ptr, k_t_ptr, v_t_ptr, bias_t_ptr,
    top_ptr, total_ptr, delta_ptr, mean_t_ptr, delta_t_ptr, out_t_ptr, dq_t_ptr,
    g_strides, q_strides, k_strides, v_strides, bias_strides,
    g_t_strides, q_t_strides, k_t_strides, v_t_strides, bias_t_strides, out_t_strides, dq_t_strides,
    tangents, heads, N, M, scale: tl.float64,
    D: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    BIAS_ROWS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """O. of one block of queries and one tangent, unless ``out_t_ptr`` is None, and dQ., unless ``dq_t_ptr`` is None.

    With dQ. also mu. and delta.. Tangents run fastest.
    """
    pid = tl.program_id(0)
    t = (pid % tangents).to(tl.int64)
    batch, head, start_n = _program(pid // tangents, heads, N, BLOCK_N)
    q = _load(_head(q_ptr, q_strides, batch, head), q_strides, start_n, N, D, PARTS, BLOCK_N)  # [BLOCK_N, D]
    q_t = _load_tangent(q_t_ptr, q_t_strides, t, batch, head, start_n, N, D, PARTS, BLOCK_N)  # [BLOCK_N, D]
    k_ptr = _head(k_ptr, k_strides, batch, head)
    v_ptr = _head(v_ptr, v_strides, batch, head)
    n = start_n + tl.arange(0, BLOCK_N)
    head_index = batch * heads + head
    rows = head_index * N + n
    top, inverse = _load_rows(top_ptr, total_ptr, rows, n < N)
    if dq_t_ptr is not None:
        g = _load(_head(g_ptr, g_strides, batch, head), g_strides, start_n, N, D, PARTS, BLOCK_N)  # [BLOCK_N, D]
        g_t = _load_tangent(g_t_ptr, g_t_strides, t, batch, head, start_n, N, D, PARTS, BLOCK_N)  # [BLOCK_N, D]
        delta = tl.load(delta_ptr + rows, mask=n < N, other=0.0)

    # Two passes over the keys: one pass would have to subtract mu. and delta. from sums that cancel.
    mean_t = tl.zeros([BLOCK_N], DTYPE)
    delta_t = tl.zeros([BLOCK_N], DTYPE)
    for start_m in range(0, M, BLOCK_M):
        k = _load(k_ptr, k_strides, start_m, M, D, PARTS, BLOCK_M)  # [BLOCK_M, D]
        k_t = _load_tangent(k_t_ptr, k_t_strides, t, batch, head, start_m, M, D, PARTS, BLOCK_M)  # [BLOCK_M, D]
        m = start_m + tl.arange(0, BLOCK_M)[None, :]
        bias = _load_bias(bias_ptr, bias_strides, batch, head, n[:, None], m, N, M, BIAS_ROWS, DTYPE)
        bias_t = _load_bias_tangent(bias_t_ptr, bias_t_strides, t, batch, head, n[:, None], m, N, M, BIAS_ROWS, DTYPE)
        p, s_t = _probabilities_and_scores_tangent(
            q, k, q_t, k_t, bias, bias_t, m < M, top[:, None], inverse[:, None], scale, DTYPE
        )  # [BLOCK_N, BLOCK_M]
        mean_t += tl.sum(p * s_t, 1)
        if dq_t_ptr is not None:
            v = _load(v_ptr, v_strides, start_m, M, D, PARTS, BLOCK_M)  # [BLOCK_M, D]
            v_t = _load_tangent(v_t_ptr, v_t_strides, t, batch, head, start_m, M, D, PARTS, BLOCK_M)  # [BLOCK_M, D]
            dp = _products(g, v, "ieee") - delta[:, None]
            # The rows of P * (dP - delta) add up to 0, so S. may stand here for S. - mu., which is not known yet.
            delta_t += tl.sum(p * (s_t * dp + _products_tangent(g, v, g_t, v_t, DTYPE)), 1)

    out_t = _zeros(PARTS, BLOCK_N, DTYPE)
    dq_t = _zeros(PARTS, BLOCK_N, DTYPE)
    for start_m in range(0, M, BLOCK_M):
        k = _load(k_ptr, k_strides, start_m, M, D, PARTS, BLOCK_M)  # [BLOCK_M, D]
        k_t = _load_tangent(k_t_ptr, k_t_strides, t, batch, head, start_m, M, D, PARTS, BLOCK_M)  # [BLOCK_M, D]
        v = _load(v_ptr, v_strides, start_m, M, D, PARTS, BLOCK_M)  # [BLOCK_M, D]
        v_t = _load_tangent(v_t_ptr, v_t_strides, t, batch, head, start_m, M, D, PARTS, BLOCK_M)  # [BLOCK_M, D]
        m = start_m + tl.arange(0, BLOCK_M)[None, :]
        bias = _load_bias(bias_ptr, bias_strides, batch, head, n[:, None], m, N, M, BIAS_ROWS, DTYPE)
        bias_t = _load_bias_tangent(bias_t_ptr, bias_t_strides, t, batch, head, n[:, None], m, N, M, BIAS_ROWS, DTYPE)
        p, s_t = _probabilities_and_scores_tangent(
            q, k, q_t, k_t, bias, bias_t, m < M, top[:, None], inverse[:, None], scale, DTYPE
        )  # [BLOCK_N, BLOCK_M]
        p_t = p * (s_t - mean_t[:, None])
        if out_t_ptr is not None:
            out_t = _add_product_tangent(out_t, p, p_t, v, v_t)
        if dq_t_ptr is not None:
            dp = _products(g, v, "ieee") - delta[:, None]
            dp_t = _products_tangent(g, v, g_t, v_t, DTYPE) - delta_t[:, None]
            dq_t = _add_product_tangent(dq_t, p * dp, p_t * dp + p * dp_t, k, k_t)

    if out_t_ptr is not None:
        out_t_ptr = _head_tangent(out_t_ptr, out_t_strides, t, batch, head)
        _store(out_t_ptr, out_t_strides, start_n, N, out_t, D, PARTS, BLOCK_N)
    if dq_t_ptr is not None:
        dq_t_ptr = _head_tangent(dq_t_ptr, dq_t_strides, t, batch, head)
        dq_t = _multiply(dq_t, tl.full([], scale, DTYPE))
        _store(dq_t_ptr, dq_t_strides, start_n, N, dq_t, D, PARTS, BLOCK_N)
        rows_t = (head_index * tangents + t) * N + n
        tl.store(mean_t_ptr + rows_t, mean_t, mask=n < N)
        tl.store(delta_t_ptr + rows_t, delta_t, mask=n < N)


@_jit
def attention_tangents_key_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, g_t_ptr, q_t_ptr, k_t_ptr, v_t_ptr, bias_t_ptr,
    top_ptr, total_ptr, delta_ptr, mean_t_ptr, delta_t_ptr, dk_t_ptr, dv_t_ptr, dbias_t_ptr,
    g_strides, q_strides, k_strides, v_strides, bias_strides,
    g_t_strides, q_t_strides, k_t_strides, v_t_strides, bias_t_strides, dk_t_strides, dv_t_strides,
    tangents, heads, N, M, scale: tl.float64,
    D: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    BIAS_ROWS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """dK. and dV. of one block of keys and one tangent, and with ``dbias_t_ptr`` sums of dS. over the queries.

    ``dbias_t_ptr`` is contiguous, (B, heads, K, M). Scores are transposed, keys by queries. Queries behind the last add
    zeros, for G and G. are zero there, and keys behind the last are not stored.
    """
    pid = tl.program_id(0)
    t = (pid % tangents).to(tl.int64)
    batch, head, start_m = _program(pid // tangents, heads, M, BLOCK_M)
    k = _load(_head(k_ptr, k_strides, batch, head), k_strides, start_m, M, D, PARTS, BLOCK_M)  # [BLOCK_M, D]
    v = _load(_head(v_ptr, v_strides, batch, head), v_strides, start_m, M, D, PARTS, BLOCK_M)  # [BLOCK_M, D]
    k_t = _load_tangent(k_t_ptr, k_t_strides, t, batch, head, start_m, M, D, PARTS, BLOCK_M)  # [BLOCK_M, D]
    v_t = _load_tangent(v_t_ptr, v_t_strides, t, batch, head, start_m, M, D, PARTS, BLOCK_M)  # [BLOCK_M, D]
    q_ptr = _head(q_ptr, q_strides, batch, head)
    g_ptr = _head(g_ptr, g_strides, batch, head)
    m = start_m + tl.arange(0, BLOCK_M)
    head_index = batch * heads + head

    dk_t = _zeros(PARTS, BLOCK_M, DTYPE)
    dv_t = _zeros(PARTS, BLOCK_M, DTYPE)
    dbias_t = tl.zeros([BLOCK_M], DTYPE)
    for start_n in range(0, N, BLOCK_N):
        q = _load(q_ptr, q_strides, start_n, N, D, PARTS, BLOCK_N)  # [BLOCK_N, D]
        q_t = _load_tangent(q_t_ptr, q_t_strides, t, batch, head, start_n, N, D, PARTS, BLOCK_N)  # [BLOCK_N, D]
        g = _load(g_ptr, g_strides, start_n, N, D, PARTS, BLOCK_N)  # [BLOCK_N, D]
        g_t = _load_tangent(g_t_ptr, g_t_strides, t, batch, head, start_n, N, D, PARTS, BLOCK_N)  # [BLOCK_N, D]
        n = start_n + tl.arange(0, BLOCK_N)
        rows = head_index * N + n
        top, inverse = _load_rows(top_ptr, total_ptr, rows, n < N)
        delta = tl.load(delta_ptr + rows, mask=n < N, other=0.0)
        rows_t = (head_index * tangents + t) * N + n
        mean_t = tl.load(mean_t_ptr + rows_t, mask=n < N, other=0.0)
        delta_t = tl.load(delta_t_ptr + rows_t, mask=n < N, other=0.0)
        bias = _load_bias(bias_ptr, bias_strides, batch, head, n[None, :], m[:, None], N, M, BIAS_ROWS, DTYPE)
        bias_t = _load_bias_tangent(
            bias_t_ptr, bias_t_strides, t, batch, head, n[None, :], m[:, None], N, M, BIAS_ROWS, DTYPE
        )
        p, s_t = _probabilities_and_scores_tangent(
            k, q, k_t, q_t, bias, bias_t, m[:, None] < M, top[None, :], inverse[None, :], scale, DTYPE
        )  # [BLOCK_M, BLOCK_N]
        p_t = p * (s_t - mean_t[None, :])
        dv_t = _add_product_tangent(dv_t, p, p_t, g, g_t)
        dp = _products(v, g, "ieee") - delta[None, :]
        ds_t = p_t * dp + p * (_products_tangent(v, g, v_t, g_t, DTYPE) - delta_t[None, :])
        dk_t = _add_product_tangent(dk_t, p * dp, ds_t, q, q_t)
        if dbias_t_ptr is not None:
            dbias_t += tl.sum(ds_t, 1)

    dk_t = _multiply(dk_t, tl.full([], scale, DTYPE))
    dk_t_ptr = _head_tangent(dk_t_ptr, dk_t_strides, t, batch, head)
    _store(dk_t_ptr, dk_t_strides, start_m, M, dk_t, D, PARTS, BLOCK_M)
    dv_t_ptr = _head_tangent(dv_t_ptr, dv_t_strides, t, batch, head)
    _store(dv_t_ptr, dv_t_strides, start_m, M, dv_t, D, PARTS, BLOCK_M)
    if dbias_t_ptr is not None:
        tl.store(dbias_t_ptr + (head_index * tangents + t) * M + m, dbias_t, mask=m < M)


@_jit
def attention_tangents_bias_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, g_t_ptr, q_t_ptr, k_t_ptr, v_t_ptr, bias_t_ptr,
    top_ptr, total_ptr, delta_ptr, mean_t_ptr, delta_t_ptr, dbias_t_ptr,
    g_strides, q_strides, k_strides, v_strides, bias_strides,
    g_t_strides, q_t_strides, k_t_strides, v_t_strides, bias_t_strides,
    tangents, heads, N, M, bias_heads, heads_per_bias, sums, terms, terms_per_program, scale: tl.float64,
    D: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    BIAS_ROWS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The sum of one tile of dS. over a chunk of the ``terms`` of ``attention_bwd_bias_kernel``, for one tangent.

    ``dbias_t_ptr`` is contiguous, (chunks, sums, K, N, M). Tangents run fastest.
    """
    pid = tl.program_id(0)
    t = (pid % tangents).to(tl.int64)
    own, start_n, start_m, chunk, place = _bias_program(pid // tangents, N, M, bias_heads, sums, BLOCK_N, BLOCK_M)
    n = start_n + tl.arange(0, BLOCK_N)
    m = start_m + tl.arange(0, BLOCK_M)[None, :]
    bias = _load_bias(bias_ptr, bias_strides, *own, n[:, None], m, N, M, BIAS_ROWS, DTYPE)
    bias_t = _load_bias_tangent(bias_t_ptr, bias_t_strides, t, *own, n[:, None], m, N, M, BIAS_ROWS, DTYPE)

    dbias_t = tl.zeros([BLOCK_N, BLOCK_M], DTYPE)
    first = chunk * terms_per_program
    for index in range(first, tl.minimum(first + terms_per_program, terms)):
        batch = own[0] + index // heads_per_bias
        head = own[1] + index % heads_per_bias
        q = _load(_head(q_ptr, q_strides, batch, head), q_strides, start_n, N, D, PARTS, BLOCK_N)  # [BLOCK_N, D]
        g = _load(_head(g_ptr, g_strides, batch, head), g_strides, start_n, N, D, PARTS, BLOCK_N)  # [BLOCK_N, D]
        k = _load(_head(k_ptr, k_strides, batch, head), k_strides, start_m, M, D, PARTS, BLOCK_M)  # [BLOCK_M, D]
        v = _load(_head(v_ptr, v_strides, batch, head), v_strides, start_m, M, D, PARTS, BLOCK_M)  # [BLOCK_M, D]
        q_t = _load_tangent(q_t_ptr, q_t_strides, t, batch, head, start_n, N, D, PARTS, BLOCK_N)  # [BLOCK_N, D]
        g_t = _load_tangent(g_t_ptr, g_t_strides, t, batch, head, start_n, N, D, PARTS, BLOCK_N)  # [BLOCK_N, D]
        k_t = _load_tangent(k_t_ptr, k_t_strides, t, batch, head, start_m, M, D, PARTS, BLOCK_M)  # [BLOCK_M, D]
        v_t = _load_tangent(v_t_ptr, v_t_strides, t, batch, head, start_m, M, D, PARTS, BLOCK_M)  # [BLOCK_M, D]
        rows = (batch * heads + head) * N + n
        top, inverse = _load_rows(top_ptr, total_ptr, rows, n < N)
        delta = tl.load(delta_ptr + rows, mask=n < N, other=0.0)
        rows_t = ((batch * heads + head) * tangents + t) * N + n
        mean_t = tl.load(mean_t_ptr + rows_t, mask=n < N, other=0.0)
        delta_t = tl.load(delta_t_ptr + rows_t, mask=n < N, other=0.0)
        p, s_t = _probabilities_and_scores_tangent(
            q, k, q_t, k_t, bias, bias_t, m < M, top[:, None], inverse[:, None], scale, DTYPE
        )  # [BLOCK_N, BLOCK_M]
        dp = _products(g, v, "ieee") - delta[:, None]
        dp_t = _products_tangent(g, v, g_t, v_t, DTYPE) - delta_t[:, None]
        dbias_t += p * ((s_t - mean_t[:, None]) * dp + dp_t)
    offsets = ((place * tangents + t) * N + n[:, None]) * M + m
    tl.store(dbias_t_ptr + offsets, dbias_t, mask=(n[:, None] < N) & (m < M))


# ---- launches --------------------------------------------------------------------------------------------------------


def tiling(kernel: Any, n: int, m: int, d: int, dtype: torch.dtype, bias_rows: bool = False) -> Tiling:
    """The blocks of ``kernel``; that of the rows has those of the forward, which does the same work, in 16 bits.

    The considerations are those of attention.py, but twice as many tiles are in registers, so that half of what is
    kept there, or walked over, fits. What the compiler reports of spills decided the rest (see compile.py).
    """
    if kernel is attention_rows_kernel and dtype.itemsize == 2:
        return attention_tiling(attention_fwd_kernel, n, m, d, dtype, bias_rows)
    width = sum(parts(d))
    keeps_queries = kernel is attention_tangents_query_kernel
    if dtype.itemsize == 2:
        kept = min(64, (6144 if keeps_queries else 4096) // width)
        walked = min(32, 1024 // width)
    else:
        kept = min(32, (4096 if kernel is attention_tangents_bias_kernel else 8192) // (width * dtype.itemsize))
        walked = 16
    limit_n, limit_m = (walked, kept) if kernel is attention_tangents_key_kernel else (kept, walked)
    block_n, block_m = block(n, limit_n), block(m, limit_m)
    num_warps = 8
    if dtype.itemsize == 2:
        num_warps = 4 if keeps_queries else max(4, max(block_n, block_m) // 8)
    return Tiling(block_n, block_m, num_warps, num_stages=2)


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
    bias_grad_t = None
    if not (count and query.numel() and key.numel()):
        if want_gradients and bias is not None:
            bias_grad_t = bias.new_zeros((count, *bias.shape), dtype=statistics_dtype(query.dtype))
        return *outputs, bias_grad_t
    inputs = query, key, value, bias, grad, grad_t, query_t, key_t, value_t, bias_t
    partial = run(tangents_launches, *inputs, *outputs, scale=scale)
    if partial is not None:
        if bias.shape[2] == 1:  # partial sums for every head of every entry: (B, heads, K, M)
            bias_grad_t = partial.movedim(2, 0).unsqueeze(3).sum_to_size(count, *bias.shape)
        else:
            bias_grad_t = partial.sum(0).movedim(1, 0).unflatten(1, bias.shape[:2])
    return *outputs, bias_grad_t


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
    scale: float,
) -> Made:
    """The launches that fill the tangents of the output and of the gradients, and the partial sums for the bias.

    ``output_t`` is None if it is not wanted, the other three if the gradients are not. The partial sums are
    (B, heads, K, M) if all queries share the bias, and (chunks, matrices of the bias, K, N, M) if they do not.
    """
    call = Call(query, key, bias, scale)
    gradients = query_grad_t is not None
    if not gradients:
        grad = grad_t = None
    count = len(query_grad_t if gradients else output_t)
    statistics = statistics_dtype(query.dtype)
    rows = {name: query.new_empty(query.shape[:3], dtype=statistics) for name in ("top_ptr", "total_ptr")}
    rows["delta_ptr"] = torch.empty_like(rows["top_ptr"]) if gradients else None
    tensors = {"g": grad, "q": query, "k": key, "v": value}
    tile = call.tiling(attention_rows_kernel, tiling)
    launches = [
        call.launch(attention_rows_kernel, tile, call.heads * triton.cdiv(call.n, tile.block_n), tensors, **rows)
    ]
    tensors |= {"g_t": grad_t, "q_t": query_t, "k_t": key_t, "v_t": value_t}
    arguments = rows | {
        "bias_t_ptr": bias_t,
        "bias_t_strides": None if bias_t is None else bias_strides(bias_t),
        "tangents": count,
    }
    for name in ("mean_t_ptr", "delta_t_ptr"):
        arguments[name] = None
        if gradients:
            arguments[name] = query.new_empty((*query.shape[:2], count, call.n), dtype=statistics)

    def add(kernel: Any, tile: Tiling, programs: int, outputs: dict[str, Tensor | None], **others: Any) -> None:
        launches.append(call.launch(kernel, tile, count * programs, tensors | outputs, **arguments, **others))

    tile = call.tiling(attention_tangents_query_kernel, tiling)
    programs = call.heads * triton.cdiv(call.n, tile.block_n)
    add(attention_tangents_query_kernel, tile, programs, {"out_t": output_t, "dq_t": query_grad_t})
    if not gradients:
        return launches, None
    partial = None
    bias_rows = bias is not None and bias.shape[2] > 1
    if bias is not None and not bias_rows:
        partial = query.new_empty((*query.shape[:2], count, call.m), dtype=statistics)
    tile = call.tiling(attention_tangents_key_kernel, tiling)
    programs = call.heads * triton.cdiv(call.m, tile.block_m)
    outputs = {"dk_t": key_grad_t, "dv_t": value_grad_t}
    add(attention_tangents_key_kernel, tile, programs, outputs, dbias_t_ptr=partial)
    if bias_rows:
        tile = call.tiling(attention_tangents_bias_kernel, tiling)
        programs, chunks, terms = call.bias_terms(bias, tile, count)
        partial = query.new_empty((chunks, terms["sums"], count, call.n, call.m), dtype=statistics)
        add(attention_tangents_bias_kernel, tile, programs, {}, **terms, dbias_t_ptr=partial)
    return launches, partial
