"""What the kernels of several operators share: products, rows of a softmax, and how long a sum one program takes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def dot(a, b):
    """a b, float32 without TF32."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def scaled(x, scale):
    """x times a scale that is a float64, in the dtype of x."""
    return x * tl.full([], scale, x.dtype)


@triton.jit
def divide_rows(x, total):
    """x over the sums of the rows of P; where there is nothing to see they are 0, and leave x as it is."""
    return x / tl.where(total > 0, total, 1.0)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that scores of tensors of ``dtype`` are computed in, and L and sums over them are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def terms_per_program(terms: int, parallel: int) -> int:
    """How many of the ``terms`` of a sum one program adds up, where ``parallel`` programs work on as many sums.

    About 1024 programs fill the largest GPUs, and 1024 partial sums of a block of 64 by 64 scores take 16 MiB. The
    shapes alone decide, so that sums have the same order, and the same bits, in every run.
    """
    return triton.cdiv(terms, max(1, 1024 // parallel))
