"""Attention: the operator behind `vitfast.functional.attention`.

Differentiation is that of window attention (see there): two `autograd.Function`s, forward and backward, each with
`backward`, `jvp` and `vmap`, and tangents that are formulas of `vitfast.reference`:

    Attention.backward          -> AttentionBackward
    Attention.jvp               -> attention_tangent
    AttentionBackward.backward  -> both tangents, by the symmetry of second derivatives
    AttentionBackward.jvp       -> attention_backward_tangent

The kernels process keys in blocks, so the backward needs more than the scores of one block: it takes the output and its
logsumexp from the forward. Both are caches of what query, key, value and bias determine, and the rules of the backward
differentiate through those.

A plain training step takes `RecordedAttention`, which has the same backward and costs less.

Every function takes its tensors as ``qkv``: either ``(query, key, value)``, each (B, heads, tokens, D), or one packed
``(qkv,)`` of shape (B, N, 3, heads, D), whose gradient the kernel writes packed as well. The output, its gradient and
its tangents are (B, heads, N, D) in the first case and (B, N, heads, D) in the second; the logsumexp is (B, heads, N)
and the bias (B or 1, heads or 1, N or 1, M), in the dtype of the scores, in both.

Causal masks and dropout have no kernel: such calls are the definition in plain PyTorch.
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

NAME = "attention"
SERVED = ("cpu", "triton")


@dataclass(frozen=True)
class Spec:
    """What a call of the operator fixes besides its tensors."""

    scale: float
    backend: str


def attention(
    qkv: tuple[Tensor, ...], bias: Tensor | None, scale: float, is_causal: bool = False, dropout_p: float = 0.0
) -> Tensor:
    """Checked arguments in, the output out: on the fastest path that serves them."""
    if is_causal or dropout_p > 0:
        choose(f"{NAME} with is_causal or dropout_p", (), qkv[0].device)  # raises if a kernel is forced
        return _definition(qkv, bias, scale, is_causal=is_causal, dropout_p=dropout_p)
    spec = Spec(scale, choose(NAME, SERVED, qkv[0].device))
    if spec.backend == "reference":
        return _definition(qkv, bias, scale)
    tensors = (*qkv,) if bias is None else (*qkv, bias)
    if torch.compiler.is_compiling():
        if forward_ad_active():  # the registered operators have no forward-mode rule
            return _definition(qkv, bias, scale)
        require_operator(NAME, spec.backend, qkv[0].device)
        return operator(_name(qkv))(*qkv, bias, scale, records_gradients(tensors))[0]
    if forward_ad_is_nested():
        return _definition(qkv, bias, scale)
    if is_transformed():
        return Attention.apply(spec, bias, *qkv)[0]
    if records_gradients(tensors):
        return RecordedAttention.apply(spec, bias, *qkv)
    return _forward(spec, bias, qkv, return_lse=False)[0]


def _definition(qkv: tuple[Tensor, ...], bias: Tensor | None, scale: float, **options) -> Tensor:
    output = reference.attention(*_unpack(qkv), bias, scale=scale, **options)
    return _swapped(qkv, output).contiguous() if len(qkv) == 1 else output


def _unpack(qkv: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """(query, key, value), each (..., heads, tokens, D); None, a tangent of zero, is taken apart like a tensor."""
    if len(qkv) == 3:
        return tuple(qkv)
    return (None, None, None) if qkv[0] is None else qkv[0].transpose(-4, -2).unbind(-3)


def _repack(packed: bool, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    if not packed:
        return query, key, value
    return (torch.stack([t.transpose(-3, -2) for t in (query, key, value)], dim=-3),)


def _swapped(qkv: tuple[Tensor, ...], x: Tensor | None) -> Tensor | None:
    """(..., heads, N, D) from a tensor in the layout of the output, or the other way round."""
    return x.transpose(-3, -2) if len(qkv) == 1 and x is not None else x


# ---- kernels -------------------------------------------------------------------------------------------------------


def _name(qkv: tuple[Tensor, ...]) -> str:
    """Of the registered operator."""
    return "attention" if len(qkv) == 3 else "attention_qkvpacked"


def _backward_name(qkv: tuple[Tensor, ...]) -> str:
    """Of the registered operator for the backward."""
    return "attention_backward" if len(qkv) == 3 else "attention_qkvpacked_backward"


def _forward(spec: Spec, bias: Tensor | None, qkv: tuple[Tensor, ...], return_lse: bool) -> tuple[Tensor, Tensor]:
    """The output, and per query and head the logsumexp of its scores, (B, heads, N), empty if not asked for."""
    arguments = (*qkv, bias, spec.scale, return_lse)
    if is_launched(NAME, spec.backend, (bias, *qkv)):
        return _triton_forward(*arguments)
    return call_operator(_name(qkv), *arguments)


def _backward(
    spec: Spec, bias: Tensor | None, out: Tensor, lse: Tensor, grad: Tensor, qkv: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """The gradients of ``qkv``, followed by that of the bias if there is one."""
    arguments = (grad, *qkv, bias, out, lse, spec.scale)
    if is_launched(NAME, spec.backend, (bias, grad, *qkv)):
        grads = _triton_backward(*arguments)
    else:
        grads = call_operator(_backward_name(qkv), *arguments)
    return grads[:-1] if bias is None else grads


def _triton_forward(*arguments):
    from vitfast.kernels import attention as kernels

    *qkv, bias, scale, return_lse = arguments
    out, lse = kernels.forward(*_unpack(qkv), bias, scale, return_lse)
    return _swapped(qkv, out), lse


def _triton_backward(grad, *arguments):
    """Allocates the gradients, packed if the inputs are, and has Triton write them: (grads of qkv..., grad of bias)."""
    from vitfast.kernels import attention as kernels

    *qkv, bias, out, lse, scale = arguments
    grads = tuple(torch.empty_like(t) for t in qkv)
    grad, out = _swapped(qkv, grad), _swapped(qkv, out)
    bias_grad = kernels.backward(grad, *_unpack(qkv), bias, out, lse, *_unpack(grads), scale)
    return (*grads, bias_grad)


# ---- differentiation -----------------------------------------------------------------------------------------------


@with_signature
class Attention(torch.autograd.Function):
    """(spec, bias, *qkv) -> (output, logsumexp); the logsumexp is a constant to autograd."""

    @staticmethod
    def forward(spec, bias, *qkv):
        out, lse = _forward(spec, bias, qkv, return_lse=True)
        # The output is a transposed view. Autograd must not see one: it refuses to change views that a Function returns
        # in place, and takes only tangents that have the strides of a view. Nor may it be detached: the graph of a
        # traced call would lose its tangent there.
        return torch.ops.aten._unsafe_view(out, out.shape), lse

    @staticmethod
    def setup_context(ctx, inputs, output):
        spec, bias, *qkv = inputs
        out, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)  # a gradient of lse would be a tensor of zeros
        ctx.spec = spec
        ctx.save_for_backward(bias, out, lse, *qkv)
        ctx.save_for_forward(bias, out, lse, *qkv)

    @staticmethod
    def backward(ctx, grad, _):
        bias, out, lse, *qkv = ctx.saved_tensors
        if grad is None:
            return None, None, *(None for _ in qkv)
        if forward_ad_is_nested():
            *qkv_grad, bias_grad = reference.attention_backward(
                _swapped(qkv, grad), *_unpack(qkv), bias, scale=ctx.spec.scale
            )
            return None, bias_grad, *_repack(len(qkv) == 1, *qkv_grad)
        if torch.is_grad_enabled() or is_transformed():
            grads = AttentionBackward.apply(ctx.spec, bias, out, lse, grad, *qkv)
        else:
            grads = _backward(ctx.spec, bias, out, lse, grad, qkv)
        return None, (None if bias is None else grads[-1]), *grads[: len(qkv)]

    @staticmethod
    def jvp(ctx, _, bias_t, *qkv_t):
        bias, _out, _lse, *qkv = ctx.saved_tensors
        return _tangent(ctx.spec, bias, qkv, bias_t, qkv_t), None

    @staticmethod
    def vmap(info, in_dims, spec, bias, *qkv):
        _, bias_dim, *qkv_dims = in_dims
        size, at = info.batch_size, _output_heads(qkv)
        heads, folded = _fold_qkv(qkv, qkv_dims, size)
        out, lse = Attention.apply(spec, fold_bias(bias, bias_dim, size, heads, 1), *folded)
        return (out.unflatten(at, (size, heads)), lse.unflatten(1, (size, heads))), (at, 1)


class RecordedAttention(Recorded):
    """(spec, bias, *qkv) -> output, outside of transforms.

    A Function whose forward takes the context cannot be transformed, but costs some 20 microseconds less in a step.
    """

    @staticmethod
    def forward(ctx, spec, bias, *qkv):
        out, lse = _forward(spec, bias, qkv, return_lse=True)
        out = torch.ops.aten._unsafe_view(out, out.shape)  # see `Attention`
        ctx.spec = spec
        ctx.save_for_backward(bias, out, lse, *qkv)
        return out

    @staticmethod
    def backward(ctx, grad):
        return Attention.backward(ctx, grad, None)


@with_signature
class AttentionBackward(torch.autograd.Function):
    """(spec, bias, out, lse, grad, *qkv) -> gradients of qkv, then of the bias if there is one.

    A function of (bias, grad, qkv): the output and the logsumexp are only caches of something they determine.
    """

    @staticmethod
    def forward(spec, bias, out, lse, grad, *qkv):
        return tuple(_backward(spec, bias, out, lse, grad, qkv))

    @staticmethod
    def setup_context(ctx, inputs, output):
        spec, bias, _out, _lse, grad, *qkv = inputs
        ctx.spec = spec
        ctx.save_for_backward(bias, grad, *qkv)
        ctx.save_for_forward(bias, grad, *qkv)

    @staticmethod
    def backward(ctx, *cotangents):
        bias, grad, *qkv = ctx.saved_tensors
        qkv_c, bias_c = cotangents[: len(qkv)], (None if bias is None else cotangents[-1])
        grad_grad = _tangent(ctx.spec, bias, qkv, bias_c, qkv_c)
        *qkv_grad, bias_grad = _backward_tangent(ctx.spec, bias, grad, qkv, bias_c, None, qkv_c)
        return None, bias_grad, None, None, grad_grad, *qkv_grad

    @staticmethod
    def jvp(ctx, _, bias_t, out_t, lse_t, grad_t, *qkv_t):
        bias, grad, *qkv = ctx.saved_tensors
        *qkv_grad_t, bias_grad_t = _backward_tangent(ctx.spec, bias, grad, qkv, bias_t, grad_t, qkv_t)
        return tuple(qkv_grad_t) if bias is None else (*qkv_grad_t, bias_grad_t)

    @staticmethod
    def vmap(info, in_dims, spec, bias, out, lse, grad, *qkv):
        _, bias_dim, out_dim, lse_dim, grad_dim, *qkv_dims = in_dims
        size, at = info.batch_size, _output_heads(qkv)
        heads, folded = _fold_qkv(qkv, qkv_dims, size)
        grads = AttentionBackward.apply(
            spec,
            fold_bias(bias, bias_dim, size, heads, 1),
            fold(out, out_dim, size, at),
            fold(lse, lse_dim, size, 1).contiguous(),
            fold(grad, grad_dim, size, at),
            *folded,
        )
        at = _heads_dim(qkv)
        outputs, dims = [g.unflatten(at, (size, heads)) for g in grads[: len(qkv)]], [at for _ in qkv]
        if bias is not None:
            outputs.append(unfold_bias_grad(grads[-1], bias, bias_dim, size, 1))
            dims.append(1)
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
    output_t = reference.attention_tangent(*_unpack(qkv), bias, (*_unpack(qkv_t), bias_t), scale=spec.scale)
    return (_swapped(qkv, output_t),)


def _define_gradients(spec, primals, tangents):
    (bias, grad, *qkv), (bias_t, grad_t, *qkv_t) = primals, tangents
    grad, grad_t = _swapped(qkv, grad), _swapped(qkv, grad_t)
    *grads_t, bias_grad_t = reference.attention_backward_tangent(
        grad, *_unpack(qkv), bias, grad_t, (*_unpack(qkv_t), bias_t), scale=spec.scale
    )
    grads_t = _repack(len(qkv) == 1, *grads_t)
    return grads_t if bias is None else (*grads_t, bias_grad_t)


def _compute_output(spec, primals, tangents):
    (bias, *qkv), (bias_t, *qkv_t) = primals, tangents
    query, key, value = _unpack(qkv)
    if spec.backend == "triton":
        return (_swapped(qkv, _triton_tangents(spec, bias, None, qkv, bias_t, None, qkv_t)[0]),)
    count, (batch, heads, tokens, dim) = count_of(tangents), query.shape
    output_t = query.new_empty(count, batch, tokens, heads, dim)
    torch.ops.vitfast.attention_tangents(
        *(query, key, value, bias, None),
        *(*_unpack(qkv_t), bias_t, None),
        *(count, spec.scale),
        *(output_t.transpose(2, 3), None, None, None, None),
    )
    return (output_t if len(qkv) == 1 else output_t.transpose(2, 3),)


def _compute_gradients(spec, primals, tangents):
    (bias, grad, *qkv), (bias_t, grad_t, *qkv_t) = primals, tangents
    grad, grad_t = _swapped(qkv, grad), _swapped(qkv, grad_t)
    if spec.backend == "triton":
        _, *grads_t, bias_grad_t = _triton_tangents(spec, bias, grad, qkv, bias_t, grad_t, qkv_t)
        grads_t = _repack(len(qkv) == 1, *grads_t)
        return grads_t if bias is None else (*grads_t, bias_grad_t.to(bias.dtype))
    count = count_of(tangents)
    grads_t = tuple(t.new_empty(count, *t.shape) for t in qkv)
    bias_grad_t = None if bias is None else bias.new_empty(count, *bias.shape)
    torch.ops.vitfast.attention_tangents(
        *(*_unpack(qkv), bias, grad),
        *(*_unpack(qkv_t), bias_t, grad_t),
        *(count, spec.scale),
        *(None, *_unpack(grads_t), bias_grad_t),
    )
    return grads_t if bias is None else (*grads_t, bias_grad_t)


def _triton_tangents(spec, bias, grad, qkv, bias_t, grad_t, qkv_t) -> tuple[Tensor | None, ...]:
    """The tangents of the output, or if there is a gradient of it those of all gradients; the others are None."""
    from vitfast.kernels import attention_tangents as kernels

    return kernels.tangents(
        *(*_unpack(qkv), bias, grad, grad_t, *_unpack(qkv_t), bias_t, spec.scale),
        want_output=grad is None,
        want_gradients=grad is not None,
    )


OUTPUT = Rule(_compute_output, _define_output, has_kernel)
GRADIENTS = Rule(_compute_gradients, _define_gradients, has_kernel)


def _heads_dim(qkv: tuple[Tensor, ...]) -> int:
    """Which dimension of the tensors of qkv is the heads."""
    return 3 if len(qkv) == 1 else 1


def _output_heads(qkv: tuple[Tensor, ...]) -> int:
    """Which dimension of the output is the heads."""
    return 2 if len(qkv) == 1 else 1


def _fold_qkv(qkv: tuple[Tensor, ...], dims: list[int | None], size: int) -> tuple[int, list[Tensor]]:
    """The number of heads, and qkv with the mapped dimensions folded into them."""
    at = _heads_dim(qkv)
    heads = unmapped_shape(qkv[0], dims[0])[at]
    return heads, [fold(t, dim, size, at) for t, dim in zip(qkv, dims, strict=True)]


# ---- registered operators: fakes for tracing, autograd for torch.compile ---------------------------------------------


def _fake(query, return_lse):
    """Output and logsumexp for a query (B, N, heads, D), the order of dimensions that the output has in memory."""
    batch, tokens, heads, _ = query.shape
    shape = (batch, heads, tokens) if return_lse else (0,)
    return query.new_empty(query.shape), query.new_empty(shape, dtype=lse_dtype(query.dtype))


def _fake_forward(query, key, value, bias, scale, return_lse):
    out, lse = _fake(query.transpose(1, 2), return_lse)
    return out.transpose(1, 2), lse


def _fake_forward_packed(qkv, bias, scale, return_lse):
    return _fake(qkv.select(2, 0), return_lse)


def _fake_backward(grad, query, key, value, bias, out, lse, scale):
    return *(torch.empty_like(t) for t in (query, key, value)), bias_grad_like(bias, query)


def _fake_backward_packed(grad, qkv, bias, out, lse, scale):
    return torch.empty_like(qkv), bias_grad_like(bias, qkv)


def _setup_compiled(ctx, inputs, output):
    *qkv, bias, scale, _ = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.scale = scale
    ctx.save_for_backward(bias, out, lse, *qkv)


def _compiled_backward(ctx, grad, _):
    bias, out, lse, *qkv = ctx.saved_tensors
    if lse.shape[0] != grad.shape[0]:  # a program that was exported without gradients
        out, lse = operator(_name(qkv))(*qkv, bias, ctx.scale, True)
    grads = operator(_backward_name(qkv))(grad, *qkv, bias, out, lse, ctx.scale)
    return *grads[: len(qkv)], (None if bias is None else grads[-1]), None, None


def _setup_compiled_backward(ctx, inputs, output):
    grad, *qkv, bias, _out, _lse, scale = inputs
    ctx.spec = Spec(scale, "reference")  # which serves all second derivatives
    ctx.save_for_backward(bias, grad, *qkv)


def _compiled_double_backward(ctx, *cotangents):
    _, bias_grad, _, _, grad_grad, *qkv_grad = AttentionBackward.backward(ctx, *cotangents)
    return grad_grad, *qkv_grad, bias_grad, None, None, None


def _defined(*arguments):
    *qkv, bias, scale, return_lse = arguments
    out = _definition(qkv, bias, scale)
    if len(qkv) == 3:  # the kernel writes heads beside channels
        out = out.transpose(1, 2).contiguous().transpose(1, 2)
    return out, operator(_name(qkv))(*without_tangents(arguments))[1] if return_lse else out.new_empty((0,))


def _defined_backward(*arguments):
    grad, *qkv, bias, _out, _lse, scale = arguments
    *qkv_grad, bias_grad = reference.attention_backward(_swapped(qkv, grad), *_unpack(qkv), bias, scale=scale)
    qkv_grad = map(laid_out_as, _repack(len(qkv) == 1, *qkv_grad), qkv)
    return *qkv_grad, grad.new_empty((0,)) if bias is None else bias_grad.contiguous()


def _register() -> None:
    for suffix, fake, fake_backward in (
        ("", _fake_forward, _fake_backward),
        ("_qkvpacked", _fake_forward_packed, _fake_backward_packed),
    ):
        forward, backward = f"vitfast::attention{suffix}", f"vitfast::attention{suffix}_backward"
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
        torch.library.register_kernel(backward, "cuda", _triton_backward)


if _extension.available():
    _register()
    # It returns nothing: results are written.
    torch.library.register_fake("vitfast::attention_tangents", lambda *arguments: None)
