"""Tangents of single operations, K at a time: the rules of `vitfast.hessian.dual`.

They are there for speed: what has no rule is left to `vmap` of `jvp`. That cannot be done with operations whose
backward uses statistics of the forward that have no tangents. Layer normalisation and attention are such: their rules
differentiate through the tensors that determine the statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitfast.hessian.deferred import Deferred, value_of
from vitfast.hessian.dual import (
    COMPOSITES,
    CONSTANTS,
    DEFERRED,
    PRIMALS,
    REPEATED,
    RULES,
    STATISTICS,
    Rule,
    Unsupported,
    by_transforms,
)
from vitfast.hessian.recording import Pair, pair, parts
from vitfast.ops import _extension, attention, blur_pool, convolution, window_attention
from vitfast.ops._tangents import compute
from vitfast.ops.layers import (
    Products,
    batch_norm_backward_tangents,
    batch_norm_tangents,
    gelu_backward_tangents,
    gelu_tangents,
    layer_norm_backward_tangents,
    layer_norm_tangents,
    matrix_product,
    order_in_memory,
)

aten = torch.ops.aten


def _rule(*operations, serves: Callable[..., bool] | None = None, maps: bool = False) -> Callable:
    """Registers the decorated function as the `Rule` of operations."""

    def register(function: Callable) -> Callable:
        RULES.update(dict.fromkeys(operations, Rule(function, serves, maps)))
        return function

    return register


def _defers(operation) -> Callable:
    """Registers the decorated function as what defers primal results of an operation."""

    def register(function: Callable) -> Callable:
        DEFERRED[operation] = function
        return function

    return register


# ---- views, and other operations that move values --------------------------------------------------------------------


def _behind(dim: int) -> int:
    """A dimension of a primal as one of its tangents, which have K in front."""
    return dim + 1 if dim >= 0 else dim


def _reshaped_primal(x, shape, *strides):
    return x.reshape(shape)  # a view in PyTorch, but its layout may be another one here


for _view_operation in (aten.view.default, aten._unsafe_view.default, aten._reshape_alias.default):
    PRIMALS[_view_operation] = _reshaped_primal


@_rule(aten.view.default, aten._unsafe_view.default, aten._reshape_alias.default)
def _view(operation, result, x, shape, *strides):
    return Pair(result, x.tangents.reshape(len(x.tangents), *result.shape))


@_defers(aten.view.default)
def _view_later(x, shape):
    if not isinstance(x, Deferred) or not x.is_contiguous or -1 in shape:
        return _reshaped_primal(value_of(x), shape)
    return Deferred(_reshaped_primal, (x, shape), shape)


@_rule(aten.expand.default)
def _expand(operation, result, x, shape, *, implicit=False):
    return Pair(result, _aligned(x.tangents, result.dim()).expand(-1, *result.shape))


@_rule(aten.permute.default)
def _permute(operation, result, x, dims):
    return Pair(result, x.tangents.permute(0, *(dim % x.dim() + 1 for dim in dims)))


@_rule(aten.t.default)
def _transpose_matrix(operation, result, x):
    return Pair(result, x.tangents if x.dim() < 2 else x.tangents.transpose(1, 2))


@_defers(aten.t.default)
def _transpose_matrix_later(x):
    if not isinstance(x, Deferred) or x.dim() < 2:
        return value_of(x).t()
    return Deferred(Tensor.t, (x,), reversed(x.shape), tuple(reversed(x.stride())))


def _has_dimensions(x, *args, **options):
    """Whether a dimension of a primal is one of its tangents; a number has none, and PyTorch takes 0 and -1 for it."""
    return x.dim() > 0


@_rule(aten.transpose.int, serves=_has_dimensions)
def _transpose(operation, result, x, first, second):
    return Pair(result, x.tangents.transpose(_behind(first), _behind(second)))


@_rule(aten.unsqueeze.default, aten.select.int, aten.slice.Tensor, aten.squeeze.dim, serves=_has_dimensions)
def _along_dimension(operation, result, x, dim=0, *rest):
    return Pair(result, operation(x.tangents, _behind(dim), *rest))


@_rule(aten.unbind.int)
def _unbind(operation, results, x, dim=0):
    return [Pair(*pair) for pair in zip(results, x.tangents.unbind(_behind(dim)), strict=True)]


@_rule(aten.split.Tensor, aten.split_with_sizes.default)
def _split(operation, results, x, sizes, dim=0):
    return [Pair(*pair) for pair in zip(results, operation(x.tangents, sizes, _behind(dim)), strict=True)]


@_rule(aten.detach.default, aten.alias.default)
def _alias(operation, result, x):
    return Pair(result, x.tangents)


@_rule(aten.clone.default)
def _clone(operation, result, x, *, memory_format=None):
    return Pair(result, x.tangents)  # which nobody changes in place


PRIMALS[aten.zero.default] = torch.zeros_like


@_rule(aten.zero.default)
def _zero(operation, result, x):
    return Pair(result, torch.zeros_like(x.tangents))


@_rule(aten._to_copy.default)
def _to_copy(operation, result, x, **options):
    return pair(result, x.tangents.to(result.device, result.dtype) if result.is_floating_point() else None)


@_rule(aten.flip.default, serves=_has_dimensions)
def _flip(operation, result, x, dims):
    return Pair(result, x.tangents.flip([_behind(dim) for dim in dims]))


@_rule(aten.unfold.default, serves=_has_dimensions)
def _unfold(operation, result, x, dim, size, step):
    return Pair(result, x.tangents.unfold(_behind(dim), size, step))


@_rule(aten.unfold_backward.default, serves=lambda grad, shape, *rest: len(shape) > 0)
def _unfold_backward(operation, result, grad, shape, dim, size, step):
    return Pair(result, operation(grad.tangents, [len(grad.tangents), *shape], _behind(dim), size, step))


@_rule(aten.select_backward.default, aten.slice_backward.default)
def _embed(operation, result, x, shape, dim, *rest):
    return Pair(result, operation(x.tangents, [len(x.tangents), *shape], _behind(dim), *rest))


def _stack(tensors, dim: int, order: list[int]):
    """As `torch.stack`, with the dimensions of the tensors in this order in memory."""
    dims = len(order)
    dim %= dims + 1
    place = order.index(dim) if dim < dims else dims
    in_memory = [d + (d >= dim) for d in order]
    in_memory.insert(place, dim)
    back = sorted(range(dims + 1), key=in_memory.__getitem__)
    return torch.stack([t.permute(order) for t in tensors], place).permute(back)


def _stacking_order(tensors) -> list[int]:
    """That of the first tensor: gradients of parts of a map's channels are joined so without being transposed on the
    way to a convolution."""
    first = parts(tensors[0])[0]
    return list(range(first.dim())) if 0 in first.stride() else order_in_memory(first)


PRIMALS[aten.stack.default] = lambda tensors, dim=0: _stack(tensors, dim, _stacking_order(tensors))


@_rule(aten.cat.default, aten.stack.default, serves=lambda tensors, *dim: len({t.dim() for t in tensors}) == 1)
def _join(operation, result, tensors, dim=0):
    count = next(len(t.tangents) for t in tensors if isinstance(t, Pair))
    tangents = [
        t.tangents if isinstance(t, Pair) else t.new_zeros(1, *t.shape).expand(count, *t.shape) for t in tensors
    ]
    if operation is aten.cat.default:
        return Pair(result, operation(tangents, _behind(dim)))
    return Pair(result, _stack(tangents, _behind(dim), [0, *map(_behind, _stacking_order(tensors))]))


def _has_one_place(indices) -> bool:
    """Whether what is indexed stays where it is: dimensions that come apart go to the front, before K."""
    given = [dim for dim, index in enumerate(indices) if index is not None]
    return not given or given[-1] - given[0] == len(given) - 1


def _indexed_dims(x, indices) -> int:
    """The number of dimensions of x[indices]."""
    taken = made = 0
    for index in indices:
        if index is not None:
            is_mask = index.dtype in (torch.bool, torch.uint8)
            taken += index.dim() if is_mask else 1
            made = max(made, 1 if is_mask else index.dim())
    return x.dim() - taken + made


@_rule(aten.index.Tensor, serves=lambda x, indices: _has_one_place(indices))
def _index(operation, result, x, indices):
    return Pair(result, operation(x.tangents, [None, *indices]))


@_rule(aten.index_put.default, serves=lambda x, indices, *rest: _has_one_place(indices))
def _index_put(operation, result, x, indices, values, accumulate=False):
    (x, x_t), (values, values_t) = parts(x), parts(values)
    count = len(values_t if x_t is None else x_t)
    x_t = x.new_zeros(count, *x.shape) if x_t is None else x_t
    if values_t is None:
        values_t = values.new_zeros(count, *values.shape)
    values_t = _aligned(values_t, _indexed_dims(x, indices))
    return Pair(result, operation(x_t, [None, *indices], values_t, accumulate))


@_rule(aten.copy.default)
def _copy(operation, result, x, source, non_blocking=False):
    source_t = parts(source)[1]
    if source_t is None:
        return Pair(result, x.tangents.new_zeros(1, *result.shape).expand(len(x.tangents), *result.shape))
    return Pair(result, _whole(_aligned(source_t, result.dim()), result).to(result.dtype))


STATISTICS.update(
    {
        aten.nll_loss2d_forward.default,  # the sum of the classes' weights
        aten.native_batch_norm.default,  # whose backward in forward mode finds the tangents by itself
        aten.native_batch_norm_backward.default,  # gradients of a weight and a bias that there may not be
    }
)

REPEATED.add(aten.gelu.default)

CONSTANTS.update(
    {
        *(aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default),
        *(aten.new_empty.default, aten.new_zeros.default, aten.new_ones.default, aten.new_full.default),
        *(aten.rand_like.default, aten.randn_like.default, aten.new_empty_strided.default),
    }
)


# ---- elementwise -----------------------------------------------------------------------------------------------------


def _aligned(tangents: Tensor | None, dims: int) -> Tensor | None:
    """Tangents of a tensor that is broadcast to ``dims`` dimensions, which then come between K and its own."""
    if tangents is None or tangents.dim() == dims + 1:
        return tangents
    return tangents.reshape(len(tangents), *(1,) * (dims + 1 - tangents.dim()), *tangents.shape[1:])


def _operands(a: Any, b: Any, result: Tensor):
    """Primals and aligned tangents of two operands."""
    (a, a_t), (b, b_t) = parts(a), parts(b)
    return a, b, _aligned(a_t, result.dim()), _aligned(b_t, result.dim())


def _whole(tangents: Tensor, result: Tensor) -> Tensor:
    """Tangents in the shape of the result."""
    return tangents.expand(len(tangents), *result.shape)


@_rule(aten.add.Tensor, aten.sub.Tensor)
def _add(operation, result, a, b, *, alpha=1):
    _, _, a_t, b_t = _operands(a, b, result)
    if b_t is None:
        return Pair(result, _whole(a_t, result))
    if a_t is not None:
        return Pair(result, operation(a_t, b_t, alpha=alpha))
    factor = alpha if operation is aten.add.Tensor else -alpha
    return Pair(result, _whole(b_t if factor == 1 else factor * b_t, result))


@_rule(aten.mul.Tensor, aten.mul.Scalar)
def _multiply(operation, result, a, b):
    a, b, a_t, b_t = _operands(a, b, result)
    if a_t is None or b_t is None:
        return Pair(result, _whole(a * b_t if a_t is None else a_t * b, result))
    return Pair(result, torch.addcmul(a_t * b, b_t, a))


@_rule(aten.div.Tensor, aten.div.Scalar)
def _divide(operation, result, a, b):
    a, b, a_t, b_t = _operands(a, b, result)
    total = None if a_t is None else a_t / b
    if b_t is not None:
        change = b_t * (-result / b)
        total = change if total is None else total + change
    return Pair(result, _whole(total, result))


@_rule(aten.neg.default)
def _negate(operation, result, x):
    return Pair(result, -x.tangents)


@_rule(aten.relu.default)
def _relu(operation, result, x):
    return Pair(result, aten.threshold_backward(x.tangents, result.expand_as(x.tangents), 0))


@_rule(aten.threshold_backward.default)
def _threshold_backward(operation, result, grad, x, threshold):
    grad_t, x = parts(grad)[1], parts(x)[0]
    return pair(result, None if grad_t is None else operation(grad_t, x.expand_as(grad_t), threshold))


def _is_exact(*args, approximate="none"):
    return approximate == "none"


@_rule(aten.gelu.default, serves=_is_exact, maps=True)
def _gelu(operation, result, x, *, approximate="none"):
    return Pair(result, gelu_tangents(x.primal, x.tangents))


@_rule(aten.gelu_backward.default, serves=_is_exact, maps=True)
def _gelu_backward(operation, result, grad, x, *, approximate="none"):
    (grad, grad_t), (x, x_t) = parts(grad), parts(x)
    return Pair(result, gelu_backward_tangents(grad, x, grad_t, x_t))


# ---- sums ------------------------------------------------------------------------------------------------------------


@_rule(aten.sum.default, aten.mean.default)
def _reduce_all(operation, result, x, *, dtype=None):
    return Pair(result, operation.overloadpacket(x.tangents.flatten(1), [1], dtype=dtype))


@_rule(aten.sum.dim_IntList, aten.mean.dim, serves=_has_dimensions)
def _reduce(operation, result, x, dims, keepdim=False, *, dtype=None):
    behind = [_behind(dim) for dim in dims] if dims else list(range(1, x.dim() + 1))
    return Pair(result, operation(x.tangents, behind, keepdim, dtype=dtype))


@_defers(aten.sum.dim_IntList)
def _sum_later(x, dims, keepdim=False, *, dtype=None):
    if not isinstance(x, Tensor) or not dims or dtype not in (None, x.dtype):
        return aten.sum.dim_IntList(value_of(x), dims, keepdim, dtype=dtype)
    dims = [dim % x.dim() for dim in dims]
    kept = [1 if dim in dims else size for dim, size in enumerate(x.shape) if keepdim or dim not in dims]
    return Deferred(lambda x: x.sum(dims, keepdim).contiguous(), (x,), kept)


# ---- softmax cross-entropy ------------------------------------------------------------------------------------------


@_rule(aten._log_softmax.default, serves=_has_dimensions)
def _log_softmax(operation, result, x, dim, half_to_float):
    mean = (result.exp() * x.tangents).sum(_behind(dim), keepdim=True)
    return Pair(result, x.tangents - mean)


@_rule(
    aten._log_softmax_backward_data.default,
    serves=lambda grad, output, dim, dtype: isinstance(output, Pair) and output.dim() > 0,
)
def _log_softmax_backward(operation, result, grad, output, dim, dtype):
    (grad, grad_t), (output, output_t) = parts(grad), parts(output)
    probability = output.exp()
    total = -probability * grad.sum(dim, keepdim=True) * output_t
    if grad_t is not None:
        total += grad_t - probability * grad_t.sum(_behind(dim), keepdim=True)
    return Pair(result, total.to(result.dtype))


# Both are linear in what has tangents; what they add up depends on the targets alone.


@_rule(aten.nll_loss_forward.default, serves=lambda x, *rest: isinstance(x, Pair))
def _nll_loss(operation, results, x, *target):
    return Pair(results[0], torch.stack([operation(x_t, *target)[0] for x_t in x.tangents])), results[1]


@_rule(aten.nll_loss_backward.default)
def _nll_loss_backward(operation, result, grad, x, *target):
    (_, grad_t), x = parts(grad), parts(x)[0]
    return pair(result, None if grad_t is None else torch.stack([operation(each, x, *target) for each in grad_t]))


# ---- matrix products -------------------------------------------------------------------------------------------------


def _product_tangents(a: Any, b: Any, start: Tensor | None = None) -> Tensor:
    """Of a b + start."""
    (a, a_t), (b, b_t) = parts(a), parts(b)
    count = next(len(t) for t in (a_t, b_t, start) if t is not None)
    total = Products(count, a.shape[0], b.shape[1])
    total.begin(start)
    total.add(a_t, b)
    total.add(a, b_t)
    return total.total()


def _addmm_primal(bias, a, b, *, beta=1, alpha=1):
    if bias.dim() != 1:
        return aten.addmm.default(bias, a, b)
    return matrix_product(a, b, bias)


PRIMALS[aten.mm.default] = matrix_product
PRIMALS[aten.addmm.default] = _addmm_primal


@_defers(aten.mm.default)
def _mm_later(a, b):
    return Deferred(matrix_product, (a, b), (a.shape[0], b.shape[1]))


@_rule(aten.mm.default)
def _mm(operation, result, a, b):
    return Pair(result, _product_tangents(a, b))


@_rule(aten.addmm.default, serves=lambda *args, beta=1, alpha=1: beta == alpha == 1)
def _addmm(operation, result, bias, a, b, *, beta=1, alpha=1):
    return Pair(result, _product_tangents(a, b, _aligned(parts(bias)[1], 2)))


@_rule(aten.bmm.default)
def _bmm(operation, result, a, b):
    (a, a_t), (b, b_t) = parts(a), parts(b)
    count = len(b_t if a_t is None else a_t)
    tangents = result.new_empty(count, *result.shape)
    for k, out in enumerate(tangents):
        if a_t is not None:
            torch.bmm(a_t[k], b, out=out)
        if b_t is not None:
            out.baddbmm_(a, b_t[k], beta=0 if a_t is None else 1)
    return Pair(result, tangents)


# ---- pooling ---------------------------------------------------------------------------------------------------------


@_rule(aten.max_pool2d_with_indices.default)
def _max_pool(operation, results, x, *options):
    indices = results[1]
    places = indices.flatten(-2).expand(len(x.tangents), *indices.shape[:-2], -1)
    return Pair(results[0], x.tangents.flatten(-2).gather(-1, places).unflatten(-1, indices.shape[-2:])), indices


@_rule(aten.max_pool2d_with_indices_backward.default)
def _max_pool_backward(operation, result, grad, x, *options):
    (_, grad_t), x = parts(grad), parts(x)[0]
    if grad_t is None:
        return result
    *options, indices = options
    count = len(grad_t)
    places = indices.expand(count, *indices.shape).flatten(0, 1)
    folded = operation(grad_t.flatten(0, 1), _unwritten(count * len(x), x), *options, places)
    return Pair(result, folded.unflatten(0, (count, -1)))


if _extension.available():

    @_rule(torch.ops.vitfast.blur_pool2d.default, serves=lambda x, taps, *_: not isinstance(taps, Pair), maps=True)
    def _blur(operation, result, x, taps, *options):
        affine, spec = blur_pool.prologue_of(*options)
        u_t = parts(x)[1]
        if blur_pool.has_prologue(affine, spec):
            u_t = by_transforms(_prologue(spec), x, *affine).tangents
        return Pair(result, blur_pool.output_tangents(u_t, taps, spec).to(result.dtype))

    @_rule(
        torch.ops.vitfast.blur_pool2d_backward.default,
        serves=lambda grad, x, taps, *_: not isinstance(taps, Pair),
        maps=True,
    )
    def _blur_backward(operation, results, grad, x, taps, size, *options):
        *options, sums = options
        affine, spec = blur_pool.prologue_of(*options)
        grad, grad_t = parts(grad)
        if x is None:
            return Pair(results[0], blur_pool.input_gradient_tangents(grad_t, taps, size, spec)), *results[1:]
        if grad_t is None:
            count = next(len(each.tangents) for each in (x, *affine) if isinstance(each, Pair))
            grad_t = grad.new_zeros(1, *grad.shape).expand(count, *grad.shape)
        wide = torch.promote_types(grad.dtype, torch.float32)
        grad_u, grad_u_t = (
            blur_pool.input_gradient_tangents(g.to(wide), taps, size, spec) for g in (grad[None], grad_t)
        )
        gradients = by_transforms(_prologue_backward(spec, sums), Pair(grad_u[0], grad_u_t), x, *affine)
        return tuple(Pair(result, gradient.tangents) for result, gradient in zip(results, gradients, strict=True))


def _prologue(spec: blur_pool.Spec) -> Callable:
    """What comes before a blur."""
    return lambda x, *affine: blur_pool.prologue_output(x, blur_pool.Affine(*affine), spec)


def _prologue_backward(spec: blur_pool.Spec, sums: bool) -> Callable:
    """What comes after its transpose."""
    return lambda grad, x, *affine: blur_pool.prologue_gradients(grad, x, blur_pool.Affine(*affine), spec, sums)


# ---- convolutions ----------------------------------------------------------------------------------------------------


# A convolution is linear in its maps, and so are its gradients: the kernels compute primal results as tangents.


def _convolution_primal(x, weight, bias, *options):
    x = _in_best_layout(x, weight)
    if not _has_kernels(x, weight, *options):
        return aten.convolution.default(x, weight, bias, *options)
    result = convolution.output_tangents(x, weight, x[None], None, options[1][0])[0]
    return result if bias is None else result.add_(bias.reshape(-1, *(1,) * (x.dim() - 2)))


def _convolution_backward_primal(grad, x, weight, bias_sizes, *options):
    return tuple(map(value_of, _convolution_backward_later(grad, x, weight, bias_sizes, *options)))


@_defers(aten.convolution_backward.default)
def _convolution_backward_later(grad, x, weight, bias_sizes, *options):
    """The gradient of x now, those of weight and bias later."""
    *options, wanted = options
    grad, x, weight = map(value_of, (grad, x, weight))
    grad, x = (_in_best_layout(maps, weight) for maps in (grad, x))
    has_kernels, padding = _has_kernels(x, weight, *options), options[1][0]

    def by_pytorch(which: int, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        only = [each == which for each in range(3)]
        return aten.convolution_backward.default(grad, x, weight, bias_sizes, *options, only)[which]

    def of_input(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        if has_kernels:
            return convolution.input_gradient_tangents(grad, weight, grad[None], None, padding)[0]
        return by_pytorch(0, grad, x, weight)

    def of_weight(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        if has_kernels:
            return convolution.weight_gradient_tangents(grad, x, weight, grad[None], None, padding)[0]
        # Flattened: dimensions of one element may have any strides.
        return by_pytorch(1, grad, x, weight).flatten().view(weight.shape)

    def of_bias(grad: Tensor) -> Tensor:
        return grad.flatten(2).sum((0, 2))

    return (
        of_input(grad, x, weight) if wanted[0] else None,
        Deferred(of_weight, (grad, x, weight), weight.shape) if wanted[1] else None,
        Deferred(of_bias, (grad,), bias_sizes) if wanted[2] else None,
    )


PRIMALS[aten.convolution.default] = _convolution_primal
PRIMALS[aten.convolution_backward.default] = _convolution_backward_primal


@_rule(aten.convolution.default)
def _convolution(operation, result, x, weight, bias, *options):
    (x, x_t), (weight, weight_t), (bias, bias_t) = parts(x), parts(weight), parts(bias)
    count = next(len(t) for t in (x_t, weight_t, bias_t) if t is not None)
    x, x_t = (_in_best_layout(maps, weight) for maps in (x, x_t))
    total = None
    if (x_t is not None or weight_t is not None) and _has_kernels(x, weight, *options):
        total = convolution.output_tangents(x, weight, x_t, weight_t, options[1][0])
    else:
        if x_t is not None:
            total = operation(x_t.flatten(0, 1), weight, None, *options).unflatten(0, (count, -1))
        if weight_t is not None:
            total = _added(total, (operation(x, weight_t[k], None, *options) for k in range(count)), count)
    if bias_t is not None:
        channels = bias_t.reshape(count, 1, -1, *(1,) * (result.dim() - 2))
        total = _whole(channels, result) if total is None else total.add_(channels)
    return Pair(result, total)


@_rule(aten.convolution_backward.default)
def _convolution_backward(operation, results, grad, x, weight, bias_sizes, *options):
    *options, wanted = options
    (grad, grad_t), (x, x_t), (weight, weight_t) = parts(grad), parts(x), parts(weight)
    count = next(len(t) for t in (grad_t, x_t, weight_t) if t is not None)
    grad, grad_t, x, x_t = (_in_best_layout(maps, weight) for maps in (grad, grad_t, x, x_t))
    has_kernels, padding = _has_kernels(x, weight, *options), options[1][0]

    def gradient(which, grad, x, weight):
        only = [which == 0, which == 1, False]
        return operation(grad, x, weight, bias_sizes, *options, only)[which]

    x_grad_t = weight_grad_t = bias_grad_t = None
    if wanted[0] and has_kernels and (grad_t is not None or weight_t is not None):
        x_grad_t = convolution.input_gradient_tangents(grad, weight, grad_t, weight_t, padding)
    elif wanted[0]:
        if grad_t is not None:
            folded = _unwritten(count * len(x), x)  # of which only shape and layout are read
            x_grad_t = gradient(0, grad_t.flatten(0, 1), folded, weight).unflatten(0, (count, -1))
        if weight_t is not None:
            x_grad_t = _added(x_grad_t, (gradient(0, grad, x, weight_t[k]) for k in range(count)), count)
    if wanted[1] and has_kernels and (grad_t is not None or x_t is not None):
        weight_grad_t = convolution.weight_gradient_tangents(grad, x, weight, grad_t, x_t, padding)
    elif wanted[1]:
        if grad_t is not None:
            weight_grad_t = _added(None, (gradient(1, grad_t[k], x, weight) for k in range(count)), count)
        if x_t is not None:
            each = (gradient(1, grad, x_t[k], weight) for k in range(count))
            weight_grad_t = _added(weight_grad_t, each, count)
    if wanted[2] and grad_t is not None:
        bias_grad_t = grad_t.flatten(3).sum((1, 3)) if grad_t.dim() > 3 else grad_t.sum(1)
    tangents = (x_grad_t, weight_grad_t, bias_grad_t)
    return tuple(None if r is None else pair(r, t) for r, t in zip(results, tangents, strict=True))


def _unwritten(batch: int, x: Tensor) -> Tensor:
    """So many images like those of x, in their layout."""
    layout = torch.channels_last if x.dim() == 4 and x.stride(1) == 1 else torch.contiguous_format
    return torch.empty((batch, *x.shape[1:]), dtype=x.dtype, device=x.device, memory_format=layout)


def _has_kernels(x, weight, stride, padding, dilation, transposed, output_padding, groups) -> bool:
    return convolution.serves(x, weight, stride, padding, dilation, transposed, groups)


def _in_best_layout(maps: Tensor | None, weight: Tensor) -> Tensor | None:
    """Images, or their tangents, with channels last where convolutions are faster so. What follows takes it over."""
    if maps is None or weight.dim() != 4 or not convolution.has_best_layout(weight):
        return maps
    return convolution.channels_last(maps)


def _added(total: Tensor | None, each: Iterable[Tensor], count: int) -> Tensor:
    """``total``, (K, ...), plus K tensors that are made one by one."""
    is_new = total is None
    for k, tensor in enumerate(each):
        if total is None:
            total = tensor.new_empty_strided((count, *tensor.shape), (tensor.numel(), *tensor.stride()))
        total[k].copy_(tensor) if is_new else total[k].add_(tensor)
    return total


# ---- normalisations --------------------------------------------------------------------------------------------------


@_rule(aten.native_layer_norm.default, maps=True)
def _layer_norm(operation, results, x, shape, weight, bias, eps):
    (x, x_t), (weight, weight_t), (_, bias_t) = parts(x), parts(weight), parts(bias)
    output, mean, inverse = results
    size = torch.Size(shape).numel()
    tangents = layer_norm_tangents(
        *(x.reshape(-1, size), mean.reshape(-1, 1), inverse.reshape(-1, 1), _reshaped(weight, size)),
        *(_reshaped(x_t, -1, x.numel() // size, size), _reshaped(weight_t, -1, size), _reshaped(bias_t, -1, size)),
    )
    return Pair(output, tangents.view(-1, *x.shape)), mean, inverse


@_rule(aten.native_layer_norm_backward.default, maps=True)
def _layer_norm_backward(operation, results, grad, x, shape, mean, inverse, weight, bias, wanted):
    (grad, grad_t), (x, x_t), (weight, weight_t) = parts(grad), parts(x), parts(weight)
    if grad_t is None and x_t is None and weight_t is None:  # the bias alone has tangents, and does not matter here
        return results
    size = torch.Size(shape).numel()
    rows = x.numel() // size
    tangents = layer_norm_backward_tangents(
        *(grad.reshape(rows, size), x.reshape(rows, size), mean.reshape(-1, 1), inverse.reshape(-1, 1)),
        _reshaped(weight, size),
        *(_reshaped(grad_t, -1, rows, size), _reshaped(x_t, -1, rows, size), _reshaped(weight_t, -1, size)),
    )
    return tuple(
        Pair(result, result_t.reshape(-1, *result.shape)) if is_wanted else None
        for result, result_t, is_wanted in zip(results, tangents, wanted, strict=True)
    )


def _reshaped(x: Tensor | None, *shape: int) -> Tensor | None:
    return None if x is None else x.reshape(shape)


def _has_constant_statistics(mean, variance, training: bool) -> bool:
    return not training and not isinstance(mean, Pair) and not isinstance(variance, Pair)


@_rule(
    aten.native_batch_norm.default,
    serves=lambda x, weight, bias, *statistics_and_rest: _has_constant_statistics(*statistics_and_rest[:3]),
    maps=True,
)
def _batch_norm(operation, results, x, weight, bias, mean, variance, training, momentum, eps):
    (x, x_t), (weight, weight_t), bias_t = parts(x), parts(weight), parts(bias)[1]
    inverse = (variance + eps).rsqrt()
    return Pair(results[0], batch_norm_tangents(x, mean, inverse, weight, x_t, weight_t, bias_t)), *results[1:]


@_rule(
    aten.native_batch_norm_backward.default,
    serves=lambda grad, x, weight, mean, variance, _mean, _inverse, training, *rest: _has_constant_statistics(
        mean, variance, training
    ),
    maps=True,
)
def _batch_norm_backward(operation, results, grad, x, weight, mean, variance, _mean, _inverse, training, eps, wanted):
    (grad, grad_t), (x, x_t), (weight, weight_t) = parts(grad), parts(x), parts(weight)
    if grad_t is None and x_t is None and weight_t is None:  # as in layer normalisation
        return results
    inverse = (variance + eps).rsqrt()
    tangents = batch_norm_backward_tangents(grad, x, mean, inverse, weight, grad_t, x_t, weight_t)
    return tuple(
        Pair(result, result_t) if is_wanted else None
        for result, result_t, is_wanted in zip(results, tangents, wanted, strict=True)
    )


# ---- attention -------------------------------------------------------------------------------------------------------


def _compute(rule, spec, primals, tangents) -> tuple[Tensor, ...]:
    """The tangents of an attention, whose bias comes last to its operators and first to its rules."""
    return compute(rule, spec, *((x[-1], *x[:-1]) for x in (primals, tangents)))


def _attention_rules(module, name: str, spec_of: Callable) -> None:
    """Of the operators of vitfast: of separate and packed inputs, in both directions. ``spec_of`` makes a
    specification of the options of a call."""
    for suffix, inputs in (("", 3), ("_qkvpacked", 1)):

        @_rule(getattr(torch.ops.vitfast, f"{name}{suffix}").default, maps=True)
        def forward(operation, results, *arguments, inputs=inputs):
            primals, tangents = zip(*map(parts, arguments[: inputs + 1]), strict=True)
            spec = spec_of(*arguments[inputs + 1 : -1], _backend(primals[0]))
            return Pair(results[0], *_compute(module.OUTPUT, spec, primals, tangents)), results[1]

        @_rule(getattr(torch.ops.vitfast, f"{name}{suffix}_backward").default, maps=True)
        def backward(operation, results, *arguments, inputs=inputs):
            primals, tangents = zip(*map(parts, arguments[: inputs + 2]), strict=True)
            options = (x for x in arguments[inputs + 2 :] if not isinstance(x, (Tensor, Pair)))
            spec = spec_of(*options, _backend(primals[0]))
            gradients = _compute(module.GRADIENTS, spec, primals, tangents)
            # Without a bias the operator returns an empty gradient of it.
            return *map(Pair, results, gradients), *results[len(gradients) :]


if _extension.available():
    _attention_rules(attention, "attention", attention.Spec)
    _attention_rules(
        window_attention,
        "window_attention",
        lambda size, shift, *rest: window_attention.Spec(tuple(size), tuple(shift), *rest),
    )


def _backend(x: Tensor) -> str:
    return "cpu" if x.device.type == "cpu" else "triton"


def _has_kernel(query: Any, key: Any, dropout_p: float, attn_mask: Any) -> bool:
    """Whether PyTorch's fused attention is one of vitfast's: no dropout, as many heads for keys as for queries, and a
    mask that is a constant and leaves every query a key: PyTorch returns 0 where it leaves none, vitfast NaN."""
    if not _extension.available() or dropout_p > 0 or isinstance(attn_mask, Pair) or query.shape[1] != key.shape[1]:
        return False
    return attn_mask is None or not (attn_mask == -torch.inf).all(-1).any()


def _fused_attention(query: Any, key: Any, is_causal: bool, attn_mask: Tensor | None, scale: float | None):
    """The specification, and the mask as a bias."""
    query, key = parts(query)[0], parts(key)[0]
    spec = attention.Spec(query.shape[-1] ** -0.5 if scale is None else scale, _backend(query))
    wide = torch.promote_types(query.dtype, torch.float32)
    bias = None if attn_mask is None else attn_mask.to(wide)
    if is_causal:
        hidden = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).triu(1)
        bias = torch.zeros(hidden.shape, dtype=wide, device=query.device).masked_fill(hidden, -torch.inf)
    if bias is None:
        return spec, None
    return spec, bias.expand(*(1,) * (4 - bias.dim()), *bias.shape[:-1], key.shape[2])


def _serves_forward(query, key, value, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
    return _has_kernel(query, key, dropout_p, attn_mask)


@_rule(aten._scaled_dot_product_flash_attention_for_cpu.default, serves=_serves_forward, maps=True)
def _scaled_dot_product(
    operation, results, query, key, value, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None
):
    spec, bias = _fused_attention(query, key, is_causal, attn_mask, scale)
    primals, tangents = zip(*map(parts, (query, key, value, bias)), strict=True)
    return Pair(results[0], *_compute(attention.OUTPUT, spec, primals, tangents)), results[1]


def _serves_backward(grad, query, key, value, out, lse, dropout_p, is_causal, *, attn_mask=None, scale=None):
    return _has_kernel(query, key, dropout_p, attn_mask)


@_rule(aten._scaled_dot_product_flash_attention_for_cpu_backward.default, serves=_serves_backward, maps=True)
def _scaled_dot_product_backward(operation, results, grad, query, key, value, *rest, attn_mask=None, scale=None):
    spec, bias = _fused_attention(query, key, rest[-1], attn_mask, scale)
    primals, tangents = zip(*map(parts, (grad, query, key, value, bias)), strict=True)
    return tuple(map(Pair, results, _compute(attention.GRADIENTS, spec, primals, tangents)))


# ---- what PyTorch cannot differentiate in forward mode ---------------------------------------------------------------


def _composite(operation) -> Callable:
    """Registers the decorated function in the place of an operation."""

    def register(function: Callable) -> Callable:
        COMPOSITES[operation] = function
        return function

    return register


@_composite(aten.as_strided.default)
def _as_strided(x, size, stride, storage_offset=None):
    raise Unsupported("as_strided looks at memory, whose layout may be another one here")


_MEAN = 1  # of the reductions of losses


@_composite(aten.cudnn_batch_norm.default)
def _cudnn_batch_norm(x, weight, bias, mean, variance, training, momentum, eps):
    results = aten.native_batch_norm.default(x, weight, bias, mean, variance, training, momentum, eps)
    return *results, x.new_empty(0, dtype=torch.uint8)  # what cuDNN reserves for its own backward


@_composite(aten.cudnn_batch_norm_backward.default)
def _cudnn_batch_norm_backward(x, grad, weight, mean, variance, save_mean, save_inverse, eps, reserve):
    training, wanted = True, [True, True, True]
    statistics = mean, variance, save_mean, save_inverse
    return aten.native_batch_norm_backward.default(grad, x, weight, *statistics, training, eps, wanted)


@_composite(aten.silu_backward.default)
def _silu_backward(grad, x):
    gate = x.sigmoid()
    return grad * gate * (1 + x * (1 - gate))


@_composite(aten.mish_backward.default)
def _mish_backward(grad, x):
    squashed = F.softplus(x).tanh()
    return grad * (squashed + x * x.sigmoid() * (1 - squashed * squashed))


@_composite(aten.hardsigmoid_backward.default)
def _hardsigmoid_backward(grad, x):
    return grad * ((x > -3) & (x < 3)) / 6


@_composite(aten.mse_loss_backward.default)
def _mse_loss_backward(grad, x, target, reduction):
    return grad * (x - target) * (2 / x.numel() if reduction == _MEAN else 2)


@_composite(aten.huber_loss_backward.default)
def _huber_loss_backward(grad, x, target, reduction, delta):
    clipped = (x - target).clamp(-delta, delta)
    return grad * clipped * (1 / x.numel() if reduction == _MEAN else 1)


@_composite(aten.native_dropout_backward.default)
def _dropout_backward(grad, mask, scale):
    return grad * mask * scale


@_composite(aten.native_group_norm_backward.default)
def _group_norm_backward(grad, x, mean, inverse, weight, batch, channels, size, groups, wanted):
    # The statistics are functions of x, and have tangents.
    normal = (x.reshape(batch, groups, -1) - mean[..., None]) * inverse[..., None]
    h = grad if weight is None else grad * weight.reshape(-1, *(1,) * (x.dim() - 2))
    h = h.reshape(batch, groups, -1)
    x_grad = inverse[..., None] * (h - h.mean(-1, keepdim=True) - normal * (h * normal).mean(-1, keepdim=True))
    rows, normal = grad.reshape(batch, channels, size), normal.reshape(batch, channels, size)
    results = (x_grad.reshape(x.shape), (rows * normal).sum((0, 2)), rows.sum((0, 2)))
    return tuple(result if is_wanted else None for result, is_wanted in zip(results, wanted, strict=True))
