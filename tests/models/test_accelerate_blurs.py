"""`accelerate` on the blurs of timm and kornia, alone and after a normalisation and an activation."""

import copy
import pickle

import libraries  # noqa: F401  (before the libraries themselves)
import pytest
import torch
from kornia.filters import BlurPool2D, MaxBlurPool2D
from modules import assert_same, output_and_gradients
from timm.layers import BlurPool2d, ConvNormAct
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

import vitfast
from vitfast.nn import BlurPool2d as OwnBlurPool2d


def timm_resnet(block, **options):
    options = {"aa_layer": BlurPool2d, "num_classes": 5, "stem_width": 8, "channels": (8, 8, 16, 16)} | options
    return ResNet(block, [1, 1, 1, 1], **options)


def kornia_network():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        BlurPool2D(3),
        nn.Conv2d(6, 4, 3),
        MaxBlurPool2D(4, max_pool_size=3),
    )


def mixed_network():
    """A normalisation, a ReLU6 and timm's blur inside of a larger sequence, and this package's own."""
    return nn.Sequential(
        nn.Conv2d(3, 5, 1),
        nn.BatchNorm2d(5, affine=False),
        nn.ReLU6(),
        BlurPool2d(5, filt_size=4, pad_mode="constant"),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        OwnBlurPool2d(5, padding="same"),
        nn.BatchNorm2d(5),
        nn.GELU(),
        BlurPool2d(stride=1),
    )


def convolutions_of_timm():
    """`ConvNormAct` with a ReLU and with another activation."""
    return nn.Sequential(
        ConvNormAct(3, 6, 3, stride=2, aa_layer=BlurPool2d),
        ConvNormAct(6, 6, 3, stride=2, aa_layer=BlurPool2d, act_layer=nn.SiLU),
        ConvNormAct(6, 6, 3),
    )


# name -> (model, classes of what is replaced)
MODELS = {
    "timm ResNet": (lambda: timm_resnet(BasicBlock), 3 * ["BasicBlock"] + 4 * ["BlurPool2d"]),
    "timm ResNet of bottlenecks": (lambda: timm_resnet(Bottleneck), 3 * ["Bottleneck"] + 4 * ["BlurPool2d"]),
    "timm ResNet with attention of channels": (
        lambda: timm_resnet(Bottleneck, block_args={"attn_layer": "se"}, drop_path_rate=0.1),
        3 * ["Bottleneck"] + 4 * ["BlurPool2d"],
    ),
    "kornia": (kornia_network, ["Sequential", "BlurPool2D", "MaxBlurPool2D"]),
    "timm ConvNormAct": (convolutions_of_timm, ["ConvNormAct", "BlurPool2d", "BlurPool2d"]),
    "mixed": (mixed_network, ["Sequential", "BlurPool2d", "BlurPool2d"]),
}


def made(name, training=False):
    """A model in float64, with statistics of its own, and images."""
    torch.manual_seed(0)
    model = MODELS[name][0]().double()
    images = torch.randn(2, 3, 48, 40, dtype=torch.float64)
    model(images)  # in training mode: the statistics of the normalisations
    return model.train(training), images


@pytest.fixture
def calls(monkeypatch):
    """The keyword arguments of every call of the fused function."""
    calls, original = [], vitfast.functional.blur_pool2d

    def blur_pool2d(*args, **options):
        calls.append(options)
        return original(*args, **options)

    monkeypatch.setattr(vitfast.functional, "blur_pool2d", blur_pool2d)
    return calls


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_results_gradients_and_statistics_stay(name, training):
    model, images = made(name, training)
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    before = output_and_gradients(other, images)
    keys = list(model.state_dict())
    report = vitfast.accelerate(model, report=True)
    assert sorted(report.replaced.values()) == sorted(MODELS[name][1]), report
    assert not report.kept
    torch.manual_seed(1)  # for the paths that are dropped
    assert_same(output_and_gradients(model, images), before)
    assert list(model.state_dict()) == keys
    for key, value in other.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, msg=key)


@pytest.mark.parametrize(
    ("name", "blurs"), [("timm ResNet", 4), ("timm ResNet of bottlenecks", 4), ("kornia", 2), ("mixed", 3)]
)
def test_normalisation_and_activation_are_part_of_the_blur(name, blurs, calls):
    fused = {"timm ResNet": 3, "timm ResNet of bottlenecks": 3, "kornia": 1, "mixed": 2}[name]
    model, images = made(name)
    vitfast.accelerate(model)
    calls.clear()
    model(images)
    assert len(calls) == blurs
    assert sum(options.get("norm") is not None for options in calls) == fused
    model.train()
    calls.clear()
    model(images)
    assert [options.get("norm") for options in calls] == [None] * blurs
    assert sum(options.get("activation") is not None for options in calls) == fused


def test_normalisation_with_an_activation_of_its_own_is_part_of_the_blur(calls):
    model, images = made("timm ConvNormAct")
    vitfast.accelerate(model)
    calls.clear()
    model(images)
    assert [options.get("activation") for options in calls] == ["relu", None]
    assert calls[0]["norm"] is not None


@pytest.mark.parametrize("name", MODELS)
def test_copies_pickles_and_restores(name):
    model, images = made(name)
    kinds, expected = [type(m) for m in model.modules()], model(images)
    vitfast.accelerate(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(images), expected)
    vitfast.restore(model)
    assert [type(m) for m in model.modules()] == kinds


@pytest.mark.parametrize("part", ["bn1", "act1", "aa"])
def test_hooks_see_what_they_saw(part):
    model, images = made("timm ResNet")
    module = model.layer2[0].get_submodule(part)
    seen = []
    module.register_forward_hook(lambda _, args, output: seen.append((args[0].clone(), output.clone())))
    expected = model(images)
    vitfast.accelerate(model)
    torch.testing.assert_close(model(images), expected)
    for before, after in zip(*seen, strict=True):
        torch.testing.assert_close(after, before)


def test_blocks_whose_maps_lose_regions_are_called_as_they_were():
    from timm.layers import DropBlock2d

    model, images = made("timm ResNet", training=True)
    model.layer2[0].drop_block = DropBlock2d(drop_prob=0.3, block_size=3)
    other = vitfast.accelerate(copy.deepcopy(model))
    torch.manual_seed(1)
    expected = model(images)
    torch.manual_seed(1)
    torch.testing.assert_close(other(images), expected)


def test_sequences_without_a_blur_after_a_normalisation_are_no_matter():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2))
    report = vitfast.accelerate(model, report=True)
    assert not report.replaced
    assert not report.kept


@pytest.mark.parametrize("blur", [BlurPool2d(4), BlurPool2D(3), MaxBlurPool2D(3)], ids=lambda blur: type(blur).__name__)
def test_autocast_and_bad_input_are_as_they_were(blur):
    x = torch.randn(1, 4, 9, 9)
    fused = vitfast.accelerate(copy.deepcopy(blur))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for each in (x, x.bfloat16()):
            assert fused(each).dtype == blur(each).dtype
            torch.testing.assert_close(fused(each), blur(each), rtol=0.02, atol=0.02)
    for wrong in (torch.ones(1, 4, 9, 9, dtype=torch.int64), torch.ones(9)):
        errors = []
        for module in (blur, fused):
            with pytest.raises(Exception) as error:  # noqa: PT011  (whatever it is, it is to be the same)
                module(wrong)
            errors.append((type(error.value), str(error.value)))
        assert errors[0] == errors[1]


def test_filters_that_differ_between_channels_are_kept():
    blur = BlurPool2d(3)
    blur.filt[1] *= 2
    report = vitfast.accelerate(nn.Sequential(blur, BlurPool2d(filt_size=9), BlurPool2D(9)), report=True)
    assert not report.replaced
    assert report.kept == {
        "0": "BlurPool2d: its filter is not the same for all channels",
        "1": "BlurPool2d: its filter has 9 taps, more than 7",
        "2": "BlurPool2D: its kernel has 9 taps, more than 7",
    }


def test_filters_without_values_are_kept():
    with torch.device("meta"):
        blur = BlurPool2d(3)
    report = vitfast.accelerate(nn.Sequential(blur), report=True)
    assert report.kept == {"0": "BlurPool2d: its filter has no values yet, it is on the meta device"}


def test_compiles_without_a_graph_break():
    model, images = made("mixed")
    expected = model(images)
    compiled = torch.compile(vitfast.accelerate(model), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), expected)
