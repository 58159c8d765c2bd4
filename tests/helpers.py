"""What the tests share: an independent definition of window attention in extended precision, and the tolerance rule.

    error <= 2 x (error of plain PyTorch in the same dtype) + one rounding of that dtype

against the exact result. Errors are root mean squares over a tensor: of two computations that are equally good, one
often has more than twice the largest error of the other, but not twice its mean error. A single wrong element stands
out of a mean all the same in float32 and float64; in float16 and bfloat16, where most of the error is that of the last
rounding, the rule holds for the largest error too.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vitfast import reference
from vitfast.functional import window_attention, window_attention_qkvpacked

Pair = tuple[int, int]


class Results(NamedTuple):
    """The output of an attention and the gradients of its inputs; no bias, no gradient of it."""

    output: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None


# ---- the tolerance rule --------------------------------------------------------------------------------------------


def _root_mean_square(x: Tensor) -> float:
    return x.square().mean().sqrt().item() if x.numel() else 0.0


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def assert_close_to_reference(
    result: Tensor, plain: Tensor, exact: Tensor, name: str = "result", roundings: int = 1
) -> None:
    """Holds ``result`` to the tolerance rule; ``plain`` is PyTorch's in the same dtype, ``exact`` is float64.

    Where plain PyTorch gets by with fewer roundings than a sum of many terms usually has, ``roundings`` says how many
    more than one are allowed.
    """
    assert result.shape == exact.shape, f"{name} has the shape {tuple(result.shape)}, not {tuple(exact.shape)}"
    assert result.dtype == plain.dtype, f"{name} is {result.dtype}, not {plain.dtype}"
    norms = {"mean": _root_mean_square}
    if result.dtype in (torch.float16, torch.bfloat16):
        norms["largest"] = _largest
    for kind, norm in norms.items():
        error, plain_error = (norm(t.detach().double() - exact) for t in (result, plain))
        rounding = roundings * torch.finfo(result.dtype).eps * norm(exact)
        # the comparison is false for NaN
        assert error <= 2 * plain_error + rounding, (
            f"{name}: {kind} error {error:.3g} is more than 2 x {plain_error:.3g} (plain PyTorch) + {rounding:.3g}"
        )


def assert_results_close(results: Results, plain: Results, exact: Results) -> None:
    for name, *tensors in zip(Results._fields, results, plain, exact, strict=True):
        if tensors[2] is None:
            assert tensors[0] is None
        else:
            assert_close_to_reference(*tensors, name=name)


# ---- cases ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One call of window attention; ``bias`` is None, "shared" or "per head"."""

    size: Pair = (14, 14)
    window: Pair = (7, 7)
    shift: Pair = (0, 0)
    heads: int = 3
    dim: int = 32
    ratio: Pair = (1, 1)
    bias: str | None = "per head"
    batch: int = 2
    scale: float | None = None
    packed: bool = False

    def __str__(self) -> str:
        """The id of the test."""
        parts = [
            f"{self.batch}x{self.size[0]}x{self.size[1]}",
            f"window{self.window[0]}x{self.window[1]}",
            f"shift{self.shift[0]}x{self.shift[1]}",
            f"heads{self.heads}",
            f"dim{self.dim}",
        ]
        if self.ratio != (1, 1):
            parts.append(f"ratio{self.ratio[0]}x{self.ratio[1]}")
        parts.append({None: "no_bias", "shared": "shared_bias", "per head": "bias"}[self.bias])
        return "-".join([*parts, "packed"] if self.packed else parts)

    def but(self, **changes) -> Case:
        return replace(self, **changes)

    @property
    def key_size(self) -> Pair:
        return self.size[0] // self.ratio[0], self.size[1] // self.ratio[1]

    @property
    def options(self) -> dict:
        """The keyword arguments of `vitfast.functional.window_attention`."""
        return {"window_size": self.window, "shift": self.shift, "scale": self.scale}

    @property
    def reference_options(self) -> dict:
        """The keyword arguments of `vitfast.reference.window_attention`, where the scale is always given."""
        return self.options | {"scale": self.dim**-0.5 if self.scale is None else self.scale}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        query = (self.batch, *self.size, self.heads, self.dim)
        key = (self.batch, *self.key_size, self.heads, self.dim)
        n = self.window[0] * self.window[1]
        m = n // (self.ratio[0] * self.ratio[1])
        bias = {None: None, "shared": (1, n, m), "per head": (self.heads, n, m)}[self.bias]
        return {"query": query, "key": key, "value": key, "bias": bias, "grad": query}


class Inputs(NamedTuple):
    """Tensors of a case; ``grad`` is the gradient of the output."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    grad: Tensor

    def map(self, function) -> Inputs:
        return Inputs(*(None if t is None else function(t) for t in self))


def make_inputs(case: Case, dtype: torch.dtype = torch.float64, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    return Inputs(
        *(
            None if shape is None else torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            for shape in case.shapes().values()
        )
    )


# ---- three ways to compute a case ----------------------------------------------------------------------------------


def fused(case: Case, inputs: Inputs) -> Results:
    """`vitfast.functional` and its backward."""
    query, key, value, bias = (None if t is None else t.detach().requires_grad_() for t in (*inputs[:3], inputs.bias))
    if case.packed:
        qkv = torch.stack((query, key, value), dim=3).detach().requires_grad_()
        output = window_attention_qkvpacked(qkv, bias, **case.options)
        qkv_grad, *bias_grad = torch.autograd.grad(output, (qkv,) if bias is None else (qkv, bias), inputs.grad)
        grads = (*qkv_grad.unbind(3), *bias_grad)
    else:
        output = window_attention(query, key, value, bias, **case.options)
        tensors = (query, key, value) if bias is None else (query, key, value, bias)
        grads = torch.autograd.grad(output, tensors, inputs.grad)
    return Results(output.detach(), *grads[:3], None if bias is None else grads[3])


def plain(case: Case, inputs: Inputs) -> Results:
    """The definition in plain PyTorch, in the dtype of the inputs, and autograd through it."""
    tensors = [t.detach().requires_grad_() for t in inputs[:4] if t is not None]
    bias = tensors[3] if len(tensors) == 4 else None
    output = reference.window_attention(*tensors[:3], bias, **case.reference_options)
    grads = torch.autograd.grad(output, tensors, inputs.grad)
    return Results(output.detach(), *grads[:3], None if bias is None else grads[3])


def exact(case: Case, inputs: Inputs) -> Results:
    """A literal loop over the windows in extended precision, independent of vitfast, rounded to float64 at the end.

    The window of a row is floor((row - shift) / window), its place in it (row - shift) mod window; columns likewise.
    """
    q, k, v, bias, grad = (None if t is None else t.detach().double().numpy().astype(np.longdouble) for t in inputs)
    scale = np.longdouble(case.reference_options["scale"])
    rows, columns = (_places(case, axis, case.size[axis], 1) for axis in (0, 1))
    key_rows, key_columns = (_places(case, axis, case.key_size[axis], case.ratio[axis]) for axis in (0, 1))
    key_window_columns = case.window[1] // case.ratio[1]
    out, dq, dk, dv = (np.zeros_like(t) for t in (q, q, k, v))
    dbias = None if bias is None else np.zeros_like(bias)
    for row_window in np.unique(rows.window):
        for column_window in np.unique(columns.window):
            y, x = np.nonzero(rows.window == row_window)[0], np.nonzero(columns.window == column_window)[0]
            ky = np.nonzero(key_rows.window == row_window)[0]
            kx = np.nonzero(key_columns.window == column_window)[0]
            n = (rows.local[y][:, None] * case.window[1] + columns.local[x]).ravel()
            m = (key_rows.local[ky][:, None] * key_window_columns + key_columns.local[kx]).ravel()
            queries, keys = np.ix_(range(case.batch), y, x), np.ix_(range(case.batch), ky, kx)
            wq, wk, wv, wg = (_tokens(t[at]) for t, at in ((q, queries), (k, keys), (v, keys), (grad, queries)))
            scores = scale * (wq @ wk.swapaxes(-1, -2))
            if bias is not None:
                scores = scores + bias[:, n][:, :, m]
            p = np.exp(scores - scores.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            dp = wg @ wv.swapaxes(-1, -2)
            ds = p * (dp - (p * dp).sum(-1, keepdims=True))
            for whole, at, tokens in (
                (out, queries, p @ wv),
                (dq, queries, scale * (ds @ wk)),
                (dk, keys, scale * (ds.swapaxes(-1, -2) @ wq)),
                (dv, keys, p.swapaxes(-1, -2) @ wg),
            ):
                whole[at] = tokens.swapaxes(1, 2).reshape(whole[at].shape)
            if bias is not None:
                sums = ds.sum(0)
                dbias[np.ix_(range(len(bias)), n, m)] += sums.sum(0, keepdims=True) if len(bias) == 1 else sums
    return Results(*(None if t is None else torch.from_numpy(t.astype(np.float64)) for t in (out, dq, dk, dv, dbias)))


class _Places(NamedTuple):
    window: np.ndarray
    local: np.ndarray


def _places(case: Case, axis: int, size: int, ratio: int) -> _Places:
    position = np.arange(size) * ratio - case.shift[axis]
    return _Places(position // case.window[axis], position % case.window[axis] // ratio)


def _tokens(x: np.ndarray) -> np.ndarray:
    """(B, rows, columns, heads, D) -> (B, heads, rows * columns, D)."""
    batch, rows, columns, heads, dim = x.shape
    return x.reshape(batch, rows * columns, heads, dim).swapaxes(1, 2)


@functools.lru_cache(maxsize=256)
def expected(case: Case, dtype: torch.dtype, seed: int = 0) -> tuple[Inputs, Results, Results]:
    """Inputs in ``dtype``, their results by plain PyTorch in that dtype, and the exact ones; shared, so only read."""
    inputs = make_inputs(case, dtype, seed)
    case = case.but(packed=False)
    return inputs, plain(case, inputs), exact(case, inputs)


# ---- memory layouts ------------------------------------------------------------------------------------------------


def restride(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """The same values, with the dimensions in memory in ``order``, outermost first."""
    return x.permute(order).contiguous().permute(torch.tensor(order).argsort().tolist())


def expanded_along(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The shape of x, with the first entry along ``dims`` repeated by strides of zero."""
    first = x
    for dim in dims:
        first = first.narrow(dim, 0, 1)
    return first.expand(x.shape)


def _sliced(x: Tensor, dim: int) -> Tensor:
    """The same values as every second element along ``dim`` of a larger tensor, whose other elements are NaN."""
    shape = list(x.shape)
    shape[dim] = 2 * shape[dim] + 1
    whole = x.new_full(shape, torch.nan)
    view = whole.narrow(dim, 1, shape[dim] - 1).unflatten(dim, (-1, 2)).select(dim + 1, 0)
    return view.copy_(x)


def _cropped(x: Tensor) -> Tensor:
    """The same values as a part of channels-first maps that are higher and wider, which are NaN elsewhere."""
    batch, height, width, heads, dim = x.shape
    whole = x.new_full((batch, heads, dim, height + 1, width + 3), torch.nan).permute(0, 3, 4, 1, 2)
    return whole[:, :height, 1 : width + 1].copy_(x)


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "heads_first": lambda x: restride(x, (0, 3, 1, 2, 4)),  # (B, heads, H, W, D) in memory
    "channels_first": lambda x: restride(x, (0, 3, 4, 1, 2)),  # (B, heads, D, H, W)
    "width_first": lambda x: restride(x, (2, 1, 0, 4, 3)),
    "batch_last": lambda x: restride(x, (1, 2, 3, 4, 0)),
    "sliced_dim": lambda x: _sliced(x, 4),
    "sliced_width": lambda x: _sliced(x, 2),
    "sliced_heads": lambda x: _sliced(x, 3),
    "channels_first_sliced": lambda x: _sliced(restride(x, (0, 3, 4, 1, 2)), 2),
    "channels_first_cropped": _cropped,
}
"""Names of memory layouts of a (B, H, W, heads, D) tensor -> functions that bring one into it."""
