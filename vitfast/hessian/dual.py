"""Forward over reverse: a gradient with K tangents, computed once.

A `Dual` is a tensor with K tangents, one for each vector. Autograd records operations on them like on any tensor, and
its backward runs on them too: the gradient of a loss is then a `Dual`, whose tangents are the products of the Hessian
with all vectors. Every operation that reaches PyTorch's dispatcher, in forward and backward, computes its primal once,
and its tangents by a rule (`vitfast.hessian.rules`), or else by `vmap` of `jvp` of that one operation.

It is what `vmap(jvp(grad(f)))` computes. Nested transforms of `torch.func` cost up to a millisecond for every layer
that is written in Python, and compute K tangents by many passes over memory.

A tensor without tangents is a plain one: constants cost nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, ValuesView
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.func import jvp
from torch.overrides import enable_reentrant_dispatch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

__all__ = ["Dual", "Primals", "Unsupported", "dual", "gradient_tangents", "parts"]


class Unsupported(Exception):
    """An operation that has no tangent here."""


class _WithoutTangents(Exception):
    """An operation returns nothing that could have a tangent."""


class Dual(Tensor):
    """A tensor and K tangents of it.

    Attributes:
        primal: the values.
        tangents: (K, *shape).
        is_shared: whether a view of the same memory exists, so that a change in place would have to be seen elsewhere.
        run: the primal results of the run that it is part of.
    """

    @staticmethod
    def __new__(cls, primal: Tensor, tangents: Tensor):
        return Tensor._make_wrapper_subclass(
            cls, primal.shape, strides=primal.stride(), dtype=primal.dtype, device=primal.device
        )

    def __init__(self, primal: Tensor, tangents: Tensor):
        self.primal, self.tangents = primal, tangents.to(primal.dtype)
        self.is_shared, self.run = False, None

    def __repr__(self) -> str:
        return f"Dual({self.primal}, tangents={self.tangents})"

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        # Autograd detaches what it saves, too, but that comes to __torch_dispatch__ alone; and in the forward of a
        # Function, where forward mode is off, what is detached is still a value of the function.
        if function in _STOPS and torch._C._is_fwd_grad_enabled():
            return args[0].run.handed_out(args[0].primal)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operation in CONSTANTS:
            return operation(*map(_primal, args), **kwargs)
        if operation._schema.is_mutable:
            plain = _not_in_place(operation)
            return _take_over(args[0], cls.__torch_dispatch__(plain, types, args, kwargs), operation)
        if operation in COMPOSITES:
            return COMPOSITES[operation](*args, **kwargs)
        run = _run_of((args, kwargs.values()))
        rule, serves = RULES.get(operation, (None, None))
        if rule is None or (serves is not None and not serves(*args, **kwargs)):
            results = by_transforms(operation, *args, **kwargs)
        else:
            results = rule(operation, run.of(operation, args, kwargs), *args, **kwargs)
        is_view = _returns_views(operation)
        for result in results if isinstance(results, (tuple, list)) else (results,):
            if isinstance(result, Tensor) and result.is_complex():
                raise Unsupported(f"{operation} returns complex numbers")
            if isinstance(result, Dual):
                result.run, result.is_shared = run, is_view
        if is_view:
            for arg in args:
                if isinstance(arg, Dual):
                    arg.is_shared = True
        return results


_STOPS = {Tensor.detach, torch.detach, Tensor.data.__get__}

RULES: dict[Any, tuple[Callable, Callable[..., bool] | None]] = {}
"""Operations of the dispatcher -> (operation, its primal result, *arguments) -> its result with tangents; and which
arguments this serves, None for all."""

PRIMALS: dict[Any, Callable] = {}
"""Operations of the dispatcher -> what computes their primal results, where that is not the operation itself. These may
have another layout, but share no memory with arguments that the operation's would not."""

STATISTICS: set[Any] = set()
"""Operations some of whose results have no tangents, and need none."""

COMPOSITES: dict[Any, Callable] = {}
"""Operations that PyTorch cannot differentiate in forward mode -> the same, of operations that it can."""

CONSTANTS: set[Any] = set()
"""Operations whose result depends on no values of their arguments. It is new in every run: somebody may fill it."""


class Primals:
    """The primal results of operations, in the order in which they run: computed once, and kept if somebody asks to.

    A function that is run again on the same values then computes tangents only.
    """

    def __init__(self, keep: bool):
        self._keep, self._results, self._next = keep, [], 0

    def handed_out(self, primal: Tensor) -> Tensor:
        """Values that somebody gets to do with as he likes."""
        return primal.clone() if self._keep else primal.detach()

    def rewind(self) -> None:
        """To the first operation."""
        self._next = 0

    def of(self, operation, args, kwargs):
        """The result of the operation that is next."""
        if self._next < len(self._results):
            kept, result, versions = self._results[self._next]
            if kept is not operation:
                raise Unsupported(f"{operation} runs where {kept} ran before: the function is not the same")
            if versions != _versions(result):
                raise Unsupported(f"the result of {operation}, which is kept, was changed in place")
        else:
            result = PRIMALS.get(operation, operation)(*map(_primal, args), **kwargs)
            if self._keep:
                self._results.append((operation, result, _versions(result)))
        self._next += 1
        return result


def _versions(results: Any) -> list[int]:
    """How often each tensor has been changed."""
    return [
        r._version for r in (results if isinstance(results, (tuple, list)) else (results,)) if isinstance(r, Tensor)
    ]


@functools.cache
def _returns_views(operation) -> bool:
    """Whether a result may share memory with an argument."""
    return any(r.alias_info is not None and not r.alias_info.is_write for r in operation._schema.returns)


def _run_of(args) -> Primals | None:
    """Of the first tensor with tangents, which may be in a list."""
    for arg in args:
        run = arg.run if isinstance(arg, Dual) else None
        if isinstance(arg, (tuple, list, ValuesView)):
            run = _run_of(arg)
        if run is not None:
            return run
    return None


def _primal(x: Any) -> Any:
    if isinstance(x, (list, tuple)):
        return [_primal(item) for item in x]
    return x.primal if isinstance(x, Dual) else x


def _not_in_place(operation):
    """The operation that returns a new tensor where ``operation`` changes its first argument."""
    namespace, name = operation._schema.name.split("::")
    plain = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None) if name.endswith("_") else None
    if plain is None or operation._overloadname not in plain.overloads():
        raise Unsupported(f"{operation} changes a tensor in place")
    return getattr(plain, operation._overloadname)


def _take_over(x: Any, result: Dual, operation) -> Dual:
    """x with the values of a result, as if it had been changed in place: if no view would have to see it."""
    if not isinstance(x, Dual) or x.is_shared:
        raise Unsupported(f"{operation} changes a tensor in place that has views, or no tangents")
    alike = result.shape == x.shape and result.dtype == x.dtype and result.stride() == x.stride()
    if not isinstance(result, Dual) or not alike:
        raise Unsupported(f"{operation} changes a tensor in place to another layout")
    x.primal, x.tangents = result.primal, result.tangents
    return x


def parts(x: Any) -> tuple[Any, Tensor | None]:
    """The primal of a tensor, and its tangents if it has some."""
    return (x.primal, x.tangents) if isinstance(x, Dual) else (x, None)


def dual(primal: Tensor, tangents: Tensor | None) -> Tensor:
    """A tensor with these tangents; a plain one if there are none."""
    return primal if tangents is None else Dual(primal, tangents)


def by_transforms(operation, *args, **kwargs):
    """Any operation that returns new tensors, by `vmap` of its `jvp`."""
    leaves, tree = tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Dual)]
    duals = [leaves[i] for i in places]
    results: list[Any] = []
    results_tree = None

    def run(*tensors):
        """The floating-point results, and the other tensors."""
        nonlocal results_tree
        given = list(leaves)
        for i, tensor in zip(places, tensors, strict=True):
            given[i] = tensor
        arguments, options = tree_unflatten(given, tree)
        results[:], results_tree = tree_flatten(operation(*arguments, **options))
        floating = [r for r in results if _is_floating(r)]
        if not floating:
            raise _WithoutTangents
        have_tangents = [unpack_dual(r).tangent is not None for r in floating]
        if any(have_tangents) and not all(have_tangents) and operation not in STATISTICS:
            raise Unsupported(f"{operation} returns values without tangents, which its derivative may need")
        return floating, [r for r in results if _is_other_tensor(r)]

    primals = tuple(d.primal for d in duals)
    try:
        with enable_reentrant_dispatch(), torch.no_grad():
            floating, floating_t, others = torch.vmap(
                lambda *tangents: jvp(run, primals, tangents, has_aux=True), out_dims=(None, 0, None), randomness="same"
            )(*(d.tangents for d in duals))
    except _WithoutTangents:
        arguments, options = tree_map(lambda x: parts(x)[0], (args, kwargs))
        return operation(*arguments, **options)
    except Exception as error:
        raise Unsupported(f"{operation} has no tangents by torch.func: {error}") from error
    with_tangents, without = map(Dual, floating, floating_t), iter(others)
    made = (next(with_tangents) if _is_floating(r) else next(without) if _is_other_tensor(r) else r for r in results)
    return tree_unflatten(list(made), results_tree)


def _is_floating(x: Any) -> bool:
    if isinstance(x, Tensor) and x.is_complex():
        raise Unsupported("complex numbers have no tangents here")
    return isinstance(x, Tensor) and x.is_floating_point()


def _is_other_tensor(x: Any) -> bool:
    return isinstance(x, Tensor) and not x.is_floating_point()


def gradient_tangents(fn: Callable[[Any], Tensor], params: Any, vectors: Any, primals: Primals | None = None) -> Any:
    """The tangents of the gradient of fn at ``params`` along K vectors at once.

    Args:
        fn: params -> a scalar.
        params: a tree of tensors.
        vectors: a tree like it, with K in front of all leaves.
        primals: of an earlier call with the same function and parameters, or to be filled for later ones.

    Returns:
        A tree like ``vectors``.

    Raises:
        Unsupported: an operation of fn has no tangents here.
    """
    leaves, tree = tree_flatten(params)
    tangents = tree_flatten(vectors)[0]
    primals = primals or Primals(keep=False)
    primals.rewind()
    with torch.enable_grad():
        duals = [Dual(p.detach(), t).requires_grad_() for p, t in zip(leaves, tangents, strict=True)]
        for leaf in duals:
            leaf.run = primals
        value = fn(tree_unflatten(duals, tree))
        if not value.requires_grad:
            return tree_map(torch.zeros_like, vectors)
        gradient = torch.autograd.grad(value, duals, allow_unused=True)
    results = [parts(g)[1] for g in gradient]
    return tree_unflatten(
        [torch.zeros_like(t) if r is None else r for r, t in zip(results, tangents, strict=True)], tree
    )
