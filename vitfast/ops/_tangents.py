"""Kernels for tangents of an operator, called for K of them at once.

Forward mode asks for one tangent, while `vmap` carries K of them through the same code: `Batch` is where the two meet.
Its `vmap` hands all K to one call of a kernel, beside primals that are there once. This is what makes products of a
Hessian with K vectors, ``vmap(jvp(grad(f)))``, do the work of the primals once.

A kernel's result has no graph and no tangent of its own. Where somebody may want one, the definition in PyTorch's
operations serves, and so it does where primals differ from vector to vector.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack

from vitfast.ops._rules import have_memory, is_batched_gradient, records_gradients, with_signature

Tensors = Sequence[Tensor | None]


@dataclass(frozen=True)
class Rule:
    """Tangents of an operator, by a kernel and by their definition.

    Attributes:
        kernel: (spec, primals, tangents) -> results; tangents and results have K in front, and may have any strides.
        definition: the same for one tangent, without K, in operations of PyTorch.
        serves: (spec, primals) -> whether there is a kernel for them.

    A tangent of None is zero. Neither returns None.
    """

    kernel: Callable[[Any, Tensors, Tensors], tuple[Tensor, ...]]
    definition: Callable[[Any, Tensors, Tensors], tuple[Tensor, ...]]
    serves: Callable[[Any, Tensors], bool]


def tangents_of(rule: Rule, spec: Any, primals: Tensors, tangents: Tensors) -> tuple[Tensor, ...]:
    """The results along one tangent, or along as many as vmap carries: by the kernel if nothing is to be differentiated
    again."""
    idle = all(tangent is None for tangent in tangents)
    if idle or not rule.serves(spec, primals) or _is_differentiated((*primals, *tangents)):
        return rule.definition(spec, primals, tangents)
    stacked = (None if tangent is None else tangent.unsqueeze(0) for tangent in tangents)
    return tuple(result.squeeze(0) for result in Batch.apply(rule, spec, len(primals), *primals, *stacked))


def compute(rule: Rule, spec: Any, primals: Tensors, tangents: Tensors) -> tuple[Tensor, ...]:
    """The results along K tangents, which have K in front, and are no part of a transform."""
    if rule.serves(spec, primals):
        return rule.kernel(spec, primals, tangents)
    return mapped(lambda *tangents: rule.definition(spec, primals, tangents), tangents)


def mapped(definition: Callable, tangents: Tensors):
    """The definition of one tangent for K of them, which have K in front."""
    return torch.vmap(definition, in_dims=tuple(None if t is None else 0 for t in tangents))(*tangents)


def _is_differentiated(tensors: Tensors) -> bool:
    """Whether anything but vmap may ask for a derivative of what is computed from the tensors."""
    present = tuple(tensor for tensor in tensors if tensor is not None)
    if records_gradients(present) or any(map(is_batched_gradient, present)):
        return True
    levels = [level.key() for level in get_interpreter_stack() or ()]
    if levels and levels[-1] == TransformType.Jvp and not torch._C._is_fwd_grad_enabled():
        levels.pop()  # the transform that asks for these tangents
    return any(level != TransformType.Vmap for level in levels)


# Vectors beyond so many bytes do not leave a GPU room for the tangents beside them.
_MOST_BYTES_OF_A_VECTOR = 512


def has_kernel(spec: Any, primals: Tensors) -> bool:
    """Whether an attention's backend has a kernel for tangents; the last dimension of the last primal is the head's."""
    if spec.backend != "triton":
        return spec.backend == "cpu"
    if not have_memory(primals):  # there is no operator that could be called instead
        return False
    vector = primals[-1]
    return _power_of_two(vector.shape[-1]) * vector.element_size() <= _MOST_BYTES_OF_A_VECTOR


def _power_of_two(n: int) -> int:
    """The smallest that is not less than n."""
    return 1 << (n - 1).bit_length() if n > 0 else 0


def count_of(tangents: Tensors) -> int:
    """K of tangents that have it in front."""
    return next(len(tangent) for tangent in tangents if tangent is not None)


@with_signature
class Batch(torch.autograd.Function):
    """(rule, spec, number of primals, *primals, *tangents with K in front) -> results with K in front."""

    @staticmethod
    def forward(rule, spec, count, *tensors):
        return tuple(rule.kernel(spec, tensors[:count], tensors[count:]))

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def vmap(info, in_dims, rule, spec, count, *tensors):
        size, dims = info.batch_size, in_dims[3:]
        primals, tangents = tensors[:count], tensors[count:]
        if any(dim is not None for dim in dims[:count]):
            return _one_by_one(rule, spec, count, dims, tensors), 0
        merged = [
            None if tangent is None else _leading(tangent, dim, size).flatten(0, 1)
            for tangent, dim in zip(tangents, dims[count:], strict=True)
        ]
        results = Batch.apply(rule, spec, count, *primals, *merged)
        return tuple(result.unflatten(0, (size, -1)) for result in results), 0


def _leading(x: Tensor, dim: int | None, size: int) -> Tensor:
    """x with the mapped dimension, or one made by expanding, in front."""
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _one_by_one(rule: Rule, spec: Any, count: int, dims: Sequence[int | None], tensors: Tensors) -> tuple[Tensor, ...]:
    """Primals differ along the mapped dimension: the definition, mapped over it and, inside, over the K tangents."""

    def of_one(*tensors):
        return mapped(lambda *tangents: rule.definition(spec, tensors[:count], tangents), tensors[count:])

    return torch.vmap(of_one, in_dims=tuple(dims))(*tensors)
