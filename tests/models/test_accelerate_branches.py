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
from timm.models.vision_transformer import Block
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import nn
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer
from torchvision.ops import StochasticDepth

import vitfast
from vitfast.models.acceleration import transformers_adapter
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


def loss_of(model, images):
    """Logits, and their cross-entropy. Stochastic depth draws the same in every call."""
    torch.manual_seed(3)
    output = model(images)
    logits = output if isinstance(output, torch.Tensor) else output.logits
    return logits, torch.nn.functional.cross_entropy(logits, torch.arange(len(images)))


def step(model, images):
    """By name: logits, and the gradients of all parameters."""
    logits, loss = loss_of(model, images)
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


@pytest.fixture(autouse=True)
def _any_number_of_rows(monkeypatch):
    monkeypatch.setattr(transformers_adapter, "_PACKED_ROWS", 1)


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
    accelerated, called = vitfast.accelerate(copy.deepcopy(model)), 0
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
        called += len(tensors[0])
        for expected, found in zip(*tensors, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4, msg=lambda m, p=part: f"{p}: {m}")
    assert called > len(parts)  # input and output of most; a few, such as torchvision's out_proj, are never called


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
        _, loss = loss_of(model, images)
        gradient = torch.autograd.grad(loss, parameters, create_graph=True)
        return torch.autograd.grad(gradient, parameters, direction)

    with vitfast.backend("reference"):
        expected = product()
    names = [name for name, _ in model.named_parameters()]
    assert_alike(*(dict(zip(["logits", *names], [torch.zeros(1), *p], strict=True)) for p in (product(), expected)))


def test_few_rows_of_transformers_are_not_packed(calls, monkeypatch):
    monkeypatch.setattr(transformers_adapter, "_PACKED_ROWS", 1024)
    model, images = make("transformers ViT")
    step(vitfast.accelerate(model), images)
    assert calls == {"norm_linear": 0, "add_linear": 0, "residual_mlp": 2}


# ---- parts that are something else -----------------------------------------------------------------------------------


class Wrapper(nn.Module):
    """As LoRA and checkpointing wrap modules; attributes of the module show through."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)

    def forward(self, *arguments, **options):
        output = self.module(*arguments, **options)
        return (3 * output[0], *output[1:]) if isinstance(output, tuple) else 3 * output


class Opaque(nn.Module):
    """A module in whose place no attribute is known."""

    def __init__(self, module):
        super().__init__()
        self.inner = module

    def forward(self, *arguments, **options):
        return self.inner(*arguments, **options)


def subclassed(module):
    """The module as one of a subclass that computes something else."""
    kind = type(module)

    def forward(self, *arguments, **options):
        output = kind.forward(self, *arguments, **options)
        return (3 * output[0], *output[1:]) if isinstance(output, tuple) else 3 * output

    module.__class__ = type(f"Other{kind.__name__}", (kind,), {"forward": forward})
    return module


PARTS = {
    "timm ViT": ("attn", "attn.qkv", "attn.proj", "mlp", "mlp.fc1", "mlp.fc2", "norm1", "norm2"),
    "timm Swin": ("attn.qkv", "attn.proj", "mlp", "mlp.fc2", "norm1", "norm2"),
    "torchvision ViT": ("mlp", "mlp.0", "ln_1", "ln_2"),
    "torchvision Swin": ("attn", "mlp", "mlp.3", "norm1", "norm2"),
    "transformers ViT": (
        *("attention", "attention.q_proj", "attention.o_proj", "mlp", "mlp.fc1"),
        *("layernorm_before", "layernorm_after"),
    ),
    "transformers Swin": ("attention.v_proj", "attention.o_proj", "mlp", "mlp.fc2", "layernorm_before"),
    "vitfast ViT": ("attn", "attn.qkv", "attn.proj", "mlp", "mlp.fc1", "norm1", "norm2"),
    "vitfast Swin": ("attn", "attn.qkv", "attn.proj", "mlp", "mlp.fc2", "norm1"),
}


REPLACEMENTS = [
    (name, part, replace)
    for name, parts in PARTS.items()
    for part in parts
    for replace in (Wrapper, Opaque, subclassed)
    if (name, part, replace) != ("vitfast Swin", "attn", Opaque)  # the block asks its attention for the window
]


@pytest.mark.parametrize(("name", "part", "replace"), REPLACEMENTS)
def test_a_part_that_is_something_else_is_called(name, part, replace):
    model, images = make(name)
    parent, _, child = part.rpartition(".")
    owner = block_of(name, model).get_submodule(parent)
    setattr(owner, child, replace(getattr(owner, child)))
    with vitfast.backend("reference"):
        before = step(model, images)
    after = step(vitfast.accelerate(model), images)
    assert_alike(after, before)


def test_parametrised_weights():
    model, images = make("timm Swin")
    block = block_of("timm Swin", model)
    for layer in (block.attn.qkv, block.mlp.fc2):
        nn.utils.parametrizations.weight_norm(layer)
    before = step(model, images)
    assert_alike(step(vitfast.accelerate(model), images), before)


@pytest.mark.parametrize("name", ["timm ViT", "transformers ViT", "vitfast ViT", "vitfast Swin"])
def test_shared_and_frozen_parameters(name):
    """In the first and the second derivative: a layer that two blocks share, and embeddings without gradients."""
    model, images = make(name)
    mlp = block_of(name, model).mlp
    others = [m for m in model.modules() if type(m) is type(mlp) and m.fc1.weight.shape == mlp.fc1.weight.shape]
    others[-1].fc1 = mlp.fc1
    for parameter in (p for key, p in model.named_parameters() if "embed" in key):
        parameter.requires_grad_(False)
    vitfast.accelerate(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    direction = [torch.randn_like(p) for p in parameters]

    def derivatives():
        logits, loss = loss_of(model, images)
        first = torch.autograd.grad(loss, parameters, retain_graph=True)
        again = torch.autograd.grad(loss, parameters, create_graph=True)
        second = torch.autograd.grad(again, parameters, direction)
        return {"logits": logits.detach(), **dict(enumerate((*first, *again))), **dict(enumerate(second, 1000))}

    with vitfast.backend("reference"):
        before = derivatives()
    assert_alike(derivatives(), before)


@pytest.mark.parametrize("name", ["timm ViT", "vitfast Swin"])
def test_gradients_in_a_batch_with_frozen_embeddings(name):
    model, images = make(name)
    for parameter in (p for key, p in model.named_parameters() if "embed" in key):
        parameter.requires_grad_(False)
    vitfast.accelerate(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    logits = model(images)
    grads = torch.randn(2, *logits.shape)
    batched = torch.autograd.grad(logits, parameters, grads, is_grads_batched=True, retain_graph=True)
    for i in range(2):
        one = torch.autograd.grad(logits, parameters, grads[i], retain_graph=True)
        for found, expected in zip(batched, one, strict=True):
            torch.testing.assert_close(found[i], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["timm ViT", "timm Swin", "vitfast ViT", "vitfast Swin"])
def test_dropout_that_is_in_another_mode_than_the_model(name):
    options = {"attn_drop_rate" if "timm" in name else "attn_drop": 0.5}
    model, images = make(name, **options)
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.eval()
    with vitfast.backend("reference"):
        before = step(model, images)
    assert_alike(step(vitfast.accelerate(model), images), before)


def test_other_default_dtypes():
    model, images = make("torchvision Swin")
    before = step(model, images)
    vitfast.accelerate(model)
    try:
        torch.set_default_dtype(torch.float64)
        assert_alike(step(model, images), before)
    finally:
        torch.set_default_dtype(torch.float32)


def test_stochastic_depth_of_whole_batches():
    model, images = make("torchvision Swin")
    for module in model.modules():
        if type(module) is StochasticDepth:
            module.mode = "batch"
    before = step(model, images)
    assert_alike(step(vitfast.accelerate(model), images), before)


def test_a_timm_whose_blocks_know_no_causal_attention(monkeypatch):
    def forward(self, x):
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    monkeypatch.setattr(Block, "forward", forward)
    model, images = make("timm ViT")
    before = step(model, images)
    report = vitfast.accelerate(model, report=True)
    assert "this version of timm has it without is_causal" in report.kept["blocks.0"]
    assert_alike(step(model, images), before)


@pytest.mark.parametrize("block", ["timm ViT", "vitfast ViT"])
def test_masks_go_through_a_block(block):
    model, _ = make(block)
    layer, x = block_of(block, model), torch.randn(BATCH, 17, 48)
    for options in ({"attn_mask": torch.randn(17, 17)}, {"is_causal": True}):
        layer.attn.fused_attn = True
        with vitfast.backend("reference"):
            before = layer(x, **options)
        vitfast.accelerate(model)
        torch.testing.assert_close(layer(x, **options), before, rtol=1e-4, atol=1e-5)
        vitfast.restore(model)


@pytest.mark.parametrize("name", ["timm Swin", "vitfast ViT"])
def test_autocast_and_forward_mode(name):
    model, images = make(name, drop=0.0)
    vitfast.accelerate(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(images).dtype == torch.bfloat16
    parameters = dict(model.named_parameters())
    tangents = {key: torch.randn_like(p) for key, p in parameters.items()}

    def call(parameters):
        return torch.func.functional_call(model, parameters, (images,))

    _, found = torch.func.jvp(call, (parameters,), (tangents,))
    with vitfast.backend("reference"):
        _, expected = torch.func.jvp(call, (parameters,), (tangents,))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
