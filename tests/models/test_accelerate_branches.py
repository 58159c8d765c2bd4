"""What `accelerate` fuses around attention and MLPs: normalisation, stochastic depth, residual additions, merging.

In float32 and with widths that the kernels take. The models of vitfast have the same branches: they are compared with
themselves in plain PyTorch.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext

import libraries  # noqa: F401  (before the libraries themselves)
import pytest
import torch
import transformers
from timm.models.swin_transformer import SwinTransformer as TimmSwin
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import nn
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

import vitfast
from vitfast.nn import _branches as fused

BATCH, SIZE = 5, 32


def timm_vit(**options):
    return TimmViT(img_size=SIZE, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=5, **options)


def timm_swin(**options):
    config = {"patch_size": 2, "window_size": 4, "embed_dim": 32, "depths": (2, 2), "num_heads": (1, 2)}
    return TimmSwin(img_size=SIZE, num_classes=5, **config, **options)


def torchvision_swin(**options):
    return SwinTransformer([2, 2], 32, [2, 2], [1, 2], [4, 4], num_classes=5, **options)


def torchvision_vit(**options):
    model = VisionTransformer(SIZE, 8, 2, 3, 48, 96, num_classes=5, **options)
    nn.init.normal_(model.heads.head.weight)  # torchvision begins with zeros, which would hide everything
    return model


SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96, "num_labels": 5}


def transformers_vit(**options):
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**SMALL, image_size=SIZE, patch_size=8, **options)
    )


def transformers_deit(**options):
    return transformers.DeiTForImageClassification(
        transformers.DeiTConfig(**SMALL, image_size=SIZE, patch_size=8, **options)
    )


def transformers_swin(**options):
    shape = {"patch_size": 2, "embed_dim": 32, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4}
    return transformers.SwinForImageClassification(
        transformers.SwinConfig(image_size=SIZE, num_labels=5, **shape, **options)
    )


def vitfast_vit(**options):
    return vitfast.create_model(
        "vit_ti", depth=2, embed_dim=48, image_size=SIZE, patch_size=8, num_classes=5, **options
    )


def vitfast_swin(**options):
    config = {"patch_size": 2, "window_size": 4, "embed_dim": 32, "depths": (2, 2), "num_heads": (1, 2)}
    return vitfast.create_model("swin_t", image_size=SIZE, num_classes=5, **config, **options)


DROP = 0.4
# name -> (model, option for stochastic depth, how many blocks, how many patch mergings)
MODELS = {
    "timm ViT": (timm_vit, "drop_path_rate", 2, 0),
    "timm Swin": (timm_swin, "drop_path_rate", 4, 1),
    "torchvision ViT": (torchvision_vit, None, 2, 0),
    "torchvision Swin": (torchvision_swin, "stochastic_depth_prob", 4, 1),
    "transformers ViT": (transformers_vit, None, 2, 0),
    "transformers DeiT": (transformers_deit, None, 2, 0),
    "transformers Swin": (transformers_swin, "drop_path_rate", 4, 1),
    "vitfast ViT": (vitfast_vit, "drop_path", 2, 0),
    "vitfast Swin": (vitfast_swin, "drop_path", 4, 1),
}


def step(model, images, seed=3):
    """By name: logits, and the gradients of all parameters. Stochastic depth draws from ``seed``."""
    torch.manual_seed(seed)
    output = model(images)
    logits = output if isinstance(output, torch.Tensor) else output.logits
    loss = torch.nn.functional.cross_entropy(logits, torch.arange(len(images)))
    names, parameters = zip(*model.named_parameters(), strict=True)
    return {"logits": logits.detach(), **dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))}


def assert_alike(found, expected):
    """Within rounding of what is largest: some gradients are 0 but for it."""
    largest = max(gradient.norm() for name, gradient in expected.items() if name != "logits")
    for name, value in expected.items():
        limit = 1e-5 * (value.norm() if name == "logits" else largest)
        assert (found[name] - value).norm() <= limit, name


def make(name, drop=DROP, **options):
    """A model in training mode, and images."""
    model, depth, *_ = MODELS[name]
    if depth is not None:
        options[depth] = drop
    return model(**options).train(), torch.randn(BATCH, 3, SIZE, SIZE)


@pytest.fixture
def calls(monkeypatch):
    """How often the fused functions are called."""
    counts = {"norm_linear": 0, "add_linear": 0, "residual_mlp": 0}
    for name in counts:
        function = getattr(fused.branches, name)

        def counting(*arguments, _name=name, _function=function):
            counts[_name] += 1
            return _function(*arguments)

        monkeypatch.setattr(fused.branches, name, counting)
    return counts


@pytest.mark.parametrize("drop", [0.0, DROP, 0.999])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_of_training_stays(name, drop, calls):
    model, images = make(name, drop)
    *_, blocks, mergings = MODELS[name]
    with vitfast.backend("reference"):
        before = step(model, images)
    assert not any(calls.values())
    vitfast.accelerate(model)
    assert_alike(step(model, images), before)
    assert calls == {"norm_linear": blocks + mergings, "add_linear": blocks, "residual_mlp": blocks}


@pytest.mark.parametrize("name", MODELS)
def test_inference_stays(name, calls):
    model, images = make(name)
    model.eval()
    with torch.no_grad(), vitfast.backend("reference"):
        before = model(images)
    vitfast.accelerate(model)
    with torch.no_grad():
        after = model(images)
    pairs = [(after, before)] if isinstance(after, torch.Tensor) else [(after.logits, before.logits)]
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert all(calls.values())


def block_of(name, model):
    path = {
        "timm ViT": "blocks.0",
        "timm Swin": "layers.0.blocks.1",
        "torchvision ViT": "encoder.layers.encoder_layer_0",
        "torchvision Swin": "features.1.1",
        "transformers ViT": "vit.layers.0",
        "transformers DeiT": "deit.layers.0",
        "transformers Swin": "swin.encoder.layers.0.blocks.1",
        "vitfast ViT": "blocks.0",
        "vitfast Swin": "layers.0.blocks.1",
    }
    return model.get_submodule(path[name])


@pytest.mark.parametrize("name", MODELS)
def test_hooks_see_what_they_saw(name):
    """On any part of a block, one after the other, and on all of patch merging."""
    model, images = make(name)
    parts = [part for _, part in block_of(name, model).named_modules()]
    parts += [part for other in model.modules() if "PatchMerging" in type(other).__name__ for part in other.modules()]
    accelerated, seen = vitfast.accelerate(copy.deepcopy(model)), []
    others = dict(zip(model.modules(), accelerated.modules(), strict=True))
    for part in parts:
        tensors = []
        for one, module in ((model, part), (accelerated, others[part])):
            seen = []
            handle = module.register_forward_hook(lambda _, inputs, output, seen=seen: seen.append((inputs, output)))
            with nullcontext() if one is accelerated else vitfast.backend("reference"):
                step(one, images)
            handle.remove()
            tensors.append([t for inputs, output in seen for t in (*inputs, output) if isinstance(t, torch.Tensor)])
        assert len(tensors[0]) == len(tensors[1]), type(part)
        for expected, found in zip(*tensors, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4, msg=lambda m, p=part: f"{p}: {m}")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("timm ViT", {"proj_drop_rate": 0.3}),
        ("timm ViT", {"attn_drop_rate": 0.3}),
        ("timm ViT", {"init_values": 0.1}),
        ("timm ViT", {"qk_norm": True}),
        ("timm ViT", {"qkv_bias": False}),
        ("timm Swin", {"attn_drop_rate": 0.3}),
        ("timm Swin", {"proj_drop_rate": 0.3}),
        ("torchvision ViT", {"dropout": 0.3}),
        ("torchvision Swin", {"dropout": 0.3}),
        ("transformers Swin", {"hidden_dropout_prob": 0.3}),
        ("torchvision Swin", {"attention_dropout": 0.3}),
        ("transformers ViT", {"hidden_dropout_prob": 0.3}),
        ("transformers ViT", {"qkv_bias": False}),
        ("transformers DeiT", {"hidden_dropout_prob": 0.3}),
        ("transformers Swin", {"qkv_bias": False}),
        ("vitfast ViT", {"proj_drop": 0.3}),
        ("vitfast ViT", {"init_values": 0.1}),
        ("vitfast ViT", {"qk_norm": True}),
        ("vitfast Swin", {"proj_drop": 0.3}),
    ],
    ids=str,
)
def test_options_that_change_a_branch(name, options):
    model, images = make(name, **options)
    with vitfast.backend("reference"):
        before = step(model, images)
    assert_alike(step(vitfast.accelerate(model), images), before)


@pytest.mark.parametrize("name", ["timm Swin", "torchvision Swin", "transformers Swin", "vitfast Swin"])
def test_maps_that_are_padded(name):
    options = {"strict_img_size": False} if name == "timm Swin" else {}
    model, _ = make(name, **options)
    images = torch.randn(BATCH, 3, 40, 36)
    with vitfast.backend("reference"):
        before = step(model, images)
    assert_alike(step(vitfast.accelerate(model), images), before)


@pytest.mark.parametrize("name", ["timm ViT", "timm Swin", "vitfast ViT", "vitfast Swin"])
def test_compiled_models_stay(name):
    model, images = make(name, drop=0.0)
    before = step(model, images)
    vitfast.accelerate(model).compile(fullgraph=True, backend="aot_eager")
    assert_alike(step(model, images), before)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", ["timm ViT", "timm Swin", "vitfast ViT", "vitfast Swin"])
def test_traced_models_take_other_batches(name):
    model, images = make(name)
    model = vitfast.accelerate(model).eval()
    with torch.no_grad():
        traced = torch.jit.trace(model, images[:2], check_trace=False)
        torch.testing.assert_close(traced(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["timm ViT", "timm Swin"])
def test_activation_checkpointing(name):
    model, images = make(name)
    before = step(model, images)
    model.set_grad_checkpointing()
    assert_alike(step(vitfast.accelerate(model), images), before)


@pytest.mark.parametrize("name", MODELS)
def test_second_derivatives(name):
    model, images = make(name)
    vitfast.accelerate(model)
    parameters = list(model.parameters())
    direction = [torch.randn_like(p) for p in parameters]

    def product():
        torch.manual_seed(3)
        output = model(images)
        logits = output if isinstance(output, torch.Tensor) else output.logits
        loss = torch.nn.functional.cross_entropy(logits, torch.arange(BATCH))
        gradient = torch.autograd.grad(loss, parameters, create_graph=True)
        return torch.autograd.grad(gradient, parameters, direction)

    with vitfast.backend("reference"):
        expected = product()
    names = [name for name, _ in model.named_parameters()]
    assert_alike(*(dict(zip(["logits", *names], [torch.zeros(1), *p], strict=True)) for p in (product(), expected)))
