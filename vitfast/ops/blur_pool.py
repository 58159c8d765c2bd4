"""Blur pooling: the operator behind `vitfast.functional.blur_pool2d`.

Differentiation. Without its prologue a blur is linear, y = A x, and a matrix and its transpose close the circle: all
derivatives of both `autograd.Function`s are one of the two, fused, and those of all orders are exact.

    Blur.backward, BlurTransposed.jvp  -> BlurTransposed
    Blur.jvp, BlurTransposed.backward  -> Blur

Under vmap the mapped dimension becomes part of the batch, and K tangents are one launch.

Outside of transforms (`RecordedPrologueBlur`) the prologue, y = A activation(scale x + shift), is fused into forward
and backward. Whatever goes beyond a plain backward, such as transforms of `torch.func` and double backward, is the
prologue in plain PyTorch and A or its transpose from the kernels. A normalisation is folded into scale and shift by the
CPU's kernels, or, where its tensors need gradients or a transform is going on, by PyTorch.

The kernel of a blur is a constant. Where someone differentiates it, or maps over it, the call is the definition in
plain PyTorch. So it is with forward mode inside of forward mode, where PyTorch loses tangents of a Function.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vitfast import reference
from vitfast.ops import _extension
from vitfast.ops._rules import (
    Recorded,
    call_operator,
    forward_ad_active,
    forward_ad_is_nested,
    is_batched_gradient,
    is_transformed,
    is_unobserved,
    records_gradients,
    register_autograd,
    require_operator,
    with_signature,
)
from vitfast.ops.backend import choose
from vitfast.reference.blur_pool import ACTIVATIONS, PADDING_MODES, fold_norm, prologue, prologue_backward

NAME = "blur_pool2d"
SERVED = ("cpu", "cuda")


class Spec(NamedTuple):
    """What a call of the operator fixes besides its tensors."""

    stride: tuple[int, int]
    padding: tuple[int, int, int, int]  # left, right, top, bottom
    padding_mode: str
    eps: float = 0.0  # of the normalisation, if there is one
    activation: str | None = None
    temperature: float = 1.0

    @property
    def blur(self) -> dict:
        """The keyword arguments of the functions in `vitfast.reference`, without those of the prologue."""
        return {"stride": self.stride, "padding": self.padding, "padding_mode": self.padding_mode}

    @property
    def numbers(self) -> tuple[tuple[int, int], tuple[int, int, int, int], int]:
        """Stride, padding and padding mode, as the registered operators take them."""
        return self.stride, self.padding, PADDING_MODES.index(self.padding_mode)


class Affine(NamedTuple):
    """The tensors of a prologue, each (C,).

    They are the scale and shift of the map, None for 1 and 0; or, with mean and variance, the weight and bias of a
    normalisation, weight * (x - mean) / sqrt(variance + eps) + bias, which the CPU's kernels fold themselves.
    """

    scale: Tensor | None = None
    shift: Tensor | None = None
    mean: Tensor | None = None
    variance: Tensor | None = None

    def folded(self, eps: float) -> Affine:
        """Scale and shift alone, differentiable."""
        if self.mean is None or self.variance is None:
            return self
        return Affine(*fold_norm(*self, eps))


def blur_pool2d(x: Tensor, kernel: Tensor, affine: Affine, spec: Spec) -> Tensor:
    """Checked arguments in, the output out: on the fastest path that serves them."""
    backend = choose(NAME, SERVED, x.device)
    if backend == "reference" or not _is_constant(kernel):
        return _definition(x, kernel, affine, spec)
    if not (torch.compiler.is_compiling() or is_transformed()):  # the usual case
        if affine.mean is not None and (backend != "cpu" or records_gradients(affine) or not is_unobserved()):
            affine = affine.folded(spec.eps)  # also for traces, which may be run on other devices
        if not records_gradients((x, *affine)):
            return _forward(x, kernel, affine, spec)
        if has_prologue(affine, spec):
            return RecordedPrologueBlur.apply(spec, kernel, x, *affine)
        return RecordedBlur.apply(spec, kernel, x)
    if forward_ad_is_nested():
        return _definition(x, kernel, affine, spec)
    with_prologue = has_prologue(affine, spec)
    if torch.compiler.is_compiling():
        if forward_ad_active():  # the registered operators have no forward-mode rule
            return _definition(x, kernel, affine, spec)
        require_operator(NAME, backend, x.device)
        affine = affine.folded(spec.eps)
        if with_prologue and records_gradients((x, *affine)):
            x, affine, spec = prologue_output(x, affine, spec).to(x.dtype), Affine(), Spec(**spec.blur)
        return _forward(x, kernel, affine, spec)
    if not with_prologue:
        return Blur.apply(spec, kernel, x)
    return Blur.apply(Spec(**spec.blur), kernel, prologue_output(x, affine, spec)).to(x.dtype)


def _definition(x: Tensor, kernel: Tensor, affine: Affine, spec: Spec) -> Tensor:
    scale, shift, *_ = affine.folded(spec.eps)
    options = {"scale": scale, "shift": shift, "activation": spec.activation, "temperature": spec.temperature}
    return reference.blur_pool2d(x, kernel, **spec.blur, **options)


def prologue_output(x: Tensor, affine: Affine, spec: Spec) -> Tensor:
    """activation(scale x + shift), what is blurred, in operations of PyTorch."""
    scale, shift, *_ = affine.folded(spec.eps)
    return prologue(x, scale, shift, spec.activation, spec.temperature)


def has_prologue(affine: Affine, spec: Spec) -> bool:
    """Whether anything comes before the blur."""
    scale, shift, mean, _ = affine
    return spec.activation is not None or scale is not None or shift is not None or mean is not None


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


def _forward(x: Tensor, kernel: Tensor, affine: Affine, spec: Spec) -> Tensor:
    arguments = (_dense(x), _taps(kernel), *spec.numbers, *_prologue_arguments(x, affine, spec))
    return call_operator("blur_pool2d", *arguments)


def _transposed(grad: Tensor, kernel: Tensor, size: tuple[int, int], spec: Spec) -> Tensor:
    """The blur's transpose of ``grad``: (B, C, *size)."""
    arguments = (_dense(grad), None, _taps(kernel), size, *spec.numbers, *_NO_PROLOGUE, False)
    return call_operator("blur_pool2d_backward", *arguments)[0]


def _backward(grad, x, kernel, affine, spec, wanted) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of x, scale and shift through the prologue; of the last two, those that are ``wanted``."""
    x = _dense(x)
    of_scale, of_shift = wanted
    grad_x, grad_scale, grad_shift = call_operator(
        "blur_pool2d_backward",
        grad.contiguous(memory_format=_memory_format(x)),  # what was saved may be laid out otherwise than x was
        x,
        _taps(kernel),
        x.shape[2:],
        *spec.numbers,
        *_prologue_arguments(x, affine, spec),
        of_scale or of_shift,
    )
    return (
        grad_x,
        grad_scale.to(affine.scale.dtype) if of_scale else None,
        grad_shift.to(affine.shift.dtype) if of_shift else None,
    )


_NO_PROLOGUE = (None, None, None, None, 0.0, 0, 1.0)


def _prologue_arguments(x: Tensor, affine: Affine, spec: Spec) -> tuple:
    """The prologue as the registered operators take it."""
    if not has_prologue(affine, spec):
        return _NO_PROLOGUE
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    tensors = [_per_channel(tensor, dtype) for tensor in affine]
    return *tensors, spec.eps, ACTIVATIONS.index(spec.activation), spec.temperature


def _per_channel(values: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """One of the tensors of a prologue in the dtype that is computed in."""
    if values is None:
        return None
    return (values if values.dtype == dtype else values.to(dtype)).contiguous()  # `to` asks autograd even so


def _memory_format(x: Tensor) -> torch.memory_format:
    """The memory format in which x is read, and the output is written."""
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _dense(x: Tensor) -> Tensor:
    """x as it is if its memory format is contiguous or channels_last; else contiguous."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def _taps(kernel: Tensor) -> Tensor:
    """The kernel as the operators take it: contiguous, in float32 or float64."""
    return (kernel if kernel.dtype in (torch.float32, torch.float64) else kernel.to(torch.float32)).contiguous()


def output_tangents(tangents: Tensor, kernel: Tensor, spec: Spec) -> Tensor:
    """A x for K tangents of x, (K, B, C, H, W), in one launch, without the prologue of ``spec``."""
    y = _forward(tangents.flatten(0, 1), kernel, Affine(), Spec(**spec.blur))
    return y.unflatten(0, (len(tangents), -1))


def input_gradient_tangents(tangents: Tensor, kernel: Tensor, size: tuple[int, int], spec: Spec) -> Tensor:
    """A^T grad for K tangents of the gradient, in the same way; (K, B, C, *size)."""
    x = _transposed(tangents.flatten(0, 1), kernel, size, spec)
    return x.unflatten(0, (len(tangents), -1))


# ---- differentiation -----------------------------------------------------------------------------------------------


def _is_plain(grad: Tensor) -> bool:
    """Whether nothing but numbers are asked of a backward."""
    return not (torch.is_grad_enabled() or is_transformed() or is_batched_gradient(grad))


@with_signature
class Blur(torch.autograd.Function):
    """(spec, kernel, x) -> A x."""

    @staticmethod
    def forward(spec, kernel, x):
        return _forward(x, kernel, Affine(), spec)

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


class RecordedBlur(Recorded):
    """(spec, kernel, x) -> A x, outside of transforms."""

    @staticmethod
    def forward(ctx, spec, kernel, x):
        ctx.spec, ctx.size, ctx.memory_format = spec, x.shape[2:], _memory_format(x)
        ctx.save_for_backward(kernel)
        return _forward(x, kernel, Affine(), spec)

    @staticmethod
    def backward(ctx, grad):
        (kernel,) = ctx.saved_tensors
        if not _is_plain(grad):
            return None, None, _apply_transposed(ctx.spec, ctx.size, kernel, grad)
        grad = grad.contiguous(memory_format=ctx.memory_format)
        return None, None, _transposed(grad, kernel, ctx.size, ctx.spec)


class RecordedPrologueBlur(Recorded):
    """(spec, kernel, x, *affine) -> A activation(scale x + shift), outside of transforms.

    Of a normalisation, x alone needs a gradient.
    """

    @staticmethod
    def forward(ctx, spec, kernel, x, *affine):
        ctx.spec = spec
        ctx.save_for_backward(kernel, x, *affine)
        return _forward(x, kernel, Affine(*affine), spec)

    @staticmethod
    def backward(ctx, grad):
        kernel, x, *affine = ctx.saved_tensors
        spec, affine = ctx.spec, Affine(*affine)
        if _is_plain(grad):
            return None, None, *_backward(grad, x, kernel, affine, spec, ctx.needs_input_grad[3:5]), None, None
        wide = grad.to(torch.float64 if grad.dtype == torch.float64 else torch.float32)
        grad_u = _apply_transposed(Spec(**spec.blur), x.shape[2:], kernel, wide)
        scale, shift, *_ = affine.folded(spec.eps)
        grad_x, *of_affine = prologue_backward(grad_u, x, scale, shift, spec.activation, spec.temperature)
        of_affine = of_affine if affine.mean is None else (None, None)
        return None, None, grad_x, *of_affine, None, None


def _fold(x: Tensor, dim: int) -> Tensor:
    """The mapped dimension as part of the batch."""
    return x.movedim(dim, 0).flatten(0, 1)


def _unfold(x: Tensor, info) -> Tensor:
    return x.unflatten(0, (info.batch_size, -1))


# ---- registered operators: fakes for tracing, autograd for torch.compile ---------------------------------------------


def _fake(x, kernel, stride, padding, padding_mode, *prologue):
    left, right, top, bottom = padding
    height = (x.shape[2] + top + bottom - kernel.shape[0]) // stride[0] + 1
    width = (x.shape[3] + left + right - kernel.shape[1]) // stride[1] + 1
    return _new_map(x, height, width)


def _fake_backward(grad, x, kernel, size, stride, padding, padding_mode, *prologue_and_sums):
    *_, sums = prologue_and_sums
    channels = grad.shape[1] if sums else 0
    return _new_map(grad, *size), *(grad.new_empty((channels,), dtype=torch.float64) for _ in range(2))


def _new_map(like: Tensor, height: int, width: int) -> Tensor:
    shape = (*like.shape[:2], height, width)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=_memory_format(like))


def _setup_compiled(ctx, inputs, output):
    x, kernel, stride, padding, padding_mode, *prologue = inputs
    if tuple(prologue[:4]) != (None,) * 4 or prologue[5] != 0:
        raise RuntimeError(
            "torch.ops.vitfast.blur_pool2d records no gradient through a prologue; call vitfast.functional.blur_pool2d"
        )
    ctx.size, ctx.numbers = list(x.shape[2:]), (stride, padding, padding_mode)
    ctx.save_for_backward(kernel)


def _compiled_backward(ctx, grad):
    (kernel,) = ctx.saved_tensors
    arguments = (_dense(grad), None, kernel, ctx.size, *ctx.numbers, *_NO_PROLOGUE, False)
    return torch.ops.vitfast.blur_pool2d_backward(*arguments)[0], *(None,) * 11


def _setup_compiled_backward(ctx, inputs, output):
    _, x, kernel, _, *ctx.numbers = inputs[:7]
    if x is not None:
        raise RuntimeError(
            "torch.ops.vitfast.blur_pool2d_backward records no gradient through a prologue; "
            "call vitfast.functional.blur_pool2d"
        )
    ctx.save_for_backward(kernel)


def _compiled_double_backward(ctx, cotangent, *_):
    (kernel,) = ctx.saved_tensors
    return torch.ops.vitfast.blur_pool2d(_dense(cotangent), kernel, *ctx.numbers, *_NO_PROLOGUE), *(None,) * 14


def prologue_of(stride, padding, mode, scale, shift, mean, variance, eps, activation, temperature):
    """The tensors of the prologue and the rest, of the arguments of a registered operator."""
    numbers = tuple(stride), tuple(padding), PADDING_MODES[mode]
    return Affine(scale, shift, mean, variance), Spec(*numbers, eps, ACTIVATIONS[activation], temperature)


def _defined(x, kernel, *options):
    return _definition(x, kernel, *prologue_of(*options)).to(x.dtype)


def _defined_backward(grad, x, kernel, size, *options_and_sums):
    *options, sums = options_and_sums
    affine, spec = prologue_of(*options)
    return prologue_gradients(
        reference.blur_pool2d_transposed(grad, kernel, tuple(size), **spec.blur), x, affine, spec, sums
    )


def prologue_gradients(grad_u: Tensor, x: Tensor | None, affine: Affine, spec: Spec, sums: bool) -> tuple[Tensor, ...]:
    """The gradients of x, scale and shift for that of u, what is blurred, as the registered operator returns them.

    Without x there is no prologue, and u is x. Those of scale and shift are empty unless ``sums`` are wanted.
    """
    none = grad_u.flatten()[:0].to(torch.float64)  # with a tangent, for all results of an operator have one
    if x is None:
        return grad_u, none, none
    ones = grad_u.new_ones(grad_u.shape[1])
    scale, shift, *_ = affine.folded(spec.eps)
    scale, shift = ones if scale is None else scale, torch.zeros_like(ones) if shift is None else shift
    grad_x, *totals = prologue_backward(grad_u, x, scale, shift, spec.activation, spec.temperature)
    return grad_x, *(total.to(torch.float64) if sums else none for total in totals)


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
