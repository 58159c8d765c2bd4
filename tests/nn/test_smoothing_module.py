"""Every block of "Blurs Behave Like Ensembles" against its formula."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitfast.nn import Smoothing2d

NAMES = ["Blur", "TanhBlur", "BNTanhBlur", "BNBlur", "ReLuBlur", "SigmoidBlur", "SoftmaxBlur", "ScalingBlur"]
UNBLURRED = ["Tanh", "ReLu", "Scaling"]


def activated(name, x, temperature):
    """What the paper's blocks compute between normalisation and blur, each as its own formula."""
    kind = name.removeprefix("BN").removesuffix("Blur")
    if kind == "":
        return F.relu(x).clamp(max=temperature) if name.startswith("BN") else x
    t = temperature
    return {
        "Tanh": lambda: F.relu(t * torch.tanh(x / t)),
        "ReLu": lambda: x.clamp(0, t),
        "Sigmoid": lambda: F.relu(4 * t * (torch.sigmoid(x / t) - 0.5)),
        "Softmax": lambda: t * F.softmax(x / t, dim=1),
        "Scaling": lambda: x / t,
    }[kind]()


def expected(name, module, x, temperature, *, growing):
    norm = module.bn
    if name.startswith("BN"):
        x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training, 0.0, norm.eps)
    x = activated(name, x, temperature)
    if name in UNBLURRED:
        return x
    if growing:
        return F.avg_pool2d(x, 2, stride=1, padding=1)
    return F.avg_pool2d(F.pad(x, (0, 1, 0, 1), mode="replicate"), 2, stride=1)


def module_and_input(name, **options):
    torch.manual_seed(0)
    module = Smoothing2d.named(name, 6, dtype=torch.float64, **options)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in (norm.weight, norm.bias, norm.running_mean):
                nn.init.normal_(tensor)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return module, 8 * torch.randn(3, 6, 7, 5, dtype=torch.float64)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("growing", [False, True], ids=["same", "growing"])
@pytest.mark.parametrize("temperature", [None, 3.0])
@pytest.mark.parametrize("name", NAMES + UNBLURRED)
def test_is_the_block_of_the_paper(name, temperature, growing, training):
    unblurred = name in UNBLURRED
    options = {"padding": 1, "pad_mode": "zeros"} if growing and not unblurred else {}
    if temperature is not None:
        options["temperature"] = temperature
    module, x = module_and_input(name, **options)
    module.train(training)
    used = temperature or {"ReLuBlur": 6.0, "ReLu": 6.0, "ScalingBlur": 5.0, "Scaling": 5.0}.get(
        name, math.inf if name == "BNBlur" else 10.0
    )
    copied = copy.deepcopy(module)
    inputs, copied_inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out = module(inputs)
    reference = expected(name, copied, copied_inputs, used, growing=growing)
    torch.testing.assert_close(out, reference)
    weight = torch.randn_like(out)
    ours = torch.autograd.grad((out * weight).sum(), (inputs, *module.parameters()))
    theirs = torch.autograd.grad((reference * weight).sum(), (copied_inputs, *copied.parameters()))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_normalisation_in_evaluation_mode_is_one_pass(memory_format, monkeypatch):
    module, x = module_and_input("BNTanhBlur")
    monkeypatch.setattr(torch.nn.BatchNorm2d, "forward", None)  # not called
    module.eval()(x.contiguous(memory_format=memory_format))


def test_a_hook_on_the_normalisation_sees_its_output():
    module, x = module_and_input("BNBlur")
    module.eval()
    without = module(x)
    seen = []
    module.bn.register_forward_hook(lambda _, args, out: seen.append(out))
    torch.testing.assert_close(module(x), without)
    assert seen[0].shape == x.shape


def test_normalisation_without_affine_parameters_or_statistics():
    module, x = module_and_input("BNBlur")
    for norm in (nn.BatchNorm2d(6, affine=False), nn.BatchNorm2d(6, track_running_stats=False)):
        module.bn = norm.double().eval()
        out = module(x)
        module.bn.register_forward_hook(lambda _, args, out: None)  # not folded
        torch.testing.assert_close(out, module(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    module, x = module_and_input("BNTanhBlur")
    reference = module.eval()(x)
    half = copy.deepcopy(module).to(dtype)
    out = half(x.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), reference, rtol=4 * torch.finfo(dtype).eps, atol=0.05)


def test_states_hold_the_normalisation_alone():
    assert list(Smoothing2d.named("TanhBlur", 4).state_dict()) == []
    assert list(Smoothing2d.named("BNBlur", 4).state_dict()) == [
        f"bn.{part}" for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    ]


def test_maps_of_one_place():
    assert Smoothing2d(3)(torch.ones(2, 3, 1, 1)).shape == (2, 3, 1, 1)


def test_a_smoother_blur():
    module = Smoothing2d(3, activation=None, filt_size=5, kernel="pascal")
    torch.testing.assert_close(module(torch.ones(2, 3, 9, 9)), torch.ones(2, 3, 9, 9))


def test_compiles():
    module, x = module_and_input("BNTanhBlur")
    module.eval()
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x))


def test_representation():
    assert "activation='tanh', temperature=10" in repr(Smoothing2d(3))
    assert Smoothing2d(3, "relu").temperature == math.inf


def test_bad_input():
    with pytest.raises(ValueError, match=r"activation must be one of None, 'relu', 'tanh', .*; got 'gelu'"):
        Smoothing2d(3, "gelu")
    with pytest.raises(ValueError, match="there is no smoothing block 'tanhblur'; there are: Blur, TanhBlur"):
        Smoothing2d.named("tanhblur", 3)
    with pytest.raises(ValueError, match="temperature must be above 0, and finite but for 'relu'; got -1"):
        Smoothing2d(3, temperature=-1)
    with pytest.raises(ValueError, match="temperature must be above 0, and finite but for 'relu'; got inf"):
        Smoothing2d(3, "tanh", temperature=float("inf"))
    with pytest.raises(TypeError, match="temperature must be a number; got 'hot'"):
        Smoothing2d(3, temperature="hot")
    with pytest.raises(ValueError, match=r"x must have 3 channels, \(B, 3, H, W\); got \(1, 4, 2, 2\)"):
        Smoothing2d(3)(torch.ones(1, 4, 2, 2))
