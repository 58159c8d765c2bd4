"""The MLP of a transformer: the operator behind `vitfast.functional.mlp`.

On the CPU, the rows of the input go through both linear layers some at a time, so that what lies between the layers
never leaves the caches, and the activation is computed in place. In one piece it is written to memory and read again
several times over, and, at sizes of tens of megabytes, in pages that the system hands out anew for every call.

Forward and backward keep the values before the activation and nothing else; the backward recomputes the activation
beside its derivative.

Anything but plain evaluation and a plain backward is the definition, which PyTorch differentiates: transforms of
`torch.func`, forward-mode differentiation, double backward, `torch.compile`, autocast; and so is every other device,
where a forced kernel of another operator is no reason to refuse.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vitfast import reference
from vitfast.ops import _extension
from vitfast.ops._rules import records_gradients
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
    if records_gradients((x, *(weight for weight in weights if weight is not None))):
        return Mlp.apply(x, *weights)
    return _forward(x, weights, keep=False)[0]


def _blocks(rows: Tensor) -> Iterator[slice]:
    """Cuts rows into blocks of nearly equal size."""
    total = len(rows)
    # Weight gradients are sums over blocks, which in 16 bits would be rounded block by block.
    count = max(1, round(total / BLOCK_ROWS)) if rows.element_size() >= 4 else 1
    size = -(-total // count)
    return (slice(first, min(first + size, total)) for first in range(0, total, size or 1))


def run_block(x: Tensor, weights: Weights, activated: Tensor, out: Tensor, keep: bool) -> Tensor | None:
    """Writes the output of some rows to ``out``, and what the activation gives to ``activated``.

    Returns the hidden values before the activation if they are to be kept.
    """
    weight1, bias1, weight2, bias2 = weights
    before = product(x, weight1, bias1, out=None if keep else activated)
    torch.ops.vitfast.gelu(before, activated)
    product(activated, weight2, bias2, out=out)
    return before if keep else None


def differentiate_block(
    grad: Tensor,
    x: Tensor,
    weights: Weights,
    before: Tensor,
    scratches: Sequence[Tensor],
    x_grad: Tensor | None,
    needed: Sequence[bool],
    sums: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """Writes the gradient of some rows to ``x_grad``, and returns those of W1, b1, W2 and b2, added to ``sums``.

    Args:
        grad: of the output.
        x: the rows.
        before: their hidden values before the activation.
        scratches: two matrices for at least as many hidden values.
        needed: which of the four gradients are.
    """
    weight1, _, weight2, _ = weights
    grad_hidden, activated = (scratch[: len(before)] for scratch in scratches)
    product(grad, weight2.t(), out=grad_hidden)
    torch.ops.vitfast.gelu_backward(before, activated, grad_hidden)
    second = parameter_gradients(grad, activated, needed[2:], sums[2:])
    first = parameter_gradients(grad_hidden, x, needed[:2], sums[:2])
    if x_grad is not None:
        product(grad_hidden, weight1.t(), out=x_grad)
    return *first, *second


def _forward(x: Tensor, weights: Weights, keep: bool) -> tuple[Tensor, list[Tensor]]:
    """The output, and of every block the hidden values before the activation if they are to be kept."""
    rows = rows_of(x)
    output = rows.new_empty(len(rows), len(weights[2]))
    hidden: list[Tensor] = []
    scratch = None
    for block in _blocks(rows):
        some = rows[block]
        if scratch is None:  # the first block is the largest
            scratch = rows.new_empty(len(some), len(weights[0]))
        before = run_block(some, weights, scratch[: len(some)], output[block], keep)
        if before is not None:
            hidden.append(before)
    return output.reshape(*x.shape[:-1], len(weights[2])), hidden


def _backward(
    grad: Tensor, x: Tensor, weights: Weights, hidden: Sequence[Tensor], needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of x, W1, b1, W2 and b2, as far as they are needed."""
    rows, grads = rows_of(x), rows_of(grad)
    if len(rows) == 0:
        return tuple(
            torch.zeros_like(t) if is_needed else None for t, is_needed in zip((x, *weights), needed, strict=True)
        )
    grad_x = torch.empty_like(rows, memory_format=torch.contiguous_format) if needed[0] else None
    sums: tuple[Tensor | None, ...] = (None,) * 4
    scratches = [torch.empty_like(hidden[0]) for _ in range(2)]  # the first block is the largest
    for block, before in zip(_blocks(rows), hidden, strict=True):
        some = None if grad_x is None else grad_x[block]
        sums = differentiate_block(grads[block], rows[block], weights, before, scratches, some, needed[1:], sums)
    return None if grad_x is None else grad_x.reshape(x.shape), *sums


class Mlp(torch.autograd.Function):
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
