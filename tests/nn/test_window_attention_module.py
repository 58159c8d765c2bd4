import copy

import numpy as np
import pytest
import torch
from helpers import assert_close_to_reference
from modules import assert_same, output_and_gradients
from timm.models import swin_transformer as timm_swin

import vitfast
from vitfast.nn import WindowAttention

CONFIGS = [
    {"dim": 24, "num_heads": 3, "window_size": 4},
    {"dim": 20, "num_heads": 2, "window_size": (3, 5), "head_dim": 6},
    {"dim": 16, "num_heads": 4, "window_size": 2, "qkv_bias": False},
]


def pair(dtype=torch.float64, **config):
    """Our module and timm's, with the same weights."""
    theirs = timm_swin.WindowAttention(**config, dtype=dtype)
    ours = WindowAttention(**config, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def region_mask(num_windows, area):
    """Forbids pairs of tokens in different regions; every token has its own."""
    region = torch.randint(3, (num_windows, area))
    return torch.zeros(num_windows, area, area, dtype=torch.float64).masked_fill(
        region[:, :, None] != region[:, None, :], float("-inf")
    )


@pytest.mark.parametrize("config", CONFIGS)
def test_a_seed_gives_the_weights_it_gives_in_timm(config):
    torch.manual_seed(3)
    theirs = timm_swin.WindowAttention(**config)
    after = torch.rand(1)
    torch.manual_seed(3)
    ours = WindowAttention(**config)
    assert torch.equal(torch.rand(1), after)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    assert torch.equal(ours.relative_position_index, theirs.relative_position_index)


@pytest.mark.parametrize("config", CONFIGS)
def test_windows_as_in_timm(config):
    ours, theirs = pair(**config)
    x = torch.randn(6, ours.window_area, ours.dim, dtype=torch.float64)
    assert_same(output_and_gradients(ours, x), output_and_gradients(theirs, x))


@pytest.mark.parametrize("config", CONFIGS)
def test_windows_with_a_mask_as_in_timm(config):
    ours, theirs = pair(**config)
    x = torch.randn(6, ours.window_area, ours.dim, dtype=torch.float64)
    mask = region_mask(3, ours.window_area)
    assert_same(output_and_gradients(ours, x, mask), output_and_gradients(theirs, x, mask))


@pytest.mark.parametrize("shift", [0, 2, (1, 3), (0, 1)])
def test_a_map_as_in_timms_block(shift):
    """The block rolls, partitions, masks and reverses; the module computes it in place."""
    height, width = 8, 12
    block = timm_swin.SwinTransformerBlock(
        24, (height, width), num_heads=3, window_size=4, shift_size=shift, dtype=torch.float64
    )
    ours = WindowAttention(24, num_heads=3, window_size=4, dtype=torch.float64)
    ours.load_state_dict(block.attn.state_dict())
    x = torch.randn(2, height, width, 24, dtype=torch.float64)

    class Theirs(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.__dict__["named_parameters"] = block.attn.named_parameters

        def forward(self, x):
            return block._attn(x)

    assert_same(output_and_gradients(ours, x, shift_size=shift), output_and_gradients(Theirs(), x))


@pytest.mark.filterwarnings("ignore::UserWarning:timm.layers.interpolate")
def test_in_the_place_of_timms_modules_in_a_whole_model():
    torch.manual_seed(0)
    model = (
        timm_swin.SwinTransformer(
            img_size=32, patch_size=2, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4), num_classes=5
        )
        .double()
        .eval()
    )
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = model(x)
    replaced = copy.deepcopy(model)
    for block in (b for stage in replaced.layers for b in stage.blocks):
        theirs = block.attn
        block.attn = WindowAttention(theirs.dim, theirs.num_heads, window_size=theirs.window_size).double()
    replaced.load_state_dict(model.state_dict())
    torch.testing.assert_close(replaced(x), expected)
    for m in (model, replaced):
        m.set_input_size((48, 48), window_size=6)
    x = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    torch.testing.assert_close(replaced(x), model(x), rtol=1e-6, atol=1e-6)  # timm interpolates the table in float32


@pytest.mark.filterwarnings("ignore::UserWarning:timm.layers.interpolate")
@pytest.mark.parametrize("new", [(12, 12), (5, 9), (7, 9), (1, 3), 24, 7])
def test_set_window_size_as_in_timm(new):
    ours, theirs = pair(torch.float32, dim=24, num_heads=3, window_size=7)
    for module in (ours, theirs):
        module.set_window_size(new)
    torch.testing.assert_close(ours.relative_position_bias_table, theirs.relative_position_bias_table)
    assert torch.equal(ours.relative_position_index, theirs.relative_position_index)
    assert ours.window_size == theirs.window_size
    assert ours.window_area == theirs.window_area
    x = torch.randn(2, ours.window_area, 24)
    torch.testing.assert_close(ours(x), theirs(x))


def test_set_window_size_keeps_a_frozen_table_frozen():
    module = WindowAttention(8, num_heads=2, window_size=2)
    module.relative_position_bias_table.requires_grad_(False)
    module.set_window_size(3)
    assert not module.relative_position_bias_table.requires_grad


def test_state_dict_round_trip():
    source, target = (WindowAttention(24, num_heads=3, window_size=4) for _ in range(2))
    x = torch.randn(2, 8, 8, 24)
    assert not torch.equal(target(x), source(x))
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(x), source(x))


def test_from_the_meta_device():
    source = WindowAttention(24, num_heads=3, window_size=4)
    with torch.device("meta"):
        target = WindowAttention(24, num_heads=3, window_size=4)
    target.to_empty(device="cpu")
    target.load_state_dict(source.state_dict())
    target.init_non_persistent_buffers()
    x = torch.randn(2, 8, 8, 24)
    assert torch.equal(target(x), source(x))


@pytest.mark.parametrize("masked", [False, True])
def test_dropout_in_training_is_timms_for_the_same_seed(masked):
    ours, theirs = pair(dim=24, num_heads=3, window_size=4, attn_drop=0.3, proj_drop=0.2)
    x = torch.randn(6, 16, 24, dtype=torch.float64)
    mask = region_mask(3, 16) if masked else None
    results = []
    for module in (ours, theirs):
        torch.manual_seed(5)
        results.append(output_and_gradients(module, x, mask))
    assert_same(*results)
    assert not torch.equal(ours(x, mask), ours(x, mask))
    assert torch.equal(ours.eval()(x, mask), ours(x, mask))


@pytest.mark.parametrize("shape", [(2, 8, 8), (1, 7, 10), (2, 3, 2)])
@pytest.mark.parametrize("shift", [0, (1, 3)])
def test_the_path_with_dropout_computes_the_same(shape, shift):
    module = WindowAttention(24, num_heads=3, window_size=4, attn_drop=0.5, dtype=torch.float64)
    x = torch.randn(*shape, 24, dtype=torch.float64)
    fused = output_and_gradients(module.eval(), x, shift_size=shift)
    module.attn_drop.p = 1e-15  # on that path, but too rare to drop anything
    assert_same(output_and_gradients(module.train(), x, shift_size=shift), fused)


def test_dropping_everything_leaves_the_projections_bias():
    module = WindowAttention(24, num_heads=3, window_size=4, attn_drop=1.0)
    out = module(torch.randn(2, 8, 8, 24), shift_size=2)
    torch.testing.assert_close(out, module.proj.bias.expand_as(out), rtol=0, atol=0)


def test_no_dropout_is_the_fused_path():
    module = WindowAttention(24, num_heads=3, window_size=4)
    x = torch.randn(2, 8, 8, 24)
    assert torch.equal(module.train()(x), module.eval()(x))


def test_attention_maps_of_windows_reproduce_the_output():
    module = WindowAttention(24, num_heads=3, window_size=4, dtype=torch.float64)
    x = torch.randn(6, 16, 24, dtype=torch.float64)
    value = module.qkv(x)[..., 48:].unflatten(-1, (3, 8)).transpose(1, 2)
    for mask in (None, region_mask(2, 16)):
        maps = module.attention_maps(x, mask)
        assert maps.shape == (6, 1, 3, 16, 16)
        torch.testing.assert_close(maps.sum(-1), torch.ones_like(maps[..., 0]))
        out = module.proj((maps[:, 0] @ value).transpose(1, 2).flatten(2))
        torch.testing.assert_close(out, module(x, mask))


def test_attention_maps_of_a_map_are_those_of_its_windows():
    module = WindowAttention(24, num_heads=3, window_size=4, dtype=torch.float64)
    x = torch.randn(2, 8, 12, 24, dtype=torch.float64)
    maps = module.attention_maps(x)
    assert maps.shape == (2, 6, 3, 16, 16)
    windows = timm_swin.window_partition(x, (4, 4)).flatten(1, 2)
    torch.testing.assert_close(maps.flatten(0, 1), module.attention_maps(windows)[:, 0])


def test_attention_maps_of_edge_windows():
    module = WindowAttention(24, num_heads=3, window_size=4, dtype=torch.float64)
    maps = module.attention_maps(torch.randn(1, 6, 6, 24, dtype=torch.float64), shift_size=1)
    sums = maps.sum(-1)  # [1, windows, heads, N]
    assert maps.shape[1] == 9
    assert torch.logical_or((sums - 1).abs() < 1e-12, sums == 0).all()
    assert (sums > 0).sum() == 3 * 6 * 6


def test_attention_maps_are_differentiable():
    module = WindowAttention(8, num_heads=2, window_size=2, dtype=torch.float64)
    x = torch.randn(1, 2, 4, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module.attention_maps, (x,))


def test_autocast_is_as_exact_as_timm():
    torch.manual_seed(0)
    ours, theirs = pair(torch.float32, dim=32, num_heads=4, window_size=4)
    x = torch.randn(8, 16, 32)
    expected = copy.deepcopy(theirs).double()(x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, plain = ours(x), theirs(x)
    assert out.dtype == torch.bfloat16
    assert_close_to_reference(out, plain, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_weights(dtype):
    module = WindowAttention(24, num_heads=3, window_size=4, dtype=dtype)
    x = torch.randn(2, 8, 8, 24, dtype=dtype)
    out = module(x, shift_size=2)
    out.sum().backward()
    assert out.dtype == module.relative_position_bias_table.grad.dtype == dtype
    windows = timm_swin.window_partition(x, (4, 4)).flatten(1, 2)
    assert module(windows, torch.zeros(4, 16, 16)).dtype == dtype


def test_channels_last_map_as_a_view():
    module = WindowAttention(24, num_heads=3, window_size=4, dtype=torch.float64)
    x = torch.randn(2, 24, 8, 8, dtype=torch.float64).permute(0, 2, 3, 1)
    torch.testing.assert_close(module(x, shift_size=1), module(x.contiguous(), shift_size=1))


def test_empty_batch():
    module = WindowAttention(24, num_heads=3, window_size=4)
    assert module(torch.zeros(0, 8, 8, 24), shift_size=2).shape == (0, 8, 8, 24)
    assert module(torch.zeros(0, 16, 24)).shape == (0, 16, 24)
    assert module(torch.zeros(0, 16, 24), torch.zeros(4, 16, 16)).shape == (0, 16, 24)


def test_compiles_without_a_graph_break():
    module = WindowAttention(24, num_heads=3, window_size=4, dtype=torch.float64)
    x = torch.randn(2, 8, 8, 24, dtype=torch.float64)
    expected = output_and_gradients(module, x, shift_size=2)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    compiled_result = output_and_gradients(compiled, x, shift_size=2)
    assert_same({k.removeprefix("_orig_mod."): v for k, v in compiled_result.items()}, expected)


def test_every_backend_is_the_reference():
    module = WindowAttention(24, num_heads=3, window_size=4, dtype=torch.float64)
    x = torch.randn(2, 7, 9, 24, dtype=torch.float64)
    fused = output_and_gradients(module, x, shift_size=3)
    with vitfast.backend("reference"):
        assert_same(fused, output_and_gradients(module, x, shift_size=3))


@pytest.mark.parametrize(
    ("shape", "kwargs", "message"),
    [
        ((16, 24), {}, r"x must be windows \(num_windows \* B, N, 24\) or a map \(B, H, W, 24\); got \(16, 24\)"),
        ((2, 8, 8, 23), {}, r"a map \(B, H, W, 24\); got \(2, 8, 8, 23\)"),
        ((2, 15, 24), {}, r"windows of \(4, 4\) tokens must have the shape .* got \(2, 15, 24\)"),
        ((4, 16, 24), {"shift_size": 2}, "shift_size goes with a map"),
        ((2, 8, 8, 24), {"mask": torch.zeros(4, 16, 16)}, "a mask goes with windows"),
        (
            (4, 16, 24),
            {"mask": torch.zeros(3, 16, 16)},
            r"num_windows that divides the 4 windows of x; got \(3, 16, 16\)",
        ),
        ((4, 16, 24), {"mask": torch.zeros(16, 16)}, r"mask must have the shape \(num_windows, 16, 16\)"),
        ((2, 8, 8, 24), {"shift_size": 4}, r"shift_size must be smaller than window_size = \(4, 4\); got 4"),
        ((2, 8, 8, 24), {"shift_size": -1}, "shift_size must be at least 0; got -1"),
    ],
)
def test_bad_input(shape, kwargs, message):
    with pytest.raises(ValueError, match=message):
        WindowAttention(24, num_heads=3, window_size=4)(torch.zeros(shape), **kwargs)


def test_no_heads():
    with pytest.raises(ValueError, match="num_heads must be at least 1; got 0"):
        WindowAttention(96, 0)


def test_numpy_integers_are_integers():
    assert WindowAttention(4, 2, window_size=np.int64(3)).window_size == (3, 3)


def test_bad_options():
    with pytest.raises(ValueError, match="dim must be at least num_heads = 4, unless head_dim is given; got dim = 2"):
        WindowAttention(2, num_heads=4)
    with pytest.raises(ValueError, match="window_size must be at least 1; got 0"):
        WindowAttention(8, num_heads=2, window_size=0)
    with pytest.raises(TypeError, match=r"window_size must be an integer or a pair of integers .* got 3.5"):
        WindowAttention(8, num_heads=2, window_size=3.5)
    with pytest.raises(TypeError, match="shift_size must be an integer or a pair"):
        WindowAttention(8, num_heads=2, window_size=4)(torch.zeros(1, 4, 4, 8), shift_size=1.0)
    with pytest.raises(TypeError, match=r"mask is added to the scores .* got torch\.bool"):
        WindowAttention(8, num_heads=2, window_size=2)(torch.zeros(1, 4, 8), torch.ones(1, 4, 4, dtype=torch.bool))
