"""`accelerate` on the models of timm, torchvision and transformers, with random weights."""

import copy
import pickle
import subprocess
import sys

import libraries  # noqa: F401  (before the libraries themselves)
import pytest
import timm
import torch
import transformers
from modules import assert_same, output_and_gradients
from timm.models.swin_transformer import SwinTransformer as TimmSwin
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import nn
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

import vitfast
from vitfast.models import acceleration as package


class FirstOutput(nn.Module):
    """A transformers model that returns a tensor."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(images)[0]


def timm_vit(**options):
    return TimmViT(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5, **options)


def timm_swin(size=(32, 32), **options):
    config = {"patch_size": 2, "window_size": 4, "embed_dim": 12, "depths": (2, 2), "num_heads": (1, 2)}
    return TimmSwin(img_size=size, num_classes=5, **config, **options)


def torchvision_swin(**options):
    return SwinTransformer([2, 2], 12, [2, 2], [1, 2], [4, 4], num_classes=5, **options)


def torchvision_vit(**options):
    model = VisionTransformer(32, 8, 2, 3, 24, 48, num_classes=5, **options)
    nn.init.normal_(model.heads.head.weight)  # torchvision begins with zeros, which would hide everything
    return model


SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}


def transformers_vit(**options):
    config = transformers.ViTConfig(**SMALL, image_size=32, patch_size=8, **options)
    return FirstOutput(transformers.ViTModel(config, add_pooling_layer=False))


def transformers_deit(**options):
    config = transformers.DeiTConfig(**SMALL, image_size=32, patch_size=8, **options)
    return FirstOutput(transformers.DeiTModel(config, add_pooling_layer=False))


def transformers_swin(**options):
    shape = {"patch_size": 2, "embed_dim": 12, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4}
    config = transformers.SwinConfig(image_size=32, **shape, **options)
    return FirstOutput(transformers.SwinModel(config, add_pooling_layer=False))


# name -> (model, how many blocks it has, how many modules are replaced, side lengths of the images). Each block has one
# attention and one MLP; modules are also the blocks around both, and the patch merging of Swin.
MODELS = {
    "timm ViT": (timm_vit, 2, 6, (32, 32)),
    "timm ViT with qk_norm": (lambda: timm_vit(qk_norm=True), 2, 6, (32, 32)),
    "timm DeiT": (lambda: timm.create_model("deit3_small_patch16_224", img_size=32, depth=2), 2, 6, (32, 32)),
    "timm PiT": (lambda: timm.create_model("pit_ti_distilled_224").eval(), 12, 36, (224, 224)),
    "timm Swin": (timm_swin, 4, 9, (32, 32)),
    "timm Swin, not square": (lambda: timm_swin((32, 48)), 4, 9, (32, 48)),
    "timm Swin, padded": (lambda: timm_swin((40, 36), strict_img_size=False), 4, 9, (40, 36)),
    "torchvision Swin": (torchvision_swin, 4, 13, (32, 32)),
    "torchvision Swin, padded": (torchvision_swin, 4, 13, (40, 36)),
    "torchvision ViT": (torchvision_vit, 2, 4, (32, 32)),
    "transformers ViT": (transformers_vit, 2, 6, (32, 32)),
    "transformers DeiT": (transformers_deit, 2, 6, (32, 32)),
    "transformers Swin": (transformers_swin, 4, 9, (32, 32)),
    "transformers Swin, padded": (transformers_swin, 4, 9, (40, 36)),
}


def made(name):
    """A model in evaluation mode, in float64, how many modules are replaced in it, and images."""
    model, _, replaced, size = MODELS[name]
    return model().double().eval(), replaced, torch.randn(2, 3, *size, dtype=torch.float64)


@pytest.mark.parametrize("name", MODELS)
def test_results_and_gradients_stay(name):
    model, replaced, images = made(name)
    keys, parameters = list(model.state_dict()), [id(p) for p in model.parameters()]
    model = FirstOutput(model) if isinstance(model(images), tuple) else model
    if "PiT" in name:  # large, and its gradients take the same path as ViT's
        before = {"output": model(images)}
        assert len(vitfast.accelerate(model, report=True).replaced) == replaced
        assert_same({"output": model(images)}, before)
        return
    before = output_and_gradients(model, images)
    report = vitfast.accelerate(model, report=True)
    assert len(report.replaced) == replaced, report
    assert not report.kept
    assert_same(output_and_gradients(model, images), before)
    inner = model.model if isinstance(model, FirstOutput) and keys[0].partition(".")[0] != "model" else model
    assert list(inner.state_dict()) == keys
    assert [id(p) for p in inner.parameters()] == parameters


@pytest.mark.parametrize("name", ["timm ViT", "timm Swin", "torchvision Swin", "torchvision ViT", "transformers Swin"])
def test_the_kernels_are_called(name, monkeypatch):
    model, _, images = made(name)
    vitfast.accelerate(model)
    calls = []
    for function in ("attention", "attention_qkvpacked", "window_attention", "window_attention_qkvpacked", "mlp"):
        original = getattr(vitfast.functional, function)
        monkeypatch.setattr(
            vitfast.functional, function, lambda *a, _f=original, **k: (calls.append(_f), _f(*a, **k))[1]
        )
    model(images)
    assert len(calls) == 2 * MODELS[name][1]


@pytest.mark.parametrize("name", ["timm ViT", "timm Swin", "torchvision Swin", "torchvision ViT", "transformers ViT"])
def test_copies_pickles_and_restores(name):
    model, replaced, images = made(name)
    kinds, expected = [type(m) for m in model.modules()], model(images)
    vitfast.accelerate(model)
    accelerated = [type(m) for m in model.modules()]
    assert sum(a is not b for a, b in zip(kinds, accelerated, strict=True)) == replaced
    assert all(issubclass(a, b) for a, b in zip(accelerated, kinds, strict=True))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in other.modules()] == accelerated
        assert torch.equal(other(images), model(images))
    assert vitfast.restore(model) is model
    assert [type(m) for m in model.modules()] == kinds
    assert torch.equal(model(images), expected)


def test_twice_is_as_once():
    model, _, images = made("timm Swin")
    first = vitfast.accelerate(model, report=True)
    kinds = [type(m) for m in model.modules()]
    assert vitfast.accelerate(model, report=True) == first
    assert [type(m) for m in model.modules()] == kinds
    assert vitfast.accelerate(model) is model
    model(images)


def test_the_rest_of_a_half_accelerated_model_is_taken_over():
    model, replaced, _ = made("timm ViT")
    vitfast.accelerate(model.blocks[0])
    assert len(vitfast.accelerate(model, report=True).replaced) == replaced


def test_unknown_models_are_left():
    model = nn.Sequential(nn.Linear(3, 3), nn.MultiheadAttention(8, 2))
    kinds = [type(m) for m in model.modules()]
    report = vitfast.accelerate(model, report=True)
    assert not report.replaced
    assert str(report) == "no module of a known class: nothing was changed"
    assert [type(m) for m in vitfast.restore(model).modules()] == kinds


@pytest.mark.parametrize("function", [vitfast.accelerate, vitfast.restore])
@pytest.mark.parametrize("thing", [3, "vit", nn.Linear, None])
def test_not_a_model(function, thing):
    with pytest.raises(TypeError, match="takes a"):
        function(thing)


def test_report_says_what_and_why():
    class Special(timm.layers.Attention):
        pass

    model = timm_vit()
    model.blocks[1].attn = Special(24, 3)
    swin = timm.create_model("swinv2_tiny_window8_256", depths=(1, 1, 1, 1))
    report = str(vitfast.accelerate(nn.ModuleDict({"vit": model, "swin": swin}), report=True))
    assert (
        "9 modules use fused kernels:\n  vit.blocks.0: Block\n  vit.blocks.0.attn: Attention\n  vit.blocks.0.mlp: Mlp"
        in report
    )
    assert "vit.blocks.1.attn: " in report
    assert "is a subclass of Attention and may compute something else" in report
    assert "swin.layers.0.blocks.0.attn: there is no fused kernel for timm.models.swin_transformer_v2" in report


def test_a_block_with_another_attention_is_left():
    model = timm_swin()
    model.layers[0].blocks[0].attn = nn.Identity()
    report = vitfast.accelerate(model, report=True)
    assert "its attention is a Identity, not timm's WindowAttention" in report.kept["layers.0.blocks.0"]
    assert len(report.replaced) == 8


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("timm Swin", lambda m: m.layers[0].blocks[1].attn),
        ("timm Swin", lambda m: m.layers[0].blocks[1].attn.attn_drop),
        ("timm ViT", lambda m: m.blocks[0].attn.attn_drop),
        ("timm ViT", lambda m: m.blocks[0].mlp.act),
        ("timm Swin", lambda m: m.layers[0].blocks[1].mlp.fc2),
        ("torchvision ViT", lambda m: m.encoder.layers[0].mlp[2]),
        ("torchvision Swin", lambda m: m.features[1][0].mlp[0]),
        ("transformers ViT", lambda m: m.model.layers[0].mlp.activation_fn),
        ("torchvision ViT", lambda m: m.encoder.layers[0].self_attention),
        ("transformers Swin", lambda m: m.model.encoder.layers[0].blocks[0].attention),
    ],
)
def test_hooks_see_what_they_saw(name, part):
    model, _, images = made(name)
    seen = []
    if "timm" in name:
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
    part(model).register_forward_hook(lambda module, inputs, output: seen.append(inputs))
    with torch.no_grad():
        model(images)
        before = list(seen)
        seen.clear()
        vitfast.accelerate(model)
        model(images)
    assert len(before) == len(seen) > 0
    for inputs, others in zip(before, seen, strict=True):
        for tensor, other in zip(inputs, others, strict=True):
            torch.testing.assert_close(tensor, other)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mask", [None, "float", "bool"])
def test_masks_of_timms_attention(mask, is_causal):
    if mask is not None and is_causal:
        mask, is_causal = None, True  # PyTorch's attention, which timm calls, refuses both at once
    model = timm.layers.Attention(24, 3).double()
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    masks = {None: None, "float": torch.randn(7, 7, dtype=torch.float64), "bool": torch.rand(7, 7) < 0.8}
    if mask == "bool":
        masks[mask][:, 0] = True
    before = output_and_gradients(model, x, masks[mask], is_causal)
    vitfast.accelerate(model)
    assert_same(output_and_gradients(model, x, masks[mask], is_causal), before)


@pytest.mark.parametrize(
    "model",
    [
        lambda: timm_vit(attn_drop_rate=0.3, proj_drop_rate=0.1),
        lambda: timm_swin(attn_drop_rate=0.3, drop_path_rate=0.2),
        lambda: torchvision_swin(attention_dropout=0.3),
        lambda: torchvision_vit(attention_dropout=0.3),
        lambda: transformers_vit(attention_probs_dropout_prob=0.3),
        lambda: transformers_swin(attention_probs_dropout_prob=0.3),
    ],
)
def test_dropout_in_training_draws_the_same(model):
    model = model().double().train()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.manual_seed(1)
    before = model(images)
    vitfast.accelerate(model)
    torch.manual_seed(1)
    torch.testing.assert_close(model(images), before)


@pytest.mark.parametrize("model", [transformers_vit, transformers_swin])
def test_attention_maps_of_transformers(model):
    """Asked for by ``attn_implementation="eager"``."""
    model = model(attn_implementation="eager").double().eval().model
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    before = model(images, output_attentions=True).attentions
    vitfast.accelerate(model)
    after = model(images, output_attentions=True).attentions
    assert len(before) == len(after) == 2
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("model", [transformers_vit, transformers_deit, transformers_swin])
def test_attention_implementation_of_transformers(model):
    package.register_attention()
    model = model().double().eval()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    before = output_and_gradients(model, images)
    model.model.set_attn_implementation("vitfast")
    assert_same(output_and_gradients(model, images), before)


@pytest.mark.parametrize("name", ["timm ViT", "timm Swin", "torchvision Swin"])
def test_compiles_without_a_graph_break(name):
    model, _, images = made(name)
    expected = output_and_gradients(model, images)
    vitfast.accelerate(model)
    model.compile(fullgraph=True, backend="aot_eager")
    assert_same(output_and_gradients(model, images), expected)


def test_second_derivatives():
    """timm's own Swin has none on PyTorch's fused attention; accelerated, they are exact."""
    model, _, images = made("timm Swin")
    vitfast.accelerate(model)
    table = model.layers[0].blocks[1].attn.relative_position_bias_table
    direction = torch.randn_like(table)

    def gradient():
        return torch.autograd.grad(model(images).square().sum(), table, create_graph=True)[0]

    (product,) = torch.autograd.grad((gradient() * direction).sum(), table)
    step = 1e-5
    with torch.no_grad():
        table += step * direction
    plus = gradient().detach()
    with torch.no_grad():
        table -= 2 * step * direction
    minus = gradient().detach()
    torch.testing.assert_close(product, (plus - minus) / (2 * step), rtol=1e-5, atol=1e-7)


TEXT = {"vocab_size": 40, **SMALL, "max_position_embeddings": 32}
TEXT_MODELS = {
    "padded": lambda: transformers.BertModel(transformers.BertConfig(**TEXT), add_pooling_layer=False),
    "causal": lambda: transformers.LlamaModel(transformers.LlamaConfig(**TEXT)),
    "causal with shared keys": lambda: transformers.LlamaModel(
        transformers.LlamaConfig(**TEXT | {"num_attention_heads": 6}, num_key_value_heads=2)
    ),
    "sliding window": lambda: transformers.MistralModel(
        transformers.MistralConfig(**TEXT, num_key_value_heads=3, sliding_window=3)
    ),
}


@pytest.mark.parametrize("name", TEXT_MODELS)
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_attention_implementation_keeps_the_masks_of_transformers(name, padding):
    package.register_attention()
    model = TEXT_MODELS[name]().double().eval()
    tokens, mask = torch.randint(40, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    if padding != "none":
        mask[1, slice(4) if padding == "left" else slice(5, None)] = 0
    outputs = []
    for implementation in ("sdpa", "vitfast"):
        model.set_attn_implementation(implementation)
        outputs.append(model(tokens, attention_mask=mask)[0][mask.bool()])
    torch.testing.assert_close(outputs[1], outputs[0])


def test_masks_of_transformers_attention():
    model = transformers_vit().double().eval().model
    attention = next(module for module in model.modules() if type(module).__name__ == "ViTAttention")
    x, mask = torch.randn(2, 9, 24, dtype=torch.float64), torch.randn(2, 1, 9, 9, dtype=torch.float64)
    expected = attention(x, mask)[0]
    assert len(vitfast.accelerate(attention, report=True).replaced) == 1
    torch.testing.assert_close(attention(x, mask)[0], expected)


def test_heads_that_were_pruned_by_hand():
    """As people do with timm's attention: fewer heads in both projections."""
    model = timm_vit().double().eval()
    attention = model.blocks[0].attn
    kept = torch.cat([torch.arange(8) + 24 * part + 8 * head for part in range(3) for head in (0, 2)])
    attention.qkv.weight = nn.Parameter(attention.qkv.weight[kept].detach())
    attention.qkv.bias = nn.Parameter(attention.qkv.bias[kept].detach())
    attention.proj.weight = nn.Parameter(attention.proj.weight[:, kept[:16]].detach())
    attention.num_heads, attention.attn_dim = 2, 16
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    before = output_and_gradients(model, images)
    vitfast.accelerate(model)
    assert_same(output_and_gradients(model, images), before)


@pytest.mark.parametrize("name", ["timm ViT", "timm Swin", "torchvision Swin", "torchvision ViT"])
def test_scripts_and_traces(name):
    model, _, images = made(name)
    expected = model(images)
    vitfast.accelerate(model)
    torch.testing.assert_close(torch.jit.trace(model, images)(images), expected)
    if name != "timm Swin":  # which timm itself cannot have scripted
        torch.testing.assert_close(torch.jit.script(model)(images), expected)
    torch.testing.assert_close(model(images), expected)


def test_graphs_of_torchvision():
    from torchvision.models.feature_extraction import create_feature_extractor

    model = torchvision_vit().eval()
    images = torch.randn(2, 3, 32, 32)
    expected = create_feature_extractor(model, ["encoder"])(images)["encoder"]
    found = create_feature_extractor(vitfast.accelerate(model), ["encoder"])(images)["encoder"]
    torch.testing.assert_close(found, expected)


def test_a_forward_of_the_instance_is_called():
    model = torchvision_vit().double().eval()
    attention = model.encoder.layers[0].self_attention
    original, seen = attention.forward, []

    def watched(*args, **kwargs):
        output = original(*args, **kwargs | {"need_weights": True})
        seen.append(output[1])
        return output

    attention.forward = watched
    vitfast.accelerate(model)
    model(torch.randn(2, 3, 32, 32, dtype=torch.float64))
    assert len(seen) == 1


def test_hooks_on_all_modules_see_what_they_saw():
    model, _, images = made("timm ViT")
    calls = []

    def count():
        calls.clear()
        handle = nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(type(module).__name__))
        model(images)
        handle.remove()
        return [name.removeprefix("Fused") for name in calls]

    expected = count()
    vitfast.accelerate(model)
    assert count() == expected


def test_hooks_on_what_normalises_nothing():
    model, _, images = made("timm ViT")
    seen = []
    model.blocks[0].attn.q_norm.register_forward_hook(lambda *_: seen.append(1))
    vitfast.accelerate(model)(images)
    assert seen == [1]


def test_the_report_speaks_of_other_activations_and_attention():
    model = nn.ModuleDict(
        {
            "clip": timm.layers.Mlp(4, act_layer=timm.layers.QuickGELU),
            "tanh": timm.layers.Mlp(4, act_layer=timm.layers.GELUTanh),
            "twins": timm.models.twins.LocallyGroupedAttn(8, 2, ws=2),
        }
    )
    report = vitfast.accelerate(model, report=True)
    assert not report.replaced
    assert report.kept == {
        "clip": "Mlp: its activation is QuickGELU(), not the exact GELU",
        "tanh": "Mlp: its activation is GELUTanh(), not the exact GELU",
        "twins": "there is no fused kernel for timm.models.twins.LocallyGroupedAttn",
    }


def test_an_unknown_version_of_a_library_is_no_matter_to_models_of_others(monkeypatch):
    adapter = package._adapter

    def broken(library):
        if library == "timm":
            raise ImportError("cannot import name 'Attention' from 'timm.layers'")
        return adapter(library)

    monkeypatch.setattr(package, "_adapter", broken)
    assert len(vitfast.accelerate(torchvision_swin(), report=True).replaced) == 13
    model = timm_vit()
    report = vitfast.accelerate(model, report=True)
    assert not report.replaced
    assert "this version of timm is not known: cannot import name 'Attention'" in str(report)
    assert vitfast.restore(model) is model


def test_no_library_is_imported():
    code = (
        "import sys, torch, vitfast\n"
        "vitfast.accelerate(torch.nn.Linear(2, 2))\n"
        "assert not {'timm', 'torchvision', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
