"""Products of curvature matrices against these matrices in full."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hessian_cases import Perceptron, alternet, dense_hessian, loss_of, made, resnet, swin, vit
from torch.func import functional_call, jacrev
from torch.testing import assert_close

from vitfast.hessian import fisher_product, gauss_newton_product, hvp
from vitfast.hessian.layout import Layout

SMALL = [(Perceptron, None), (vit, 8), (swin, 16)]
LARGER = [(alternet, 16), (resnet, 16)]
small = pytest.mark.parametrize(("build", "side"), SMALL, ids=lambda value: getattr(value, "__name__", ""))
every = pytest.mark.parametrize(("build", "side"), SMALL + LARGER, ids=lambda value: getattr(value, "__name__", ""))


@small
def test_the_hessian_in_full(build, side):
    model, inputs, targets = made(build, side=side, batch=3)
    loss, params = loss_of(model, inputs, targets)
    expected = dense_hessian(model, inputs, targets)
    assert_close(hvp(loss, params, torch.eye(len(expected), dtype=torch.float64)), expected, rtol=1e-9, atol=1e-10)


@every
def test_batched_products_are_single_ones_symmetric_and_differences_of_gradients(build, side):
    model, inputs, targets = made(build, side=side, batch=3)
    loss, params = loss_of(model, inputs, targets)
    size = Layout.of(params).size
    vectors = torch.randn(size, 3, dtype=torch.float64)
    products = hvp(loss, params, vectors)
    for vector, product in zip(vectors.T, products.T, strict=True):
        assert_close(hvp(loss, params, vector), product, rtol=1e-9, atol=1e-10)
    gram = vectors.T @ products
    assert_close(gram, gram.T, rtol=1e-9, atol=1e-9)

    def gradient(step):
        layout, leaves = Layout.of(params), list(params)
        moved = layout.unflatten(layout.flatten(params) + step * vectors[:, 0])
        moved = {name: moved[name].requires_grad_() for name in leaves}
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss(moved), [moved[name] for name in leaves])])

    step = 1e-6
    differences = (gradient(step) - gradient(-step)) / (2 * step)
    kinks = build in (alternet, resnet)  # of their ReLUs, which a step may cross
    assert (differences - products[:, 0]).norm() <= (1e-4 if kinks else 1e-6) * products[:, 0].norm()


@every
def test_no_parameter_is_without_a_tangent(build, side):
    """A canary: of a random direction in one parameter alone, every parameter's gradient has a tangent that matters."""
    model, inputs, targets = made(build, side=side, batch=3)
    loss, params = loss_of(model, inputs, targets)
    for chosen in params:
        direction = {name: torch.zeros_like(value) for name, value in params.items()}
        direction[chosen] = torch.randn_like(params[chosen])
        product = hvp(loss, params, direction)
        silent = [name for name, value in product.items() if not value.abs().max() > 0]
        assert not silent, (chosen, silent)


def test_every_form_of_vectors():
    model, inputs, targets = made(Perceptron)
    loss, params = loss_of(model, inputs, targets)
    layout = Layout.of(params)
    columns = torch.randn(layout.size, 4, dtype=torch.float64)
    expected = hvp(loss, params, columns)
    trees = hvp(loss, params, layout.unflatten_rows(columns.T))
    assert_close(layout.flatten_rows(trees).T, expected)
    tree = hvp(loss, params, layout.unflatten(columns[:, 1].contiguous()))
    assert list(tree) == list(params)
    assert_close(layout.flatten(tree), expected[:, 1])
    assert_close(hvp(loss, params, columns, chunk=3), expected)
    assert_close(hvp(loss, params, columns[:, 1]), expected[:, 1])
    assert hvp(loss, params, columns[:, :0]).shape == (layout.size, 0)


def test_a_single_tensor_and_a_scalar_among_params():
    weight = torch.randn(3, 2, dtype=torch.float64)
    matrix = hvp(lambda w: (w.sin() ** 2).sum(), weight, torch.eye(6, dtype=torch.float64))
    assert_close(matrix, torch.diag(2 * (2 * weight).cos().flatten()))
    params = [torch.tensor(0.3, dtype=torch.float64), torch.randn(2, dtype=torch.float64)]
    vectors = [torch.randn(5, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)]
    products = hvp(lambda p: p[0] ** 2 * p[1].square().sum(), params, vectors)
    assert [product.shape for product in products] == [(5,), (5, 2)]


def test_gauss_newton_and_fisher_in_full():
    model, inputs, targets = made(Perceptron, batch=7)
    _, params = loss_of(model, inputs, targets)
    layout = Layout.of(params)
    eye = torch.eye(layout.size, dtype=torch.float64)

    def outputs(p):
        return functional_call(model, p, (inputs,))

    def losses(p):
        return F.cross_entropy(outputs(p), targets, reduction="none")

    jacobian = torch.cat([j.flatten(2) for j in jacrev(outputs)(params).values()], 2)  # [7, 3, n]
    probabilities = outputs(params).softmax(1)
    curvature = torch.diag_embed(probabilities) - probabilities[:, :, None] * probabilities[:, None]
    expected = torch.einsum("bin,bij,bjm->nm", jacobian, curvature, jacobian) / 7
    found = gauss_newton_product(outputs, lambda out: F.cross_entropy(out, targets), params, eye)
    assert_close(found, expected)
    gradients = torch.cat([j.flatten(1) for j in jacrev(losses)(params).values()], 1)
    assert_close(fisher_product(losses, params, eye), gradients.T @ gradients / 7)


def test_bad_input():
    model, inputs, targets = made(Perceptron)
    loss, params = loss_of(model, inputs, targets)
    size = Layout.of(params).size
    with pytest.raises(ValueError, match=rf"vectors must have the shape \({size},\) or \({size}, K\)"):
        hvp(loss, params, torch.ones(size + 1, dtype=torch.float64))
    with pytest.raises(ValueError, match="vectors must have the shape"):
        hvp(loss, params, {name: torch.ones(2, 7) for name in params})
    with pytest.raises(ValueError, match=r"the function must return a scalar tensor; got \(4, 3\)"):
        hvp(lambda p: functional_call(model, p, (inputs,)), params, torch.ones(size, dtype=torch.float64))
    with pytest.raises(ValueError, match="params holds no tensors"):
        hvp(loss, {}, torch.ones(0))
    with pytest.raises(TypeError, match=r"params must be floating-point tensors; got torch\.int64"):
        hvp(loss, torch.ones(3, dtype=torch.int64), torch.ones(3))
    with pytest.raises(ValueError, match=r"one loss for each sample, \(N,\); got \(\)"):
        fisher_product(loss, params, torch.ones(size, dtype=torch.float64))
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        hvp(loss, params, torch.ones(size, 2, dtype=torch.float64), chunk=0)
