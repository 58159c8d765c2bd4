"""Weights in every layout, against the models that they come from. The files are made here."""

import json
import re

import libraries  # noqa: F401  (before the libraries themselves)
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
import transformers

import vitfast
from vitfast.models import create_model, load_weights
from vitfast.models.weights import read_weights

VIT = {"embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 10, "image_size": 32, "patch_size": 8}
SWIN = {"embed_dim": 12, "depths": (2, 2), "num_heads": (2, 3), "num_classes": 10, "image_size": 64, "window_size": 4}


def make_vit(**options):
    return create_model("vit_ti", **VIT | options).double().eval()


def make_swin(**options):
    return create_model("swin_t", **SWIN | options).double().eval()


def prepared(model):
    """In float64 and evaluation mode, with weights that all matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.double().eval()


def logits_of(model, x):
    output = model(x)
    return output if isinstance(output, torch.Tensor) else output.logits


def assert_same_logits(ours, theirs, size):
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), logits_of(theirs, x), rtol=1e-9, atol=1e-10)


def timm_vit():
    return timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=10
    ), make_vit()


def timm_swin():
    return timm.models.SwinTransformer(
        img_size=64, embed_dim=12, depths=(2, 2), num_heads=(2, 3), num_classes=10, window_size=4
    ), make_swin()


def torchvision_vit():
    return torchvision.models.VisionTransformer(32, 8, 2, 3, 24, 96, num_classes=10), make_vit()


def torchvision_swin():
    return torchvision.models.SwinTransformer([4, 4], 12, [2, 2], [2, 3], [4, 4], num_classes=10), make_swin()


def transformers_vit():
    config = transformers.ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=96,
        image_size=32,
        patch_size=8,
        num_labels=10,
        layer_norm_eps=1e-6,
    )
    return transformers.ViTForImageClassification(config), make_vit()


def transformers_swin():
    config = transformers.SwinConfig(
        image_size=64, embed_dim=12, depths=[2, 2], num_heads=[2, 3], window_size=4, num_labels=10
    )
    return transformers.SwinForImageClassification(config), make_swin()


SOURCES = [timm_vit, timm_swin, torchvision_vit, torchvision_swin, transformers_vit, transformers_swin]


@pytest.mark.parametrize("make", SOURCES)
def test_state_dicts(make):
    theirs, ours = make()
    prepared(theirs)
    assert load_weights(ours, theirs.state_dict()) is ours
    assert_same_logits(ours, theirs, 64 if "swin" in make.__name__ else 32)


@pytest.mark.parametrize("make", [transformers_vit, transformers_swin])
@pytest.mark.parametrize("sharded", [False, True])
def test_folders_of_transformers(make, sharded, tmp_path):
    """Its files have other names than its modules."""
    theirs, ours = make()
    prepared(theirs).save_pretrained(tmp_path, max_shard_size="20KB" if sharded else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == sharded
    load_weights(ours, tmp_path)
    assert_same_logits(ours, theirs, 64 if make is transformers_swin else 32)


@pytest.mark.parametrize("extra", ["pooler.dense.weight", "pre_logits.fc.weight", "pre_logits/kernel"])
def test_layers_before_a_classifier_that_stays_behind(extra):
    model = make_vit()
    state = model.state_dict() | {extra: torch.zeros(3, 3)}
    with pytest.raises(ValueError, match=f"unexpected: {extra}; only the classifier differs"):
        load_weights(model, state)
    load_weights(make_vit(), state, classifier=False)


@pytest.mark.parametrize(("model", "source"), [(3, {}), (torch.nn.Linear(1, 1), 5), (torch.nn.Linear(1, 1), None)])
def test_what_is_no_model_or_no_source(model, source):
    with pytest.raises(TypeError, match=r"load_weights takes a model|source must be a state dict"):
        load_weights(model, source)


def test_the_model_without_classifier_of_transformers():
    theirs, _ = transformers_vit()
    prepared(theirs)
    ours = make_vit(num_classes=0)
    load_weights(ours, {k: v for k, v in theirs.vit.state_dict().items() if "pooler" not in k})
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs.vit(x).last_hidden_state[:, 0], rtol=1e-9, atol=1e-10)


def as_old_timm_swin(state):
    """timm 0.5: merging at the end of a stage, the classifier called head, buffers saved."""
    old = {}
    for key, value in state.items():
        key = re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", key)
        old[key.replace("head.fc.", "head.")] = value
    old["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.long)
    old["layers.0.blocks.1.attn_mask"] = torch.zeros(16, 16, 16)
    return old


def test_swin_of_old_timm(tmp_path):
    theirs, ours = timm_swin()
    prepared(theirs)
    torch.save({"model": as_old_timm_swin(theirs.state_dict()), "epoch": 3}, tmp_path / "swin.pth")
    load_weights(ours, tmp_path / "swin.pth")
    assert_same_logits(ours, theirs, 64)


def as_google(model, prefix):
    """The arrays of Google's .npz files, from a ViT of this package."""
    arrays, heads = {}, model.blocks[0].attn.num_heads
    state = {key: value.numpy() for key, value in model.state_dict().items()}

    def put(name, key, reshape=lambda weight: weight.T):
        arrays[f"{name}/kernel"] = reshape(state[f"{key}.weight"])
        arrays[f"{name}/bias"] = state[f"{key}.bias"]

    def put_norm(name, key):
        arrays[f"{name}/scale"], arrays[f"{name}/bias"] = state[f"{key}.weight"], state[f"{key}.bias"]

    put("embedding", "patch_embed.proj", lambda weight: weight.transpose(2, 3, 1, 0))
    arrays["cls"] = state["cls_token"]
    arrays["Transformer/posembed_input/pos_embedding"] = state["pos_embed"]
    for i in range(len(model.blocks)):
        name, key = f"Transformer/encoderblock_{i}", f"blocks.{i}"
        put_norm(f"{name}/LayerNorm_0", f"{key}.norm1")
        put_norm(f"{name}/LayerNorm_2", f"{key}.norm2")
        put(f"{name}/MlpBlock_3/Dense_0", f"{key}.mlp.fc1")
        put(f"{name}/MlpBlock_3/Dense_1", f"{key}.mlp.fc2")
        attention = f"{name}/MultiHeadDotProductAttention_1"
        for part, weight, bias in zip(
            ("query", "key", "value"),
            np.split(state[f"{key}.attn.qkv.weight"], 3),
            np.split(state[f"{key}.attn.qkv.bias"], 3),
            strict=True,
        ):
            arrays[f"{attention}/{part}/kernel"] = weight.T.reshape(len(weight), heads, -1)
            arrays[f"{attention}/{part}/bias"] = bias.reshape(heads, -1)
        put(f"{attention}/out", f"{key}.attn.proj", lambda weight: weight.T.reshape(heads, -1, len(weight)))
    put_norm("Transformer/encoder_norm", "norm")
    put("head", "head")
    return {prefix + name: array for name, array in arrays.items()}


@pytest.mark.parametrize("prefix", ["", "opt/target/", "params/"])
def test_googles_files(prefix, tmp_path):
    source, ours = prepared(make_vit()), make_vit()
    np.savez(tmp_path / "vit.npz", **as_google(source, prefix))
    load_weights(ours, tmp_path / "vit.npz")
    assert_same_logits(ours, source, 32)


def test_timm_reads_googles_files_alike(tmp_path):
    """What `as_google` writes is what timm's own reader takes for Google's."""
    source = prepared(make_vit())
    np.savez(tmp_path / "vit.npz", **as_google(source, ""))
    theirs = timm_vit()[0].double().eval()
    theirs.load_pretrained(str(tmp_path / "vit.npz"))
    assert_same_logits(source, theirs, 32)


def test_authors_resnet(tmp_path, golden):
    """The layout of the ResNets of Park & Kim is that of the models here."""
    name = "resnet_18"
    state = {key: golden.weights(key, tuple(shape)) for key, shape in golden.facts[name]["state"]}
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "resnet.pth.tar")
    model = create_model(name, num_classes=100, stem=False).double().eval()
    load_weights(model, tmp_path / "resnet.pth.tar")
    with torch.no_grad():
        logits = model(golden.images(golden.facts[name]["input"]))
    torch.testing.assert_close(logits, golden.logits(name), rtol=1e-9, atol=1e-9)


def test_round_trip_through_safetensors(tmp_path):
    source = prepared(make_swin())
    safetensors.torch.save_file(source.state_dict(), tmp_path / "swin.safetensors")
    ours = create_model("swin_t", pretrained=tmp_path / "swin.safetensors", **SWIN).double().eval()
    assert_same_logits(ours, source.float().double(), 64)


def test_compiled_models_prefix_is_removed(tmp_path):
    source = prepared(make_vit())
    torch.save({f"module._orig_mod.{k}": v for k, v in source.state_dict().items()}, tmp_path / "vit.pt")
    ours = make_vit()
    load_weights(ours, str(tmp_path / "vit.pt"))
    assert_same_logits(ours, source, 32)


def test_positions_of_another_image_size(tmp_path):
    source = make_vit(image_size=48)
    torch.save(source.state_dict(), tmp_path / "vit.pt")
    ours = load_weights(make_vit(), tmp_path / "vit.pt")
    source.set_image_size(32)
    assert torch.equal(ours.pos_embed, source.pos_embed)


def test_the_classifier_can_stay(tmp_path):
    torch.manual_seed(0)
    source, ours = prepared(make_vit()), make_vit(num_classes=3)
    head = ours.head.weight.clone()
    with pytest.raises(ValueError, match=r"only the classifier differs: load_weights\(\.\.\., classifier=False\)"):
        load_weights(ours, source.state_dict())
    load_weights(ours, source.state_dict(), classifier=False)
    assert torch.equal(ours.head.weight, head)
    assert torch.equal(ours.blocks[1].mlp.fc2.weight, source.blocks[1].mlp.fc2.weight)


@pytest.mark.parametrize("layout", ["hub cache", "sharded hub cache"])
def test_hub_repositories_from_the_cache(tmp_path, monkeypatch, layout):
    """The cache that huggingface_hub keeps, filled here, and the network turned off."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    source = prepared(make_vit())
    state = {key: value.contiguous() for key, value in source.state_dict().items()}
    snapshot = tmp_path / "models--someone--vit" / "snapshots" / "0123456789"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0123456789")
    if layout == "hub cache":
        safetensors.torch.save_file(state, snapshot / "model.safetensors")
    else:
        halves = {"a.safetensors": sorted(state)[::2], "b.safetensors": sorted(state)[1::2]}
        for file, keys in halves.items():
            safetensors.torch.save_file({key: state[key] for key in keys}, snapshot / file)
        index = {"weight_map": {key: file for file, keys in halves.items() for key in keys}}
        (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same_logits(load_weights(make_vit(), "someone/vit"), source, 32)
    assert_same_logits(load_weights(make_vit(), "hf-hub:someone/vit"), source, 32)
    with pytest.raises(FileNotFoundError, match=r"no file someone/else, .* its cache has none"):
        load_weights(make_vit(), "someone/else")


def test_published_weights_are_timms():
    """Every name that stands for `pretrained=True` is a repository that timm knows, of the same architecture."""
    from vitfast.models.registry import _models

    published = {name: entry.weights for name, entry in _models.items() if entry.weights is not None}
    assert set(published) == {*(f"vit_{size}" for size in ("ti", "s", "b", "l")), *(f"swin_{s}" for s in "tsbl")}
    for name, repository in published.items():
        theirs = repository.removeprefix("timm/")
        config = timm.get_pretrained_cfg(theirs)
        assert config is not None
        assert config.num_classes == 1000
        with torch.device("meta"):
            ours = create_model(name)
            assert list(ours.state_dict()) == list(timm.create_model(theirs).state_dict())


def test_package_exports_it():
    assert vitfast.load_weights is load_weights


# ---- what does not fit -----------------------------------------------------------------------------------------------


def test_a_wrong_checkpoint_is_listed_and_changes_nothing():
    model = make_vit()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = {key: value + 1 for key, value in before.items()}
    del state["blocks.1.norm1.weight"]
    state["blocks.2.norm1.weight"] = torch.zeros(24)
    state["cls_token"] = torch.zeros(1, 1, 25)
    with pytest.raises(ValueError, match="does not fit this VisionTransformer") as caught:
        load_weights(model, state)
    message = str(caught.value)
    assert "missing: blocks.1.norm1.weight" in message
    assert "unexpected: blocks.2.norm1.weight" in message
    assert "of another shape: cls_token is (1, 1, 25) instead of (1, 1, 24)" in message
    assert "classifier=False" not in message
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_long_lists_are_cut():
    with pytest.raises(ValueError, match=r"missing: cls_token, pos_embed, .* and \d+ more; unexpected: patch_embed"):
        load_weights(make_vit(), make_swin().state_dict())


def test_create_model_says_what_does_not_fit(tmp_path):
    torch.save(make_vit().state_dict(), tmp_path / "vit.pt")
    with pytest.raises(ValueError, match=r"vit\.pt does not fit this VisionTransformer: .*classifier=False"):
        create_model("vit_ti", pretrained=tmp_path / "vit.pt", **VIT | {"num_classes": 3})


class NotData:
    pass


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("model.pt", lambda path: torch.save({"model": NotData()}, path), "not a file of tensors and plain data"),
        ("model.pt", lambda path: torch.save({"epoch": 3}, path), "holds no state dict"),
        ("model.pt", lambda path: torch.save([torch.ones(1)], path), "holds no state dict"),
        ("model.pt", lambda path: path.write_bytes(b"not a checkpoint"), "not a file of tensors and plain data"),
        ("model.pt", lambda path: path.write_bytes(b""), "not a file of tensors and plain data"),
        ("model.safetensors", lambda path: path.write_bytes(b"12345678"), "is not a safetensors file"),
        ("model.npz", lambda path: path.write_bytes(b"not an archive"), "is not a file of NumPy arrays"),
        ("model.npz", lambda path: np.savez(path, cls=np.array([None])), "is not a file of NumPy arrays"),
    ],
)
def test_files_without_weights(tmp_path, name, write, message):
    path = tmp_path / name
    write(path)
    with pytest.raises(ValueError, match=message):
        read_weights(path)


@pytest.mark.parametrize("source", ["no/such/file.pt", "weights.safetensors", "runs/model.npz"])
def test_missing_files(source):
    with pytest.raises(FileNotFoundError, match=f"there is no file {re.escape(source)}"):
        read_weights(source)


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there are no weights in .*; expected one of model\.safetensors"):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    ("package", "source"), [("safetensors", "model.safetensors"), ("huggingface_hub", "someone/vit")]
)
def test_missing_packages_say_how_to_install_them(tmp_path, monkeypatch, package, source):
    import sys

    (tmp_path / "model.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r'pip install "vitfast\[weights\]"'):
        read_weights(source)


def test_patches_that_are_no_square():
    state = {"embedding.0.patch_embedding.1.weight": torch.zeros(24, 3 * 7)}
    with pytest.raises(ValueError, match="cannot be that of square patches of 3 channels"):
        load_weights(make_vit(), state)
