"""The layers around attention, against those of timm."""

import libraries  # noqa: F401  (before the libraries themselves)
import pytest
import timm.layers
import torch
from modules import assert_same, output_and_gradients
from timm.models import vision_transformer

from vitfast.nn import DropPath, LayerScale, Mlp, PatchEmbed, TransformerBlock


def assert_same_module(ours, theirs, x):
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for value, other in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(value, other)
    assert_same(output_and_gradients(ours.double(), x), output_and_gradients(theirs.double(), x))


def make(cls, *args, **options):
    torch.manual_seed(3)
    return cls(*args, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"qkv_bias": True, "mlp_ratio": 2.5},
        {"qk_norm": True, "proj_bias": False},
        {"init_values": 0.5, "act_layer": torch.nn.ReLU},
    ],
)
def test_block_is_timms(options):
    ours = make(TransformerBlock, 24, 3, **options)
    theirs = make(vision_transformer.Block, 24, 3, **options)
    assert_same_module(ours, theirs, torch.randn(2, 7, 24, dtype=torch.float64))


def test_block_drops_what_timms_drops():
    options = {"proj_drop": 0.2, "attn_drop": 0.1, "drop_path": 0.4}
    x = torch.randn(5, 7, 24, dtype=torch.float64)
    results = []
    for cls in (TransformerBlock, vision_transformer.Block):
        block = make(cls, 24, 3, **options).double().train()
        block.attn.attn_drop.p = 0.0  # drawn by another function than timm's; the next test sees it
        torch.manual_seed(5)
        results.append(output_and_gradients(block, x))
    assert_same(*results)


def test_block_passes_masks_on():
    block = TransformerBlock(24, 3).double()
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    mask = torch.ones(7, 7, dtype=torch.bool).tril()
    torch.testing.assert_close(block(x, attn_mask=mask), block(x, is_causal=True))
    assert not torch.allclose(block(x), block(x, is_causal=True))


@pytest.mark.parametrize("options", [{}, {"hidden_features": 11, "out_features": 3}, {"bias": False}])
def test_mlp_is_timms(options):
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    assert_same_module(make(Mlp, 8, **options), make(timm.layers.Mlp, 8, **options), x)


@pytest.mark.parametrize(("patch", "norm"), [(4, None), ((2, 8), torch.nn.LayerNorm)])
def test_patch_embed_is_timms(patch, norm):
    ours = make(PatchEmbed, patch, 3, 10, norm_layer=norm)
    theirs = make(timm.layers.PatchEmbed, 16, patch, 3, 10, norm_layer=norm, output_fmt="NHWC")
    assert_same_module(ours, theirs, torch.randn(2, 3, 16, 16, dtype=torch.float64))


def test_patch_embed_completes_the_last_patches_with_zeros():
    embed = PatchEmbed((4, 8), 2, 5).double()
    x = torch.randn(2, 2, 9, 17, dtype=torch.float64)
    padded = torch.zeros(2, 2, 12, 24, dtype=torch.float64)
    padded[:, :, :9, :17] = x
    assert embed(x).shape == (2, 3, 3, 5)
    torch.testing.assert_close(embed(x), embed(padded))


def test_layer_scale_is_timms():
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    assert_same_module(LayerScale(8, 0.3), timm.layers.LayerScale(8, 0.3), x)


def test_stochastic_depth():
    drop = DropPath(0.25).train()
    x = torch.rand(4000, 2, 3) + 1
    y = drop(x)
    kept = y.flatten(1).ne(0).all(1)
    torch.testing.assert_close(y[kept], x[kept] / 0.75)
    assert y[~kept].eq(0).all()
    assert 0.7 < kept.double().mean() < 0.8
    assert drop.eval()(x) is x
    assert DropPath(0.0).train()(x) is x


@pytest.mark.parametrize(
    ("make_module", "error", "message"),
    [
        (lambda: DropPath(1.0), ValueError, "drop_prob must be at least 0 and less than 1; got 1.0"),
        (lambda: DropPath("0.1"), TypeError, "drop_prob must be a number; got '0.1'"),
        (lambda: Mlp(8.0), TypeError, "in_features must be an integer; got 8.0"),
        (lambda: Mlp(8, 0), ValueError, "hidden_features must be at least 1; got 0"),
        (lambda: PatchEmbed(0, 3, 8), ValueError, "patch_size must be at least 1; got 0"),
        (lambda: PatchEmbed(4, 3, 0), ValueError, "embed_dim must be at least 1; got 0"),
        (lambda: LayerScale(-1), ValueError, "dim must be at least 1; got -1"),
        (lambda: TransformerBlock(10, 3), ValueError, "dim must be a multiple of num_heads"),
    ],
)
def test_bad_options(make_module, error, message):
    with pytest.raises(error, match=message):
        make_module()


def test_patch_embed_names_the_shape_it_expects():
    with pytest.raises(ValueError, match=r"images must have the shape \(B, 3, H, W\); got \(2, 1, 8, 8\)"):
        PatchEmbed(4, 3, 8)(torch.randn(2, 1, 8, 8))
