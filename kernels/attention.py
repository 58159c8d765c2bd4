"""Attention in Triton, forward and backward.

For each head,

    S = scale * Q K^T + bias        P = softmax(S)        O = P V

and with G the gradient of O and L the natural logarithm of the sum of exp(S) over the keys,

    P = exp(S - L)        dV = P^T G        dP = G V^T        delta = rowsum(G * O)        dS = P * (dP - delta)
    dQ = scale * dS K        dK = scale * dS^T Q        dbias = dS, summed over the dimensions of 1

Shapes: Q, G and O (B, heads, N, D); K and V (B, heads, M, D); bias (B or 1, heads or 1, N or 1, M); L and delta
(B, heads, N). Any strides, with offsets of 64 bits. O and L are saved for the backward, whose memory is linear in N but
for the gradient of the bias itself.

Kernels. ``attention_fwd_kernel`` takes a block of queries over blocks of keys with an online softmax. In the backward
``attention_bwd_query_kernel`` does the same for dQ; it leaves delta, and what P has to be divided by, for
``attention_bwd_key_kernel``, which takes a block of keys over blocks of queries for dK and dV, and for the gradient of
a bias that all queries share. A bias with rows of its own for the queries takes ``attention_bwd_bias_kernel``: a
program owns a tile of the gradient and walks over a chunk of the heads and entries of the batch that share it. There
are no atomics: partial sums, one per chunk or head, are added up by `torch.sum`, and the number of chunks depends on
the shapes only, so gradients have the same bits in every run.

Head dimensions. Blocks are powers of two, so a tile of vectors is up to two blocks side by side, its parts: 48 elements
are 32 and 16 and 80 are 64 and 16, where one block would be 64 or 128 wide.

Precision. float16 and bfloat16 are multiplied by tensor cores and accumulated in float32; P and dS are rounded to the
input's dtype for their products. A product of float32 is three of TF32 by tensor cores, of the leading halves of both
and of each with what the other leaves: its error is that of float32. float64 is float64 throughout. Scores keep their
natural scale, although exp2 with log2(e) in the scale would save a multiplication: the exponent is the difference of
two scores, so it is exact where both are as large as the finite numbers that stand for -inf in many masks.

Source: the online softmax of Milakov & Gimelshein, arXiv 1805.02867; the order of the loops, and delta from O, of Dao,
"FlashAttention-2", arXiv 2307.08691.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import TF32X3, divide_rows, dot, online_softmax, scaled, statistics_dtype, terms_per_program
from .launch import Launch, Made, pointers_and_strides, run, strides

# ---- tiles: tuples of blocks, one for each part of the head dimension ------------------------------------------------


@triton.jit
def _program(pid, heads, tokens, BLOCK: tl.constexpr):
    """Batch entry, head and first token of program pid; blocks of tokens run fastest, then heads, then the batch."""
    blocks = tl.cdiv(tokens, BLOCK)
    index = pid // blocks
    return (index // heads).to(tl.int64), (index % heads).to(tl.int64), pid % blocks * BLOCK


@triton.jit
def _bias_program(pid, N, M, bias_heads, sums, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """Of program pid: its matrix of the bias, as an entry and a head, first query and key, chunk, and place of its sum.

    The bias has ``sums`` matrices, ``bias_heads`` for each of its entries. Tiles run fastest, then matrices, then
    chunks; sums are (chunks, sums, N, M), and their places count the matrices of these.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles = tl.cdiv(N, BLOCK_N) * tiles_m
    tile, place = pid % tiles, pid // tiles
    own = place % sums
    matrix = (own // bias_heads).to(tl.int64), (own % bias_heads).to(tl.int64)
    return matrix, tile // tiles_m * BLOCK_N, tile % tiles_m * BLOCK_M, place // sums, place.to(tl.int64)


@triton.jit
def _head(ptr, strides, batch, head):
    """Where one head of a tensor (B, heads, tokens, D) begins."""
    return ptr + batch * strides[0] + head * strides[1]


@triton.jit
def _part(ptr, strides, start, tokens, i: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers to part i of the vectors of the tokens start, start + 1, ... of a head, and which of them exist."""
    token = start + tl.arange(0, BLOCK)
    element = (PARTS[0] if i > 0 else 0) + tl.arange(0, PARTS[i])
    offsets = token.to(tl.int64)[:, None] * strides[2] + element.to(tl.int64)[None, :] * strides[3]
    return ptr + offsets, (token < tokens)[:, None] & (element < D)[None, :]  # [BLOCK, PARTS[i]]


@triton.jit
def _load(ptr, strides, start, tokens, D: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """The vectors of a block of tokens, zeros behind the last. [BLOCK, D]"""
    tile = ()
    for i in tl.static_range(len(PARTS)):
        pointers, exists = _part(ptr, strides, start, tokens, i, D, PARTS, BLOCK)
        tile += (tl.load(pointers, mask=exists, other=0.0),)
    return tile


@triton.jit
def _store(ptr, strides, start, tokens, tile, D: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    for i in tl.static_range(len(PARTS)):
        pointers, exists = _part(ptr, strides, start, tokens, i, D, PARTS, BLOCK)
        tl.store(pointers, tile[i].to(ptr.dtype.element_ty), mask=exists)


@triton.jit
def _zeros(PARTS: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    tile = ()
    for i in tl.static_range(len(PARTS)):
        tile += (tl.full([BLOCK, PARTS[i]], 0.0, DTYPE),)  # tl.zeros of Triton 3.6 takes no element of a tuple
    return tile


@triton.jit
def _products(a, b, PRECISION: tl.constexpr = TF32X3):
    """a b^T of tiles a and b: the products of each row of a with each of b."""
    products = dot(a[0], tl.trans(b[0]), PRECISION)
    for i in tl.static_range(1, len(a)):
        products += dot(a[i], tl.trans(b[i]), PRECISION)
    return products


@triton.jit
def _add_product(tile, weights, rows, PRECISION: tl.constexpr = TF32X3):
    """tile + weights rows; the weights are rounded to the dtype of the rows."""
    sums = ()
    for i in tl.static_range(len(tile)):
        sums += (tile[i] + dot(weights.to(rows[i].dtype), rows[i], PRECISION),)
    return sums


@triton.jit
def _multiply(tile, factor):
    """A tile times a number, or a column of one for each row."""
    products = ()
    for i in tl.static_range(len(tile)):
        products += (tile[i] * factor,)
    return products


@triton.jit
def _row_products(a, b, DTYPE: tl.constexpr):
    """The product of each row of tile a with the same row of b. [BLOCK]"""
    sums = tl.sum(a[0].to(DTYPE) * b[0].to(DTYPE), 1)
    for i in tl.static_range(1, len(a)):
        sums += tl.sum(a[i].to(DTYPE) * b[i].to(DTYPE), 1)
    return sums


@triton.jit
def _load_bias(ptr, strides, batch, head, n, m, N, M, BIAS_ROWS: tl.constexpr, DTYPE: tl.constexpr):
    """The bias of queries n and keys m, one a column and the other a row; a zero if there is none.

    Without BIAS_ROWS all queries share a row, which is loaded once.
    """
    if ptr is None:
        return tl.zeros([1, 1], DTYPE)
    else:
        pointers = ptr + batch * strides[0] + head * strides[1] + m.to(tl.int64) * strides[3]
        if BIAS_ROWS:
            return tl.load(pointers + n.to(tl.int64) * strides[2], mask=(n < N) & (m < M), other=0.0).to(DTYPE)
        else:
            return tl.load(pointers, mask=m < M, other=0.0).to(DTYPE)


@triton.jit
def _probabilities(s, lse):
    """P from the saved L, up to a factor for each query that the rounding of L leaves, and `divide_rows` removes.

    P is never above 1. S is computed again here, in another order, and may be rounded to more than L if both are huge.
    """
    return tl.exp(tl.minimum(s - lse, 0.0, propagate_nan=tl.PropagateNan.ALL))


# ---- kernels ---------------------------------------------------------------------------------------------------------

# These change from call to call without changing the code that is best for them.
_jit = triton.jit(do_not_specialize=["heads", "bias_heads", "heads_per_bias", "terms", "terms_per_program", "tangents"])


@_jit
def attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, lse_ptr,
    q_strides, k_strides, v_strides, bias_strides, out_strides,
    heads, N, M, scale: tl.float64,
    D: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    BIAS_ROWS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Out and L of one block of queries."""
    batch, head, start_n = _program(tl.program_id(0), heads, N, BLOCK_N)
    q = _load(_head(q_ptr, q_strides, batch, head), q_strides, start_n, N, D, PARTS, BLOCK_N)  # [BLOCK_N, D]
    k_ptr = _head(k_ptr, k_strides, batch, head)
    v_ptr = _head(v_ptr, v_strides, batch, head)
    n = start_n + tl.arange(0, BLOCK_N)

    top = tl.full([BLOCK_N], float("-inf"), DTYPE)  # the largest score so far
    total = tl.zeros([BLOCK_N], DTYPE)  # the sum of exp(score - top) so far
    out = _zeros(PARTS, BLOCK_N, DTYPE)
    for start_m in range(0, M, BLOCK_M):
        k = _load(k_ptr, k_strides, start_m, M, D, PARTS, BLOCK_M)  # [BLOCK_M, D]
        v = _load(v_ptr, v_strides, start_m, M, D, PARTS, BLOCK_M)  # [BLOCK_M, D]
        m = start_m + tl.arange(0, BLOCK_M)[None, :]
        bias = _load_bias(bias_ptr, bias_strides, batch, head, n[:, None], m, N, M, BIAS_ROWS, DTYPE)
        s = tl.where(m < M, scaled(_products(q, k), scale) + bias, float("-inf"))  # [BLOCK_N, BLOCK_M]
        p, decay, top, total = online_softmax(s, top, total)
        out = _add_product(_multiply(out, decay[:, None]), p, v)

    # Without a key that is not forbidden this is 0 / 0, as it is in a softmax.
    out = _multiply(out, (1.0 / total)[:, None])
    _store(_head(out_ptr, out_strides, batch, head), out_strides, start_n, N, out, D, PARTS, BLOCK_N)
    if lse_ptr is not None:
        tl.store(lse_ptr + (batch * heads + head) * N + n, top + tl.log(total), mask=n < N)


@_jit
def attention_bwd_query_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, lse_ptr, delta_ptr, total_ptr, dq_ptr,
    g_strides, q_strides, k_strides, v_strides, bias_strides, out_strides, dq_strides,
    heads, N, M, scale: tl.float64,
    D: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    BIAS_ROWS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """dQ, delta and the sums of the rows of P of one block of queries."""
    batch, head, start_n = _program(tl.program_id(0), heads, N, BLOCK_N)
    q = _load(_head(q_ptr, q_strides, batch, head), q_strides, start_n, N, D, PARTS, BLOCK_N)  # [BLOCK_N, D]
    g = _load(_head(g_ptr, g_strides, batch, head), g_strides, start_n, N, D, PARTS, BLOCK_N)  # [BLOCK_N, D]
    out = _load(_head(out_ptr, out_strides, batch, head), out_strides, start_n, N, D, PARTS, BLOCK_N)  # [BLOCK_N, D]
    k_ptr = _head(k_ptr, k_strides, batch, head)
    v_ptr = _head(v_ptr, v_strides, batch, head)
    n = start_n + tl.arange(0, BLOCK_N)
    rows = (batch * heads + head) * N + n
    lse = tl.load(lse_ptr + rows, mask=n < N, other=0.0)
    delta = _row_products(g, out, DTYPE)

    total = tl.zeros([BLOCK_N], DTYPE)
    dq = _zeros(PARTS, BLOCK_N, DTYPE)
    for start_m in range(0, M, BLOCK_M):
        k = _load(k_ptr, k_strides, start_m, M, D, PARTS, BLOCK_M)  # [BLOCK_M, D]
        v = _load(v_ptr, v_strides, start_m, M, D, PARTS, BLOCK_M)  # [BLOCK_M, D]
        m = start_m + tl.arange(0, BLOCK_M)[None, :]
        bias = _load_bias(bias_ptr, bias_strides, batch, head, n[:, None], m, N, M, BIAS_ROWS, DTYPE)
        s = tl.where(m < M, scaled(_products(q, k), scale) + bias, float("-inf"))  # [BLOCK_N, BLOCK_M]
        p = _probabilities(s, lse[:, None])
        total += tl.sum(p, 1)
        dq = _add_product(dq, p * (_products(g, v) - delta[:, None]), k)

    dq = _multiply(dq, divide_rows(tl.full([], scale, DTYPE), total)[:, None])
    _store(_head(dq_ptr, dq_strides, batch, head), dq_strides, start_n, N, dq, D, PARTS, BLOCK_N)
    tl.store(delta_ptr + rows, delta, mask=n < N)
    tl.store(total_ptr + rows, total, mask=n < N)


@_jit
def attention_bwd_key_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, lse_ptr, delta_ptr, total_ptr, dk_ptr, dv_ptr, dbias_ptr,
    g_strides, q_strides, k_strides, v_strides, bias_strides, dk_strides, dv_strides,
    heads, N, M, scale: tl.float64,
    D: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    BIAS_ROWS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """dK and dV of one block of keys, and with ``dbias_ptr``, contiguous (B, heads, M), sums of dS over the queries.

    Scores are transposed, keys by queries: their gradients are what dK and dV are products of. Queries behind the last
    add zeros, for G is zero there, and keys behind the last are not stored, so neither has to be masked.
    """
    batch, head, start_m = _program(tl.program_id(0), heads, M, BLOCK_M)
    k = _load(_head(k_ptr, k_strides, batch, head), k_strides, start_m, M, D, PARTS, BLOCK_M)  # [BLOCK_M, D]
    v = _load(_head(v_ptr, v_strides, batch, head), v_strides, start_m, M, D, PARTS, BLOCK_M)  # [BLOCK_M, D]
    q_ptr = _head(q_ptr, q_strides, batch, head)
    g_ptr = _head(g_ptr, g_strides, batch, head)
    m = start_m + tl.arange(0, BLOCK_M)

    dk = _zeros(PARTS, BLOCK_M, DTYPE)
    dv = _zeros(PARTS, BLOCK_M, DTYPE)
    dbias = tl.zeros([BLOCK_M], DTYPE)
    for start_n in range(0, N, BLOCK_N):
        q = _load(q_ptr, q_strides, start_n, N, D, PARTS, BLOCK_N)  # [BLOCK_N, D]
        g = _load(g_ptr, g_strides, start_n, N, D, PARTS, BLOCK_N)  # [BLOCK_N, D]
        n = start_n + tl.arange(0, BLOCK_N)
        rows = (batch * heads + head) * N + n
        lse = tl.load(lse_ptr + rows, mask=n < N, other=0.0)
        delta = tl.load(delta_ptr + rows, mask=n < N, other=0.0)
        total = tl.load(total_ptr + rows, mask=n < N, other=1.0)
        bias = _load_bias(bias_ptr, bias_strides, batch, head, n[None, :], m[:, None], N, M, BIAS_ROWS, DTYPE)
        s = scaled(_products(k, q), scale) + bias  # [BLOCK_M, BLOCK_N]
        p = _probabilities(s, lse[None, :]) * divide_rows(1.0, total)[None, :]
        dv = _add_product(dv, p, g)
        ds = p * (_products(v, g) - delta[None, :])
        dk = _add_product(dk, ds, q)
        if dbias_ptr is not None:
            dbias += tl.sum(ds, 1)

    dk = _multiply(dk, tl.full([], scale, DTYPE))
    _store(_head(dk_ptr, dk_strides, batch, head), dk_strides, start_m, M, dk, D, PARTS, BLOCK_M)
    _store(_head(dv_ptr, dv_strides, batch, head), dv_strides, start_m, M, dv, D, PARTS, BLOCK_M)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + (batch * heads + head) * M + m, dbias, mask=m < M)


@_jit
def attention_bwd_bias_kernel(
    g_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, lse_ptr, delta_ptr, total_ptr, dbias_ptr,
    g_strides, q_strides, k_strides, v_strides, bias_strides,
    heads, N, M, bias_heads, heads_per_bias, sums, terms, terms_per_program, scale: tl.float64,
    D: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    BIAS_ROWS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The sum of one tile of dS over a chunk of the ``terms`` that share a matrix of the bias.

    A term is a head of an entry of the batch; ``heads_per_bias`` heads of an entry come after one another.
    ``dbias_ptr`` is contiguous, (chunks, sums, N, M).
    """
    own, start_n, start_m, chunk, place = _bias_program(tl.program_id(0), N, M, bias_heads, sums, BLOCK_N, BLOCK_M)
    n = start_n + tl.arange(0, BLOCK_N)
    m = start_m + tl.arange(0, BLOCK_M)[None, :]
    bias = _load_bias(bias_ptr, bias_strides, *own, n[:, None], m, N, M, BIAS_ROWS, DTYPE)

    dbias = tl.zeros([BLOCK_N, BLOCK_M], DTYPE)
    first = chunk * terms_per_program
    for index in range(first, tl.minimum(first + terms_per_program, terms)):
        batch = own[0] + index // heads_per_bias
        head = own[1] + index % heads_per_bias
        q = _load(_head(q_ptr, q_strides, batch, head), q_strides, start_n, N, D, PARTS, BLOCK_N)  # [BLOCK_N, D]
        g = _load(_head(g_ptr, g_strides, batch, head), g_strides, start_n, N, D, PARTS, BLOCK_N)  # [BLOCK_N, D]
        k = _load(_head(k_ptr, k_strides, batch, head), k_strides, start_m, M, D, PARTS, BLOCK_M)  # [BLOCK_M, D]
        v = _load(_head(v_ptr, v_strides, batch, head), v_strides, start_m, M, D, PARTS, BLOCK_M)  # [BLOCK_M, D]
        rows = (batch * heads + head) * N + n
        lse = tl.load(lse_ptr + rows, mask=n < N, other=0.0)
        delta = tl.load(delta_ptr + rows, mask=n < N, other=0.0)
        total = tl.load(total_ptr + rows, mask=n < N, other=1.0)
        p = _probabilities(scaled(_products(q, k), scale) + bias, lse[:, None])  # [BLOCK_N, BLOCK_M]
        dbias += p * divide_rows(1.0, total)[:, None] * (_products(g, v) - delta[:, None])
    offsets = (place * N + n[:, None]) * M + m
    tl.store(dbias_ptr + offsets, dbias, mask=(n[:, None] < N) & (m < M))


# ---- launches --------------------------------------------------------------------------------------------------------


def parts(d: int) -> tuple[int, ...]:
    """The blocks, one or two, that hold d elements with the fewest to spare; 16 is the least that Triton multiplies."""
    whole = max(16, triton.next_power_of_2(d))
    first = whole // 2
    second = max(16, triton.next_power_of_2(d - first))
    return (first, second) if first >= 16 and first + second < whole else (whole,)


class Tiling(NamedTuple):
    """Block sizes, the warps that share a block, and how deep Triton pipelines the loads."""

    block_n: int
    block_m: int
    num_warps: int
    num_stages: int


def tiling(kernel: Any, n: int, m: int, d: int, dtype: torch.dtype, bias_rows: bool = False) -> Tiling:
    """The blocks of ``kernel``; ``bias_rows``: whether queries have rows of the bias of their own.

    A program keeps one block, of queries or of keys, and walks over blocks of the other, which are loaded ahead, if it
    has registers and shared memory to spare for more stages than one. Four warps, which multiply by one instruction on
    Hopper, and as many programs as fit beside each other, are faster than larger blocks, but where there are so many
    tokens that a larger block saves reading. All this was measured on an H200, at 65 to 4096 tokens.

    Products of float32 split their operands, which takes registers. float64 is multiplied without tensor cores: each
    thread reads whole rows and columns, and small blocks over many threads are what keeps it from spilling.
    """
    width = sum(parts(d))
    if dtype.itemsize == 2:
        kept, walked, num_stages = _blocks_of_two_bytes(kernel, m, width, len(parts(d)), bias_rows)
    elif dtype == torch.float32:
        kept, walked = min(64, 5120 // width), min(32, 2048 // width)
        if kernel is attention_fwd_kernel:
            kept, walked = min(128, 8192 // width), min(32, 4096 // width)
        num_stages = 1
    else:
        kept = walked = min(32, 1024 // width)
        num_stages = 2
    limit_n, limit_m = (walked, kept) if kernel is attention_bwd_key_kernel else (kept, walked)
    num_warps = 8 if dtype == torch.float64 else 4
    return Tiling(block(n, limit_n), block(m, limit_m), num_warps, num_stages)


def _blocks_of_two_bytes(kernel: Any, m: int, width: int, count: int, bias_rows: bool) -> tuple[int, int, int]:
    """The tokens kept, those walked over, and the stages, for head dimensions of ``count`` parts."""
    room = 16384 // width  # shared memory for what is kept
    many = m >= 1024 and width <= 64
    if kernel is attention_bwd_bias_kernel:
        return min(64, room), min(32, room), 3 if width <= 64 else 2 if width <= 128 else 1
    if bias_rows:  # loaded ahead too
        return min(64, room), min(64, 4096 // width), 2 if kernel is attention_fwd_kernel else 1
    if kernel is attention_fwd_kernel:
        return min(128 if count == 1 else 64, room), 64 if many else 32, 3 if width <= 128 else 2
    if many:
        return 128, 64 if kernel is attention_bwd_query_kernel else 32, 3
    if kernel is attention_bwd_query_kernel:
        return min(64, room), min(32, 4096 // width), 3 if width <= 128 else 2
    return min(64, room), min(32, 4096 // width), 1 if width <= 64 else 2


def block(tokens: int, limit: int) -> int:
    """The power of two that holds the tokens, but no more than ``limit`` and no less than 16."""
    return max(16, min(triton.next_power_of_2(tokens), 1 << (max(16, limit).bit_length() - 1)))


def forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor]:
    """O, with the heads of a token side by side in memory, and L, which is empty, (0,), if it is not asked for."""
    batch, heads, n, d = query.shape
    out = query.new_empty((batch, n, heads, d)).transpose(1, 2)
    lse = query.new_empty((batch, heads, n) if return_lse else (0,), dtype=statistics_dtype(query.dtype))
    if not key.shape[2]:
        return out.zero_(), lse.fill_(float("-inf"))
    if out.numel():
        run(forward_launches, query, key, value, bias, out, lse if return_lse else None, scale=scale)
    return out, lse


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    scale: float,
) -> Tensor:
    """Writes the gradients of query, key and value into the tensors given for them, and returns that of the bias.

    The latter is contiguous, in the dtype of the bias; empty, (0,), if there is none.
    """
    grads = grad_query, grad_key, grad_value
    if not (query.numel() and key.numel()):
        for tensor in grads:
            tensor.zero_()
        return query.new_empty((0,)) if bias is None else bias.new_zeros(bias.shape)
    # L is contiguous already, unless vmap made it a view
    inputs = grad, query, key, value, bias, out, lse.contiguous()
    partial = run(backward_launches, *inputs, *grads, scale=scale)
    if bias is None:
        return query.new_empty((0,))
    if bias.shape[2] == 1:  # partial sums for every head of every entry: (B, heads, 1, M)
        return partial.sum_to_size(bias.shape)
    return partial.sum(0).view(bias.shape)


def forward_launches(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor | None, scale: float
) -> Made:
    """The launch that fills ``out``, and ``lse`` unless it is None."""
    call = Call(query, key, bias, scale)
    tile = call.tiling(attention_fwd_kernel)
    programs = call.heads * triton.cdiv(call.n, tile.block_n)
    tensors = {"q": query, "k": key, "v": value, "out": out}
    return [call.launch(attention_fwd_kernel, tile, programs, tensors, lse_ptr=lse)], None


def backward_launches(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    scale: float,
) -> Made:
    """The launches that fill the gradients, and the partial sums they leave for the bias.

    These are (B, heads, 1, M) if all queries share the bias, and (chunks, matrices of the bias, N, M) if they do not.
    """
    call = Call(query, key, bias, scale)
    tensors = {"g": grad, "q": query, "k": key, "v": value}
    saved = {"lse_ptr": lse, "delta_ptr": torch.empty_like(lse), "total_ptr": torch.empty_like(lse)}
    rows, partial = bias is not None and bias.shape[2] > 1, None
    if bias is not None and not rows:
        partial = lse.new_empty((*query.shape[:2], 1, call.m))
    tile = call.tiling(attention_bwd_query_kernel)
    programs = call.heads * triton.cdiv(call.n, tile.block_n)
    inputs = tensors | {"out": out, "dq": grad_query}
    launches = [call.launch(attention_bwd_query_kernel, tile, programs, inputs, **saved)]
    tile = call.tiling(attention_bwd_key_kernel)
    programs = call.heads * triton.cdiv(call.m, tile.block_m)
    outputs = {"dk": grad_key, "dv": grad_value}
    launches.append(
        call.launch(attention_bwd_key_kernel, tile, programs, tensors | outputs, **saved, dbias_ptr=partial)
    )
    if rows:
        tile = call.tiling(attention_bwd_bias_kernel)
        programs, chunks, terms = call.bias_terms(bias, tile)
        partial = lse.new_empty((chunks, terms["sums"], call.n, call.m))
        launches.append(
            call.launch(attention_bwd_bias_kernel, tile, programs, tensors, **saved, **terms, dbias_ptr=partial)
        )
    return launches, partial


def bias_strides(bias: Tensor) -> tuple[int, ...]:
    """`strides` of a bias or of tangents of it, 0 along the dimensions of 1, whose one element serves all."""
    return tuple(
        0 if size == 1 else stride
        for size, stride in zip(bias.shape[-4:] + bias.shape[:-4], strides(bias, 4), strict=True)
    )


class Call:
    """What the launches of one call have in common."""

    def __init__(self, query: Tensor, key: Tensor, bias: Tensor | None, scale: float):
        self.heads = query.shape[0] * query.shape[1]  # of all entries of the batch
        self.heads_per_entry = query.shape[1]
        self.n, self.d = query.shape[2:]
        self.m = key.shape[2]
        self.dtype = query.dtype
        self.arguments: dict[str, Any] = {
            "bias_ptr": bias,
            "bias_strides": None if bias is None else bias_strides(bias),
            "heads": self.heads_per_entry,
            "N": self.n,
            "M": self.m,
            "scale": scale,
            "D": self.d,
            "PARTS": parts(self.d),
            "BIAS_ROWS": bias is not None and bias.shape[2] > 1,
            "DTYPE": tl.float64 if query.dtype == torch.float64 else tl.float32,
        }

    def tiling(self, kernel: Any, choose: Callable[..., Tiling] = tiling) -> Tiling:
        return choose(kernel, self.n, self.m, self.d, self.dtype, self.arguments["BIAS_ROWS"])

    def bias_terms(self, bias: Tensor, tile: Tiling, repeats: int = 1) -> tuple[int, int, dict[str, int]]:
        """Programs per repeat, chunks and arguments of ``repeats`` sums over what shares a matrix of the bias."""
        sums = bias.shape[0] * bias.shape[1]
        parallel = sums * triton.cdiv(self.n, tile.block_n) * triton.cdiv(self.m, tile.block_m)
        terms = self.heads // sums
        per_program = terms_per_program(terms, repeats * parallel)
        chunks = triton.cdiv(terms, per_program)
        arguments = {
            "bias_heads": bias.shape[1],
            "heads_per_bias": self.heads_per_entry if bias.shape[1] == 1 else 1,
            "sums": sums,
            "terms": terms,
            "terms_per_program": per_program,
        }
        return chunks * parallel, chunks, arguments

    def launch(
        self, kernel: Any, tile: Tiling, programs: int, tensors: dict[str, Tensor | None], **arguments: Any
    ) -> Launch:
        """A launch on ``tensors`` of (B, heads, tokens, D), each of which becomes a pointer and its strides."""
        blocks = {"BLOCK_N": tile.block_n, "BLOCK_M": tile.block_m}
        return Launch(
            kernel,
            programs,
            pointers_and_strides(tensors, 4) | self.arguments | blocks | arguments,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
