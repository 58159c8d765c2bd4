"""Attention in plain PyTorch.

For each head,

    S = scale * Q K^T + bias,    P = softmax(S),    O = P V.

Shapes: ``query`` (B, heads, N, D); ``key`` and ``value`` (B, heads, M, D); ``bias`` (B or 1, heads or 1, N or 1, M).
float16 and bfloat16 are computed in float32 and rounded once, at the end.

Source: Vaswani et al., "Attention Is All You Need", NeurIPS 2017, section 3.2.1.

The derivatives are written out as well, because second-order methods differentiate through them. With G the gradient
of O, and a dot for the tangent of a quantity:

    dV = P^T G        dP = G V^T        dS = P * (dP - rowsum(P * dP))
    dQ = scale * dS K        dK = scale * dS^T Q        dbias = dS, summed over the dimensions of 1

    S. = scale * (Q. K^T + Q K.^T) + bias.        P. = P * (S. - rowsum(P * S.))        O. = P. V + P V.

A row of P depends on one query and on all keys, so the derivatives go from one block of queries to the next and hold
the scores of one block at a time: their memory is linear in N. The definition holds all scores.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from vitfast.reference._algebra import (
    add,
    matmul,
    scaled,
    softmax_backward,
    softmax_backward_tangent,
    transposed,
    without_autocast,
)

# Scores of a block of queries: enough for a whole call at the sizes of image classification, which then is one block,
# and for operations that are long beside their launch; 16 MiB in float32.
_BLOCK_SCORES = 2**22


@without_autocast
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float,
    is_causal: bool = False,
    dropout_p: float = 0.0,
) -> Tensor:
    """The definition: (B, heads, N, D) -> (B, heads, N, D).

    With ``is_causal`` query i sees the keys j <= i only. With ``dropout_p`` each probability is zero with this
    probability, and else divided by 1 - ``dropout_p``.
    """
    q, k, v, b = _widened(query, key, value, bias)
    scores = scale * (q @ k.mT)
    if b is not None:
        scores = scores + b
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, float("-inf"))
    probabilities = scores.softmax(-1)
    if dropout_p > 0:
        probabilities = F.dropout(probabilities, dropout_p)
    return (probabilities @ v).to(query.dtype)


@without_autocast
def attention_tangent(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    tangents: tuple[Tensor | None, ...],
    *,
    scale: float,
) -> Tensor:
    """The tangent of the output along ``tangents``, those of (query, key, value, bias); None stands for zero."""
    q, k, v, b = _widened(query, key, value, bias)
    q_t, k_t, v_t, b_t = _widened(*tangents)
    output_t = _Blocks()
    for rows in _row_blocks(q, k):
        q_rows, q_t_rows = _rows(q, rows), _rows(q_t, rows)
        p = _probabilities(q_rows, k, _rows(b, rows), scale)
        p_t = _probabilities_tangent(p, q_rows, k, q_t_rows, k_t, _rows(b_t, rows), scale)
        output_t.append(add(matmul(p_t, v), matmul(p, v_t)))
    return output_t.joined(query)


@without_autocast
def attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of (query, key, value, bias) for the output's gradient ``grad``."""
    g, q, k, v, b = _widened(grad, query, key, value, bias)
    query_grad, key_grad, value_grad, bias_grad = (_Blocks() for _ in range(4))
    for rows in _row_blocks(q, k):
        g_rows, q_rows, b_rows = _rows(g, rows), _rows(q, rows), _rows(b, rows)
        p = _probabilities(q_rows, k, b_rows, scale)
        scores_grad = softmax_backward(p, g_rows @ v.mT)
        query_grad.append(scores_grad @ k)
        key_grad.add(scores_grad.mT @ q_rows)
        value_grad.add(p.mT @ g_rows)
        bias_grad.take_bias_grad(scores_grad, b, b_rows)
    return (
        query_grad.joined(query, scale),
        key_grad.joined(key, scale),
        value_grad.joined(value),
        None if bias is None else bias_grad.joined(bias),
    )


@without_autocast
def attention_backward_tangent(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    grad_tangent: Tensor | None,
    tangents: tuple[Tensor | None, ...],
    *,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The tangents of what `attention_backward` returns, along ``grad_tangent`` and ``tangents``.

    With ``grad_tangent`` None this is also the vector-Jacobian product of the backward with respect to
    (query, key, value, bias): second derivatives of the scalar <grad, output> are symmetric.
    """
    g, q, k, v, b = _widened(grad, query, key, value, bias)
    g_t, q_t, k_t, v_t, b_t = _widened(grad_tangent, *tangents)
    query_grad_t, key_grad_t, value_grad_t, bias_grad_t = (_Blocks() for _ in range(4))
    for rows in _row_blocks(q, k):
        g_rows, q_rows, b_rows = _rows(g, rows), _rows(q, rows), _rows(b, rows)
        g_t_rows, q_t_rows, b_t_rows = _rows(g_t, rows), _rows(q_t, rows), _rows(b_t, rows)
        p = _probabilities(q_rows, k, b_rows, scale)
        p_t = _probabilities_tangent(p, q_rows, k, q_t_rows, k_t, b_t_rows, scale)
        p_grad = g_rows @ v.mT
        p_grad_t = add(matmul(g_t_rows, v.mT), matmul(g_rows, transposed(v_t)))
        scores_grad = softmax_backward(p, p_grad)
        scores_grad_t = softmax_backward_tangent(p, p_t, p_grad, p_grad_t)
        query_grad_t.append(add(matmul(scores_grad_t, k), matmul(scores_grad, k_t)))
        key_grad_t.add(add(matmul(transposed(scores_grad_t), q_rows), matmul(scores_grad.mT, q_t_rows)))
        value_grad_t.add(add(matmul(transposed(p_t), g_rows), matmul(p.mT, g_t_rows)))
        bias_grad_t.take_bias_grad(scores_grad_t, b, b_rows)
    return (
        query_grad_t.joined(query, scale),
        key_grad_t.joined(key, scale),
        value_grad_t.joined(value),
        None if bias is None else bias_grad_t.joined(bias),
    )


class _Blocks:
    """A result that the blocks of queries bring piece by piece; a piece of None is zero."""

    def __init__(self):
        self.pieces: list[Tensor] = []

    def append(self, piece: Tensor | None) -> None:
        """Another block's rows of the result."""
        if piece is not None:
            self.pieces.append(piece)

    def add(self, piece: Tensor | None) -> None:
        """Another block's share of a sum over all queries."""
        if piece is not None:
            self.pieces = [self.pieces[0] + piece] if self.pieces else [piece]

    def take_bias_grad(self, scores_grad: Tensor | None, bias: Tensor | None, bias_rows: Tensor | None) -> None:
        if scores_grad is not None and bias is not None:
            take = self.add if bias.shape[-2] == 1 else self.append
            take(scores_grad.sum_to_size(bias_rows.shape))

    def joined(self, like: Tensor, factor: float = 1.0) -> Tensor:
        """The whole result times ``factor``, in the dtype of ``like``, the tensor that it belongs to."""
        if not self.pieces:
            return torch.zeros_like(like)
        whole = torch.cat(self.pieces, dim=-2)
        return (whole if factor == 1 else factor * whole).to(like.dtype)


def _widened(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in the dtype to compute in."""
    return tuple(t if t is None or t.dtype == torch.float64 else t.float() for t in tensors)


def _row_blocks(query: Tensor, key: Tensor) -> Iterator[tuple[int, int]]:
    """(first query, number of queries) of blocks of no more than `_BLOCK_SCORES` scores, but one query at least."""
    batch, heads, queries, _ = query.shape
    scores_per_query = batch * heads * key.shape[-2]
    if queries * scores_per_query <= _BLOCK_SCORES:
        yield 0, queries
        return
    step = max(_BLOCK_SCORES // scores_per_query, 1)
    for start in range(0, queries, step):
        yield start, min(step, queries - start)


def _rows(x: Tensor | None, rows: tuple[int, int]) -> Tensor | None:
    """These rows of x, or the one that stands for all."""
    return x if x is None or x.shape[-2] == 1 else x.narrow(-2, *rows)


def _probabilities(query: Tensor, key: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    scores = scale * (query @ key.mT)
    return (scores if bias is None else scores + bias).softmax(-1)


def _probabilities_tangent(
    p: Tensor,
    query: Tensor,
    key: Tensor,
    query_t: Tensor | None,
    key_t: Tensor | None,
    bias_t: Tensor | None,
    scale: float,
) -> Tensor | None:
    scores_t = add(matmul(query_t, key.mT), matmul(query, transposed(key_t)))
    scores_t = add(scaled(scale, scores_t), bias_t)
    return None if scores_t is None else softmax_backward(p, scores_t)
