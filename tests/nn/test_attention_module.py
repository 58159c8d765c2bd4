import copy
from functools import partial

import pytest
import torch
from helpers import assert_close_to_reference
from modules import assert_same, output_and_gradients
from timm.layers import Attention as TimmAttention
from torch import nn

import vitfast
from vitfast.nn import Attention

CONFIGS = [
    {"dim": 24, "num_heads": 3},
    {"dim": 24, "num_heads": 2, "qkv_bias": True, "proj_bias": False},
    {"dim": 20, "num_heads": 3, "attn_head_dim": 6, "dim_out": 10, "qkv_bias": True},
    {"dim": 16, "num_heads": 4, "qk_norm": True, "norm_layer": nn.LayerNorm},
    {"dim": 16, "num_heads": 2, "scale_norm": True, "norm_layer": partial(nn.LayerNorm, eps=1e-6), "gated": True},
]


def pair(dtype=torch.float64, **config):
    """Our module and timm's, with the same weights."""
    theirs = TimmAttention(**config, dtype=dtype)
    ours = Attention(**config, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def tokens(module, count=7, dtype=torch.float64):
    return torch.randn(2, count, module.dim, dtype=dtype)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_seed_gives_the_weights_it_gives_in_timm(config):
    torch.manual_seed(3)
    theirs = TimmAttention(**config)
    torch.manual_seed(3)
    ours = Attention(**config)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


@pytest.mark.parametrize("count", [1, 7, 65])
@pytest.mark.parametrize("config", CONFIGS)
def test_as_in_timm(config, count):
    ours, theirs = pair(**config)
    x = tokens(ours, count)
    assert_same(output_and_gradients(ours, x), output_and_gradients(theirs, x))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", [(7, 7), (2, 1, 7, 7), (2, 1, 1, 7)])
@pytest.mark.parametrize("boolean", [False, True])
@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[3]])
def test_masks_as_in_timm(config, boolean, shape, is_causal):
    ours, theirs = pair(**config)
    x = tokens(ours)
    mask = torch.rand(shape) < 0.7 if boolean else torch.randn(shape, dtype=torch.float64)
    if boolean:
        mask[..., 0] = True  # no query without a key
    causal = torch.ones(7, 7, dtype=torch.bool).tril()
    both = mask
    if is_causal:  # PyTorch's own attention refuses both at once
        both = mask & causal if boolean else mask.masked_fill(~causal, -torch.inf)
    assert_same(output_and_gradients(ours, x, mask, is_causal), output_and_gradients(theirs, x, both))


def test_a_learned_mask_gets_its_gradient():
    ours, theirs = pair(**CONFIGS[0])
    x, bias = tokens(ours), torch.randn(1, 3, 7, 7, dtype=torch.float64, requires_grad=True)
    grads = [torch.autograd.grad(module(x, bias).square().sum(), bias)[0] for module in (ours, theirs)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("config", CONFIGS)
def test_float32(config):
    exact, _ = pair(**config)
    single = copy.deepcopy(exact).float()
    x = tokens(exact)
    with vitfast.backend("reference"):
        plain = single(x.float())
    assert_close_to_reference(single(x.float()), plain, exact(x))


@pytest.mark.parametrize("config", CONFIGS)
def test_attention_maps(config):
    module, _ = pair(**config)
    x = tokens(module)
    mask = torch.rand(7, 7) < 0.7
    mask[:, 0] = True
    for options in ({}, {"attn_mask": mask}, {"is_causal": True}, {"attn_mask": torch.randn(2, 1, 7, 7).double()}):
        maps = module.attention_maps(x, **options)
        torch.testing.assert_close(maps.sum(-1), torch.ones(2, module.num_heads, 7, dtype=torch.float64))
        value = module.qkv(x).unflatten(-1, (3, module.num_heads, -1))[:, :, 2].transpose(1, 2)
        output = module.norm((maps @ value).transpose(1, 2).flatten(2))
        if module.gate is not None:
            output = output * module.gate(x).sigmoid()
        torch.testing.assert_close(module.proj(output), module(x, **options))


def test_attention_dropout_only_in_training():
    module = Attention(24, num_heads=3, attn_drop=0.5).eval()
    x = torch.randn(2, 7, 24)
    assert torch.equal(module(x), module(x))
    module.train()
    torch.manual_seed(1)
    first = module(x)
    torch.manual_seed(1)
    assert torch.equal(first, module(x))
    assert not torch.equal(first, module(x))


def test_output_dropout():
    module = Attention(24, num_heads=3, proj_drop=0.5)
    dropped = (module(torch.randn(2, 50, 24)) == 0).double().mean().item()
    assert 0.3 < dropped < 0.7


def test_compiles_without_a_graph_break():
    module, _ = pair(**CONFIGS[3])
    x = tokens(module)
    expected = output_and_gradients(module, x)
    module.compile(fullgraph=True, backend="aot_eager")
    assert_same(output_and_gradients(module, x), expected)


def test_autocast():
    module = Attention(24, num_heads=3)
    x = torch.randn(2, 7, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
        assert module(x, torch.rand(7, 7) < 0.9).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"dim": 0}, ValueError, "dim must be at least 1"),
        ({"dim": 24.0}, TypeError, "dim must be an integer"),
        ({"num_heads": 5}, ValueError, "dim must be a multiple of num_heads"),
        ({"num_heads": 0}, ValueError, "num_heads must be at least 1"),
        ({"attn_head_dim": 0}, ValueError, "attn_head_dim must be at least 1"),
        ({"dim_out": -1}, ValueError, "dim_out must be at least 1"),
        ({"qk_norm": True}, ValueError, "norm_layer"),
        ({"scale_norm": True}, ValueError, "norm_layer"),
    ],
)
def test_wrong_options(options, error, words):
    with pytest.raises(error, match=words):
        Attention(**{"dim": 24, "num_heads": 3, **options})


@pytest.mark.parametrize("shape", [(7, 24), (2, 7, 23), (2, 3, 7, 24)])
def test_wrong_input(shape):
    with pytest.raises(ValueError, match=r"x must be tokens \(B, N, 24\)"):
        Attention(24, num_heads=3)(torch.randn(shape))


def test_a_mask_that_does_not_fit():
    with pytest.raises(ValueError, match="bias"):
        Attention(24, num_heads=3)(torch.randn(2, 7, 24), torch.zeros(8, 8))
