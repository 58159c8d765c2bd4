"""Forward over reverse: a gradient with K tangents, computed once.

A `Dual` is a tensor with K tangents, one for each vector. Autograd records operations on them like on any tensor, and
its backward runs on them too: the gradient of a loss is then a `Dual`, whose tangents are the products of the Hessian
with all vectors. Every operation that reaches PyTorch's dispatcher, in forward and backward, computes its primal once,
and its tangents by a rule (`vitfast.hessian.rules`), or else by `vmap` of `jvp` of that one operation.

It is what `vmap(jvp(grad(f)))` computes. Nested transforms of `torch.func` cost up to a millisecond for every layer
that is written in Python, and compute K tangents by many passes over memory.

A tensor without tangents is a plain one: constants cost nothing. Rules see neither: they get a `Pair` for every `Dual`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.autograd.graph import saved_tensors_hooks
from torch.func import jvp
from torch.overrides import enable_reentrant_dispatch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from vitfast.hessian.deferred import forgotten, value_of, version_of
from vitfast.hessian.nested import leaves_of, mapped
from vitfast.hessian.program import unseen
from vitfast.hessian.recording import Pair, Recording, parts

__all__ = [
    "Dual",
    "Rule",
    "Unsupported",
    "by_transforms",
    "generator_state",
    "gradient_tangents",
    "set_generator_state",
]


class Unsupported(Exception):
    """An operation that has no tangent here."""


class _WithoutTangents(Exception):
    """An operation returns nothing that could have a tangent."""


class Dual(Tensor):
    """A tensor and K tangents of it.

    Attributes:
        pair: the values and their tangents.
        is_shared: whether a view of the same memory exists, so that a change in place would have to be seen elsewhere.
        origin: what it can be computed from again at little cost, None if there is no such thing.
        recording: of the run that it is part of, None if there is none.
        place: what stands for it there.
    """

    @staticmethod
    def __new__(cls, pair: Pair, recording: Recording | None = None, place: Pair | None = None):
        held = pair.held
        self = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=held.device
        )
        self.pair, self.is_shared, self.recording, self.place = pair, False, recording, place
        self.origin: Origin | None = None
        return self

    @property
    def primal(self) -> Tensor:
        """The values."""
        return self.pair.primal

    @property
    def tangents(self) -> Tensor:
        """(K, *shape)."""
        return self.pair.tangents

    def __repr__(self) -> str:
        return f"Dual({self.primal}, tangents={self.tangents})"

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        # Autograd detaches what it saves, too, but that comes to __torch_dispatch__ alone; and in the forward of a
        # Function, where forward mode is off, what is detached is still a value of the function.
        if function in _STOPS and torch._C._is_fwd_grad_enabled():
            primal = args[0].primal  # somebody gets to do with it as he likes
            return primal.detach() if args[0].recording is None else primal.clone()
        with torch._C.DisableTorchFunctionSubclass():
            return _INSTEAD.get(function, function)(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        kwargs, known = kwargs or {}, _known(operation)
        if known.is_constant:
            return operation(*mapped(_primal, args), **kwargs)
        if known.is_mutable:
            plain = _not_in_place(operation)
            return _take_over(args[0], cls.__torch_dispatch__(plain, types, args, kwargs), operation)
        if known.composite is not None:
            return known.composite(*args, **kwargs)
        results = _with_tangents(operation, known, args, kwargs)
        if known.returns_views:
            for x in leaves_of((args, results)):
                if isinstance(x, Dual):
                    x.is_shared = True
        return results


_STOPS = {Tensor.detach, torch.detach, Tensor.data.__get__}


def _index_select(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """As `torch.index_select`, whose backward adds to a tensor without tangents, in place."""
    if not isinstance(x, Dual) or x.dim() == 0 or not -x.dim() <= dim < x.dim():
        return torch.index_select(x, dim, index)
    return x[(*(slice(None),) * (dim % x.dim()), index.reshape(-1))]


def _adaptive_avg_pool2d(x: Tensor, output_size: int | Sequence[int | None]) -> Tensor:
    """As `F.adaptive_avg_pool2d`, which changes the strides of a mean of channels-last maps in place."""
    if output_size in (1, (1, 1), [1, 1]):
        return x.mean((-2, -1), keepdim=True)
    return F.adaptive_avg_pool2d(x, output_size)


_INSTEAD = {
    torch.index_select: _index_select,
    Tensor.index_select: _index_select,
    F.adaptive_avg_pool2d: _adaptive_avg_pool2d,
}
"""Functions -> the same, of operations that have tangents here."""


@dataclass(frozen=True)
class Rule:
    """How the tangents of an operation's results are computed.

    Attributes:
        function: (operation, its primal result, *arguments) -> its result, with pairs for what has tangents.
        serves: which arguments it is for, None for all.
        maps: whether it may map a definition over all tangents, which PyTorch allows in a dispatch only if told so.
    """

    function: Callable[..., Any]
    serves: Callable[..., bool] | None
    maps: bool


RULES: dict[Any, Rule] = {}
"""Of operations of the dispatcher."""

PRIMALS: dict[Any, Callable] = {}
"""Operations of the dispatcher -> what computes their primal results, where that is not the operation itself. These may
have another layout, but share no memory with arguments that the operation's would not."""

DEFERRED: dict[Any, Callable] = {}
"""Operations -> what defers some of their primal results in a backward pass, for these may be gradients of parameters,
which nobody reads. Its arguments may be deferred themselves."""

REPEATED: set[Any] = set()
"""Operations of one result that cost little, and whose arguments autograd keeps: it need not keep the result, too."""

STATISTICS: set[Any] = set()
"""Operations some of whose results have no tangents, and need none."""

COMPOSITES: dict[Any, Callable] = {}
"""Operations that PyTorch cannot differentiate in forward mode -> the same, of operations that it can."""

CONSTANTS: set[Any] = set()
"""Operations whose result depends on no values of their arguments. It is new in every run: somebody may fill it."""


@dataclass(frozen=True)
class _Known:
    """What is known of an operation: all of the above, its schema, and what computes its primal results."""

    is_constant: bool
    is_repeated: bool
    is_mutable: bool
    returns_views: bool
    takes_lists: bool  # of tensors
    composite: Callable | None
    rule: Rule | None
    primal: Callable
    deferred: Callable | None


@functools.cache
def _known(operation) -> _Known:
    schema = operation._schema
    returns_views = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    takes_lists = any("Tensor" in str(a.type) and "List" in str(a.type) for a in schema.arguments)
    return _Known(
        *(operation in CONSTANTS, operation in REPEATED, schema.is_mutable, returns_views, takes_lists),
        *(COMPOSITES.get(operation), RULES.get(operation), PRIMALS.get(operation, operation), DEFERRED.get(operation)),
    )


def _with_tangents(operation, known: _Known, args: tuple, kwargs: dict) -> Any:
    """The results of an operation, by its rule or by transforms."""
    each = mapped if known.takes_lists else _each
    rule, pairs, options = known.rule, each(_pair, args), {name: mapped(_pair, x) for name, x in kwargs.items()}
    if rule is None or (rule.serves is not None and not rule.serves(*pairs, **options)):
        function, first = by_transforms, (operation,)
    else:
        if known.deferred is not None and _in_backward():
            result = known.deferred(*each(_held, args), **kwargs)
        else:
            result = known.primal(*each(_primal, args), **kwargs)
        function, first = rule.function, (operation, result)
    if function is by_transforms or rule.maps:
        with enable_reentrant_dispatch(), torch.no_grad():
            results = function(*first, *pairs, **options)
    else:
        results = function(*first, *pairs, **options)
    operands = leaves_of((args, *kwargs.values())) if known.takes_lists else (*args, *kwargs.values())
    recording = next(x.recording for x in operands if isinstance(x, Dual))
    places: list[Pair] = []

    def dual(x: Any) -> Any:
        if not isinstance(x, Pair):
            return value_of(x)
        x = _of_one_dtype(x)
        if recording is None:
            return Dual(x)
        places.append(Pair(x.held, None))
        return Dual(x, recording, places[-1])

    results = mapped(dual, results)
    if recording is not None:
        args, kwargs = each(_place, args), {name: mapped(_place, value) for name, value in kwargs.items()}
        recording.add(function, (*first, *args), kwargs, places)
    elif function is not by_transforms and known.is_repeated:
        results.origin = Origin(operation, pairs, options)
    elif function is not by_transforms and _is_view_of_what_is_repeated(known, results, args):
        results.origin = Origin(operation, [args[0].origin, *pairs[1:]], options)
    return results


def _is_view_of_what_is_repeated(known: _Known, results: Any, args: Sequence) -> bool:
    return known.returns_views and isinstance(results, Dual) and args[0].origin is not None


def _of_one_dtype(x: Pair) -> Pair:
    return x if x.tangents.dtype == x.dtype else Pair(x.held, x.tangents.to(x.dtype))


class Origin:
    """What a value with tangents can be computed from again: an operation that has a rule, and its arguments.

    The first argument may be another origin, of which the operation is a view.
    """

    __slots__ = ("_args", "_operation", "_options")

    def __init__(self, operation, args: Sequence[Any], options: dict):
        self._operation, self._args, self._options = operation, args, options

    def again(self) -> Pair:
        """The value."""
        known, args = _known(self._operation), [x.again() if isinstance(x, Origin) else x for x in self._args]
        with torch.no_grad():
            result = known.primal(*(parts(x)[0] for x in args), **self._options)
            again = known.rule.function(self._operation, result, *args, **self._options)
        return _of_one_dtype(again)


# What autograd keeps must not refer to the tensor that it is kept for: nothing would free the two. Nor does autograd
# watch over what is kept in another form: pairs are never changed, and of constants the versions are kept.


def _kept(tensor: Tensor) -> Any:
    """What autograd keeps of a tensor."""
    if not isinstance(tensor, Dual):
        return tensor.detach(), version_of(tensor)
    return tensor.pair if tensor.origin is None else tensor.origin


def _given_back(kept: Any) -> Tensor:
    if isinstance(kept, Origin):
        return Dual(kept.again())
    if isinstance(kept, Pair):
        return Dual(kept)
    tensor, version = kept
    if version_of(tensor) != version:
        raise RuntimeError(f"a tensor of shape {tuple(tensor.shape)} that a derivative needs was changed in place")
    return tensor


def _pair(x: Any) -> Any:
    return x.pair if isinstance(x, Dual) else x


def _place(x: Any) -> Any:
    return x.place if isinstance(x, Dual) else x


def _primal(x: Any) -> Any:
    return x.pair.primal if isinstance(x, Dual) else x


def _held(x: Any) -> Any:
    return x.pair.held if isinstance(x, Dual) else x


def _in_backward() -> bool:
    """Whether autograd is at work: what a function itself computes with may be changed in place afterwards."""
    return torch._C._current_graph_task_id() != -1


def _each(function: Callable[[Any], Any], args: tuple) -> list:
    return [function(x) for x in args]


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
    x.pair, x.place, x.origin = result.pair, result.place, result.origin
    return x


def by_transforms(operation, *args, **kwargs):
    """The result of any operation that returns new tensors, with pairs, by `vmap` of its `jvp`."""
    leaves, tree = tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Pair)]
    pairs = [leaves[i] for i in places]
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

    primals = tuple(p.primal for p in pairs)
    along = torch.vmap(
        lambda *tangents: jvp(run, primals, tangents, has_aux=True), out_dims=(None, 0, None), randomness="same"
    )
    try:
        with unseen():
            floating, floating_t, others = along(*(p.tangents for p in pairs))
    except _WithoutTangents:
        arguments, options = tree_map(lambda x: parts(x)[0], (args, kwargs))
        return operation(*arguments, **options)
    except Exception as error:
        raise Unsupported(f"{operation} has no tangents by torch.func: {error}") from error
    with_tangents, without = map(Pair, floating, floating_t), iter(others)
    made = (next(with_tangents) if _is_floating(r) else next(without) if _is_other_tensor(r) else r for r in results)
    return tree_unflatten(list(made), results_tree)


def _is_floating(x: Any) -> bool:
    if isinstance(x, Tensor) and x.is_complex():
        raise Unsupported("complex numbers have no tangents here")
    return isinstance(x, Tensor) and x.is_floating_point()


def _is_other_tensor(x: Any) -> bool:
    return isinstance(x, Tensor) and not x.is_floating_point()


def gradient_tangents(
    fn: Callable[[Any], Tensor], params: Any, vectors: Any, recording: Recording | None = None
) -> Any:
    """The tangents of the gradient of fn at ``params`` along K vectors at once.

    Args:
        fn: params -> a scalar.
        params: a tree of tensors.
        vectors: a tree like it, with K in front of all leaves.
        recording: of an earlier call with the same function and parameters, which is then not called again; or to be
            filled by this one, if it is new or tensors in it have been changed since.

    Returns:
        A tree like ``vectors``, to be read only: of a recording, tensors may share memory, and belong to it.

    Raises:
        Unsupported: an operation of fn has no tangents here.
    """
    leaves, tree = tree_flatten(params)
    tangents = tree_flatten(vectors)[0]
    if recording is not None and recording.is_current():
        results = recording.replay(tangents)
    else:
        results = _recorded(fn, leaves, tree, tangents, recording)
    return tree_unflatten(
        [torch.zeros_like(t) if r is None else r for r, t in zip(results, tangents, strict=True)], tree
    )


def _recorded(fn, leaves: list[Tensor], tree, tangents: list[Tensor], recording: Recording | None) -> list:
    """The tangents of the gradient, None for zero, from a run of the function."""
    if recording is None:
        return [g.tangents if isinstance(g, Dual) else None for g in _gradient(fn, leaves, tree, tangents, None)]
    recording.clear()
    try:
        gradient = _gradient(fn, leaves, tree, tangents, recording)
    except BaseException:
        recording.clear()
        raise
    recording.end([g.place if isinstance(g, Dual) else None for g in gradient])
    return [g.tangents if isinstance(g, Dual) else None for g in gradient]


def _gradient(fn, leaves: list[Tensor], tree, tangents: list[Tensor], recording: Recording | None) -> Sequence:
    """The gradient, whose values have tangents where these are not zero."""
    with torch.inference_mode(False), torch.enable_grad():
        duals = []
        for leaf, leaf_t in zip(leaves, tangents, strict=True):
            primal = leaf.detach()
            place = None if recording is None else recording.input(primal)
            duals.append(Dual(Pair(primal, leaf_t.to(primal.dtype)), recording, place).requires_grad_())
        value = _value(fn, duals, tree)
        if not value.requires_grad:
            return [None] * len(duals)
        for dual in duals:  # now: fn itself may ask for gradients
            dual.register_hook(_without_primal)
        return torch.autograd.grad(value, duals, allow_unused=True)


def _value(fn, duals: list[Dual], tree) -> Tensor:
    """fn of the parameters, of which autograd keeps what costs most to compute."""
    if duals[0].recording is not None:  # which keeps all values for later
        return fn(tree_unflatten(duals, tree))
    generator = generator_state(duals[0].device)
    try:
        with saved_tensors_hooks(_kept, _given_back):
            return fn(tree_unflatten(duals, tree))
    except RuntimeError as error:
        if "saved tensor hooks" not in str(error):  # transforms of torch.func, for one, do not go with them
            raise
    set_generator_state(duals[0].device, generator)
    return fn(tree_unflatten(duals, tree))


def generator_state(device: torch.device) -> Tensor:
    """That of the default generator of a device."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_generator_state(device: torch.device, state: Tensor) -> None:
    """Has its random numbers come again."""
    torch.cuda.set_rng_state(state, device) if device.type == "cuda" else torch.set_rng_state(state)


def _without_primal(gradient: Tensor) -> Tensor:
    """The gradient of a parameter, whose primal nobody will read: what it would be computed from can go."""
    if not isinstance(gradient, Dual):
        return gradient
    pair = Pair(forgotten(gradient.pair.held), gradient.tangents)
    return Dual(pair, gradient.recording, gradient.place)
