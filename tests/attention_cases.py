"""Cases of attention, an independent definition in extended precision, and memory layouts."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import numpy as np
import torch
from helpers import Inputs, Results, _sliced, assert_close_to_reference, restride
from torch import Tensor

from vitfast import reference
from vitfast.functional import attention, attention_qkvpacked


@dataclass(frozen=True)
class Case:
    """One call of attention; ``bias`` names the dimensions of (B, heads, N, M) that the bias has, the others are 1."""

    queries: int = 49
    keys: int | None = None  # as many as queries
    heads: int = 3
    dim: int = 32
    batch: int = 2
    bias: str | None = "hnm"
    scale: float | None = None
    packed: bool = False

    def __str__(self) -> str:
        """The id of the test."""
        parts = [f"{self.batch}x{self.heads}x{self.queries}x{self.dim}"]
        if self.keys is not None:
            parts.append(f"keys{self.keys}")
        parts.append("no_bias" if self.bias is None else f"bias_{self.bias}")
        if self.scale is not None:
            parts.append(f"scale{self.scale}")
        return "-".join([*parts, "packed"] if self.packed else parts)

    def but(self, **changes) -> Case:
        return replace(self, **changes)

    @property
    def scores(self) -> tuple[int, int, int, int]:
        return self.batch, self.heads, self.queries, self.queries if self.keys is None else self.keys

    @property
    def reference_options(self) -> dict:
        """The keyword arguments of `vitfast.reference.attention`, where the scale is always given."""
        return {"scale": self.dim**-0.5 if self.scale is None else self.scale}

    def shapes(self) -> dict[str, tuple[int, ...] | None]:
        batch, heads, n, m = self.scores
        query, key = (batch, heads, n, self.dim), (batch, heads, m, self.dim)
        bias = None
        if self.bias is not None:
            bias = tuple(size if name in self.bias else 1 for name, size in zip("bhnm", self.scores, strict=True))
        return {"query": query, "key": key, "value": key, "bias": bias, "grad": query}


def make_inputs(case: Case, dtype: torch.dtype = torch.float64, seed: int = 0) -> Inputs:
    """Tensors in the layout of separate inputs, packed or not."""
    generator = torch.Generator().manual_seed(seed)
    return Inputs(
        *(
            None if shape is None else torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            for shape in case.shapes().values()
        )
    )


def arguments(case: Case, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, ...]:
    """(query, key, value[, bias]), or (qkv[, bias]) if the case is packed."""
    *tensors, bias, _ = make_inputs(case, dtype, seed)
    if case.packed:
        tensors = [pack(*tensors)]
    return tuple(tensors) if bias is None else (*tensors, bias)


def pack(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Three times (B, heads, N, D) -> (B, N, 3, heads, D)."""
    return torch.stack([t.transpose(1, 2) for t in (query, key, value)], dim=2)


def unpack(qkv: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.transpose(1, 2) for t in qkv.unbind(2))


def fused_function(case: Case):
    """Of `arguments`: the function of `vitfast.functional`."""
    return functools.partial(attention_qkvpacked if case.packed else attention, scale=case.scale)


def plain_function(case: Case):
    """The same by PyTorch operations alone."""

    def plain_attention(*tensors):
        if not case.packed:
            return reference.attention(*tensors, **case.reference_options)
        return reference.attention(*unpack(tensors[0]), *tensors[1:], **case.reference_options).transpose(1, 2)

    return plain_attention


# ---- three ways to compute a case ----------------------------------------------------------------------------------


def fused(case: Case, inputs: Inputs) -> Results:
    """`vitfast.functional` and its backward."""
    leaves = [t.detach() for t in inputs[:3]]
    if case.packed:
        leaves = [pack(*leaves)]
    if inputs.bias is not None:
        leaves.append(inputs.bias.detach())
    leaves = [t.requires_grad_() for t in leaves]
    output = fused_function(case)(*leaves)
    grads = torch.autograd.grad(output, leaves, inputs.grad.transpose(1, 2) if case.packed else inputs.grad)
    bias_grad = None if inputs.bias is None else grads[-1]
    if case.packed:
        return Results(output.detach().transpose(1, 2), *unpack(grads[0]), bias_grad)
    return Results(output.detach(), *grads[:3], bias_grad)


def plain(case: Case, inputs: Inputs) -> Results:
    """The definition in plain PyTorch, in the dtype of the inputs, and autograd through it."""
    leaves = [t.detach().requires_grad_() for t in inputs[:4] if t is not None]
    output = reference.attention(*leaves, **case.reference_options)
    grads = torch.autograd.grad(output, leaves, inputs.grad)
    return Results(output.detach(), *grads[:3], None if inputs.bias is None else grads[3])


def exact(case: Case, inputs: Inputs) -> Results:
    """A literal loop over batch and heads in extended precision, rounded to float64 at the end."""
    q, k, v, bias, grad = (None if t is None else t.detach().double().numpy().astype(np.longdouble) for t in inputs)
    scale = np.longdouble(case.reference_options["scale"])
    out, dq, dk, dv = (np.zeros_like(t) for t in (q, q, k, v))
    dbias = None if bias is None else np.zeros_like(bias)
    full = None if bias is None else np.broadcast_to(bias, case.scores)
    for at in np.ndindex(*case.scores[:2]):
        scores = scale * (q[at] @ k[at].T)
        if bias is not None:
            scores = scores + full[at]
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        dp = grad[at] @ v[at].T
        ds = p * (dp - (p * dp).sum(-1, keepdims=True))
        out[at], dv[at] = p @ v[at], p.T @ grad[at]
        dq[at], dk[at] = scale * (ds @ k[at]), scale * (ds.T @ q[at])
        if bias is not None:
            own = tuple(i if size > 1 else 0 for i, size in zip(at, bias.shape, strict=False))
            for axis, size in enumerate(bias.shape[2:]):
                ds = ds if size == ds.shape[axis] else ds.sum(axis, keepdims=True)
            dbias[own] += ds
    return Results(*(None if t is None else torch.from_numpy(t.astype(np.float64)) for t in (out, dq, dk, dv, dbias)))


def cancelling(case: Case, inputs: Inputs) -> Results:
    """What the results are sums of, in absolute values: the size of what cancels where a gradient is zero."""
    q, k, v, bias, grad = (None if t is None else t.detach().double() for t in inputs)
    scale = case.reference_options["scale"]
    scores = scale * (q @ k.mT)
    p = (scores if bias is None else scores + bias).softmax(-1)
    dp = (grad @ v.mT).abs()
    ds = p * (dp + (p * dp).sum(-1, keepdim=True))
    return Results(
        p @ v.abs(),
        abs(scale) * (ds @ k.abs()),
        abs(scale) * (ds.mT @ q.abs()),
        p.mT @ grad.abs(),
        None if bias is None else ds.sum_to_size(bias.shape),
    )


def assert_results_close(case: Case, inputs: Inputs, results: Results, plain: Results, exact: Results) -> None:
    """The tolerance rule of helpers.py.

    A gradient of the scores is zero where a softmax does not change: with one key, along a bias that all keys share, or
    where one score is far above the others. Only rounding errors are left of it then, and the one rounding that the
    rule adds is one of the terms that cancel.
    """
    terms = cancelling(case, inputs)
    for name, result, one, truth, term in zip(Results._fields, results, plain, exact, terms, strict=True):
        if truth is None:
            assert result is None
            continue
        eps = torch.finfo(torch.float64 if result.dtype == torch.float64 else torch.float32).eps
        if truth.square().sum() <= eps**2 * term.square().sum():
            result, one, truth = result + term.to(result.dtype), one + term.to(one.dtype), truth + term
        assert_close_to_reference(result, one, truth, name)


@functools.lru_cache(maxsize=256)
def expected(case: Case, dtype: torch.dtype, seed: int = 0) -> tuple[Inputs, Results, Results]:
    """Inputs in ``dtype``, their results by plain PyTorch in that dtype, and the exact ones; shared, so only read."""
    inputs = make_inputs(case, dtype, seed)
    return inputs, plain(case, inputs), exact(case, inputs)


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "tokens_first": lambda x: restride(x, (0, 2, 1, 3)),  # (B, N, heads, D) in memory, as a projection leaves it
    "channels_first": lambda x: restride(x, (0, 1, 3, 2)),  # (B, heads, D, N)
    "heads_last": lambda x: restride(x, (0, 2, 3, 1)),
    "batch_last": lambda x: restride(x, (1, 2, 3, 0)),
    "sliced_dim": lambda x: _sliced(x, 3),
    "sliced_tokens": lambda x: _sliced(x, 2),
    "sliced_heads": lambda x: _sliced(x, 1),
    "channels_first_sliced": lambda x: _sliced(restride(x, (0, 1, 3, 2)), 2),
}
"""Names of memory layouts of a (B, heads, tokens, D) tensor -> functions that bring one into it."""
