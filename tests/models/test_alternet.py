import pytest
import torch
from helpers import assert_close_to_reference

import vitfast
from vitfast.models import create_model
from vitfast.models.alternet import AttentionBlock
from vitfast.models.residual import PreActivationBlock
from vitfast.nn import LocalAttention2d

NAMES = [f"alternet_{depth}" for depth in (18, 34, 50, 101, 152)]
SMALL = {"num_classes": 10, "in_channels": 1, "width": 16, "window_size": 4, "stem": False}


def attention_modules(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, LocalAttention2d)}


def kinds(stage):
    letters = {PreActivationBlock: "c", AttentionBlock: "a"}
    return "".join(letters[type(block)] for block in stage)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_state_dict_are_the_authors(golden, name):
    with torch.device("meta"):
        model = create_model(name, num_classes=100)
    assert golden.state(model) == golden.facts[name]["state"]
    assert sum(p.numel() for p in model.parameters()) == golden.facts[name]["params"]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", ["alternet_18", "alternet_50", pytest.param("alternet_152", marks=pytest.mark.slow)])
def test_logits_are_the_authors(golden, name, backend):
    model = golden.load(create_model(name, num_classes=100))
    with torch.no_grad(), vitfast.backend(backend):
        logits = model(golden.images(golden.facts[name]["input"]))
    expected = golden.logits(name)
    assert (logits - expected).abs().max() <= 1e-9 * expected.abs().max()


def assert_float32_is_as_exact_as_plain_pytorch(model, x, exact):
    with torch.no_grad():
        fused = model(x)
        with vitfast.backend("reference"):
            plain = model(x)
    assert_close_to_reference(fused, plain, exact)


def test_float32_with_the_golden_weights(golden):
    name = "alternet_18"  # the deeper ones amplify rounding errors up to the size of the logits with these weights
    model = golden.load(create_model(name, num_classes=100)).float()
    x = golden.images(golden.facts[name]["input"]).float()
    assert_float32_is_as_exact_as_plain_pytorch(model, x, golden.logits(name))


@pytest.mark.parametrize("name", ["alternet_18_cifar", "alternet_50_cifar"])
def test_float32_with_new_weights(name):
    model = create_model(name, num_classes=100).double().eval()
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        exact = model(x.double())
    assert_float32_is_as_exact_as_plain_pytorch(model.float(), x, exact)


def test_cifar_preset_has_the_papers_size():
    with torch.device("meta"):
        model = create_model("alternet_50_cifar", num_classes=100)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 33.0
    assert {module.window_size for module in attention_modules(model).values()} == {(4, 4)}
    assert [kinds(stage) for stage in (model.layer1, model.layer2, model.layer3, model.layer4)] == [
        "ccc",
        "ccca",
        "ccccca",
        "caca",
    ]


def test_build_up_rule():
    with torch.device("meta"):
        model = create_model("alternet_50", num_blocks2=(1, 2, 3, 0))
    assert [kinds(stage) for stage in (model.layer1, model.layer2, model.layer3, model.layer4)] == [
        "cca",
        "caca",
        "cacaca",
        "cccc",
    ]


def test_without_attention_it_is_the_resnet_it_comes_from():
    alternet = create_model("alternet_18", num_blocks2=(0, 0, 0, 0), **SMALL).eval()
    resnet = create_model("preresnet_18", num_classes=10, in_channels=1, width=16, stem=False).eval()
    state = {key.replace("layer0.layer0", "layer0"): value for key, value in alternet.state_dict().items()}
    resnet.load_state_dict(state)
    x = torch.randn(2, 1, 32, 32)
    assert torch.equal(alternet(x), resnet(x))


def test_attention_grows_with_the_width():
    model = create_model("alternet_18", **SMALL)
    assert [(m.heads, m.dim_head) for m in attention_modules(model).values()] == [(6, 16), (12, 16), (24, 16)]
    other = create_model("alternet_18", heads=(1, 2, 3, 4), dim_head=8, **SMALL)
    assert [(m.heads, m.dim_head) for m in attention_modules(other).values()] == [(2, 8), (3, 8), (4, 8)]


def test_gradients_are_those_of_plain_pytorch():
    model = create_model("alternet_18", **SMALL).double()
    images = torch.randn(2, 1, 32, 32, dtype=torch.float64)
    labels = torch.tensor([3, 7])

    def loss_and_gradients():
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        return loss, torch.autograd.grad(loss, list(model.parameters()))

    loss, grads = loss_and_gradients()
    with vitfast.backend("reference"):
        loss_plain, grads_plain = loss_and_gradients()
    torch.testing.assert_close(loss, loss_plain, rtol=1e-10, atol=0)
    for ours, plain in zip(grads, grads_plain, strict=True):
        assert (ours - plain).norm() <= 1e-9 * plain.norm() + 1e-12


@pytest.mark.parametrize("size", [32, 31, 36])
def test_any_image_size(size):
    model = create_model("alternet_18", **SMALL)
    out = model(torch.randn(2, 1, size, size))
    out.sum().backward()
    assert out.shape == (2, 10)
    assert all(p.grad is not None for p in model.parameters())


def test_options_reach_the_attention():
    model = create_model("alternet_18", k=2, attn_drop=0.1, proj_drop=0.2, **SMALL)
    for module in attention_modules(model).values():
        assert module.k == 2
        assert module.attn_drop.p == 0.1
        assert module.attn["to_out"][1].p == 0.2


def test_attention_maps_by_a_hook():
    model = create_model("alternet_18", **SMALL).eval()
    maps = []
    for module in attention_modules(model).values():
        module.register_forward_hook(lambda module, args, output: maps.append(module.attention_maps(*args)))
    with torch.no_grad():
        model(torch.randn(2, 1, 32, 32))
    assert [tuple(m.shape) for m in maps] == [(2, 16, 6, 16, 16), (2, 4, 12, 16, 16), (2, 1, 24, 16, 16)]
    for m in maps:
        torch.testing.assert_close(m.sum(-1), torch.ones(m.shape[:-1]))


def test_bad_options():
    with pytest.raises(ValueError, match=r"num_blocks2 must be at most half of num_blocks = \(2, 2, 2, 2\)"):
        create_model("alternet_18", num_blocks2=(0, 1, 1, 2))
    with pytest.raises(ValueError, match="heads must be four integers"):
        create_model("alternet_18", heads=(3, 6))
    with pytest.raises(TypeError, match="heads must be four integers, one per stage, of at least 1; got 4"):
        create_model("alternet_18", heads=4)
    with pytest.raises(ValueError, match=r"k must divide window_size = \(7, 7\); got 2"):
        create_model("alternet_18", k=2)
