import pytest
import torch

from vitfast.models import create_model

NAMES = [f"{family}_{depth}" for family in ("resnet", "preresnet") for depth in (18, 34, 50, 101, 152)]
WITH_LOGITS = ["resnet_18", "resnet_34", "resnet_50", "preresnet_18", "preresnet_50"]
LARGEST_WITH_LOGITS = ["resnet_152", "preresnet_101"]


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_state_dict_are_the_authors(golden, name):
    with torch.device("meta"):
        model = create_model(name, num_classes=100, stem=False)
    assert golden.state(model) == golden.facts[name]["state"]
    assert sum(p.numel() for p in model.parameters()) == golden.facts[name]["params"]


@pytest.mark.parametrize("name", WITH_LOGITS + [pytest.param(n, marks=pytest.mark.slow) for n in LARGEST_WITH_LOGITS])
def test_logits_are_the_authors(golden, name):
    model = golden.load(create_model(name, num_classes=100, stem=False))
    with torch.no_grad():
        logits = model(golden.images(golden.facts[name]["input"]))
    expected = golden.logits(name)
    assert (logits - expected).abs().max() <= 1e-9 * expected.abs().max()


@pytest.mark.parametrize("name", ["resnet_18", "preresnet_50"])
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
