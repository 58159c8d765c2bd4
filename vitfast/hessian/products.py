r"""Products of the Hessian, the Gauss-Newton matrix and the empirical Fisher matrix with K vectors in one pass.

Forward mode over reverse mode: the tangent of the gradient along each vector. Hessians take it from tensors with K
tangents (`vitfast.hessian.dual`), or, where these do not serve, from `vmap(jvp(grad(f)))`, as the others do. What does
not depend on a vector is computed once for all K. The other order, a gradient of a
tangent, is never used: PyTorch's forward-mode formulas of layer and batch normalisation are not differentiable in
reverse, and it returns wrong numbers without a word.

Sources: Pearlmutter, "Fast Exact Multiplication by the Hessian", Neural Computation 1994; Schraudolph, "Fast Curvature
Matrix-Vector Products for Second-Order Gradient Descent", Neural Computation 2002.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_map

from vitfast.hessian import rules  # noqa: F401 - the rules of `dual` register themselves
from vitfast.hessian.dual import Unsupported, generator_state, gradient_tangents, set_generator_state
from vitfast.hessian.layout import Layout
from vitfast.hessian.memory import bytes_of_vector, fitting_chunk, keeping_freed_memory
from vitfast.hessian.recording import Recording
from vitfast.ops._rules import forward_ad_is_nested, is_transformed

__all__ = ["batched", "fisher_product", "gauss_newton_product", "hvp"]


def hvp(fn: Callable[[Any], Tensor], params: Any, vectors: Any, *, chunk: int | None = None) -> Any:
    r"""Hessian-vector products of K vectors at once.

    .. math:: H v_k, \qquad H = \nabla^2 f(\theta)

    Args:
        fn: params -> a scalar. A model enters as ``torch.func.functional_call``. Random numbers are drawn alike for all
            vectors of a chunk; buffers must not be changed in place.
        params: a tensor, or a dictionary, list or tuple of tensors, with n numbers in all.
        vectors: (n,) or (n, K); or a tree like ``params``, maybe with K in front of all leaves.
        chunk: how many vectors at a time. None: as many as the free memory allows, which costs one more gradient to
            find out if there is more than one vector.

    Returns:
        The products, in the form of ``vectors``.

    Raises:
        TypeError: ``params`` are not floating-point tensors.
        ValueError: ``fn`` does not return a scalar, or the vectors do not fit.

    >>> weight = torch.randn(3, 2)
    >>> hvp(lambda w: (w.sin() ** 2).sum(), weight, torch.eye(6)).shape
    torch.Size([6, 6])
    """
    layout, scalar = Layout.of(params), _scalar(fn)
    return _apply(hessian_products(scalar, params), layout, params, vectors, chunk, scalar)


def gauss_newton_product(
    outputs_fn: Callable[[Any], Tensor],
    loss_fn: Callable[[Tensor], Tensor],
    params: Any,
    vectors: Any,
    *,
    chunk: int | None = None,
) -> Any:
    r"""Products of the generalised Gauss-Newton matrix with K vectors at once.

    .. math:: J^\top H_\ell J v_k

    with J the Jacobian of the outputs and :math:`H_\ell` the Hessian of the loss with respect to them: positive
    semi-definite where the loss is convex in the outputs.

    Args:
        outputs_fn: params -> outputs of any shape.
        loss_fn: outputs -> a scalar.
        params, vectors, chunk: as in `hvp`.

    Returns:
        The products, in the form of ``vectors``.

    Raises:
        TypeError, ValueError: as `hvp`.
    """
    layout = Layout.of(params)
    outputs, pull = vjp(outputs_fn, params)
    loss_gradient = grad(_scalar(loss_fn))

    def product(v):
        outputs_t = jvp(outputs_fn, (params,), (v,))[1]
        return pull(jvp(loss_gradient, (outputs,), (outputs_t,))[1])[0]

    return _apply(mapped(product), layout, params, vectors, chunk, lambda p: loss_fn(outputs_fn(p)))


def fisher_product(losses_fn: Callable[[Any], Tensor], params: Any, vectors: Any, *, chunk: int | None = None) -> Any:
    r"""Products of the empirical Fisher matrix with K vectors at once.

    .. math:: \frac1N \sum_i g_i g_i^\top v_k

    with :math:`g_i` the gradient of the loss of sample i, none of which is formed.

    Args:
        losses_fn: params -> the losses of N samples, (N,).
        params, vectors, chunk: as in `hvp`.

    Returns:
        The products, in the form of ``vectors``.

    Raises:
        TypeError: as `hvp`.
        ValueError: ``losses_fn`` does not return (N,), or the vectors do not fit.
    """
    layout = Layout.of(params)
    losses, pull = vjp(losses_fn, params)
    if losses.dim() != 1:
        raise ValueError(
            f"losses_fn must return one loss for each sample, (N,); got {tuple(losses.shape)}. PyTorch's losses do "
            "with reduction='none'"
        )

    def product(v):
        return pull(jvp(losses_fn, (params,), (v,))[1] / len(losses))[0]

    return _apply(mapped(product), layout, params, vectors, chunk, lambda p: losses_fn(p).sum())


def _scalar(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def checked(*args):
        value = fn(*args)
        if not isinstance(value, Tensor) or value.dim() != 0:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"the function must return a scalar tensor; got {got}. Take a mean or a sum")
        return value

    return checked


def _apply(products, layout: Layout, params, vectors, chunk: int | None, scalar) -> Any:
    rows, form = layout.rows_of(vectors)
    if chunk is None:
        chunk = 1 if len(rows) == 1 else fitting_chunk(bytes_of_vector(scalar, params), len(rows), rows.device)
    with keeping_freed_memory():
        return layout.in_form(batched(products, layout, rows, chunk), form)


@dataclass
class Way:
    """How the products of a function are computed: by `gradient_tangents`, until an operation has no tangents."""

    by_transforms: bool = False


def hessian_products(
    fn: Callable[[Any], Tensor], params: Any, recording: Recording | None = None, way: Way | None = None
) -> Callable[[Any], Any]:
    """From a tree of vectors, with K in front of all leaves, to the tree of their products; see `gradient_tangents`."""
    way = way or Way()

    def products(vectors):
        if way.by_transforms or is_transformed() or forward_ad_is_nested():
            return by_transforms(vectors)
        device = tree_flatten(vectors)[0][0].device
        generator = generator_state(device)
        try:
            return gradient_tangents(fn, params, vectors, recording)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            way.by_transforms = isinstance(error, Unsupported)
            reason = f"{type(error).__name__}: {error}"
        set_generator_state(device, generator)
        results = by_transforms(vectors)  # which raises what is wrong with fn itself
        warnings.warn(f"Hessian-vector products by transforms of torch.func, which are slower: {reason}", stacklevel=4)
        return results

    gradient = grad(fn)
    by_transforms = mapped(lambda v: jvp(gradient, (params,), (v,))[1])
    return products


def mapped(product: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """From the product of one vector to that of K, which have K in front."""

    def products(vectors):
        if len(tree_flatten(vectors)[0][0]) == 1:
            return tree_map(lambda p: p[None], product(tree_map(lambda v: v[0], vectors)))
        return vmap(product, randomness="same")(vectors)

    return products


def batched(products: Callable[[Any], Any], layout: Layout, rows: Tensor, chunk: int) -> Tensor:
    """products(tree with K in front) of the rows (K, n), as rows; ``chunk`` rows at a time."""
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1; got {chunk}")
    if len(rows) == 0:
        return torch.zeros_like(rows)
    parts = rows.split(chunk)
    # PyTorch's fused attention for GPUs has no tangents.
    with sdpa_kernel(SDPBackend.MATH) if rows.is_cuda else nullcontext():
        done = [layout.flatten_rows(products(layout.unflatten_rows(part.contiguous()))) for part in parts]
    return torch.cat(done) if len(done) != 1 else done[0]
