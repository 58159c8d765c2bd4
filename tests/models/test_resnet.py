import pytest
import torch

from vitfast.models import ResNet, create_model, list_models
from vitfast.nn import MCDropout

VARIANTS = ["", "mcdo_", "dnn_smoothing_", "mcdo_smoothing_"]
NAMES = [
    f"{family}_{variant}{depth}"
    for family in ("resnet", "preresnet")
    for variant in VARIANTS
    for depth in (18, 34, 50, 101, 152)
]
WITH_LOGITS = [
    *("resnet_18", "resnet_34", "resnet_50", "preresnet_18", "preresnet_50"),
    *("resnet_dnn_smoothing_18", "resnet_dnn_smoothing_50", "preresnet_dnn_smoothing_18", "preresnet_dnn_smoothing_34"),
]
LARGEST_WITH_LOGITS = [
    *("resnet_152", "preresnet_101"),
    *("resnet_dnn_smoothing_101", "resnet_dnn_smoothing_152"),
    *("preresnet_dnn_smoothing_101", "preresnet_dnn_smoothing_152"),
]


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_state_dict_are_the_authors(golden, name):
    for alias in golden.facts[name]["aliases"]:
        with torch.device("meta"):
            model = create_model(alias, num_classes=100, stem=False, compat="hdvw")
        assert golden.state(model) == golden.facts[name]["state"]
        assert sum(p.numel() for p in model.parameters()) == golden.facts[name]["params"]


@pytest.mark.parametrize("name", WITH_LOGITS + [pytest.param(n, marks=pytest.mark.slow) for n in LARGEST_WITH_LOGITS])
def test_logits_are_the_authors(golden, name):
    model = golden.load(create_model(name, num_classes=100, stem=False, compat="hdvw"))
    with torch.no_grad():
        logits = model(golden.images(golden.facts[name]["input"]))
    expected = golden.logits(name)
    assert (logits - expected).abs().max() <= 1e-9 * expected.abs().max()


@pytest.mark.parametrize("family", ["resnet", "preresnet"])
@pytest.mark.parametrize("depth", [18, 50])
def test_all_variants_have_the_same_weights(family, depth):
    """Without quirks, a checkpoint of one fits the others."""
    models = [create_model(f"{family}_{variant}{depth}", width=4) for variant in VARIANTS]
    first = {key: value.shape for key, value in models[0].state_dict().items()}
    assert all({key: value.shape for key, value in model.state_dict().items()} == first for model in models)


def test_every_name_of_the_authors_is_listed(golden):
    names = {alias for name in NAMES for alias in golden.facts[name]["aliases"]}
    assert names == set(list_models("resnet_*")) | set(list_models("preresnet_*"))


@pytest.mark.parametrize("preactivation", [False, True])
@pytest.mark.parametrize("bottleneck", [False, True])
def test_dropout_comes_before_the_last_convolution_of_each_block(preactivation, bottleneck, monkeypatch):
    options = {"num_blocks": (1, 1, 1, 1), "bottleneck": bottleneck, "preactivation": preactivation, "width": 4}
    plain = ResNet(**options).eval()
    dropping = ResNet(mc_dropout=0.5, **options).eval()
    dropping.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 64, 64)
    dropped_channels = []
    for module in dropping.modules():
        if isinstance(module, MCDropout):
            monkeypatch.setattr(module, "p", 0.0)
            module.register_forward_hook(lambda _, args, out: dropped_channels.append(out.shape[1]))
    torch.testing.assert_close(dropping(x), plain(x))
    assert dropped_channels == [4, 8, 16, 32]
    monkeypatch.undo()
    assert not torch.equal(dropping(x), dropping(x))  # in evaluation mode


@pytest.mark.parametrize("name", ["resnet_dnn_smoothing_18", "preresnet_dnn_smoothing_18"])
def test_smoothing_keeps_the_size_of_maps_and_follows_every_stage(name):
    model = create_model(name, width=4, stem=False)
    sizes = []
    for i in range(1, 5):
        assert len(model.get_submodule(f"smooth{i}")) == 1
        model.get_submodule(f"smooth{i}").register_forward_hook(lambda _, args, out: sizes.append(out.shape[2:]))
    model(torch.randn(1, 3, 32, 32))
    assert sizes == [(32, 32), (16, 16), (8, 8), (4, 4)]


@pytest.mark.parametrize("name", ["Tanh", "ReLu", "Scaling"])
def test_blocks_without_a_blur_keep_the_size_in_the_authors_way_too(name):
    model = create_model("resnet_18", smoothing=name, compat="hdvw", width=4, stem=False)
    seen = []
    model.smooth1.register_forward_hook(lambda _, args, out: seen.append((args[0].shape, out.shape)))
    model(torch.randn(1, 3, 32, 32))
    assert seen == [(torch.Size([1, 4, 32, 32]),) * 2]


def test_smoothing_by_name_by_function_and_by_stage():
    options = {"width": 4, "stem": False}
    named = create_model("resnet_18", smoothing="BNBlur", num_smoothings=(0, 2, 0, 0), **options)
    assert [len(named.get_submodule(f"smooth{i}")) for i in range(1, 5)] == [0, 2, 0, 0]
    assert isinstance(named.smooth2[0].bn, torch.nn.BatchNorm2d)
    made = create_model("resnet_18", smoothing=lambda channels: torch.nn.BatchNorm2d(channels), **options)
    assert [made.get_submodule(f"smooth{i}")[0].num_features for i in range(1, 5)] == [4, 8, 16, 32]
    with pytest.raises(ValueError, match="there is no smoothing block 'Gauss'; there are: Blur, TanhBlur"):
        create_model("resnet_18", smoothing="Gauss", **options)
    with pytest.raises(ValueError, match="compat must be 'hdvw' or None; got 'timm'"):
        create_model("resnet_18", compat="timm", **options)
    with pytest.raises(ValueError, match="mc_dropout must be at least 0 and less than 1; got 1"):
        create_model("resnet_18", mc_dropout=1, **options)


@pytest.mark.parametrize(
    "name", ["resnet_18", "preresnet_50", "resnet_mcdo_smoothing_50", "preresnet_mcdo_smoothing_18"]
)
def test_trains_at_any_width_and_channels(name):
    model = create_model(name, num_classes=5, in_channels=1, width=8, stem=False)
    out = model(torch.randn(2, 1, 32, 32))
    out.sum().backward()
    assert out.shape == (2, 5)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", ["resnet_18", "preresnet_18"])
def test_imagenet_stem_shrinks_by_four(name):
    model = create_model(name, width=8)
    assert model.layer0(torch.randn(1, 3, 64, 64)).shape == (1, 8, 16, 16)
    assert create_model(name, width=8, stem=False).layer0(torch.randn(1, 3, 64, 64)).shape == (1, 8, 64, 64)


def test_channels_last():
    model = create_model("preresnet_18", width=8, stem=False).double().eval()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected = model(x)
    torch.testing.assert_close(
        model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last)), expected
    )


def test_bad_input():
    with pytest.raises(ValueError, match=r"images must have the shape \(B, 3, H, W\); got \(2, 1, 32, 32\)"):
        create_model("resnet_18", width=8)(torch.zeros(2, 1, 32, 32))
    with pytest.raises(ValueError, match="width must be at least 1; got 0"):
        create_model("resnet_18", width=0)
    with pytest.raises(TypeError, match=r"num_classes must be an integer; got 2\.5"):
        create_model("resnet_18", num_classes=2.5)
    with pytest.raises(
        ValueError, match=r"num_blocks must be four integers, one per stage, of at least 1; got \(2, 2\)"
    ):
        create_model("resnet_18", num_blocks=(2, 2))
