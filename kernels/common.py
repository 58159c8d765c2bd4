"""What the kernels of several operators share: products, rows of a softmax, and how long a sum one program takes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TF32X3 = tl.constexpr("tf32x3")


@triton.jit
def dot(a, b, PRECISION: tl.constexpr = TF32X3):
    """a b. float32 is multiplied by tensor cores, as three products of TF32, or with "ieee" without them.

    The former's errors are no larger, but its operands, of two halves each, take twice the registers.
    """
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def scaled(x, scale):
    """x times a scale that is a float64, in the dtype of x."""
    return x * tl.full([], scale, x.dtype)


@triton.jit
def divide_rows(x, total):
    """x over the sums of the rows of P; where there is nothing to see they are 0, and leave x as it is."""
    return x / tl.where(total > 0, total, 1.0)


@triton.jit
def softmax(s):
    """Of whole rows of scores, exp(S - top), the largest score, and the sum of exp(S - top)."""
    top = tl.max(s, 1)
    # There may be nothing to see: -inf - (-inf) would be NaN.
    p = tl.exp(s - tl.where(top == float("-inf"), 0.0, top)[:, None])
    return p, top, tl.sum(p, 1)


@triton.jit
def online_softmax(s, top, total):
    """Takes another block of scores: exp(S - top), what sums so far are multiplied by, and the new top and total.

    The largest score so far is ``top``, and the sum of exp(S - top) so far ``total``, of each row.
    """
    new_top = tl.maximum(top, tl.max(s, 1))
    # There may be nothing to see in the first blocks: -inf - (-inf) would be NaN.
    reference = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp(s - reference[:, None])
    decay = tl.exp(top - reference)
    return p, decay, new_top, total * decay + tl.sum(p, 1)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that scores of tensors of ``dtype`` are computed in, and L and sums over them are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def terms_per_program(terms: int, parallel: int, programs: int = 1024) -> int:
    """How many of the ``terms`` of a sum one program adds up, where ``parallel`` programs work on as many sums.

    About 1024 programs fill the largest GPUs, and 1024 partial sums of a block of 64 by 64 scores take 16 MiB. The
    shapes alone decide, so that sums have the same order, and the same bits, in every run.
    """
    return triton.cdiv(terms, max(1, programs // parallel))


def tangents_to_fill(
    count: int, query: Tensor, key: Tensor, value: Tensor, want_output: bool, want_gradients: bool
) -> list[Tensor | None]:
    """``count`` tangents of the output and of the gradients of query, key and value, or None for what is not wanted.

    They are zeros if there is nothing to compute. The order of dimensions in memory is that of the primal.
    """
    new = torch.empty_like if count and query.numel() and key.numel() else torch.zeros_like
    wanted = (want_output, want_gradients, want_gradients, want_gradients)
    primals = (query, query, key, value)
    return [new(x.expand(count, *x.shape)) if want else None for x, want in zip(primals, wanted, strict=True)]
