import pytest
import torch

import vitfast
from vitfast.models import create_model, list_models, register
from vitfast.models import registry as registry_module


def tiny(*, num_classes, width=4):
    return torch.nn.Linear(width, num_classes)


@pytest.fixture
def registry(monkeypatch):
    """A copy, so that what a test registers is gone after it."""
    monkeypatch.setattr(registry_module, "_models", dict(registry_module._models))


def test_lists_by_pattern():
    assert list_models("alternet_*") == [
        *(f"alternet_{depth}" for depth in (18, 34, 50, 101, 152)),
        "alternet_18_cifar",
        "alternet_50_cifar",
    ]
    assert len(list_models("*resnet_mcdo_??")) == 6
    assert list_models("vit_*") == [f"vit_{size}" for size in ("ti", "s", "b", "l", "h")]
    assert list_models("swin_*") == [f"swin_{size}" for size in ("t", "s", "b", "l")]
    assert len(list_models("resnet_*")) == len(list_models("preresnet_*")) == 5 * 5  # plain under two names
    assert len(list_models()) == 7 + 50 + 5 + 4
    assert list_models("no such model") == []


def test_every_name_makes_a_model():
    for name in list_models():
        with torch.device("meta"):
            model = create_model(name, num_classes=7)
        assert model(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 7)


def test_package_exports_it():
    assert vitfast.create_model is create_model
    assert vitfast.list_models is list_models


@pytest.mark.usefixtures("registry")
def test_registered_models_take_options_over_defaults():
    register("tiny", tiny, width=2)
    assert create_model("tiny").weight.shape == (1000, 2)
    assert create_model("tiny", num_classes=3, width=5).weight.shape == (3, 5)


@pytest.mark.usefixtures("registry")
def test_a_name_is_registered_once():
    register("tiny", tiny)
    with pytest.raises(ValueError, match="already a model 'tiny'"):
        register("tiny", tiny)


def test_unknown_name_suggests_close_ones():
    with pytest.raises(ValueError, match=r"no model 'alternet50'; did you mean .*alternet_50\b"):
        create_model("alternet50")
    with pytest.raises(ValueError, match=r"no model 'zzz'; vitfast\.list_models\(\)"):
        create_model("zzz")


def test_some_models_have_no_published_weights():
    with pytest.raises(ValueError, match=r"no published weights for alternet_18; .* pretrained=path"):
        create_model("alternet_18", pretrained=True)


def test_unknown_option_names_the_known_ones():
    with pytest.raises(TypeError, match=r"resnet_18 has no option windows; it has: .*in_channels, width, stem"):
        create_model("resnet_18", windows=7)
