import copy
import pickle

import libraries  # noqa: F401  (before the libraries themselves)
import pytest
import timm
import torch
from helpers import assert_close_to_reference
from modules import assert_same, output_and_gradients

import vitfast
from vitfast.models import VisionTransformer, create_model, load_weights

SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 10}
THEIR_NAMES = {
    "image_size": "img_size",
    "in_channels": "in_chans",
    "drop": "drop_rate",
    "drop_path": "drop_path_rate",
    "pos_drop": "pos_drop_rate",
    "proj_drop": "proj_drop_rate",
}
PRESETS = {
    "vit_ti": "vit_tiny_patch16_224",
    "vit_s": "vit_small_patch16_224",
    "vit_b": "vit_base_patch16_224",
    "vit_l": "vit_large_patch16_224",
    "vit_h": "vit_huge_patch14_224",
}


def make_pair(**options):
    ours = VisionTransformer(**SMALL, **options)
    theirs = timm.models.VisionTransformer(
        **SMALL, **{THEIR_NAMES.get(name, name): value for name, value in options.items()}
    )
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
    ours.load_state_dict(theirs.state_dict())
    return ours.double(), theirs.double()


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": 32, "patch_size": 8},
        {"image_size": (24, 40), "patch_size": (8, 4), "in_channels": 1, "qkv_bias": False},
        {"image_size": 32, "patch_size": 16, "global_pool": "avg", "init_values": 0.1},
        {"image_size": 32, "patch_size": 8, "global_pool": "avg", "class_token": False, "qk_norm": True},
        {"image_size": 16, "patch_size": 16, "mlp_ratio": 1.5},
    ],
)
def test_is_timms(options):
    ours, theirs = make_pair(**options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    rows, columns = ours.image_size
    x = torch.randn(2, options.get("in_channels", 3), rows, columns, dtype=torch.float64)
    assert_same(output_and_gradients(ours, x), output_and_gradients(theirs, x))
    torch.testing.assert_close(ours.forward_features(x), theirs.forward_features(x), rtol=1e-10, atol=1e-11)


def test_drops_what_timms_drops():
    ours, theirs = make_pair(image_size=32, patch_size=8, drop=0.1, pos_drop=0.2, proj_drop=0.1, drop_path=0.5)
    x = torch.randn(6, 3, 32, 32, dtype=torch.float64)
    results = []
    for model in (ours, theirs):
        torch.manual_seed(11)
        results.append(output_and_gradients(model.train(), x))
    assert_same(*results)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_timms(name):
    with torch.device("meta"):
        ours, theirs = create_model(name), timm.create_model(PRESETS[name], num_classes=1000)
    assert {key: value.shape for key, value in ours.state_dict().items()} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_those_of_the_papers_authors(golden, name):
    with torch.device("meta"):
        model = create_model(name, num_classes=100, patch_size=16, qkv_bias=False)
    assert sum(p.numel() for p in model.parameters()) == golden.facts[name]["params"]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_logits_are_the_authors(golden, backend):
    facts = golden.facts["vit_ti"]
    model = create_model("vit_ti", num_classes=100, qkv_bias=False, norm_eps=1e-5).double().eval()
    load_weights(model, {key: golden.weights(key, tuple(shape)) for key, shape in facts["state"]})
    with torch.no_grad(), vitfast.backend(backend):
        logits = model(golden.images(facts["input"]))
    expected = golden.logits("vit_ti")
    assert (logits - expected).abs().max() <= 1e-9 * expected.abs().max()


def test_float32_is_as_exact_as_plain_pytorch():
    model = create_model("vit_ti", num_classes=10).double().eval()
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        exact = model(x.double())
        fused = model.float()(x)
        with vitfast.backend("reference"):
            plain = model(x)
    assert_close_to_reference(fused, plain, exact)


def test_without_classes_it_returns_features():
    model = VisionTransformer(**SMALL | {"num_classes": 0}, image_size=32, patch_size=8).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x), model.forward_features(x)[:, 0])


@pytest.mark.parametrize("options", [{}, {"class_token": False, "global_pool": "avg"}])
def test_positions_are_interpolated_as_timm_does(options):
    make_options = {"patch_size": 4, **options}
    source = VisionTransformer(**SMALL, image_size=24, **make_options)
    wide = VisionTransformer(**SMALL, image_size=(16, 40), **make_options)
    wide.load_state_dict(source.state_dict())
    expected = timm.layers.resample_abs_pos_embed(
        source.pos_embed.detach(), [4, 10], num_prefix_tokens=source.num_prefix_tokens
    )
    torch.testing.assert_close(wide.pos_embed.detach(), expected, rtol=0, atol=1e-6)
    source.set_image_size((16, 40))
    assert torch.equal(source.pos_embed, wide.pos_embed)
    x = torch.randn(2, 3, 16, 40)
    assert torch.equal(source.eval()(x), wide.eval()(x))


def test_a_model_inside_another_one_loads_too():
    source = torch.nn.Sequential(VisionTransformer(**SMALL, image_size=24, patch_size=4))
    target = torch.nn.Sequential(VisionTransformer(**SMALL, image_size=32, patch_size=4))
    target.load_state_dict(source.state_dict())
    assert target[0].pos_embed.shape == (1, 65, 24)


def test_image_size_of_the_same_grid_keeps_the_parameter():
    model = VisionTransformer(**SMALL, image_size=24, patch_size=4)
    before = model.pos_embed
    model.set_image_size(24)
    assert model.pos_embed is before


def test_copies_and_pickles():
    model = VisionTransformer(**SMALL, image_size=24, patch_size=4).eval()
    x = torch.randn(2, 3, 24, 24)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))


def test_compiles_without_graph_breaks():
    model = VisionTransformer(**SMALL, image_size=16, patch_size=8)
    x = torch.randn(2, 3, 16, 16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"global_pool": "max"}, ValueError, "global_pool must be one of 'token', 'avg'; got 'max'"),
        ({"class_token": False}, ValueError, 'global_pool "token" needs a class token'),
        ({"image_size": 225}, ValueError, r"image_size must be a multiple of patch_size = \(16, 16\); got 225"),
        ({"num_classes": -1}, ValueError, "num_classes must be at least 0; got -1"),
        ({"depth": 2.0}, TypeError, "depth must be an integer; got 2.0"),
        ({"num_heads": 5}, ValueError, "dim must be a multiple of num_heads"),
        ({"drop_path": 1.0}, ValueError, "drop_prob must be at least 0 and less than 1"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        VisionTransformer(**SMALL | options)


def test_images_of_another_size_name_the_way_out():
    model = VisionTransformer(**SMALL, image_size=32, patch_size=8)
    with pytest.raises(
        ValueError, match=r"images of \(32, 32\) pixels; got .*\(1, 3, 32, 40\)\. model\.set_image_size"
    ):
        model(torch.randn(1, 3, 32, 40))


def test_positions_that_are_no_square_do_not_load():
    model = VisionTransformer(**SMALL, image_size=32, patch_size=8)
    state = model.state_dict() | {"pos_embed": torch.zeros(1, 12, 24)}
    with pytest.raises(RuntimeError, match="size mismatch for pos_embed"):
        model.load_state_dict(state)
