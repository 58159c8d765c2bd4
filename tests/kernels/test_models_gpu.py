"""Whole models on a GPU: what they compute there is what they compute on the CPU, and Hessians take the kernels."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import vitfast
from vitfast import hessian
from vitfast.functional import attention_qkvpacked, window_attention_qkvpacked

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU; run by `make gpu-test`"),
    pytest.mark.usefixtures("full_precision"),
]


@pytest.fixture
def full_precision(monkeypatch):
    """float32 is float32 in PyTorch's own operations."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


MODELS = {
    "vit": ("vit_ti", {"image_size": 32, "patch_size": 4, "depth": 2}, 32),
    "swin": ("swin_t", {}, 64),
    "alternet": ("alternet_18_cifar", {}, 32),
    "alternet on images": ("alternet_18", {}, 64),
    "smoothed resnet": ("resnet_dnn_smoothing_18", {}, 64),
}
models = pytest.mark.parametrize("name", MODELS)


def made(name, dtype):
    """A model in evaluation mode, images and labels, on the CPU."""
    torch.manual_seed(0)
    registered, options, side = MODELS[name]
    model = vitfast.create_model(registered, num_classes=10, **options).eval().to(dtype)
    return model, torch.randn(3, 3, side, side, dtype=dtype), torch.arange(3)


def results(model, images, labels):
    logits = model(images)
    return [logits.detach(), *torch.autograd.grad(F.cross_entropy(logits, labels), [*model.parameters()])]


def assert_close_by_norm(ours, theirs, tolerance):
    for one, other in zip(ours, theirs, strict=True):
        assert (one.cpu() - other).norm() <= tolerance * other.norm() + 1e-30


def assert_products_are_those_of_the_cpu(model, images, labels, vectors, tolerance, **options):
    """Twice, as an operator may keep something of the first time."""

    def products(model, *batch):
        operator = hessian.HessianOperator(model, F.cross_entropy, [batch], **options)
        return [operator @ vectors.to(batch[0].device) for _ in range(2)]

    on_gpu = products(copy.deepcopy(model).cuda(), images.cuda(), labels.cuda())
    assert_close_by_norm(on_gpu, products(model, images, labels), tolerance)


@models
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-3)], ids=str)
def test_logits_and_gradients_are_those_of_the_cpu(name, dtype, tolerance):
    model, images, labels = made(name, dtype)
    on_gpu = results(copy.deepcopy(model).cuda(), images.cuda(), labels.cuda())
    assert_close_by_norm(on_gpu, results(model, images, labels), tolerance)


@models
def test_channels_last_changes_nothing(name):
    model, images, labels = made(name, torch.float64)
    expected = results(model, images, labels)
    model, images = (x.cuda().to(memory_format=torch.channels_last) for x in (model, images))
    assert_close_by_norm(results(model, images, labels.cuda()), expected, 1e-9)


@models
@pytest.mark.parametrize("keep_primals", [False, True], ids=["anew", "kept"])
def test_hessian_vector_products_are_those_of_the_cpu(name, keep_primals):
    model, images, labels = made(name, torch.float64)
    vectors = torch.randn(sum(p.numel() for p in model.parameters()), 3, dtype=torch.float64)
    assert_products_are_those_of_the_cpu(model, images, labels, vectors, 1e-9, keep_primals=keep_primals)


def test_products_with_batch_normalisation_in_training():
    model, images, labels = made("smoothed resnet", torch.float64)
    vectors = torch.randn(sum(p.numel() for p in model.parameters()), 2, dtype=torch.float64)
    assert_products_are_those_of_the_cpu(model.train(), images, labels, vectors, 1e-9)


def test_products_of_a_model_with_fused_attention_of_pytorch():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2, "num_classes": 10}
    model = timm.models.VisionTransformer(**options).eval()  # in float32, for which there are fused kernels
    images, labels = torch.randn(2, 3, 32, 32), torch.arange(2)
    vectors = torch.randn(sum(p.numel() for p in model.parameters()), 2)
    assert_products_are_those_of_the_cpu(model, images, labels, vectors, 1e-3)


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_products_take_no_transforms_in_float32(name):
    """By the kernels' tangents, which products fall back from with a warning."""
    model, images, labels = made(name, torch.float32)
    vectors = torch.randn(sum(p.numel() for p in model.parameters()), 2)
    operator = hessian.HessianOperator(model.cuda(), F.cross_entropy, [(images.cuda(), labels.cuda())])
    assert (operator @ vectors.cuda()).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["vit_small_patch16_224", "swin_tiny_patch4_window7_224"])
def test_accelerated_models_compute_the_same(name, dtype):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name).cuda().eval().to(dtype)
    fused = vitfast.accelerate(copy.deepcopy(model))
    images = torch.randn(2, 3, 224, 224, device="cuda", dtype=dtype)
    expected, got = (results(m, images, torch.arange(2, device="cuda")) for m in (model, fused))
    exact = results(copy.deepcopy(model).double(), images.double(), torch.arange(2, device="cuda"))
    norm = lambda a, b: sum(float((x.double() - y).square().sum()) for x, y in zip(a, b, strict=True)) ** 0.5  # noqa: E731
    whole = sum(float(x.square().sum()) for x in exact) ** 0.5
    assert norm(got, exact) <= 2 * norm(expected, exact) + torch.finfo(dtype).eps * whole


OPERATORS = {
    "attention": (attention_qkvpacked, (2, 17, 3, 2, 16)),
    "window_attention": (lambda qkv: window_attention_qkvpacked(qkv, window_size=4, shift=1), (2, 6, 7, 3, 2, 16)),
}


@pytest.mark.parametrize("name", OPERATORS)
class TestOperatorsAreSeen:
    """Kernels that Python launches do nothing behind the back of what follows the dispatcher."""

    def test_a_traced_graph_computes_anew(self, name):
        function, shape = OPERATORS[name]
        graph = make_fx(lambda x: function(x))(torch.randn(shape, device="cuda"))
        other = torch.randn(shape, device="cuda")
        torch.testing.assert_close(graph(other), function(other))

    def test_under_a_mode(self, name):
        function, shape = OPERATORS[name]
        x = torch.randn(shape, device="cuda")
        with FlopCounterMode(display=False):
            inside = function(x)
        torch.testing.assert_close(inside, function(x))

    def test_gradients_in_a_batch(self, name):
        function, shape = OPERATORS[name]
        x = torch.randn(shape, device="cuda", requires_grad=True)
        out = function(x)
        grads = torch.randn(3, *out.shape, device="cuda")
        (batched,) = torch.autograd.grad(out, x, grads, retain_graph=True, is_grads_batched=True)
        one_by_one = [torch.autograd.grad(out, x, grad, retain_graph=True)[0] for grad in grads]
        torch.testing.assert_close(batched, torch.stack(one_by_one))

    def test_graph_capture(self, name):
        function, shape = OPERATORS[name]
        x = torch.randn(shape, device="cuda")
        function(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = function(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(out, function(x))

    def test_a_stream_of_its_own(self, name):
        function, shape = OPERATORS[name]
        x = torch.randn(shape, device="cuda")
        expected = function(x)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            out = function(x)
        stream.synchronize()
        torch.testing.assert_close(out, expected)
