import copy

import pytest
import torch
from helpers import assert_close_to_reference

import vitfast
from vitfast import functional
from vitfast.nn import LocalAttention2d

CONFIGS = [
    # (module, (H, W))
    ({"window_size": 4}, (8, 12)),
    ({"window_size": 4}, (7, 10)),
    ({"window_size": (2, 3), "dim_out": 7}, (5, 5)),
    ({"window_size": 4, "k": 2}, (8, 8)),
    ({"window_size": 4, "k": 2}, (6, 10)),
    ({"window_size": (3, 6), "k": 3}, (6, 9)),
    ({"window_size": 3, "k": 3}, (3, 6)),
]


def make(**config):
    config = {"dim_in": 5, "heads": 2, "dim_head": 4, "dtype": torch.float64, **config}
    module = LocalAttention2d(**config)
    with torch.no_grad():
        module.pos_embedding.normal_()  # far from the small initial values, so that a wrong bias shows
    return module


def literal(module, x):
    """The definition, pixel by pixel: the output, and the attention of every head, query and key as a dictionary."""
    window_rows, window_columns = module.window_size
    k, heads, dim = module.k, module.heads, module.dim_head
    weight_q = module.attn["to_q"].weight[:, :, 0, 0]
    weight_kv = module.attn["to_kv"].weight
    table = module.pos_embedding
    batch, _, height, width = x.shape
    rows = []
    maps = {}
    for b in range(batch):
        for i in range(height):
            for j in range(width):
                query = (weight_q @ x[b, :, i, j]).view(heads, dim)
                top, left = i // window_rows * window_rows, j // window_columns * window_columns
                scores, values, places = [], [], []
                for ci in range(top, min(top + window_rows, height), k):
                    for cj in range(left, min(left + window_columns, width), k):
                        cell = x[b, :, ci : ci + k, cj : cj + k]
                        key, value = torch.einsum("ocij, cij -> o", weight_kv, cell).view(2, heads, dim)
                        biases = [
                            table[ci + u - i + window_rows - 1, cj + v - j + window_columns - 1]
                            for u in range(k)
                            for v in range(k)
                        ]
                        scores.append((query * key).sum(-1) / dim**0.5 + sum(biases) / k**2)
                        values.append(value)
                        places.append((ci // k, cj // k))
                probabilities = torch.stack(scores).softmax(0)  # [keys, heads]
                rows.append((probabilities[..., None] * torch.stack(values)).sum(0).flatten())
                maps[b, i, j] = dict(zip(places, probabilities, strict=True))
    output = torch.stack(rows).view(batch, height, width, heads * dim).permute(0, 3, 1, 2)
    return module.attn["to_out"](output), maps


def output_and_gradients(module, x):
    x = x.detach().requires_grad_()
    out = module(x)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return out, *torch.autograd.grad((out * weight).sum(), (x, *module.parameters()))


@pytest.mark.parametrize(("config", "size"), CONFIGS)
def test_is_the_definition(config, size):
    torch.manual_seed(0)
    module = make(**config)
    x = torch.randn(2, 5, *size, dtype=torch.float64)
    expected, _ = literal(module, x)
    torch.testing.assert_close(module(x), expected, rtol=1e-11, atol=1e-11)
    with vitfast.backend("reference"):
        torch.testing.assert_close(module(x), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("config", [{"window_size": 2}, {"window_size": (2, 4), "k": 2}])
def test_gradients_are_those_of_the_definition(config):
    torch.manual_seed(0)
    module = make(**config)
    x = torch.randn(1, 5, 4, 6, dtype=torch.float64, requires_grad=True)
    inputs = (x, *module.parameters())
    weight = torch.randn(1, 5, 4, 6, dtype=torch.float64)
    ours = torch.autograd.grad((module(x) * weight).sum(), inputs)
    expected = torch.autograd.grad((literal(module, x)[0] * weight).sum(), inputs)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(("config", "size"), CONFIGS)
def test_attention_maps_are_those_of_the_definition(config, size):
    torch.manual_seed(0)
    module = make(**config)
    x = torch.randn(2, 5, *size, dtype=torch.float64)
    maps = module.attention_maps(x)
    _, expected = literal(module, x)
    (rows, columns), k = module.window_size, module.k
    across = -(-size[1] // columns)
    assert maps.shape == (2, -(-size[0] // rows) * across, 2, rows * columns, rows * columns // k**2)
    for (b, i, j), attention in expected.items():
        window, query = i // rows * across + j // columns, i % rows * columns + j % columns
        for (ki, kj), probability in attention.items():
            key = ki % (rows // k) * (columns // k) + kj % (columns // k)
            torch.testing.assert_close(maps[b, window, :, query, key], probability)
    assert maps.sum().item() == pytest.approx(2 * 2 * size[0] * size[1])  # batch, heads, H, W: and all else is 0


def test_defaults_and_state_dict():
    module = LocalAttention2d(64)
    assert (module.window_size, module.k, module.heads, module.dim_head) == ((7, 7), 1, 8, 32)
    assert {name: tuple(value.shape) for name, value in module.state_dict().items()} == {
        "pos_embedding": (13, 13),
        "attn.to_q.weight": (256, 64, 1, 1),
        "attn.to_kv.weight": (512, 64, 1, 1),
        "attn.to_out.0.weight": (64, 256, 1, 1),
        "attn.to_out.0.bias": (64,),
    }
    assert tuple(LocalAttention2d(64, k=2, window_size=4).attn["to_kv"].weight.shape) == (512, 64, 2, 2)


def test_state_dict_round_trip():
    source, target = make(window_size=4), make(window_size=4)
    target.load_state_dict(source.state_dict())
    x = torch.randn(2, 5, 8, 8, dtype=torch.float64)
    assert torch.equal(target(x), source(x))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("k", [1, 2])
def test_the_operator_reads_what_the_convolutions_wrote(monkeypatch, memory_format, k):
    module = make(window_size=4, k=k).to(memory_format=memory_format)
    written, read = [], []
    for name in ("to_q", "to_kv"):
        module.attn[name].register_forward_hook(lambda m, args, out: written.append(out.untyped_storage().data_ptr()))
    operator = functional.window_attention

    def spy(*tensors, **options):
        read.extend(t.untyped_storage().data_ptr() for t in tensors[:3])
        return operator(*tensors, **options)

    monkeypatch.setattr(functional, "window_attention", spy)
    x = torch.randn(2, 5, 8, 8, dtype=torch.float64).contiguous(memory_format=memory_format)
    before = []
    module.attn["to_out"].register_forward_pre_hook(lambda m, args: before.append(args[0]))
    out = module(x)
    assert read == [written[0], written[1], written[1]]
    assert before[0].is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(out, literal(module, x)[0])


def test_channels_last_gives_the_same_gradients():
    module = make(window_size=4, k=2)
    x = torch.randn(2, 5, 6, 8, dtype=torch.float64)
    expected = output_and_gradients(module, x)
    ours = output_and_gradients(copy.deepcopy(module).to(memory_format=torch.channels_last), x)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("config", "size"), CONFIGS)
def test_the_path_with_dropout_computes_the_same(config, size):
    module = make(**config, attn_drop=0.5)
    x = torch.randn(2, 5, *size, dtype=torch.float64)
    fused = output_and_gradients(module.eval(), x)
    module.attn_drop.p = 1e-15  # on that path, but too rare to drop anything
    for a, b in zip(output_and_gradients(module.train(), x), fused, strict=True):
        torch.testing.assert_close(a, b)


def test_dropping_everything():
    x = torch.randn(2, 5, 8, 8, dtype=torch.float64)
    module = make(window_size=4, k=2, attn_drop=1.0)
    out = module(x)
    bias = module.attn["to_out"][0].bias
    torch.testing.assert_close(out, bias[:, None, None].expand_as(out), rtol=0, atol=0)
    module = make(window_size=4, proj_drop=1.0)
    assert torch.equal(module(x), torch.zeros_like(x))


def test_attention_dropout_drops_the_share_asked_for_and_keeps_the_mean():
    torch.manual_seed(0)
    module = make(window_size=4, attn_drop=0.25)
    x = torch.randn(64, 5, 8, 8, dtype=torch.float64)
    dropped = []
    module.attn_drop.register_forward_hook(lambda m, args, out: dropped.append((args[0], out)))
    module(x)
    before, after = dropped[0]
    kept = after != 0
    assert kept.double().mean().item() == pytest.approx(0.75, abs=0.01)  # 131072 draws: a deviation of 0.0012
    torch.testing.assert_close(after[kept], before[kept] / 0.75)


def test_no_dropout_in_evaluation():
    module = make(window_size=4, attn_drop=0.5, proj_drop=0.5)
    x = torch.randn(2, 5, 8, 8, dtype=torch.float64)
    assert not torch.equal(module(x), module(x))
    torch.testing.assert_close(module.eval()(x), literal(module, x)[0])


def test_autocast_is_as_exact_as_plain_pytorch():
    torch.manual_seed(0)
    module = LocalAttention2d(32, window_size=4, heads=4, dim_head=8)
    x = torch.randn(2, 32, 16, 16)
    expected = copy.deepcopy(module).double()(x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
        with vitfast.backend("reference"):
            plain = module(x)
    assert out.dtype == torch.bfloat16
    assert_close_to_reference(out, plain, expected)


@pytest.mark.parametrize("k", [1, 2])
def test_compiles_without_a_graph_break(k):
    module = make(window_size=4, k=k)
    x = torch.randn(2, 5, 8, 8, dtype=torch.float64)
    expected = output_and_gradients(module, x)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for a, b in zip(output_and_gradients(compiled, x), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_second_derivatives():
    module = make(dim_in=2, window_size=2, heads=1, dim_head=2)
    x = torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in module.named_parameters()]

    def function(x, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradgradcheck(function, (x, *module.parameters()))


def test_empty_batch():
    assert make(window_size=4)(torch.zeros(0, 5, 8, 8, dtype=torch.float64)).shape == (0, 5, 8, 8)


def test_bad_input():
    module = make(window_size=4, k=2)
    with pytest.raises(ValueError, match=r"x must have the shape \(B, 5, H, W\); got \(2, 8, 8, 5\)"):
        module(torch.zeros(2, 8, 8, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"x must have the shape \(B, 5, H, W\); got \(5, 8, 8\)"):
        module(torch.zeros(5, 8, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"multiples of the key stride k = 2; got \(2, 5, 8, 7\)"):
        module(torch.zeros(2, 5, 8, 7, dtype=torch.float64))


@pytest.mark.parametrize("options", [{"heads": 0}, {"dim_head": 0}], ids=str)
def test_no_heads(options):
    with pytest.raises(ValueError, match="must be at least 1; got 0"):
        LocalAttention2d(8, **options)


def test_bad_options():
    with pytest.raises(ValueError, match=r"k must divide window_size = \(7, 7\); got 2"):
        LocalAttention2d(8, k=2)
    with pytest.raises(ValueError, match="k must be at least 1"):
        LocalAttention2d(8, k=0)
    with pytest.raises(TypeError, match=r"k must be an integer; got 2\.0"):
        LocalAttention2d(8, k=2.0)
    with pytest.raises(ValueError, match="window_size must be at least 1"):
        LocalAttention2d(8, window_size=(4, 0))
