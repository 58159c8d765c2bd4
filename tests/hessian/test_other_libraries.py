"""PyHessian and curvlinops find the same numbers for the same model and data."""

from __future__ import annotations

import warnings

import libraries  # noqa: F401  (before the libraries themselves)
import pyhessian
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from curvlinops import GGNLinearOperator, HessianLinearOperator
from hessian_cases import Normalised, made, ragged
from pyhessian.utils import hessian_vector_product
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

import vitfast
from vitfast.hessian import HessianOperator, max_eigenvalue_spectrum


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
def test_curvlinops(curvature):
    """On a model without layer normalisation, through which its products, gradients of tangents, are wrong."""
    model, inputs, targets = made(Normalised, batch=10)
    batches = list(zip(inputs.split(4), targets.split(4), strict=True))
    operator = HessianOperator(model, F.cross_entropy, batches, curvature=curvature)
    kind = {"hessian": HessianLinearOperator, "gauss_newton": GGNLinearOperator}[curvature]
    theirs = kind(model, nn.CrossEntropyLoss(), list(model.parameters()), batches)
    vectors = torch.randn(operator.shape[0], 3, dtype=torch.float64)
    assert_close(operator @ vectors, (theirs @ vectors).detach())


def test_pyhessian():
    model, inputs, targets, batches = ragged()
    operator = HessianOperator(model, F.cross_entropy, batches)
    theirs = pyhessian.hessian(model, nn.CrossEntropyLoss(), data=(inputs, targets), cuda=False)
    for vector in torch.randn(3, operator.shape[0], dtype=torch.float64):
        parts = list(operator.layout.unflatten(vector).values())
        product = hessian_vector_product(theirs.gradsH, theirs.params, parts)
        assert_close(operator @ vector, torch.cat([part.flatten() for part in product]))


def test_pyhessian_on_an_accelerated_model():
    """It differentiates twice in reverse, which PyTorch's own fused attention refuses."""
    torch.manual_seed(0)
    model = vitfast.create_model(
        "vit_ti", num_classes=3, image_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2, in_channels=1
    )
    inputs, targets = torch.randn(6, 1, 8, 8), torch.arange(6) % 3
    theirs = pyhessian.hessian(model.eval(), nn.CrossEntropyLoss(), data=(inputs, targets), cuda=False)
    (value,), _ = theirs.eigenvalues(maxIter=300, tol=1e-6)
    spectrum = max_eigenvalue_spectrum(model, F.cross_entropy, [(inputs, targets)], k=1)
    assert spectrum.values.item() == pytest.approx(value, rel=1e-3)


MODELS = {
    "torchvision ResNet": lambda: torchvision.models.resnet18(num_classes=3),
    "torchvision Swin": lambda: torchvision.models.SwinTransformer(
        [2, 2], 16, depths=[2, 2], num_heads=[1, 2], window_size=[4, 4], num_classes=3
    ),
    "timm ResNet with blurs": lambda: timm.create_model("resnetblur18", num_classes=3),
    "timm ViT": lambda: timm.create_model(
        "vit_tiny_patch16_224", num_classes=3, img_size=64, patch_size=16, depth=1, embed_dim=16, num_heads=2
    ),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-11)])
@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_models_of_other_libraries_are_not_left_to_transforms(name, accelerated, dtype, tolerance):
    """Products of a whole model by nested transforms are right, but slow: an operator warns of them."""
    torch.manual_seed(0)
    model, inputs, targets = MODELS[name]().eval().to(dtype), torch.randn(2, 3, 64, 64, dtype=dtype), torch.arange(2)
    if accelerated:
        vitfast.accelerate(model)
    operator = HessianOperator(model, F.cross_entropy, [(inputs, targets)])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Hessian-vector products by transforms")
        product = operator @ torch.ones(operator.shape[0], dtype=dtype)
    model.double()
    params = list(model.parameters())
    with sdpa_kernel(SDPBackend.MATH):  # PyTorch's fused attention has no second derivative
        loss = F.cross_entropy(model(inputs.double()), targets)
        gradients = torch.autograd.grad(loss, params, create_graph=True)
        expected = torch.autograd.grad(sum(gradient.sum() for gradient in gradients), params)
    expected = torch.cat([part.flatten() for part in expected])
    assert (product - expected).norm() <= tolerance * expected.norm()
