"""Blur pooling: the operator behind `vitfast.functional.blur_pool2d`.

Differentiation. Without its prologue a blur is linear, y = A x, and a matrix and its transpose close the circle: all
derivatives of both `autograd.Function`s are one of the two, fused, and those of all orders are exact.

    Blur.backward, BlurTransposed.jvp  -> BlurTransposed
    Blur.jvp, BlurTransposed.backward  -> Blur

Under vmap the mapped dimension becomes part of the batch, and K tangents are one launch.

Outside of transforms (`RecordedBlur`) the prologue, y = A activation(scale x + shift), is fused into forward and
backward. Whatever goes beyond a plain backward, such as transforms of `torch.func` and double backward, is the prologue
in plain PyTorch and A or its transpose from the kernels.

The kernel of a blur is a constant. Where someone differentiates it, or maps over it, the call is the definition in
plain PyTorch. So it is with forward mode inside of forward mode, where PyTorch loses tangents of a Function.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vitfast import reference
from vitfast.ops import _extension
from vitfast.ops._rules import (
    call_operator,
    forward_ad_active,
    forward_ad_is_nested,
    is_batched_gradient,
    is_transformed,
    may_be_differentiated,
    records_gradients,
    register_autograd,
    require_operator,
    with_signature,
)
from vitfast.ops.backend import choose
from vitfast.reference.blur_pool import ACTIVATIONS, PADDING_MODES, prologue, prologue_backward

NAME = "blur_pool2d"
SERVED = ("cpu", "cuda")


@dataclass(frozen=True)
class Spec:
    """What a call of the operator fixes besides its tensors."""

    stride: tuple[int, int]
    padding: tuple[int, int, int, int]  # left, right, top, bottom
    padding_mode: str
    activation: str | None = None
    temperature: float = 1.0

    @property
    def blur(self) -> dict:
        """The keyword arguments of the functions in `vitfast.reference`, without those of the prologue."""
        return {"stride": self.stride, "padding": self.padding, "padding_mode": self.padding_mode}

    @property
    def numbers(self) -> tuple[list[int], list[int], int]:
        """Stride, padding and padding mode, as the registered operators take them."""
        return list(self.stride), list(self.padding), PADDING_MODES.index(self.padding_mode)


def blur_pool2d(x: Tensor, kernel: Tensor, scale: Tensor | None, shift: Tensor | None, spec: Spec) -> Tensor:
    """Checked arguments in, the output out: on the fastest path that serves them."""
    backend = choose(NAME, SERVED, x.device)
    if backend == "reference" or not _is_constant(kernel) or forward_ad_is_nested():
        return _definition(x, kernel, scale, shift, spec)
    tensors = tuple(t for t in (x, scale, shift) if t is not None)
    has_prologue = _has_prologue(scale, shift, spec)
    if torch.compiler.is_compiling():
        if forward_ad_active():  # the registered operators have no forward-mode rule
            return _definition(x, kernel, scale, shift, spec)
        require_operator(NAME, backend, x.device)
        if has_prologue and records_gradients(tensors):
            x, scale, shift = prologue(x, scale, shift, spec.activation, spec.temperature).to(x.dtype), None, None
            spec = Spec(**spec.blur)
        return _forward(x, kernel, scale, shift, spec)
    if not may_be_differentiated(tensors):
        return _forward(x, kernel, scale, shift, spec)
    if not is_transformed():
        return RecordedBlur.apply(spec, kernel, x, scale, shift)
    if not has_prologue:
        return Blur.apply(spec, kernel, x)
    u = prologue(x, scale, shift, spec.activation, spec.temperature)
    return Blur.apply(Spec(**spec.blur), kernel, u).to(x.dtype)


def _definition(x: Tensor, kernel: Tensor, scale: Tensor | None, shift: Tensor | None, spec: Spec) -> Tensor:
    options = {"scale": scale, "shift": shift, "activation": spec.activation, "temperature": spec.temperature}
    return reference.blur_pool2d(x, kernel, **spec.blur, **options)


def _has_prologue(scale: Tensor | None, shift: Tensor | None, spec: Spec) -> bool:
    return not (scale is None and shift is None and spec.activation is None)


def _is_constant(kernel: Tensor) -> bool:
    """Whether nobody asks for a derivative with respect to the kernel or maps over it."""
    if kernel.requires_grad and torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling():
        return True
    if torch._C._functorch.is_functorch_wrapped_tensor(kernel):
        return False
    return not forward_ad_active() or forward_ad.unpack_dual(kernel).tangent is None


# ---- kernels -------------------------------------------------------------------------------------------------------


def _forward(x: Tensor, kernel: Tensor, scale: Tensor | None, shift: Tensor | None, spec: Spec) -> Tensor:
    activation = ACTIVATIONS.index(spec.activation)
    values = (_per_channel(v, x) for v in (scale, shift))
    arguments = (_dense(x), _taps(kernel), *spec.numbers, *values, activation, spec.temperature)
    return call_operator(torch.ops.vitfast.blur_pool2d.default, *arguments)


def _transposed(grad: Tensor, kernel: Tensor, size: tuple[int, int], spec: Spec) -> Tensor:
    """The blur's transpose of ``grad``: (B, C, *size)."""
    arguments = (_dense(grad), None, _taps(kernel), list(size), *spec.numbers, None, None, 0, 1.0)
    return call_operator(torch.ops.vitfast.blur_pool2d_backward.default, *arguments)[0]


def _backward(grad, x, kernel, scale, shift, spec, wanted) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of x, scale and shift through the prologue; of the last two, those that are ``wanted``."""
    x = _dense(x)
    grad_x, grad_scale, grad_shift = call_operator(
        torch.ops.vitfast.blur_pool2d_backward.default,
        grad.contiguous(memory_format=_memory_format(x)),  # what was saved may be laid out otherwise than x was
        x,
        _taps(kernel),
        list(x.shape[2:]),
        *spec.numbers,
        *(_per_channel(v, x) for v in (scale, shift)),
        ACTIVATIONS.index(spec.activation),
        spec.temperature,
    )
    of_scale, of_shift = wanted
    return (
        grad_x,
        grad_scale.to(scale.dtype) if of_scale else None,
        grad_shift.to(shift.dtype) if of_shift else None,
    )


def _memory_format(x: Tensor) -> torch.memory_format:
    """The memory format in which x is read, and the output is written."""
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _dense(x: Tensor) -> Tensor:
    """x as it is if its memory format is contiguous or channels_last; else contiguous."""
    return x.contiguous(memory_format=_memory_format(x))


def _taps(kernel: Tensor) -> Tensor:
    """The kernel as the operators take it: contiguous, in float32 or float64."""
    return (
        kernel.contiguous() if kernel.dtype in (torch.float32, torch.float64) else kernel.to(torch.float32).contiguous()
    )


def _per_channel(values: Tensor | None, x: Tensor) -> Tensor | None:
    """Scale or shift in the dtype that x is computed in."""
    if values is None:
        return None
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (values if values.dtype == dtype else values.to(dtype)).contiguous()  # `to` asks autograd even so


# ---- differentiation -----------------------------------------------------------------------------------------------


def _is_plain(grad: Tensor) -> bool:
    """Whether nothing but numbers are asked of a backward."""
    return not (torch.is_grad_enabled() or is_transformed() or is_batched_gradient(grad))


@with_signature
class Blur(torch.autograd.Function):
    """(spec, kernel, x) -> A x."""

    @staticmethod
    def forward(spec, kernel, x):
        return _forward(x, kernel, None, None, spec)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.spec, kernel, x = inputs
        ctx.size = tuple(x.shape[2:])
        ctx.save_for_backward(kernel)
        ctx.save_for_forward(kernel)

    @staticmethod
    def backward(ctx, grad):
        (kernel,) = ctx.saved_tensors
        return None, None, _apply_transposed(ctx.spec, ctx.size, kernel, grad)

    @staticmethod
    def jvp(ctx, _spec, _kernel, x_t):
        (kernel,) = ctx.saved_tensors
        return _apply(ctx.spec, kernel, x_t)

    @staticmethod
    def vmap(info, in_dims, spec, kernel, x):
        return _unfold(Blur.apply(spec, kernel, _fold(x, in_dims[2])), info), 0


@with_signature
class BlurTransposed(torch.autograd.Function):
    """(spec, size, kernel, grad) -> A^T grad, whose height and width are ``size``."""

    @staticmethod
    def forward(spec, size, kernel, grad):
        return _transposed(grad, kernel, size, spec)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.spec, ctx.size, kernel, _grad = inputs
        ctx.save_for_backward(kernel)
        ctx.save_for_forward(kernel)

    @staticmethod
    def backward(ctx, cotangent):
        (kernel,) = ctx.saved_tensors
        return None, None, None, _apply(ctx.spec, kernel, cotangent)

    @staticmethod
    def jvp(ctx, _spec, _size, _kernel, grad_t):
        (kernel,) = ctx.saved_tensors
        return _apply_transposed(ctx.spec, ctx.size, kernel, grad_t)

    @staticmethod
    def vmap(info, in_dims, spec, size, kernel, grad):
        return _unfold(BlurTransposed.apply(spec, size, kernel, _fold(grad, in_dims[3])), info), 0


def _apply(spec: Spec, kernel: Tensor, x: Tensor) -> Tensor:
    """A x, differentiable."""
    if forward_ad_is_nested() or is_batched_gradient(x):
        return reference.blur_pool2d(x, kernel, **spec.blur)
    return Blur.apply(spec, kernel, x)


def _apply_transposed(spec: Spec, size: tuple[int, int], kernel: Tensor, grad: Tensor) -> Tensor:
    """A^T grad, differentiable."""
    if forward_ad_is_nested() or is_batched_gradient(grad):
        return reference.blur_pool2d_transposed(grad, kernel, size, **spec.blur)
    return BlurTransposed.apply(spec, size, kernel, grad)


@with_signature
class RecordedBlur(torch.autograd.Function):
    """(spec, kernel, x, scale, shift) -> A activation(scale x + shift), outside of transforms.

    A Function whose forward takes the context cannot be transformed, but costs 12 microseconds less in a backward.
    """

    @staticmethod
    def forward(ctx, spec, kernel, x, scale, shift):
        ctx.spec, ctx.size, ctx.memory_format = spec, tuple(x.shape[2:]), _memory_format(x)
        # Without a prologue nothing of x is kept but its size.
        ctx.save_for_backward(kernel, x if _has_prologue(scale, shift, spec) else None, scale, shift)
        return _forward(x, kernel, scale, shift, spec)

    @staticmethod
    def backward(ctx, grad):
        kernel, x, scale, shift = ctx.saved_tensors
        spec = ctx.spec
        if _is_plain(grad):
            if x is None:
                grad = grad.contiguous(memory_format=ctx.memory_format)
                return None, None, _transposed(grad, kernel, ctx.size, spec), None, None
            return None, None, *_backward(grad, x, kernel, scale, shift, spec, ctx.needs_input_grad[3:])
        if x is None:
            return None, None, _apply_transposed(spec, ctx.size, kernel, grad), None, None
        wide = grad.to(torch.float64 if grad.dtype == torch.float64 else torch.float32)
        grad_u = _apply_transposed(Spec(**spec.blur), ctx.size, kernel, wide)
        return None, None, *prologue_backward(grad_u, x, scale, shift, spec.activation, spec.temperature)


def _fold(x: Tensor, dim: int) -> Tensor:
    """The mapped dimension as part of the batch."""
    return x.movedim(dim, 0).flatten(0, 1)


def _unfold(x: Tensor, info) -> Tensor:
    return x.unflatten(0, (info.batch_size, -1))


# ---- registered operators: fakes for tracing, autograd for torch.compile ---------------------------------------------


def _fake(x, kernel, stride, padding, padding_mode, scale, shift, activation, temperature):
    left, right, top, bottom = padding
    height = (x.shape[2] + top + bottom - kernel.shape[0]) // stride[0] + 1
    width = (x.shape[3] + left + right - kernel.shape[1]) // stride[1] + 1
    return _new_map(x, height, width)


def _fake_backward(grad, x, kernel, size, stride, padding, padding_mode, scale, shift, activation, temperature):
    channels = 0 if x is None else grad.shape[1]
    return _new_map(grad, *size), *(grad.new_empty((channels,), dtype=torch.float64) for _ in range(2))


def _new_map(like: Tensor, height: int, width: int) -> Tensor:
    shape = (*like.shape[:2], height, width)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=_memory_format(like))


def _setup_compiled(ctx, inputs, output):
    x, kernel, *ctx.numbers, scale, shift, activation, _ = inputs
    if not (scale is None and shift is None and activation == 0):
        raise RuntimeError(
            "torch.ops.vitfast.blur_pool2d records no gradient through a prologue; call vitfast.functional.blur_pool2d"
        )
    ctx.size = list(x.shape[2:])
    ctx.save_for_backward(kernel)


def _compiled_backward(ctx, grad):
    (kernel,) = ctx.saved_tensors
    arguments = (_dense(grad), None, kernel, ctx.size, *ctx.numbers, None, None, 0, 1.0)
    return torch.ops.vitfast.blur_pool2d_backward(*arguments)[0], *(None,) * 8


def _setup_compiled_backward(ctx, inputs, output):
    _, x, kernel, _, *ctx.numbers, _, _, _, _ = inputs
    if x is not None:
        raise RuntimeError(
            "torch.ops.vitfast.blur_pool2d_backward records no gradient through a prologue; "
            "call vitfast.functional.blur_pool2d"
        )
    ctx.save_for_backward(kernel)


def _compiled_double_backward(ctx, cotangent, *_):
    (kernel,) = ctx.saved_tensors
    return torch.ops.vitfast.blur_pool2d(_dense(cotangent), kernel, *ctx.numbers, None, None, 0, 1.0), *(None,) * 10


def _spec_of(numbers: list, activation: int, temperature: float) -> Spec:
    stride, padding, mode = numbers
    return Spec(tuple(stride), tuple(padding), PADDING_MODES[mode], ACTIVATIONS[activation], temperature)


def _defined(x, kernel, *options):
    *numbers, scale, shift, activation, temperature = options
    return _definition(x, kernel, scale, shift, _spec_of(numbers, activation, temperature)).to(x.dtype)


def _defined_backward(grad, x, kernel, size, *options):
    *numbers, scale, shift, activation, temperature = options
    spec = _spec_of(numbers, activation, temperature)
    grad_u = reference.blur_pool2d_transposed(grad, kernel, tuple(size), **spec.blur)
    none = grad.new_empty((0,), dtype=torch.float64)
    if x is None:
        return grad_u, none, none
    ones = grad_u.new_ones(grad.shape[1])
    scale, shift = ones if scale is None else scale, torch.zeros_like(ones) if shift is None else shift
    grad_x, *sums = prologue_backward(grad_u, x, scale, shift, spec.activation, spec.temperature)
    return grad_x, *(value.to(torch.float64) for value in sums)


if _extension.available():
    torch.library.register_fake("vitfast::blur_pool2d", _fake)
    torch.library.register_fake("vitfast::blur_pool2d_backward", _fake_backward)
    register_autograd("vitfast::blur_pool2d", _compiled_backward, setup_context=_setup_compiled, definition=_defined)
    register_autograd(
        "vitfast::blur_pool2d_backward",
        _compiled_double_backward,
        setup_context=_setup_compiled_backward,
        definition=_defined_backward,
    )
