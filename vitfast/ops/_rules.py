"""What the operators' differentiation rules share: which transforms are active, and the fold of vmap's dimension."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vitfast.ops import _extension
from vitfast.ops.backend import BackendError
from vitfast.ops.results import are_handed_over

# ---- active transforms ---------------------------------------------------------------------------------------------


def records_gradients(tensors: Iterable[Tensor | None]) -> bool:
    """Whether autograd records what is computed from the tensors."""
    if torch.is_grad_enabled():
        for tensor in tensors:  # a generator in `any` takes as long again
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def is_transformed() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation is going on."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad_active()


def forward_ad_active() -> bool:
    """Whether forward-mode differentiation is going on."""
    return torch.autograd.forward_ad._current_level >= 0


def forward_ad_is_nested() -> bool:
    """Whether one `torch.func.jvp` runs inside another: PyTorch loses the outer tangent of a Function's `jvp`."""
    return torch._functorch.eager_transforms.JVP_NESTING > 1


def is_batched_gradient(grad: Tensor) -> bool:
    """Whether autograd asks for many gradients at once, ``is_grads_batched=True``: a vmap that is no transform."""
    return torch._C._functorch.is_legacy_batchedtensor(grad)


_WITH_MEMORY = (Tensor, torch.nn.Parameter)


def have_memory(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a kernel that Python launches can take the tensors' pointers, and nobody has to see the operator.

    Subclasses that PyTorch dispatches and tensors of a vmap that is no transform may be without memory of their own,
    and modes of dispatching follow what is computed: all these have to meet the registered operator.
    """
    if torch._C._len_torch_dispatch_stack():
        return False
    return all(t is None or (type(t) in _WITH_MEMORY and not is_batched_gradient(t)) for t in tensors)


def is_autocast(device: torch.device) -> bool:
    """Whether autocast is going on, which some devices, such as "meta", do not know."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def require_operator(operator: str, backend: str, device: torch.device) -> None:
    """Raises where nothing but the registered operator may be called, and it cannot be."""
    _extension.require()  # it registers the operators, the Triton kernels' too
    if backend == "triton" and device.type == "cpu":
        raise BackendError(
            f"{operator}: Triton's interpreter cannot run inside of torch.compile, under modes of dispatching, for "
            "subclasses of tensors or gradients in a batch; do without one or the other"
        )


def is_launched(operator: str, backend: str, tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether Python launches a Triton kernel on the tensors; if not, the registered operator is to be called."""
    if backend != "triton":
        return False
    if not have_memory(tensors):
        require_operator(operator, backend, tensors[-1].device)
        return False
    return True


# ---- registered operators ------------------------------------------------------------------------------------------


# Operators of the extension without PyTorch's dispatcher, by name; and what they raise for tensors that must meet it.
_DIRECT = vars(_extension.require().direct) if _extension.available() else {}
_Unsuited = _DIRECT.get("Unsuited", ())


def operator(name: str):
    """The registered operator."""
    return getattr(torch.ops.vitfast, name).default


def call_operator(name: str, *arguments):
    """The operator of that name, of a tensor and more.

    In eager mode it is called without what takes as long as a small kernel: on the CPU without PyTorch's dispatcher, if
    nobody follows what is called; else without the operator's registered rules of autograd.
    """
    if torch.compiler.is_compiling():
        return operator(name)(*arguments)
    if name in _DIRECT and arguments[0].is_cpu and is_unobserved() and are_handed_over():
        try:
            return _DIRECT[name](*arguments)
        except _Unsuited:  # subclasses and others
            pass
    with torch._C._AutoDispatchBelowAutograd():
        return operator(name)(*arguments)


def is_unobserved() -> bool:
    """Whether nobody follows which operators are called: no mode, trace, profiler or transform."""
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state()
        or torch._C._autograd._profiler_enabled()
        or torch.autograd.profiler._is_profiler_enabled  # with profile_all_threads nothing else tells
        or is_transformed()
    )


class _DefinedForTangents:
    """What `torch.library.register_autograd` takes as a library; see `register_autograd`."""

    def __init__(self, namespace: str, definition: Callable):
        self._library = torch.library.Library(namespace, "FRAGMENT")
        self._definition = definition

    def impl(self, name: str, kernel: Callable, dispatch_key: str, **options) -> None:
        def guarded(keyset, *arguments):
            if forward_ad_active() and any(map(has_tangent, arguments)):
                return self._definition(*arguments)
            return kernel(keyset, *arguments)

        self._library.impl(name, guarded, dispatch_key, **options)


_libraries: list[_DefinedForTangents] = []  # what a library registers lives as long as the library


def register_autograd(operator: str, backward: Callable, *, setup_context: Callable, definition: Callable) -> None:
    """`torch.library.register_autograd`, and for tensors with tangents the definition.

    An operator that is registered has no rule for forward mode, and PyTorch would return tangents of zero without a
    word: in exported programs and other traced graphs, which call the operator itself.

    Args:
        definition: the operator in operations of PyTorch, with the same arguments and results.
    """
    library = _DefinedForTangents(operator.split("::")[0], definition)
    torch.library.register_autograd(operator, backward, setup_context=setup_context, lib=library)
    _libraries.append(library)


def laid_out_as(x: Tensor, like: Tensor) -> Tensor:
    """x with its dimensions in the order in memory that those of ``like`` have, as kernels write their results."""
    order = sorted(range(like.dim()), key=like.stride, reverse=True)
    inverse = [order.index(i) for i in range(like.dim())]
    return x.permute(order).contiguous().permute(inverse)


def has_tangent(value: object) -> bool:
    """Whether forward-mode differentiation follows a tensor."""
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None


def without_tangents(values: tuple) -> tuple:
    """The values without their tangents."""
    return tuple(forward_ad.unpack_dual(value).primal if isinstance(value, Tensor) else value for value in values)


# ---- calls of a Function ---------------------------------------------------------------------------------------------


def with_signature(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """Decorates a Function whose `forward` has no default arguments: its signature is made once, not in every call.

    `Function.apply` asks `inspect.signature` for it, which takes 25 microseconds, as long as a small map's kernel; a
    function that has the attribute ``__signature__`` is not inspected.
    """
    function.forward.__signature__ = inspect.signature(function.forward)
    return function


class Recorded(torch.autograd.Function):
    """A Function for calls outside of transforms.

    `Function.apply` looks for transforms and binds arguments to the signature of `forward`, in Python: 10 microseconds
    of a training step, as long as a small map's kernel. What is needed here is its part in C++ alone.
    """

    @classmethod
    def apply(cls, *arguments):
        return super(torch.autograd.Function, cls).apply(*arguments)


# ---- vmap folds the mapped dimension into the heads: each has its own scores and, in the gradient, its own bias -----


def unmapped_shape(x: Tensor, dim: int | None) -> torch.Size:
    """The shape of x without the mapped dimension ``dim``."""
    return x.shape if dim is None else x.movedim(dim, 0).shape[1:]


def fold(x: Tensor, dim: int | None, size: int, at: int) -> Tensor:
    """Moves the mapped dimension of x (or one made by expanding) in front of dimension ``at`` and merges the two."""
    x = x.unsqueeze(at).expand(*x.shape[:at], size, *x.shape[at:]) if dim is None else x.movedim(dim, at)
    return x.flatten(at, at + 1)


def fold_bias(bias: Tensor | None, dim: int | None, size: int, heads: int, at: int) -> Tensor | None:
    """`fold` of a bias whose dimension ``at`` is the heads, which is expanded if it is 1."""
    if bias is None:
        return None
    bias = bias.unsqueeze(at) if dim is None else bias.movedim(dim, at)
    return bias.expand(*bias.shape[:at], size, heads, *bias.shape[at + 2 :]).flatten(at, at + 1)


def unfold_bias_grad(bias_grad: Tensor, bias: Tensor, dim: int | None, size: int, at: int) -> Tensor:
    """The gradient of a folded bias with the mapped dimension apart, in front of dimension ``at``."""
    bias_grad = bias_grad.unflatten(at, (size, -1))
    return bias_grad.sum(at + 1, keepdim=True) if unmapped_shape(bias, dim)[at] == 1 else bias_grad


# ---- fakes ---------------------------------------------------------------------------------------------------------


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the logsumexp, in which scores are computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def bias_grad_like(bias: Tensor | None, like: Tensor) -> Tensor:
    """An unwritten gradient of the bias, empty if there is none."""
    return like.new_empty((0,)) if bias is None else torch.empty_like(bias, memory_format=torch.contiguous_format)
