"""Gradients with K tangents: against `jvp` of `grad`, vector by vector, for every rule and for what has none."""

from __future__ import annotations

import functools
import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hessian_cases import Normalised, Perceptron, alternet, loss_of, made, resnet, swin, vit
from torch import nn
from torch.func import functional_call, grad, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

import vitfast
from vitfast.hessian import HessianOperator, dual, hvp
from vitfast.hessian import memory as hessian_memory
from vitfast.hessian.deferred import Deferred, version_of
from vitfast.hessian.dual import Dual, Unsupported, gradient_tangents
from vitfast.hessian.recording import Recording


class Layers(nn.Module):
    """Any layers between linear ones, on tokens (batch, 6, 8)."""

    def __init__(self, *layers):
        super().__init__()
        self.first, self.layers, self.last = nn.Linear(5, 48), nn.Sequential(*layers), nn.LazyLinear(3)

    def forward(self, x):
        return self.last(self.layers(self.first(x).unflatten(1, (6, 8))).flatten(1))


class Images(nn.Module):
    """Any layers between convolutions, on maps (batch, 4, 6, 6)."""

    def __init__(self, *layers):
        super().__init__()
        self.first, self.layers, self.last = nn.Linear(5, 144), nn.Sequential(*layers), nn.LazyLinear(3)

    def forward(self, x):
        return self.last(self.layers(self.first(x).unflatten(1, (4, 6, 6))).flatten(1))


class View(nn.Module):
    """Another shape of the same memory, which the images of a batch must not be too scattered for."""

    def __init__(self, *shape):
        super().__init__()
        self.shape = shape

    def forward(self, x):
        return x.view(len(x), *self.shape)


class Function(nn.Module):
    """A function as a layer, with a parameter that it may use."""

    def __init__(self, function):
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.rand(8))

    def forward(self, x):
        return self.function(x, self.weight)


def in_place(x, weight):
    y = x * weight
    y += x
    y.mul_(2)
    return F.silu(y, inplace=True)


def moved(x, weight):
    parts = [*x.unbind(1)[:2], *(piece.squeeze(1) for piece in x.split(1, 1))]
    joined = torch.cat([torch.stack(parts, 1), weight.expand(len(x), 1, -1), torch.ones(len(x), 1, 8).to(x)], dim=1)
    return joined.transpose(1, 2)[:, 1:, ::2].permute(0, 2, 1) * joined[:, -2:, :7].select(1, 0).unsqueeze(1)


def stacked(x, weight):
    maps = torch.stack([x.mT, (x * weight).mT], 1) + torch.stack([(x.sin() * weight).mT, x.mT], -1).movedim(-1, 1)
    return maps.flatten(1, 2) * torch.stack([torch.ones_like(x), x], -3).flatten(1, 2).flatten(1).unflatten(1, (16, 6))


def windows(x, weight):
    return (x * weight).flip(1, -1).unfold(-1, 3, 2).unfold(1, 4, 1).flip(0)


def distributions(x, weight):
    return F.log_softmax(x, 1) * F.log_softmax(x * weight, -1).detach() + F.log_softmax(x * weight, -1)


def broadcast(x, weight):
    return (x - weight) / (1 + weight * weight) + x.mean((1, 2), keepdim=True) * x.sum(1, keepdim=True) - 3 * x.mean()


def attended(x, weight):
    heads = (x * weight).unflatten(2, (2, 4)).transpose(1, 2)
    mask = torch.linspace(-1, 1, 36).to(x).view(6, 6)
    return F.scaled_dot_product_attention(heads, heads.sin(), heads.cos(), attn_mask=mask).transpose(1, 2).flatten(2)


def causal(x, weight):
    return F.scaled_dot_product_attention(x, x * weight, x, dropout_p=0.0)


def normalised_over_two(x, weight):
    return F.layer_norm(x, (6, 8), weight.expand(6, 8), weight.expand(6, 8).sin())


def multiplied(x, weight):
    return torch.bmm(x, x.mT * weight[:6]) @ x + torch.baddbmm(x, x @ x.mT, x, beta=0.5)


def stopped(x, weight):
    return x * (x * weight).detach() + x


def filled(x, weight):
    noise = torch.zeros_like(x)
    noise += 0.5
    return x * noise * weight


def chosen(x, weight):
    return torch.where(x > 0, x, x * weight)[:, [0, 2, 1]] * x.amax(1, keepdim=True)


def indexed(x, weight):
    """By tensors in one place and in two, masks, and with what is put there with and without tangents."""
    rows, columns = torch.tensor([[0, 2], [2, 1]]), torch.tensor([1, 7])
    mask = torch.zeros(6, 8, dtype=torch.bool)
    mask[1:3, ::3] = True
    put = (x * weight).index_put((rows,), x[rows] * weight, accumulate=True)
    put = put.index_put((torch.arange(4), rows[1, 0], columns[0]), weight[0])
    ones = torch.ones_like(x).index_put((torch.tensor([0, 3]), rows[0]), weight.sin())
    put = put * ones.index_put((rows[0],), torch.tensor(0.5).to(x))
    put = put.index_select(1, rows[0]) * torch.index_select(x * put, -2, torch.tensor(2)) + put[:, :2]
    put = put.repeat(1, 3, 1)
    return put * (put[rows, :, columns].sum() + x[:, rows, columns].sum() + x[:, mask].square().sum())


def blurred(x, weight):
    """With every prologue, of constants too, and taps that have tangents."""
    taps, maps = torch.tensor([0.25, 0.5, 0.25]).to(x), torch.tensor([0.5, 1, 2, 1.5]).to(x)
    scale, shift = weight[:4], weight[4:]
    blur = functools.partial(vitfast.functional.blur_pool2d, stride=2)
    with torch.no_grad():
        unfollowed = weight + 0
    return (
        blur(x, taps, scale=scale, shift=shift, activation="relu").sum(0)
        + blur(x.sin(), taps, scale=scale, activation="tanh_relu", temperature=2.0)
        * blur(x, taps, shift=shift, activation="relu6", padding_mode="zeros")
        + blur(x, taps, norm=(scale, shift, maps, maps, 1e-5))
        * blur(x, taps, norm=(maps, None, maps, maps, 1e-5), activation="relu")
        * blur(x, taps, norm=(unfollowed[:4], unfollowed[4:], maps, maps, 1e-5))
        + blur(maps.view(1, 4, 1, 1) + x.detach(), taps, scale=scale, shift=shift)
        + blur(x, weight[:3])
    )


LAYERS = {
    "gelu": lambda: Layers(nn.GELU()),
    "gelu by tanh": lambda: Layers(nn.GELU(approximate="tanh")),
    "silu": lambda: Layers(nn.SiLU()),
    "mish": lambda: Layers(nn.Mish()),
    "hardswish": lambda: Layers(nn.Hardswish()),
    "hardsigmoid": lambda: Layers(nn.Hardsigmoid()),
    "relu": lambda: Images(nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1), nn.ReLU()),
    "elu": lambda: Layers(nn.ELU()),
    "softmax": lambda: Layers(nn.Softmax(-1)),
    "layer norm": lambda: Layers(
        nn.LayerNorm(8), nn.LayerNorm(8, bias=False), nn.LayerNorm(8, elementwise_affine=False)
    ),
    "layer norm of two": lambda: Layers(Function(normalised_over_two)),
    "linear": lambda: Layers(nn.Linear(8, 5, bias=False), nn.Tanh(), nn.Linear(5, 8)),
    "in place": lambda: Layers(Function(in_place)),
    "moved": lambda: Layers(Function(moved)),
    "stacked": lambda: Layers(Function(stacked)),
    "windows": lambda: Layers(Function(windows)),
    "log softmax": lambda: Layers(Function(distributions)),
    "broadcast": lambda: Layers(Function(broadcast)),
    "attended": lambda: Layers(Function(attended)),
    "attended without a mask": lambda: Layers(Function(causal)),
    "multiplied": lambda: Layers(Function(multiplied)),
    "stopped": lambda: Layers(Function(stopped)),
    "filled": lambda: Layers(Function(filled)),
    "chosen": lambda: Layers(Function(chosen)),
    "indexed": lambda: Layers(Function(indexed)),
    "convolution": lambda: Images(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(6, 4, 1, bias=False)),
    "convolutions with kernels": lambda: Images(
        *(nn.Conv2d(4, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Tanh()),
        *(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.Tanh(), nn.Conv2d(32, 16, 1), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(16, 16, 3, padding=2)),
    ),
    "convolutions of odd kinds": lambda: Images(
        *(nn.Conv2d(4, 16, 3, padding="valid"), nn.GELU(), View(-1), View(16, 4, 4)),
        *(nn.Conv2d(16, 16, 3, padding="same", padding_mode="reflect"), nn.GELU(), nn.GELU()),
        *(nn.Conv2d(16, 16, 1, padding="valid"), nn.ReLU(), View(4, 64), nn.Linear(64, 3)),
    ),
    "convolutions of one and three dimensions": lambda: Images(
        *(nn.Flatten(2), nn.Conv1d(4, 16, 3, padding=1), nn.Tanh(), nn.Unflatten(2, (4, 3, 3)), nn.Conv3d(16, 2, 3))
    ),
    "groups": lambda: Images(nn.Conv2d(4, 8, 3, groups=2, dilation=2), nn.Tanh(), nn.Conv2d(8, 8, 2, groups=8)),
    "transposed": lambda: Images(nn.ConvTranspose2d(4, 3, 3, stride=2, output_padding=1), nn.Tanh()),
    "batch norm": lambda: Images(nn.BatchNorm2d(4), nn.Tanh(), nn.BatchNorm2d(4, affine=False)),
    "group norm": lambda: Images(nn.GroupNorm(2, 4), nn.Tanh(), nn.GroupNorm(1, 4, affine=False)),
    "max pool": lambda: Images(nn.MaxPool2d(2), nn.Conv2d(4, 4, 1)),
    "max pool of channels last": lambda: Images(
        *(nn.Conv2d(4, 16, 3, padding=1), nn.MaxPool2d(3, stride=2, padding=1), nn.Tanh(), nn.MaxPool2d(2))
    ),
    "blurs": lambda: Images(
        *(vitfast.nn.BlurPool2d(4, 3), nn.Conv2d(4, 16, 3, padding=1), nn.Tanh()),
        *(vitfast.nn.BlurPool2d(16, 4, stride=1), nn.Tanh(), vitfast.nn.BlurPool2d(16, 2, stride=1)),
    ),
    "blurs with prologues": lambda: Images(Function(blurred)),
    "average of channels last": lambda: Images(
        *(nn.Conv2d(4, 16, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Tanh(), nn.Conv2d(16, 8, 1)),
        nn.AdaptiveAvgPool2d((1, 1)),
    ),
    "average pool": lambda: Images(nn.AvgPool2d(3, stride=2, padding=1), nn.AdaptiveAvgPool2d(2)),
}


def layers(name):
    """A model in float64 and evaluation mode, with parameters that all matter, and a batch."""
    torch.manual_seed(0)
    model, inputs, targets = LAYERS[name](), torch.randn(4, 5, dtype=torch.float64), torch.randint(3, (4,))
    model(inputs.float())
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model, inputs, targets


def directions(params, count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(count, *p.shape, dtype=p.dtype, generator=generator) for n, p in params.items()}


def by_transforms(fn, params, vectors):
    count = len(next(iter(vectors.values())))
    each = [jvp(grad(fn), (params,), ({n: v[k] for n, v in vectors.items()},))[1] for k in range(count)]
    return {n: torch.stack([one[n] for one in each]) for n in params}


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "hardsigmoid"])
def test_layers(name):
    fn, params = loss_of(*layers(name))
    vectors = directions(params, 3)
    with sdpa_kernel(SDPBackend.MATH):  # the others have no forward mode in PyTorch
        expected = by_transforms(fn, params, vectors)
    assert max(t.abs().max() for t in expected.values()) > 1e-3
    assert_close(gradient_tangents(fn, params, vectors), expected, rtol=1e-9, atol=1e-10)


def test_what_pytorch_cannot_differentiate_twice():
    fn, params = loss_of(*layers("hardsigmoid"))
    vectors, step = directions(params, 1), 1e-6

    def gradient_at(sign):
        return grad(fn)({n: p + sign * step * vectors[n][0] for n, p in params.items()})

    after, before = gradient_at(1), gradient_at(-1)
    expected = {n: (after[n] - before[n])[None] / (2 * step) for n in params}
    assert_close(gradient_tangents(fn, params, vectors), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("build", "side", "training"),
    [(build, side, False) for build, side in ((Perceptron, None), (vit, 8), (swin, 16))]
    + [
        (build, side, mode)
        for build, side in ((Normalised, None), (alternet, 16), (resnet, 16))
        for mode in (False, True)
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_models(build, side, training):
    model, inputs, targets = made(build, side=side)
    model.train(training)
    for module in model.modules():
        if hasattr(module, "track_running_stats"):
            module.track_running_stats = not training
    fn, params = loss_of(model, inputs, targets)
    vectors = directions(params, 2)
    expected = by_transforms(fn, params, vectors)
    size = max(t.abs().max() for t in expected.values())
    assert_close(gradient_tangents(fn, params, vectors), expected, rtol=1e-9, atol=1e-12 * size)


@pytest.mark.parametrize(("build", "side"), [(vit, 8), (swin, 16), (alternet, 16), (resnet, 64)])
def test_models_have_rules_for_all_operations(build, side, monkeypatch):
    def by_transforms(operation, *args, **kwargs):
        raise AssertionError(f"{operation} has no rule")

    monkeypatch.setattr(dual, "by_transforms", by_transforms)
    model, inputs, targets = made(functools.partial(build, stem=True) if build is resnet else build, side=side)
    fn, params = loss_of(model, inputs, targets)
    gradient_tangents(fn, params, directions(params, 2))


@pytest.mark.parametrize(
    ("build", "side", "programs"), [(vit, 8, 1), (swin, 16, 1), (alternet, 16, 1), (resnet, 64, 0)]
)
def test_recordings_of_models_have_programs(build, side, programs):
    """Without one they are run rule by rule: right, but slower, and without a word. The ResNet's blurs have prologues,
    whose tangents are by transforms, which no program holds."""
    fn, params = loss_of(*made(build, side=side))
    recording = Recording()
    for seed in range(3):
        vectors = directions(params, 2, seed)
        result = gradient_tangents(fn, params, vectors, recording)
        assert_close(result, gradient_tangents(fn, params, vectors), rtol=1e-10, atol=1e-12)
    assert len(recording._programs) == programs


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [
        ("layer norm", torch.float32, 1e-4),
        ("layer norm", torch.bfloat16, 0.1),
        ("convolution", torch.float32, 1e-5),
        ("convolutions with kernels", torch.float32, 1e-5),
        ("convolutions of odd kinds", torch.float32, 1e-5),
        ("blurs", torch.float32, 1e-5),
        ("blurs", torch.bfloat16, 0.1),
        ("blurs with prologues", torch.float32, 1e-5),
        ("blurs with prologues", torch.bfloat16, 0.1),
        ("max pool of channels last", torch.float32, 1e-5),
        ("indexed", torch.float32, 1e-5),
        ("average of channels last", torch.float32, 1e-5),
        ("convolutions of one and three dimensions", torch.float32, 1e-5),
    ],
    ids=str,
)
def test_other_dtypes(name, dtype, tolerance):
    model, inputs, targets = layers(name)
    fn, params = loss_of(model, inputs, targets)
    vectors = directions(params, 2)
    exact = by_transforms(fn, params, vectors)
    fn, params = loss_of(model.to(dtype), inputs.to(dtype), targets)
    result = gradient_tangents(fn, params, {n: v.to(dtype) for n, v in vectors.items()})
    size = max(t.norm() for t in exact.values())
    for name, value in result.items():
        assert value.dtype == dtype
        assert (value.double() - exact[name]).norm() <= tolerance * size


LOSSES = {
    "cross-entropy": F.cross_entropy,
    "sum": lambda x, y: F.cross_entropy(x, y, reduction="sum"),
    "smooth and weighted": lambda x, y: F.cross_entropy(x, y, torch.tensor([0.5, 1, 2]).to(x), label_smoothing=0.1),
    "weighted samples": lambda x, y: F.cross_entropy(x, y, reduction="none") @ torch.linspace(-1, 2, 4).to(x),
    "squared": lambda x, y: F.nll_loss(F.log_softmax(x, 1), y, ignore_index=1) ** 2,
    "classes first": lambda x, y: F.nll_loss(x.T.log_softmax(0).T.sin(), y),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    y, vectors = torch.tensor([0, 2, 1, 2]), torch.randn(3, 4, 3, dtype=torch.float64)
    x = torch.randn(4, 3, dtype=torch.float64)

    def fn(p):
        return LOSSES[name](p["x"], y)

    params, vectors = {"x": x}, {"x": vectors}
    recording = Recording()
    expected = by_transforms(fn, params, vectors)
    for _ in range(2):
        assert_close(gradient_tangents(fn, params, vectors, recording), expected, rtol=1e-10, atol=1e-12)


def test_parameters_that_do_not_matter_have_zeros():
    used, unused = torch.randn(3, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    vectors = [torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)]
    result = gradient_tangents(lambda p: p[0].pow(3).sum(), [used, unused], vectors)
    assert_close(result[0], 6 * used * vectors[0])
    assert not result[1].any()
    assert not gradient_tangents(lambda p: torch.tensor(1.0), [used], vectors[:1])[0].any()
    assert not gradient_tangents(lambda p: p[0].sum(), [used], vectors[:1])[0].any()


def test_control_flow_may_look_at_values():
    x = torch.tensor([1.0, -2.0])

    def fn(p):
        return (p**3).sum() if p.sum() < 0 and p[0].item() > 0 else (p**2).sum()

    assert_close(gradient_tangents(fn, x, torch.eye(2)), torch.diag(6 * x))


# ---- what cannot be computed so --------------------------------------------------------------------------------------


def overwritten(p):
    y = p * 1
    y[0] = 2 * y[1]
    return y.pow(3).sum()


def test_changes_of_views_are_left_to_transforms():
    x, vectors = torch.randn(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    with pytest.raises(Unsupported, match="in place"):
        gradient_tangents(overwritten, x, vectors)
    with pytest.warns(UserWarning, match=r"by transforms of torch.func, which are slower: .* in place"):
        product = hvp(overwritten, x, vectors)
    assert_close(product, torch.autograd.functional.hessian(overwritten, x))


def squeezed(x):
    y = x * x
    with torch.no_grad():
        y.diagonal().fill_(0.5)
    return (y.sin() * x).square().sum()


HARD = {
    "complex": lambda x: torch.fft.rfft(x).abs().pow(3).sum(),
    "determinant": lambda x: torch.linalg.det(x) + (torch.linalg.solve(x + 3 * torch.eye(3).to(x), x)).square().sum(),
    "filled diagonal": squeezed,
    "empty": lambda x: torch.cat([x[:0], x.view(3, 3)[:, :0].reshape(0, 3), x]).pow(3).sum() + x.new_empty(0).sum(),
    "numbers": lambda x: x.pow(3).sum().sum(-1).mean().squeeze().unsqueeze(-1).sum() * x.sum().exp(),
    "bias of one row": lambda x: F.linear(x[:1].sin(), x, x[0]).pow(3).sum() + x.pow(3).sum(),
    "matrix as bias": lambda x: torch.addmm(x.cos(), x, x.sin()).square().sum() + x.cos().pow(3).sum(),
    "mse": lambda x: F.mse_loss(x.sin(), torch.ones(3, 3).to(x)) + F.mse_loss(x, x.cos(), reduction="sum"),
    "huber": lambda x: F.huber_loss(x.sin(), x.cos() * 3, delta=0.7),
    "circular": lambda x: F.pad(x[None, None], (1, 1, 1, 1), mode="circular").pow(3).sum(),
}


@pytest.mark.filterwarnings("ignore:Hessian-vector products by transforms")
@pytest.mark.parametrize("name", HARD)
def test_hard_functions(name):
    torch.manual_seed(1)
    x = torch.randn(3, 3, dtype=torch.float64)
    vectors = torch.randn(9, 2, dtype=torch.float64)
    before = vectors.clone()
    gradient, step = grad(HARD[name]), 1e-6
    shifts = [step * v.view(3, 3) for v in vectors.T]
    expected = torch.stack([(gradient(x + s) - gradient(x - s)).flatten() / (2 * step) for s in shifts], 1)
    assert_close(hvp(HARD[name], x, vectors), expected, rtol=1e-5, atol=1e-6)
    assert_close(hvp(HARD[name], x, vectors[:, 0]), expected[:, 0], rtol=1e-5, atol=1e-6)
    assert torch.equal(vectors, before)


class Doubled(torch.autograd.Function):
    """x**2, by values that are detached inside, and by a change in place of a view."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        y = x.detach() * x
        y.squeeze().mul_(2)
        return y

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 4 * grad * x


def test_functions_with_a_backward_of_their_own():
    x, v = torch.randn(1, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    with pytest.raises(Unsupported):
        gradient_tangents(lambda p: Doubled.apply(p * 1).pow(2).sum(), x, v.view(1, 1, 4))


@pytest.mark.parametrize("causal", [False, True])
def test_fused_attention_of_pytorch(causal):
    query = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    weight, v = torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)

    def fn(w):
        return F.scaled_dot_product_attention(query * w, query.sin() * w, query.cos(), is_causal=causal).square().sum()

    step = 1e-6
    with sdpa_kernel(SDPBackend.MATH):
        expected = (grad(fn)(weight + step * v) - grad(fn)(weight - step * v)) / (2 * step)
    assert_close(gradient_tangents(fn, weight, v[None])[0], expected, rtol=1e-5, atol=1e-7)


def changed_afterwards(model, inputs):
    y = model(inputs)
    return y / (y * y).sum(1, keepdim=True).detach().add_(1.0)


def test_kept_values_are_not_changed_through_what_is_detached():
    model, inputs = nn.Linear(4, 3).double(), torch.randn(5, 4, dtype=torch.float64)
    outer = nn.Module()
    outer.model, outer.forward = model, lambda x: changed_afterwards(model, x)
    kept = HessianOperator(outer, F.mse_loss, [(inputs, inputs[:, :3])], keep_primals=True)
    vector = torch.randn(kept.shape[0], dtype=torch.float64)
    first = kept @ vector
    assert_close(kept @ vector, first, rtol=0, atol=0)
    assert_close(HessianOperator(outer, F.mse_loss, [(inputs, inputs[:, :3])]) @ vector, first)


def test_statistics_of_instance_normalisation_are_not_touched():
    model, inputs, targets = layers("average pool")
    model.layers.append(nn.InstanceNorm2d(4, track_running_stats=True).double())
    model.train()
    before = model.layers[-1].running_mean.clone()
    operator = HessianOperator(model, F.cross_entropy, [(inputs, targets)])
    operator @ torch.randn(operator.shape[0], dtype=torch.float64)
    assert torch.equal(model.layers[-1].running_mean, before)


class Overwriting(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, dtype=torch.float64))

    def forward(self, x):
        return overwritten(self.weight) * x


def test_an_operator_fails_once_and_then_goes_by_transforms():
    operator = HessianOperator(Overwriting(), lambda out, y: out.mean(), [(torch.ones(2).double(), torch.ones(2))])
    vector = torch.randn(3, dtype=torch.float64)
    with pytest.warns(UserWarning, match="by transforms"):
        first = operator @ vector
    assert_close(operator @ vector, first)  # a second warning would be an error


def test_only_the_bias_of_a_normalisation():
    x, bias = torch.randn(3, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)

    def fn(b):
        return F.layer_norm(x, (4,), torch.ones_like(x[0]), b).sum() + b.pow(3).sum()

    assert_close(hvp(fn, bias, torch.ones_like(bias)), 6 * bias)


class Detaching(torch.autograd.Function):
    """x**2, whose forward detaches what it computes with."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.detach() ** 2

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * grad * x


def test_what_a_function_detaches_in_its_forward_has_tangents():
    p, v = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    expected = hvp(lambda p: (p.sin() ** 2 * p).sum(), p, v)
    assert_close(hvp(lambda p: (Detaching.apply(p.sin()) * p).sum(), p, v), expected)


def test_the_bias_alone_of_a_batch_normalisation():
    x, bias = torch.randn(3, 4, 2, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    mean, variance = torch.randn(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64) + 0.5

    def fn(b):
        return F.batch_norm(x, mean, variance, torch.ones_like(mean), b).sum() + b.pow(3).sum()

    assert_close(hvp(fn, bias, torch.ones_like(bias)), 6 * bias)
    curved = hvp(lambda b: F.batch_norm(x, mean, variance, None, b).pow(3).sum(), bias, torch.ones_like(bias))
    assert_close(curved, 6 * F.batch_norm(x, mean, variance, None, bias).sum((0, 2)))


def test_a_fallback_draws_the_same_random_numbers():
    p, v = torch.randn(200, dtype=torch.float64), torch.ones(200, dtype=torch.float64)

    def fn(p):
        mask = torch.rand(200, dtype=torch.float64) < 0.5
        overwritten(p[:2])
        return (mask * p**3).sum()

    torch.manual_seed(0)
    mask = torch.rand(200, dtype=torch.float64) < 0.5
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="by transforms"):
        assert_close(hvp(fn, p, v), 6 * p * mask)


def test_errors_of_the_function_are_its_own():
    def broken(p):
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        hvp(broken, torch.randn(3), torch.randn(3))


def test_nested_products():
    """A product inside of a transform is that of the transforms, and differentiable."""
    x, v = torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)

    def fn(p):
        return (p**4).sum()

    third = grad(lambda p: hvp(fn, p, v).sum())(x)
    assert_close(third, 24 * x * v)
    assert_close(jvp(lambda p: hvp(fn, p, v), (x,), (v,))[1], 24 * x * v * v)


# ---- values that are kept --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "hardsigmoid"])
def test_recorded_operations_give_the_same(name):
    fn, params = loss_of(*layers(name))
    recording, calls = Recording(), 0

    def counted(p):
        nonlocal calls
        calls += 1
        return fn(p)

    for seed, count in enumerate((2, 2, 2, 1, 1, 3)):  # recorded, run again, and by the program of the second run
        vectors = directions(params, count, seed)
        with sdpa_kernel(SDPBackend.MATH):
            result = gradient_tangents(counted, params, vectors, recording)
            assert_close(result, gradient_tangents(fn, params, vectors), rtol=0, atol=0)
        assert all(p.tangents is None for step in recording._steps for p in (*step.results, *recording._inputs))
    assert calls == 1
    assert len(recording) > 10


def test_recordings_keep_the_programs_of_few_counts_of_vectors():
    fn, params = loss_of(*layers("linear"))
    recording = Recording()
    for count in (1, 1, 2, 3, 4, 5, 1, 1):
        vectors = directions(params, count, count)
        assert_close(gradient_tangents(fn, params, vectors, recording), gradient_tangents(fn, params, vectors))
        assert len(recording._programs) <= 4


def test_recorded_vectors_may_be_one_tensor():
    x, v, recording = torch.randn(3, dtype=torch.float64), torch.randn(1, 3, dtype=torch.float64), Recording()
    for first, second in ((v, v), (v, v), (v, v), (v, 2 * v), (v, 3 * v)):
        results = gradient_tangents(lambda p: (p[0] * p[1].exp()).sum(), [x, x + 1], [first, second], recording)
        assert_close(results[0], (x + 1).exp() * second)


@pytest.mark.parametrize("name", ["layer norm", "gelu", "attended", "blurs"])
def test_recorded_operations_follow_the_backend(name):
    fn, params = loss_of(*layers(name))
    recording = Recording()
    for seed, backend in enumerate(("cpu", "cpu", "cpu", "reference", "reference", "cpu", "reference")):
        vectors = directions(params, 2, seed)
        with sdpa_kernel(SDPBackend.MATH), vitfast.backend(backend):
            result = gradient_tangents(fn, params, vectors, recording)
            assert_close(result, gradient_tangents(fn, params, vectors), rtol=1e-10, atol=1e-12)


def test_a_recording_leaves_out_what_does_not_matter():
    x, v = torch.randn(3, dtype=torch.float64), torch.randn(1, 3, dtype=torch.float64)
    recording, other, needless = Recording(), Recording(), []

    def chatty(p):
        value = p.exp()
        needless.append(weakref.ref(value.primal))
        value.sum().neg()
        return (p**3).sum()

    for _ in range(2):
        assert_close(gradient_tangents(chatty, x, v, recording), 6 * x * v)
        gradient_tangents(lambda p: (p**3).sum(), x, v, other)
    assert len(recording) == len(other)
    assert len(needless) == 1
    assert needless[0]() is None


def test_a_run_that_fails_leaves_nothing_in_a_recording():
    recording, seen = Recording(), []

    def broken(p):
        value = p.exp()
        seen.append(weakref.ref(value.primal))
        if len(seen) == 1:
            raise LookupError("mine")
        return value.sum()

    x, v = torch.randn(3, dtype=torch.float64), torch.randn(1, 3, dtype=torch.float64)
    with pytest.raises(LookupError, match="mine"):
        gradient_tangents(broken, x, v, recording)
    assert len(recording) == 0
    assert seen[0]() is None
    for _ in range(2):
        assert_close(gradient_tangents(broken, x, v, recording), x.exp() * v)
    assert len(seen) == 2


def test_recorded_parameters_of_two_dtypes():
    params = {"a": torch.randn(4, 5), "b": torch.randn(5, dtype=torch.bfloat16)}
    vectors, recording = {n: torch.randn(2, *p.shape) for n, p in params.items()}, Recording()

    def fn(p):
        return (p["a"].tanh().bfloat16() @ p["b"]).square().sum()

    first = gradient_tangents(fn, params, vectors, recording)
    assert_close(gradient_tangents(None, params, vectors, recording), first, rtol=0, atol=0)


def test_products_in_inference_mode():
    weight, v = torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    with torch.inference_mode():
        result = hvp(lambda p: (p**3).sum(), weight, v)
    assert_close(result.clone(), 6 * weight * v)


@pytest.mark.parametrize("first", ["tangents", "none", "expanded"])
def test_stacks_have_the_tangents_in_front(first):
    x = torch.randn(4, 6, dtype=torch.float64)
    given = {"tangents": lambda p: p.mT, "none": lambda p: x.mT, "expanded": lambda p: p[:1].expand(4, 6).mT}[first]
    seen = []

    def fn(p):
        stacked = torch.stack([given(p), (p * p).mT], 1)
        seen.append(stacked.tangents.stride())
        return stacked.flatten(1).pow(3).sum()

    params, vectors = {"p": x}, {"p": torch.randn(3, 4, 6, dtype=torch.float64)}
    gradient_tangents(lambda p: fn(p["p"]), params, vectors)
    assert max(seen[0]) == seen[0][0]


def test_a_recording_is_made_anew_when_its_tensors_change():
    x, factor = torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    v, recording = torch.randn(1, 3, dtype=torch.float64), Recording()
    for change in (lambda: None, lambda: x.mul_(2), lambda: factor.add_(1)):
        change()
        assert_close(gradient_tangents(lambda p: (factor * p**3).sum(), x, v, recording), 6 * factor * x * v)


def test_a_recording_without_a_gradient():
    x, v, recording = torch.randn(3), torch.randn(1, 3), Recording()
    for fn in (lambda p: torch.tensor(1.0), lambda p: p.sum()):
        for _ in range(2):
            assert not gradient_tangents(fn, x, v, recording).any()
        recording.clear()


def test_an_interrupted_replay_leaves_no_tangents():
    x, v, recording = torch.randn(3, dtype=torch.float64), torch.randn(1, 3, dtype=torch.float64), Recording()
    expected = gradient_tangents(lambda p: (p.sin() ** 2).sum(), x, v, recording)
    last = recording._steps[-1]
    compute = last.function

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    last.function = interrupted
    with pytest.raises(KeyboardInterrupt):
        gradient_tangents(None, x, v, recording)
    assert all(p.tangents is None for step in recording._steps for p in (*step.results, *recording._inputs))
    last.function = compute
    assert_close(gradient_tangents(None, x, v, recording), expected)


@pytest.mark.parametrize("keep_primals", [False, True])
@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_frozen_dropout_is_the_same_for_all_vectors(keep_primals, chunk):
    model, inputs, targets = layers("linear")
    model.layers.append(nn.Dropout(0.5))
    model.train()
    options = {"dropout": "frozen", "seed": 3, "chunk": chunk, "keep_primals": keep_primals}
    operator = HessianOperator(model, F.cross_entropy, [(inputs, targets), (inputs.sin(), targets)], **options)
    vectors = torch.randn(operator.shape[0], 3, dtype=torch.float64)
    together = operator @ vectors
    assert_close(together, torch.stack([operator @ v for v in vectors.T], 1))
    assert_close(operator @ vectors, together, rtol=0, atol=0)
    dense = operator.to_dense()
    assert_close(dense, dense.T)


# ---- memory that is kept ---------------------------------------------------------------------------------------------


def test_freed_memory_is_kept_while_somebody_asks_for_it():
    model, inputs, targets = layers("linear")
    before = hessian_memory._holders
    operator = HessianOperator(model, F.cross_entropy, [(inputs, targets)])
    assert hessian_memory._holders == before + 1
    fn, params = loss_of(model, inputs, targets)
    hvp(fn, params, torch.randn(operator.shape[0], dtype=torch.float64))
    assert hessian_memory._holders == before + 1
    del operator
    assert hessian_memory._holders == before


def test_product_of_a_functional_call_in_any_form():
    model, inputs, targets = layers("gelu")
    fn, params = loss_of(model, inputs, targets)
    tree = {n: v[0] for n, v in directions(params, 1).items()}
    product = hvp(fn, params, tree)
    assert set(product) == set(params)
    assert functional_call(model, product, (inputs,)).shape == (4, 3)


# ---- primal results that nobody reads -------------------------------------------------------------------------------


@pytest.fixture
def read(monkeypatch):
    """What is deferred in a test and read, each checked against the layout that was foretold."""
    results = []

    def checked(self):
        is_new = self.value is None
        result = compute(self)
        if is_new:
            results.append(result)
            foretold = self.shape, tuple(self.stride()), self.dtype, self.device
            assert (result.shape, result.stride(), result.dtype, result.device) == foretold
        return result

    compute = Deferred.read
    monkeypatch.setattr(Deferred, "read", checked)
    return results


@pytest.mark.parametrize("name", ["linear", "convolution", "convolutions with kernels", "groups", "transposed"])
def test_gradients_of_parameters_are_not_computed(name, read):
    model, inputs, targets = layers(name)
    loss, params = loss_of(model, inputs, targets)
    gradient_tangents(loss, params, directions(params, 2))
    weights = {p.shape for p in model.parameters()} | {p.shape[::-1] for p in model.parameters()}
    assert not [r.shape for r in read if r.shape in weights]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_that_are_needed_are_computed(read, layout, dtype):
    """Weights that are functions of parameters, or used twice."""
    torch.manual_seed(0)
    x = torch.randn(4, 16, 6, 6, dtype=dtype).contiguous(memory_format=layout)
    shapes = {
        "a": (16, 5),
        "b": (5, 16),
        "bias": (16,),
        "k": (16, 16, 3, 3),
        "g": (16, 8, 1, 1),
        "s": (16, 16, 3, 3),
        "w": (16, 16),
    }
    params = {name: torch.randn(shape, dtype=dtype) / 4 for name, shape in shapes.items()}

    def fn(p):
        weight, bias = p["a"] @ p["b"], p["bias"].tanh()
        maps = F.conv2d(x, p["k"] * 0.5, bias, padding=1).tanh() + F.conv2d(x, p["g"].sin(), groups=2)
        maps = F.conv2d(maps, p["s"].tanh(), bias, stride=2)
        rows = F.linear(maps.movedim(1, -1), weight, bias).sin()
        turned = p["w"].t().view(4, 4, 16).view(16, 16)
        return F.linear(rows, weight.t(), bias).square().mean() + F.linear(rows @ turned, p["b"]).mean()

    vectors = directions(params, 2)
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-9}[dtype]
    recording = Recording()
    for _ in range(2):
        result = gradient_tangents(fn, params, vectors, recording)
        assert_close(result, by_transforms(fn, params, vectors), rtol=tolerance, atol=tolerance)
    assert {(16, 16), (16, 16, 3, 3), (16, 8, 1, 1), (16,)} <= {tuple(r.shape) for r in read}


class ForgettingItsMatrix(torch.autograd.Function):
    """x times a matrix that is overwritten at the end of the backward pass, as one that frees its memory may do."""

    @staticmethod
    def forward(x, matrix):
        return x @ matrix

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.matrix = inputs[1].clone()

    @staticmethod
    def backward(ctx, grad):
        result = grad @ ctx.matrix.t()
        ctx.matrix.zero_()
        return result, None

    @staticmethod
    def jvp(ctx, x_t, _):
        return x_t @ ctx.matrix


def test_what_is_changed_before_it_is_read_is_noticed():
    x, matrix, vectors = torch.randn(3, 4).double(), torch.randn(4, 4).double(), torch.randn(2, 3, 4).double()
    with pytest.raises(RuntimeError, match="yet to read was changed in place"):
        gradient_tangents(lambda x: ForgettingItsMatrix.apply(x.sin(), matrix).square().sum(), x, vectors)


# ---- values that are computed again ---------------------------------------------------------------------------------


class Repeated(nn.Module):
    """Activations whose results are used as they are, as views, twice, and changed in place."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = F.gelu(self.first(x))
        rows = F.gelu(self.second(x)).view(2, -1, 8).transpose(0, 1)
        changed = F.gelu(x * x)
        changed *= x
        changed = changed + F.gelu(changed)
        return self.last(rows.flatten(0, 1) * x + changed.sin())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_activations_that_are_computed_again(dtype):
    torch.manual_seed(0)
    model, x, y = Repeated().to(dtype), torch.randn(4, 5, dtype=dtype), torch.randint(3, (4,))
    loss, params = loss_of(model, x, y)
    vectors = directions(params, 3)
    exact, exact_params = loss_of(Repeated().double(), x.double(), y)[0], {n: p.double() for n, p in params.items()}
    expected = by_transforms(exact, exact_params, {n: v.double() for n, v in vectors.items()})
    result = gradient_tangents(loss, params, vectors)
    for name, product in result.items():
        limit = {torch.float64: 1e-12, torch.bfloat16: 0.1}[dtype] * expected[name].abs().max()
        assert (product.double() - expected[name]).abs().max() <= limit
        assert product.dtype == dtype


def test_activations_are_not_kept(monkeypatch):
    """Of two tensors with tangents in each layer, the one that is not an activation is there when the loss is."""
    layers = nn.Sequential(*(module for _ in range(6) for module in (nn.Linear(16, 16), nn.GELU())))
    params = {n: p.detach() for n, p in layers.named_parameters()}
    alive = []

    def fn(p):
        x = functional_call(layers, p, (torch.randn(1000, 16),)).square().mean()
        gc.collect()
        large = [t.pair for t in gc.get_objects() if type(t) is Dual and t.shape == (1000, 16)]
        alive.append(len({id(pair.tangents) for pair in large}))
        return x

    vectors = directions(params, 2)
    gradient_tangents(fn, params, vectors)
    monkeypatch.setattr(dual, "_kept", lambda tensor: (tensor, version_of(tensor)))
    monkeypatch.setattr(dual, "_given_back", lambda kept: kept[0])
    gradient_tangents(fn, params, vectors)
    assert alive[0] <= alive[1] - 5


def test_a_constant_that_is_changed_after_its_use_is_noticed():
    def fn(x):
        constant = torch.full((3,), 2.0)
        y = (x.sin() * constant).sum()
        constant.zero_()
        return y * y

    with pytest.raises(RuntimeError, match=r"a tensor of shape \(3,\) that a derivative needs was changed in place"):
        gradient_tangents(fn, torch.ones(3), torch.eye(3))


# ---- what autograd keeps in a product -------------------------------------------------------------------------------


class Branches(nn.Module):
    """A frozen layer, a branch that nothing depends on, and a layer to differentiate; tanh keeps its own result."""

    def __init__(self, fails=False):
        super().__init__()
        self.frozen, self.layer, self.fails, self.seen = nn.Linear(4, 8), nn.Linear(8, 3), fails, []

    def forward(self, x):
        branches = [self.frozen(x).tanh(), self.layer(torch.ones(2, 8).to(x)).tanh()]
        self.seen += [weakref.ref(branch) for branch in branches]
        if self.fails:
            raise torch.OutOfMemoryError("no memory")
        return self.layer(branches[0])


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_not_run_backward_is_freed(fails):
    model = Branches(fails)
    params = {n: p.detach() for n, p in model.layer.named_parameters(prefix="layer")}
    vectors = directions(params, 2)

    def fn(p):
        return functional_call(model, p, (torch.randn(5, 4),)).square().mean()

    with pytest.raises(torch.OutOfMemoryError) if fails else nullcontext():
        gradient_tangents(fn, params, vectors)
    gc.collect()
    assert model.seen
    assert not [alive for alive in model.seen if alive() is not None]


def added_to(x):
    a = x.sin()
    b = a * a
    a += 1
    return (a * b).sum()


def doubled(x):
    y = x.tanh()
    y *= 2
    return (y * x).sum()


def cleared(x):
    y = x + 1
    y.zero_()
    return (x**3).sum() + y.sum()


@pytest.mark.parametrize("fn", [added_to, doubled, cleared])
def test_values_that_are_changed_after_they_were_kept(fn):
    """PyTorch refuses the first two; their derivatives are those of what was computed all the same."""
    x, vectors = torch.linspace(-1, 2, 4).double(), torch.eye(4).double()
    expected = {
        added_to: torch.diag(torch.func.vmap(grad(grad(lambda x: x.sin() ** 3 + x.sin() ** 2)))(x)),
        doubled: torch.diag(torch.func.vmap(grad(grad(lambda x: 2 * x.tanh() * x)))(x)),
        cleared: torch.diag(6 * x),
    }[fn]
    assert_close(gradient_tangents(fn, x, vectors), expected)
    assert_close(vectors, torch.eye(4).double())


def penalised(x):
    (slope,) = torch.autograd.grad(x.sin().square().sum(), x, create_graph=True)
    return (x.tanh() * slope).sum()


def stepped(x):
    inner = x * 1
    (slope,) = torch.autograd.grad(F.gelu(inner @ inner.t()).sum(), inner, create_graph=True)
    return (x - 0.1 * slope).sin().sum()


def hooked(x):
    seen = []
    x.register_hook(lambda g: seen.append(g.sum().item()))
    return (x @ x.t()).sin().sum()


def transformed(x):
    return (torch.func.grad(lambda y: y.sin().sum())(torch.ones(3).double()) * x).square().sum()


@pytest.mark.parametrize("fn", [penalised, stepped, hooked, transformed])
def test_functions_that_differentiate_themselves(fn):
    x, vectors = torch.linspace(-1, 2, 6).double().view(2, 3), torch.eye(6).double().view(6, 2, 3)
    expected = torch.autograd.functional.hessian(fn, x).view(6, 2, 3)
    assert_close(gradient_tangents(fn, x, vectors), expected)
