"""Window attention: the operator behind `vitfast.functional.window_attention`.

Differentiation. Two `autograd.Function`s, forward and backward, each with `backward`, `jvp` and `vmap`; the tangents of
both are formulas of `vitfast.reference`, linear in the tangents and differentiable any number of times:

    WindowAttention.backward          -> WindowAttentionBackward
    WindowAttention.jvp               -> window_attention_tangent
    WindowAttentionBackward.backward  -> both tangents, by the symmetry of second derivatives
    WindowAttentionBackward.jvp       -> window_attention_backward_tangent

Under ``vmap(jvp(grad(f)))`` over K tangents both kernels see unbatched primals and run once, and inside the formulas
vmap batches only what depends on a tangent: the probabilities are computed once for all K.

A plain training step takes `RecordedWindowAttention`, which has the same backward and costs less.

Every function takes its tensors as ``qkv``: either ``(query, key, value)`` or one packed ``(qkv,)`` of shape
(B, H, W, 3, heads, D), whose gradient the kernel writes packed as well.

Dynamo refuses a Function that has a `jvp`, so while compiling the registered operators are called instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitfast import reference
from vitfast.ops import _extension
from vitfast.ops._rules import (
    Recorded,
    bias_grad_like,
    call_operator,
    fold,
    fold_bias,
    forward_ad_active,
    forward_ad_is_nested,
    is_launched,
    is_transformed,
    laid_out_as,
    lse_dtype,
    operator,
    records_gradients,
    register_autograd,
    require_operator,
    unfold_bias_grad,
    unmapped_shape,
    with_signature,
    without_tangents,
)
from vitfast.ops._tangents import Rule, count_of, has_kernel, tangents_of
from vitfast.ops.backend import choose

NAME = "window_attention"
SERVED = ("cpu", "triton")


@dataclass(frozen=True)
class Spec:
    """What a call of the operator fixes besides its tensors."""

    window_size: tuple[int, int]
    shift: tuple[int, int]
    scale: float
    backend: str

    @property
    def options(self) -> dict:
        """The keyword arguments of the functions in `vitfast.reference`."""
        return {"window_size": self.window_size, "shift": self.shift, "scale": self.scale}


def window_attention(
    qkv: tuple[Tensor, ...],
    bias: Tensor | None,
    window_size: tuple[int, int],
    shift: tuple[int, int],
    scale: float,
) -> Tensor:
    """Checked arguments in, (B, H, W, heads, D) out: on the fastest path that serves them."""
    spec = Spec(window_size, shift, scale, choose(NAME, SERVED, qkv[0].device))
    if spec.backend == "reference":
        return reference.window_attention(*_unpack(qkv), bias, **spec.options)
    tensors = (*qkv,) if bias is None else (*qkv, bias)
    if torch.compiler.is_compiling():
        if forward_ad_active():  # the registered operators have no forward-mode rule
            return reference.window_attention(*_unpack(qkv), bias, **spec.options)
        require_operator(NAME, spec.backend, qkv[0].device)
        needs_grad = records_gradients(tensors)
        return operator(_name(qkv))(*qkv, bias, list(window_size), list(shift), scale, needs_grad)[0]
    if forward_ad_is_nested():
        return reference.window_attention(*_unpack(qkv), bias, **spec.options)
    if is_transformed():
        return WindowAttention.apply(spec, bias, *qkv)[0]
    if records_gradients(tensors):
        return RecordedWindowAttention.apply(spec, bias, *qkv)
    return _forward(spec, bias, qkv, return_lse=False)[0]


def _unpack(qkv: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """(query, key, value), each (..., heads, D); None, a tangent of zero, is taken apart like a tensor."""
    if len(qkv) == 3:
        return tuple(qkv)
    return (None, None, None) if qkv[0] is None else qkv[0].unbind(-3)


def _repack(packed: bool, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    return (torch.stack((query, key, value), dim=-3),) if packed else (query, key, value)


# ---- kernels -------------------------------------------------------------------------------------------------------


def _name(qkv: tuple[Tensor, ...]) -> str:
    """Of the registered operator."""
    return "window_attention" if len(qkv) == 3 else "window_attention_qkvpacked"


def _backward_name(qkv: tuple[Tensor, ...]) -> str:
    """Of the registered operator for the backward."""
    return "window_attention_backward" if len(qkv) == 3 else "window_attention_qkvpacked_backward"


def _forward(spec: Spec, bias: Tensor | None, qkv: tuple[Tensor, ...], return_lse: bool) -> tuple[Tensor, Tensor]:
    """The output, and per query and head the logsumexp of its scores, (B, heads, H, W), empty if not asked for."""
    if is_launched(NAME, spec.backend, (bias, *qkv)):
        from vitfast.kernels import window_attention as kernels

        return kernels.forward(*_unpack(qkv), bias, spec.window_size, spec.shift, spec.scale, return_lse)
    arguments = (*qkv, bias, list(spec.window_size), list(spec.shift), spec.scale, return_lse)
    return call_operator(_name(qkv), *arguments)


def _backward(
    spec: Spec, bias: Tensor | None, lse: Tensor, grad: Tensor, qkv: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """The gradients of ``qkv``, followed by that of the bias if there is one."""
    if is_launched(NAME, spec.backend, (bias, grad, *qkv)):
        grads = _triton_backward(grad, *qkv, bias, lse, spec.window_size, spec.shift, spec.scale)
    else:
        arguments = (grad, *qkv, bias, lse, list(spec.window_size), list(spec.shift), spec.scale)
        grads = call_operator(_backward_name(qkv), *arguments)
    return grads[:-1] if bias is None else grads


def _triton_backward(grad, *arguments):
    """Allocates the gradients, packed if the inputs are, and has Triton write them: (grads of qkv..., grad of bias)."""
    from vitfast.kernels import window_attention as kernels

    *qkv, bias, lse, window_size, shift, scale = arguments
    grads = tuple(torch.empty_like(t) for t in qkv)
    bias_grad = kernels.backward(grad, *_unpack(qkv), bias, lse, *_unpack(grads), window_size, shift, scale)
    return (*grads, bias_grad)


# ---- differentiation -----------------------------------------------------------------------------------------------


@with_signature
class WindowAttention(torch.autograd.Function):
    """(spec, bias, *qkv) -> (output, logsumexp); the logsumexp is a constant to autograd."""

    @staticmethod
    def forward(spec, bias, *qkv):
        return tuple(_forward(spec, bias, qkv, return_lse=True))

    @staticmethod
    def setup_context(ctx, inputs, output):
        spec, bias, *qkv = inputs
        _, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)  # a gradient of lse would be a tensor of zeros
        ctx.spec = spec
        ctx.save_for_backward(bias, lse, *qkv)
        ctx.save_for_forward(bias, lse, *qkv)

    @staticmethod
    def backward(ctx, grad, _):
        bias, lse, *qkv = ctx.saved_tensors
        if grad is None:
            return None, None, *(None for _ in qkv)
        if forward_ad_is_nested():
            *qkv_grad, bias_grad = reference.window_attention_backward(grad, *_unpack(qkv), bias, **ctx.spec.options)
            return None, bias_grad, *_repack(len(qkv) == 1, *qkv_grad)
        if torch.is_grad_enabled() or is_transformed():
            grads = WindowAttentionBackward.apply(ctx.spec, bias, lse, grad, *qkv)
        else:
            grads = _backward(ctx.spec, bias, lse, grad, qkv)
        return None, (None if bias is None else grads[-1]), *grads[: len(qkv)]

    @staticmethod
    def jvp(ctx, _, bias_t, *qkv_t):
        bias, _lse, *qkv = ctx.saved_tensors
        return _tangent(ctx.spec, bias, qkv, bias_t, qkv_t), None

    @staticmethod
    def vmap(info, in_dims, spec, bias, *qkv):
        _, bias_dim, *qkv_dims = in_dims
        size, heads = info.batch_size, _heads(qkv[0], qkv_dims[0])
        folded = [_fold_heads(t, dim, size) for t, dim in zip(qkv, qkv_dims, strict=True)]
        out, lse = WindowAttention.apply(spec, fold_bias(bias, bias_dim, size, heads, 0), *folded)
        return (out.unflatten(3, (size, heads)), lse.unflatten(1, (size, heads))), (3, 1)


class RecordedWindowAttention(Recorded):
    """(spec, bias, *qkv) -> output, outside of transforms.

    A Function whose forward takes the context cannot be transformed, but costs some 20 microseconds less in a step.
    """

    @staticmethod
    def forward(ctx, spec, bias, *qkv):
        out, lse = _forward(spec, bias, qkv, return_lse=True)
        ctx.spec = spec
        ctx.save_for_backward(bias, lse, *qkv)
        return out

    @staticmethod
    def backward(ctx, grad):
        return WindowAttention.backward(ctx, grad, None)


@with_signature
class WindowAttentionBackward(torch.autograd.Function):
    """(spec, bias, lse, grad, *qkv) -> gradients of qkv, then of the bias if there is one.

    A function of (bias, grad, qkv): the logsumexp is only a cache of something they determine.
    """

    @staticmethod
    def forward(spec, bias, lse, grad, *qkv):
        return tuple(_backward(spec, bias, lse, grad, qkv))

    @staticmethod
    def setup_context(ctx, inputs, output):
        spec, bias, _lse, grad, *qkv = inputs
        ctx.spec = spec
        ctx.save_for_backward(bias, grad, *qkv)
        ctx.save_for_forward(bias, grad, *qkv)

    @staticmethod
    def backward(ctx, *cotangents):
        bias, grad, *qkv = ctx.saved_tensors
        qkv_c, bias_c = cotangents[: len(qkv)], (None if bias is None else cotangents[-1])
        grad_grad = _tangent(ctx.spec, bias, qkv, bias_c, qkv_c)
        *qkv_grad, bias_grad = _backward_tangent(ctx.spec, bias, grad, qkv, bias_c, None, qkv_c)
        return None, bias_grad, None, grad_grad, *qkv_grad

    @staticmethod
    def jvp(ctx, _, bias_t, lse_t, grad_t, *qkv_t):
        bias, grad, *qkv = ctx.saved_tensors
        *qkv_grad_t, bias_grad_t = _backward_tangent(ctx.spec, bias, grad, qkv, bias_t, grad_t, qkv_t)
        return tuple(qkv_grad_t) if bias is None else (*qkv_grad_t, bias_grad_t)

    @staticmethod
    def vmap(info, in_dims, spec, bias, lse, grad, *qkv):
        _, bias_dim, lse_dim, grad_dim, *qkv_dims = in_dims
        size, heads = info.batch_size, _heads(qkv[0], qkv_dims[0])
        folded = [_fold_heads(t, dim, size) for t, dim in zip(qkv, qkv_dims, strict=True)]
        grads = WindowAttentionBackward.apply(
            spec,
            fold_bias(bias, bias_dim, size, heads, 0),
            fold(lse, lse_dim, size, 1).contiguous(),
            _fold_heads(grad, grad_dim, size),
            *folded,
        )
        outputs = [g.unflatten(-2, (size, heads)) for g in grads[: len(qkv)]]
        dims = [g.dim() - 3 for g in outputs]
        if bias is not None:
            outputs.append(unfold_bias_grad(grads[-1], bias, bias_dim, size, 0))
            dims.append(0)
        return tuple(outputs), tuple(dims)


def _tangent(spec, bias, qkv, bias_t, qkv_t) -> Tensor:
    """The tangent of the output; a packed tangent is taken apart like its primal."""
    return tangents_of(OUTPUT, spec, (bias, *qkv), (bias_t, *qkv_t))[0]


def _backward_tangent(spec, bias, grad, qkv, bias_t, grad_t, qkv_t) -> tuple[Tensor | None, ...]:
    """The tangents of the gradients of qkv (packed if qkv is), then of the bias's gradient."""
    results = tangents_of(GRADIENTS, spec, (bias, grad, *qkv), (bias_t, grad_t, *qkv_t))
    return (*results, None) if bias is None else results


def _define_output(spec, primals, tangents):
    (bias, *qkv), (bias_t, *qkv_t) = primals, tangents
    return (reference.window_attention_tangent(*_unpack(qkv), bias, (*_unpack(qkv_t), bias_t), **spec.options),)


def _define_gradients(spec, primals, tangents):
    (bias, grad, *qkv), (bias_t, grad_t, *qkv_t) = primals, tangents
    *grads_t, bias_grad_t = reference.window_attention_backward_tangent(
        grad, *_unpack(qkv), bias, grad_t, (*_unpack(qkv_t), bias_t), **spec.options
    )
    grads_t = _repack(len(qkv) == 1, *grads_t)
    return grads_t if bias is None else (*grads_t, bias_grad_t)


def _compute_output(spec, primals, tangents):
    (bias, *qkv), (bias_t, *qkv_t) = primals, tangents
    if spec.backend == "triton":
        return (_triton_tangents(spec, bias, None, qkv, bias_t, None, qkv_t)[0],)
    query, key, value = map(_adjacent, _unpack(qkv))
    count = count_of(tangents)
    output_t = query.new_empty(count, *query.shape)
    torch.ops.vitfast.window_attention_tangents(
        *(query, key, value, bias, None),
        *(*map(_adjacent, _unpack(qkv_t)), bias_t, None),
        *(count, list(spec.window_size), list(spec.shift), spec.scale),
        *(output_t, None, None, None, None),
    )
    return (output_t,)


def _compute_gradients(spec, primals, tangents):
    (bias, grad, *qkv), (bias_t, grad_t, *qkv_t) = primals, tangents
    if spec.backend == "triton":
        _, *grads_t, bias_grad_t = _triton_tangents(spec, bias, grad, qkv, bias_t, grad_t, qkv_t)
        grads_t = _repack(len(qkv) == 1, *grads_t)
        return grads_t if bias is None else (*grads_t, bias_grad_t.to(bias.dtype))
    count = count_of(tangents)
    grads_t = tuple(t.new_empty(count, *t.shape) for t in qkv)
    bias_grad_t = None if bias is None else bias.new_empty(count, *bias.shape)
    torch.ops.vitfast.window_attention_tangents(
        *(*map(_adjacent, _unpack(qkv)), bias, _adjacent(grad)),
        *(*map(_adjacent, _unpack(qkv_t)), bias_t, _adjacent(grad_t)),
        *(count, list(spec.window_size), list(spec.shift), spec.scale),
        *(None, *_unpack(grads_t), bias_grad_t),
    )
    return grads_t if bias is None else (*grads_t, bias_grad_t)


def _adjacent(x: Tensor | None) -> Tensor | None:
    """x with the channels of a head side by side, as the kernel for tangents takes them fastest."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _triton_tangents(spec, bias, grad, qkv, bias_t, grad_t, qkv_t) -> tuple[Tensor | None, ...]:
    """The tangents of the output, or if there is a gradient of it those of all gradients; the others are None."""
    from vitfast.kernels import window_attention_tangents as kernels

    return kernels.tangents(
        *(*_unpack(qkv), bias, grad, grad_t, *_unpack(qkv_t), bias_t, spec.window_size, spec.shift, spec.scale),
        want_output=grad is None,
        want_gradients=grad is not None,
    )


OUTPUT = Rule(_compute_output, _define_output, has_kernel)
GRADIENTS = Rule(_compute_gradients, _define_gradients, has_kernel)


def _heads(x: Tensor, dim: int | None) -> int:
    """The number of heads of x = (..., heads, D) with a mapped dimension somewhere."""
    return unmapped_shape(x, dim)[-2]


def _fold_heads(x: Tensor, dim: int | None, size: int) -> Tensor:
    return fold(x, dim, size, len(unmapped_shape(x, dim)) - 2)


# ---- registered operators: fakes for tracing, autograd for torch.compile ---------------------------------------------


def _fake(query, out_like, return_lse):
    batch, height, width, heads, _ = query.shape
    shape = (batch, heads, height, width) if return_lse else (0,)
    return out_like(query), query.new_empty(shape, dtype=lse_dtype(query.dtype))


def _fake_forward(query, key, value, bias, window_size, shift, scale, return_lse):
    return _fake(query, torch.empty_like, return_lse)


def _fake_forward_packed(qkv, bias, window_size, shift, scale, return_lse):
    return _fake(qkv.select(3, 0), torch.empty_like, return_lse)


def _fake_backward(grad, query, key, value, bias, lse, window_size, shift, scale):
    return *(torch.empty_like(t) for t in (query, key, value)), bias_grad_like(bias, query)


def _fake_backward_packed(grad, qkv, bias, lse, window_size, shift, scale):
    return torch.empty_like(qkv), bias_grad_like(bias, qkv)


def _setup_compiled(ctx, inputs, output):
    *qkv, bias, window_size, shift, scale, _ = inputs
    _, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.arguments = (window_size, shift, scale)
    ctx.save_for_backward(bias, lse, *qkv)


def _compiled_backward(ctx, grad, _):
    bias, lse, *qkv = ctx.saved_tensors
    if lse.shape[0] != grad.shape[0]:  # a program that was exported without gradients
        lse = operator(_name(qkv))(*qkv, bias, *ctx.arguments, True)[1]
    grads = operator(_backward_name(qkv))(grad, *qkv, bias, lse, *ctx.arguments)
    return *grads[: len(qkv)], (None if bias is None else grads[-1]), None, None, None, None


def _setup_compiled_backward(ctx, inputs, output):
    grad, *qkv, bias, _, window_size, shift, scale = inputs
    ctx.spec = Spec(tuple(window_size), tuple(shift), scale, "reference")  # which serves all second derivatives
    ctx.save_for_backward(bias, grad, *qkv)


def _compiled_double_backward(ctx, *cotangents):
    _, bias_grad, _, grad_grad, *qkv_grad = WindowAttentionBackward.backward(ctx, *cotangents)
    return grad_grad, *qkv_grad, bias_grad, None, None, None, None


def _defined(*arguments):
    *qkv, bias, window_size, shift, scale, return_lse = arguments
    options = {"window_size": tuple(window_size), "shift": tuple(shift), "scale": scale}
    query, key, value = _unpack(qkv)
    out = laid_out_as(reference.window_attention(query, key, value, bias, **options), query)
    return out, operator(_name(qkv))(*without_tangents(arguments))[1] if return_lse else out.new_empty((0,))


def _defined_backward(*arguments):
    grad, *qkv, bias, _lse, window_size, shift, scale = arguments
    options = {"window_size": tuple(window_size), "shift": tuple(shift), "scale": scale}
    *qkv_grad, bias_grad = reference.window_attention_backward(grad, *_unpack(qkv), bias, **options)
    qkv_grad = map(laid_out_as, _repack(len(qkv) == 1, *qkv_grad), qkv)
    return *qkv_grad, grad.new_empty((0,)) if bias is None else bias_grad.contiguous()


def _triton_forward(*arguments):
    from vitfast.kernels import window_attention as kernels

    *qkv, bias, window_size, shift, scale, return_lse = arguments
    return kernels.forward(*_unpack(qkv), bias, tuple(window_size), tuple(shift), scale, return_lse)


def _triton_backward_operator(*arguments):
    *head, window_size, shift, scale = arguments
    grads = _triton_backward(*head, tuple(window_size), tuple(shift), scale)
    if grads[-1] is None:
        grads = (*grads[:-1], grads[0].new_empty((0,)))
    return grads


def _register() -> None:
    for suffix, fake, fake_backward in (
        ("", _fake_forward, _fake_backward),
        ("_qkvpacked", _fake_forward_packed, _fake_backward_packed),
    ):
        forward, backward = f"vitfast::window_attention{suffix}", f"vitfast::window_attention{suffix}_backward"
        torch.library.register_fake(forward, fake)
        torch.library.register_fake(backward, fake_backward)
        register_autograd(forward, _compiled_backward, setup_context=_setup_compiled, definition=_defined)
        register_autograd(
            backward,
            _compiled_double_backward,
            setup_context=_setup_compiled_backward,
            definition=_defined_backward,
        )
        torch.library.register_kernel(forward, "cuda", _triton_forward)
        torch.library.register_kernel(backward, "cuda", _triton_backward_operator)


if _extension.available():
    _register()
    # It returns nothing: results are written.
    torch.library.register_fake("vitfast::window_attention_tangents", lambda *arguments: None)
