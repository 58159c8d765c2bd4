import copy
import pickle

import libraries  # noqa: F401  (before the libraries themselves)
import pytest
import timm
import torch
import torchvision
from helpers import assert_close_to_reference
from modules import assert_same, output_and_gradients

import vitfast
from vitfast.models import SwinTransformer, create_model, load_weights

SMALL = {"embed_dim": 12, "depths": (2, 2), "num_heads": (2, 3), "num_classes": 10, "drop_path": 0.0}
PRESETS = {
    "swin_t": "swin_tiny_patch4_window7_224",
    "swin_s": "swin_small_patch4_window7_224",
    "swin_b": "swin_base_patch4_window7_224",
    "swin_l": "swin_large_patch4_window7_224",
}
THEIR_NAMES = {"image_size": "img_size", "in_channels": "in_chans", "drop_path": "drop_path_rate"}


def draw(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)


def drop_rates(model):
    """Of all blocks; timm has an identity where it is 0."""
    return [getattr(block.drop_path1, "drop_prob", 0.0) for stage in model.layers for block in stage.blocks]


def make_timm_pair(**options):
    options = SMALL | options
    ours = SwinTransformer(**options)
    theirs = timm.models.SwinTransformer(**{THEIR_NAMES.get(name, name): value for name, value in options.items()})
    draw(theirs)
    ours.load_state_dict(theirs.state_dict())
    return ours.double(), theirs.double()


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": 32, "patch_size": 2, "window_size": 4},
        {"image_size": (32, 48), "patch_size": (2, 4), "window_size": (4, 3), "in_channels": 1, "qkv_bias": False},
        {"image_size": 24, "patch_size": 2, "window_size": 7, "mlp_ratio": 2.0},  # last map smaller than the window
    ],
)
def test_is_timms(options):
    ours, theirs = make_timm_pair(**options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    size = options["image_size"]
    x = torch.randn(2, options.get("in_channels", 3), *(size if isinstance(size, tuple) else (size, size)))
    if options["window_size"] == 7:
        # timm rolls before it pads; where the map of a shifted block needs padding, that is another result.
        for stage in (*ours.layers, *theirs.layers):
            del stage.blocks[1]
    assert_same(output_and_gradients(ours, x.double()), output_and_gradients(theirs, x.double()))


def test_drops_what_timms_drops():
    ours, theirs = make_timm_pair(image_size=32, patch_size=2, window_size=4, drop_path=0.5, depths=(3, 3))
    x = torch.randn(6, 3, 32, 32, dtype=torch.float64)
    results = []
    for model in (ours, theirs):
        for stage in model.layers:
            for block in stage.blocks:
                if hasattr(block.drop_path1, "drop_prob") and block.drop_path1.drop_prob > 0:
                    block.drop_path1.drop_prob = block.drop_path2.drop_prob = 0.25  # timm's are rounded to float32
        torch.manual_seed(11)
        results.append(output_and_gradients(model.train(), x))
    assert_same(*results)


@pytest.mark.parametrize("size", [(64, 64), (96, 72), (60, 100), (36, 28), (8, 12)])
def test_maps_of_any_size_are_padded_as_torchvision_does(size):
    theirs = torchvision.models.SwinTransformer(
        patch_size=[4, 4], embed_dim=12, depths=[2, 2], num_heads=[2, 3], window_size=[4, 4], num_classes=10
    ).double()
    draw(theirs)
    ours = SwinTransformer(**SMALL, image_size=64, window_size=4).double()
    load_weights(ours, theirs.state_dict())
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    for model in (ours, theirs.eval()):
        model.eval()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-11)


def test_images_are_padded_to_whole_patches():
    model = SwinTransformer(**SMALL, image_size=32, window_size=4).double().eval()
    x = torch.randn(2, 3, 30, 33, dtype=torch.float64)
    padded = torch.zeros(2, 3, 32, 36, dtype=torch.float64)
    padded[:, :, :30, :33] = x
    torch.testing.assert_close(model(x), model(padded))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_timms(name):
    with torch.device("meta"):
        ours, theirs = create_model(name), timm.create_model(PRESETS[name])
    assert {key: value.shape for key, value in ours.state_dict().items()} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }
    assert drop_rates(ours) == pytest.approx(drop_rates(theirs))


def test_float32_is_as_exact_as_plain_pytorch():
    model = create_model("swin_t", num_classes=10).double().eval()
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        exact = model(x.double())
        fused = model.float()(x)
        with vitfast.backend("reference"):
            plain = model(x)
    assert_close_to_reference(fused, plain, exact)


def test_bias_tables_of_another_window_are_interpolated():
    source = SwinTransformer(**SMALL, image_size=64, window_size=4)
    target = SwinTransformer(**SMALL, image_size=64, window_size=8)
    draw(source)
    target.load_state_dict(source.state_dict())
    key = "layers.0.blocks.1.attn.relative_position_bias_table"
    assert target.state_dict()[key].shape == (225, 2)
    for stage in source.layers:
        for block in stage.blocks:
            block.attn.set_window_size(block.attn.window_size[0] * 2)
    assert torch.equal(source.state_dict()[key], target.state_dict()[key])
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(source.eval()(x), target.eval()(x))


def test_without_classes_it_returns_features():
    model = SwinTransformer(**SMALL | {"num_classes": 0}, image_size=32, window_size=4).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x), model.forward_features(x).mean((1, 2)))


def test_copies_and_pickles():
    model = SwinTransformer(**SMALL, image_size=32, window_size=4).eval()
    x = torch.randn(2, 3, 32, 32)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))


def test_compiles_without_graph_breaks():
    model = SwinTransformer(**SMALL, image_size=32, window_size=4)
    x = torch.randn(2, 3, 30, 40)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"depths": (2, 2, 2)}, ValueError, "depths and num_heads must have one entry per stage each"),
        ({"depths": (2, 0)}, ValueError, "depths must be integers of at least 1, one per stage"),
        ({"num_heads": 3}, TypeError, "num_heads must be integers, one per stage; got 3"),
        ({"window_size": 0}, ValueError, "window_size must be at least 1; got 0"),
        ({"image_size": 0}, ValueError, "image_size must be at least 1; got 0"),
        ({"embed_dim": 12.0}, TypeError, "embed_dim must be an integer; got 12.0"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        SwinTransformer(**SMALL | options)


def test_images_of_another_number_of_channels():
    model = SwinTransformer(**SMALL, image_size=32, window_size=4)
    with pytest.raises(ValueError, match=r"images must have the shape \(B, 3, H, W\)"):
        model(torch.randn(2, 4, 32, 32))
