"""The MLP of a transformer: the operator behind `vitfast.functional.mlp`.

On the CPU, the rows of the input go through both linear layers some at a time, so that what lies between the layers
never leaves the caches, and the activation is computed in place. In one piece it is written to memory and read again
several times over, and, at sizes of tens of megabytes, in pages that the system hands out anew for every call.

Forward and backward keep the values before the activation and nothing else; the backward recomputes the activation
beside its derivative.

Anything but plain evaluation and a plain backward is the definition, which PyTorch differentiates: transforms of
`torch.func`, forward-mode differentiation, double backward, `torch.compile`, tracing, autocast; and so is every other
device, where a forced kernel of another operator is no reason to refuse.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vitfast import reference
from vitfast.ops import _extension
from vitfast.ops._rules import Recorded, records_gradients
from vitfast.ops.linear import is_plain_backward, is_plain_call, parameter_gradients, product, rows_of

# Rows at a time. Fewer, and the matrix products lose speed; many more, and the hidden values outgrow the caches.
BLOCK_ROWS = 2048

Weights = tuple[Tensor, Tensor | None, Tensor, Tensor | None]
"""W1 (hidden, in), b1, W2 (out, hidden) and b2."""


def mlp(x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None) -> Tensor:
    """Checked arguments in, the output out: on the fastest path that serves them."""
    weights = (weight1, bias1, weight2, bias2)
    if not is_plain_call(x):
        return reference.mlp(x, *weights)
    if records_gradients((x, *weights)):
        return Mlp.apply(x, *weights)
    return _forward(x, weights, keep=False)[0]


def row_blocks(total: int, rows: int = BLOCK_ROWS) -> Iterator[slice]:
    """Cuts rows into blocks of nearly equal size, of about so many rows; the first is the largest."""
    size = -(-total // max(1, round(total / rows)))
    return (slice(first, min(first + size, total)) for first in range(0, total, size or 1))


def _blocks(rows: Tensor) -> Iterator[slice]:
    # Weight gradients are sums over blocks, which in 16 bits would be rounded block by block.
    return row_blocks(len(rows)) if rows.element_size() >= 4 else row_blocks(len(rows), max(len(rows), 1))


def _forward(x: Tensor, weights: Weights, keep: bool) -> tuple[Tensor, list[Tensor]]:
    """The output, and of every block the hidden values before the activation if they are to be kept."""
    weight1, bias1, weight2, bias2 = weights
    rows = rows_of(x)
    output = rows.new_empty(len(rows), len(weight2))
    hidden: list[Tensor] = []
    scratch = None
    for block in _blocks(rows):
        some = rows[block]
        if scratch is None:  # the first block is the largest
            scratch = rows.new_empty(len(some), len(weight1))
        activated = scratch[: len(some)]
        before = product(some, weight1, bias1, out=None if keep else activated)
        if keep:
            hidden.append(before)
        torch.ops.vitfast.gelu(before, activated)
        product(activated, weight2, bias2, out=output[block])
    return output.reshape(*x.shape[:-1], len(weight2)), hidden


def _backward(
    grad: Tensor, x: Tensor, weights: Weights, hidden: Sequence[Tensor], needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients of x, W1, b1, W2 and b2, as far as they are needed."""
    weight1, _, weight2, _ = weights
    rows, grads = rows_of(x), rows_of(grad)
    if len(rows) == 0:
        return tuple(
            torch.zeros_like(t) if is_needed else None for t, is_needed in zip((x, *weights), needed, strict=True)
        )
    grad_x = torch.empty_like(rows, memory_format=torch.contiguous_format) if needed[0] else None
    first = second = None, None  # of weight and bias of the linear layers
    scratches = [torch.empty_like(hidden[0]) for _ in range(2)]  # the first block is the largest
    for block, before in zip(_blocks(rows), hidden, strict=True):
        grad_hidden, activated = (scratch[: len(before)] for scratch in scratches)
        product(grads[block], weight2.t(), out=grad_hidden)
        torch.ops.vitfast.gelu_backward(before, activated, grad_hidden)
        second = parameter_gradients(grads[block], activated, needed[3:], sums=second)
        first = parameter_gradients(grad_hidden, rows[block], needed[1:3], sums=first)
        if grad_x is not None:
            product(grad_hidden, weight1.t(), out=grad_x[block])
    return None if grad_x is None else grad_x.reshape(x.shape), *first, *second


class Mlp(Recorded):
    """(x, W1, b1, W2, b2) -> output. Called outside of transforms only."""

    @staticmethod
    def forward(ctx, x, *weights):
        output, hidden = _forward(x, weights, keep=True)
        ctx.save_for_backward(x, *weights, *hidden)
        return output

    @staticmethod
    def backward(ctx, grad):
        x, weight1, bias1, weight2, bias2, *hidden = ctx.saved_tensors
        weights = (weight1, bias1, weight2, bias2)
        if is_plain_backward(grad):
            return _backward(grad, x, weights, hidden, ctx.needs_input_grad)
        return reference.mlp_backward(grad, x, *weights)


if _extension.available():
    for _name in ("gelu", "gelu_backward"):  # they return nothing, and so do their fakes
        torch.library.register_fake(f"vitfast::{_name}", lambda *tensors: None)
