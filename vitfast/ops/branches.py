"""Residual branches of transformers on the CPU: x + s f(norm(x)), with an MLP as f, or attention between linear layers.

Layer normalisation, stochastic depth and the residual addition compute little, and as operations of their own each
reads and writes the whole map, often in pages that the system hands out anew. Here some rows of a map at a time go
through them and the matrix products beside them (`csrc/cpu/branches.cpp`), while they are in the caches; the backward
normalises once more instead of keeping what it was.

Stochastic depth multiplies whole samples by zero. Those are left out: neither results nor gradients depend on them.
(A branch that is not finite would make them NaN; here they are x.)

All functions are for plain calls of what `serves`; double backward and gradients in a batch go by the definitions,
which PyTorch differentiates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitfast import reference
from vitfast.ops import _extension
from vitfast.ops._rules import Recorded, records_gradients
from vitfast.ops.linear import PLAIN, has_product_kernel, is_plain_backward, is_plain_call, rows_of
from vitfast.ops.mlp import BLOCK_ROWS, Weights, row_blocks


class Norm(NamedTuple):
    """A layer normalisation over the last dimension: weight and bias (C,), and epsilon."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


def serves(x: Tensor, weights: Sequence[Tensor], vectors: Sequence[Tensor | None]) -> bool:
    """Whether the functions below take a map x (B, ..., C), weights of linear layers and vectors of parameters now."""
    return (
        x.dim() >= 2
        and x.numel() > 0
        and is_plain_call(x)
        and x.dtype == torch.float32
        and all(
            w.is_contiguous() and len(w) % 16 == w.shape[1] % 16 == 0 and has_product_kernel(w, w.t()) for w in weights
        )
        and all(t is None or _is_vector(t) for t in vectors)
    )


def _is_vector(t: Tensor) -> bool:
    return t.dtype == torch.float32 and t.is_cpu and t.is_contiguous() and type(t) in PLAIN


# ---- which rows ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Depth:
    """Stochastic depth of one call: what the branch of each sample is multiplied by. ``factors`` of None are all 1."""

    samples: int
    factors: tuple[float, ...] | None = None

    @property
    def kept(self) -> list[int]:
        """The samples whose factor is not 0."""
        return [i for i in range(self.samples) if self.factors is None or self.factors[i] != 0]

    def scaled(self, branch: Tensor) -> Tensor:
        """s branch, of the branches (B, ...) of all samples."""
        return branch if self.factors is None else branch * _column(branch, self.factors)

    def spread(self, branch: Tensor) -> Tensor:
        """s branch for all samples, (B, ...), of the branches (B', ...) of those that are kept."""
        if self.factors is None:
            return branch
        scaled = branch * _column(branch, [self.factors[i] for i in self.kept])
        everything = branch.new_zeros(self.samples, *branch.shape[1:])
        return everything.index_copy(0, _of_cpu(self.kept, torch.int64), scaled)


def _of_cpu(values: Sequence[float], dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype, device="cpu")


def _column(like: Tensor, values: Sequence[float]) -> Tensor:
    return like.new_tensor(values).view(-1, *(1,) * (like.dim() - 1))


class _Block(NamedTuple):
    """Rows that are computed together.

    Attributes:
        rows: where they lie among all that are kept.
        index: where they lie in the map, or None if these are the same places.
        scale: what their branch is multiplied by, or None for 1.
    """

    rows: slice
    index: Tensor | None
    scale: Tensor | None

    def __len__(self) -> int:
        return self.rows.stop - self.rows.start

    def of(self, map_: Tensor) -> Tensor:
        """A map as the operators take it beside the index."""
        return map_[self.rows] if self.index is None else map_


class _Rows:
    """The rows of a map x (B, ..., C): those of samples that are kept, in blocks, and the others."""

    def __init__(self, depth: Depth, x: Tensor):
        per_sample = x[0].numel() // x.shape[-1]
        kept = depth.kept
        self._samples = depth.samples
        self._dropped = sorted(set(range(depth.samples)) - set(kept))
        self._index = self._scale = None
        self.count = len(kept) * per_sample
        if depth.factors is not None:
            rows = torch.arange(depth.samples * per_sample, device="cpu").view(-1, per_sample)
            factors = _of_cpu([depth.factors[i] for i in kept], torch.float32)
            self._index = rows[_of_cpu(kept, torch.int64)].flatten()
            self._scale = factors.repeat_interleave(per_sample)

    def copy_dropped(self, source: Tensor | None, target: Tensor) -> None:
        """The rows of maps (rows, C) that no branch is added to; zeros from None."""
        for sample in self._dropped:
            rows = target.view(self._samples, -1)[sample]
            rows.zero_() if source is None else rows.copy_(source.view(self._samples, -1)[sample])

    def blocks(self) -> Iterator[_Block]:
        """Of nearly equal size."""
        for rows in row_blocks(self.count, BLOCK_ROWS):
            yield _Block(rows, *(None if t is None else t[rows] for t in (self._index, self._scale)))


def _map_rows(x: Tensor) -> Tensor:
    """(B, ..., C) as a contiguous matrix."""
    return rows_of(x).contiguous()


# ---- gradients -------------------------------------------------------------------------------------------------------


class _Gradients:
    """New gradients of parameters, which the first block writes and others add to.

    Attributes:
        norm: of weight and bias of the normalisation; None where they are not needed.
        layers: of weight and bias of each linear layer, likewise.
        add: whether there is something to add to.
    """

    def __init__(self, norm: Sequence[Tensor | None], layers: Sequence[Tensor | None], needed: Sequence[bool]):
        self.norm = [torch.empty_like(t) if wanted else None for t, wanted in zip(norm, needed, strict=False)]
        self.layers: list[Tensor | None] = []
        self._needed = needed
        wanted = needed[len(norm) :]
        for i in range(0, len(layers), 2):
            weight, bias = layers[i : i + 2]
            # The sum for a bias is made beside the product for its weight.
            self.layers.append(torch.empty_like(weight) if wanted[i] or wanted[i + 1] else None)
            self.layers.append(torch.empty_like(bias) if wanted[i + 1] else None)
        self.add = False

    def chosen(self) -> list[Tensor | None]:
        """Those that are needed, after all blocks."""
        found = [*self.norm, *self.layers]
        if not self.add:
            for gradient in found:
                if gradient is not None:
                    gradient.zero_()
        return [gradient if wanted else None for gradient, wanted in zip(found, self._needed, strict=True)]


def _by_definition(
    function: Callable, tensors: Sequence[Tensor | None], grads: Sequence[Tensor | None], needed: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients that are needed, by PyTorch, which can differentiate them once more."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Of one tensor in two places, each has a gradient of its own.
        places = [None if t is None else t.view_as(t) for t in tensors]
        outputs = function(*places)
    recorded = [(o, grad) for o, grad in zip(outputs, grads, strict=True) if grad is not None and o.requires_grad]
    wanted = [t for t, is_needed in zip(places, needed, strict=True) if is_needed]
    if not (recorded and wanted):
        return [None] * len(tensors)
    outputs, grads = zip(*recorded, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=again, allow_unused=True))
    return [next(found) if is_needed else None for is_needed in needed]


# ---- x + s mlp(norm(x)) ----------------------------------------------------------------------------------------------


def residual_mlp(x: Tensor, norm: Norm, weights: Weights, depth: Depth) -> Tensor:
    """x + s mlp(norm(x)) of a map x (B, ..., C) and one factor s for each of its B samples."""
    if records_gradients((x, *norm[:2], *weights)):
        return ResidualMlp.apply(x, depth, norm.eps, *norm[:2], *weights)
    return _residual_mlp(x, norm, weights, depth, keep=False)[0]


def _residual_mlp(x: Tensor, norm: Norm, weights: Weights, depth: Depth, keep: bool) -> tuple[Tensor, list[Tensor]]:
    """The output, and of every block the hidden values before the activation if they are to be kept."""
    rows, which = _map_rows(x), _Rows(depth, x)
    out = torch.empty_like(rows)
    which.copy_dropped(rows, out)
    kept: list[Tensor] = []
    for block in which.blocks():
        hidden = rows.new_empty(len(block), len(weights[0])) if keep else None
        torch.ops.vitfast.residual_mlp(block.of(rows), block.index, block.scale, *norm, *weights, block.of(out), hidden)
        if hidden is not None:
            kept.append(hidden)
    return out.view(x.shape), kept


class ResidualMlp(Recorded):
    """(x, depth, eps, the norm's weight and bias, W1, b1, W2, b2) -> output. Called outside of transforms only."""

    @staticmethod
    def forward(ctx, x, depth, eps, norm_weight, norm_bias, *weights):
        out, hidden = _residual_mlp(x, Norm(norm_weight, norm_bias, eps), weights, depth, keep=True)
        ctx.depth, ctx.eps = depth, eps
        ctx.save_for_backward(x, norm_weight, norm_bias, *weights, *hidden)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, norm_weight, norm_bias, *others = ctx.saved_tensors
        weights, hidden, depth = tuple(others[:4]), others[4:], ctx.depth
        needed = (ctx.needs_input_grad[0], *ctx.needs_input_grad[3:])
        if is_plain_backward(grad):
            norm = Norm(norm_weight, norm_bias, ctx.eps)
            found = _residual_mlp_backward(grad, x, norm, weights, depth, hidden, needed)
        else:

            def definition(x, norm_weight, norm_bias, *weights):
                return (x + depth.scaled(reference.mlp(Norm(norm_weight, norm_bias, ctx.eps)(x), *weights)),)

            found = _by_definition(definition, (x, norm_weight, norm_bias, *weights), [grad], needed)
        return found[0], None, None, *found[1:]


def _residual_mlp_backward(
    grad: Tensor,
    x: Tensor,
    norm: Norm,
    weights: Weights,
    depth: Depth,
    hidden: Sequence[Tensor],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of x, the norm's weight and bias, W1, b1, W2 and b2."""
    rows, grads, which = _map_rows(x), _map_rows(grad), _Rows(depth, x)
    x_grad, sums = torch.empty_like(rows), _Gradients(norm[:2], weights, needed[1:])
    which.copy_dropped(grads, x_grad)
    for block, before in zip(which.blocks(), hidden, strict=True):
        torch.ops.vitfast.residual_mlp_backward(
            block.of(grads),
            block.of(rows),
            block.index,
            block.scale,
            *norm,
            weights[0],
            weights[2],
            before,
            sums.add,
            block.of(x_grad),
            *sums.norm,
            *sums.layers,
        )
        sums.add = True
    return [x_grad.view(x.shape) if needed[0] else None, *sums.chosen()]


# ---- norm(x) W^T + b -------------------------------------------------------------------------------------------------


def norm_linear(x: Tensor, norm: Norm, weight: Tensor, bias: Tensor | None, depth: Depth) -> tuple[Tensor, Tensor]:
    """norm(x) W^T + b of the samples that are kept, (B', ..., D); and x once more, for the residual addition.

    The gradient of that second result is where the first one's is added to: one pass instead of three.
    """
    if records_gradients((x, *norm[:2], weight, bias)):
        return NormLinear.apply(x, depth, norm.eps, *norm[:2], weight, bias)
    return _norm_linear(x, norm, weight, bias, depth), x


def _norm_linear(x: Tensor, norm: Norm, weight: Tensor, bias: Tensor | None, depth: Depth) -> Tensor:
    rows, which = _map_rows(x), _Rows(depth, x)
    out = rows.new_empty(which.count, len(weight))
    for block in which.blocks():
        torch.ops.vitfast.norm_linear(block.of(rows), block.index, *norm, weight, bias, out[block.rows])
    return out.view(len(depth.kept), *x.shape[1:-1], len(weight))


class NormLinear(Recorded):
    """(x, depth, eps, the norm's weight and bias, W, b) -> (output, x). Called outside of transforms only."""

    @staticmethod
    def forward(ctx, x, depth, eps, norm_weight, norm_bias, weight, bias):
        ctx.depth, ctx.eps = depth, eps
        ctx.save_for_backward(x, norm_weight, norm_bias, weight, bias)
        ctx.set_materialize_grads(False)  # nobody may use x again
        return _norm_linear(x, Norm(norm_weight, norm_bias, eps), weight, bias, depth), x

    @staticmethod
    def backward(ctx, grad, residual_grad):
        tensors = x, norm_weight, norm_bias, weight, bias = ctx.saved_tensors
        needed = (ctx.needs_input_grad[0], *ctx.needs_input_grad[3:])
        if grad is None:  # nobody used the output
            return residual_grad if needed[0] else None, *(None,) * 6
        if is_plain_backward(grad) and (residual_grad is None or is_plain_backward(residual_grad)):
            norm = Norm(norm_weight, norm_bias, ctx.eps)
            found = _norm_linear_backward(grad, residual_grad, x, norm, (weight, bias), ctx.depth, needed)
        else:

            def definition(x, norm_weight, norm_bias, weight, bias):
                return F.linear(Norm(norm_weight, norm_bias, ctx.eps)(x[ctx.depth.kept]), weight, bias), x.view_as(x)

            found = _by_definition(definition, tensors, [grad, residual_grad], needed)
        return found[0], None, None, *found[1:]


def _norm_linear_backward(
    grad: Tensor,
    residual_grad: Tensor | None,
    x: Tensor,
    norm: Norm,
    parameters: tuple[Tensor, Tensor | None],
    depth: Depth,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of x, the norm's weight and bias, W and b."""
    rows, which = _map_rows(x), _Rows(depth, x)
    grads, start = _map_rows(grad), None if residual_grad is None else _map_rows(residual_grad)
    x_grad, sums = torch.empty_like(rows), _Gradients(norm[:2], parameters, needed[1:])
    which.copy_dropped(start, x_grad)
    for block in which.blocks():
        torch.ops.vitfast.norm_linear_backward(
            grads[block.rows],
            None if start is None else block.of(start),
            block.of(rows),
            block.index,
            *norm,
            parameters[0],
            sums.add,
            block.of(x_grad),
            *sums.norm,
            *sums.layers,
        )
        sums.add = True
    return [x_grad.view(x.shape) if needed[0] else None, *sums.chosen()]


# ---- x + s (y W^T + b) -----------------------------------------------------------------------------------------------


def add_linear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, depth: Depth) -> Tensor:
    """x + s (y W^T + b) of a map x (B, ..., C), with y (B', ..., D) of the samples that are kept."""
    if records_gradients((x, y, weight, bias)):
        return AddLinear.apply(x, y, depth, weight, bias)
    return _add_linear(x, y, weight, bias, depth)


def _add_linear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, depth: Depth) -> Tensor:
    rows, others, which = _map_rows(x), _map_rows(y), _Rows(depth, x)
    out = torch.empty_like(rows)
    which.copy_dropped(rows, out)
    for block in which.blocks():
        torch.ops.vitfast.add_linear(
            block.of(rows), others[block.rows], block.index, block.scale, weight, bias, block.of(out)
        )
    return out.view(x.shape)


class AddLinear(Recorded):
    """(x, y, depth, W, b) -> output. Called outside of transforms only."""

    @staticmethod
    def forward(ctx, x, y, depth, weight, bias):
        ctx.depth = depth
        ctx.save_for_backward(y, weight, bias)
        return _add_linear(x, y, weight, bias, depth)

    @staticmethod
    def backward(ctx, grad):
        tensors = y, weight, bias = ctx.saved_tensors
        depth, needed = ctx.depth, (ctx.needs_input_grad[1], *ctx.needs_input_grad[3:])
        if is_plain_backward(grad):
            found = _add_linear_backward(grad, y, (weight, bias), depth, needed)
        else:

            def definition(y, weight, bias):
                return (depth.spread(F.linear(y, weight, bias)),)

            found = _by_definition(definition, tensors, [grad], needed)
        return grad if ctx.needs_input_grad[0] else None, found[0], None, *found[1:]


def _add_linear_backward(
    grad: Tensor, y: Tensor, parameters: tuple[Tensor, Tensor | None], depth: Depth, needed: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of y, W and b."""
    grads, others, which = _map_rows(grad), _map_rows(y), _Rows(depth, grad)
    y_grad, sums = torch.empty_like(others), _Gradients((), parameters, needed[1:])
    for block in which.blocks():
        torch.ops.vitfast.add_linear_backward(
            block.of(grads),
            others[block.rows],
            block.index,
            block.scale,
            parameters[0],
            sums.add,
            y_grad[block.rows],
            *sums.layers,
        )
        sums.add = True
    return [y_grad.view(y.shape) if needed[0] else None, *sums.chosen()]


if _extension.available():
    for _name in ("add_linear", "norm_linear", "residual_mlp"):
        for _operator in (_name, f"{_name}_backward"):  # they return nothing, and so do their fakes
            torch.library.register_fake(f"vitfast::{_operator}", lambda *tensors: None)
