"""Operators that are called without PyTorch's dispatcher: the same results, and only where nobody would notice."""

from __future__ import annotations

import platform
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from vitfast import _C
from vitfast.functional import attention_qkvpacked, blur_pool2d, window_attention_qkvpacked
from vitfast.ops import _rules

NO_PROLOGUE = (None, None, None, None, 0.0, 0, 1.0)
TAPS = torch.tensor([0.25, 0.5, 0.25])


def arguments(name):
    """Of a registered operator: tensors in memory of any order."""
    maps = [torch.randn(2, 5, 6, 3, 8).transpose(1, 2) for _ in range(4)]
    heads = [torch.randn(2, 7, 3, 8).transpose(1, 2) for _ in range(4)]
    window, bias = ([4, 3], [1, 2], 0.3), torch.randn(3, 12, 12)
    packed_map, packed = torch.randn(2, 6, 5, 3, 3, 8), torch.randn(2, 7, 3, 3, 8)
    lse, head_lse = torch.randn(2, 3, 6, 5), torch.randn(2, 3, 7)
    x, kernel = torch.randn(2, 3, 8, 9).contiguous(memory_format=torch.channels_last), torch.outer(TAPS, TAPS)
    blur = ([2, 1], [1, 1, 1, 1], 1)
    return {
        "attention": (*heads[:3], None, 0.3, True),
        "attention_backward": (heads[0], *heads[:3], None, heads[3], head_lse, 0.3),
        "attention_qkvpacked": (packed, torch.randn(1, 3, 7, 7), 0.3, True),
        "attention_qkvpacked_backward": (packed[:, :, 0].clone(), packed, None, packed[:, :, 1].clone(), head_lse, 0.3),
        "blur_pool2d": (x, kernel, *blur, *NO_PROLOGUE),
        "blur_pool2d_backward": (
            torch.randn(2, 3, 4, 9).contiguous(memory_format=torch.channels_last),
            x,
            kernel,
            [8, 9],
            *blur,
            torch.rand(3),
            torch.randn(3),
            None,
            None,
            0.0,
            1,
            1.0,
            True,
        ),
        "window_attention": (*maps[:3], bias, *window, True),
        "window_attention_backward": (maps[3], *maps[:3], bias, lse, *window),
        "window_attention_qkvpacked": (packed_map, None, *window, True),
        "window_attention_qkvpacked_backward": (packed_map[:, :, :, 0].clone(), packed_map, bias, lse, *window),
    }[name]


NAMES = sorted(name for name in vars(_C.direct) if not name.startswith("_") and name != "Unsuited")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_results_are_those_of_the_operator(name, dtype):
    def cast(value):
        if not isinstance(value, torch.Tensor) or value.dim() == 2:  # a blur's kernel has a dtype of its own
            return value
        wide = torch.promote_types(dtype, torch.float32)
        in_wide = value.dim() == 1 or value.shape in {(2, 3, 6, 5), (2, 3, 7), (3, 12, 12), (1, 3, 7, 7)}
        return value.to(wide if in_wide else dtype)  # scale and shift, logsumexps and biases

    given = [cast(value) for value in arguments(name)]
    found, expected = getattr(_C.direct, name)(*given), _rules.operator(name)(*given)
    found, expected = (r if isinstance(r, tuple) else (r,) for r in (found, expected))
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
        assert (one.dtype, one.stride(), one.requires_grad) == (other.dtype, other.stride(), False)


@pytest.fixture
def direct_calls(monkeypatch):
    """The names of the operators that were called directly."""
    called = []

    def logged(name, function):
        def call(*arguments):
            result = function(*arguments)
            called.append(name)
            return result

        return call

    monkeypatch.setattr(_rules, "_DIRECT", {name: logged(name, getattr(_C.direct, name)) for name in NAMES})
    return called


def test_what_is_called_directly(direct_calls):
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    blur_pool2d(x, TAPS).sum().backward()
    window_attention_qkvpacked(torch.randn(1, 4, 4, 3, 2, 8, requires_grad=True), window_size=2).sum().backward()
    with torch.inference_mode():
        attention_qkvpacked(torch.randn(1, 4, 3, 2, 8))
        attention_qkvpacked(torch.nn.Parameter(torch.randn(1, 4, 3, 2, 8)))
    windows = ["window_attention_qkvpacked", "window_attention_qkvpacked_backward"]
    assert direct_calls == ["blur_pool2d", "blur_pool2d_backward", *windows, *["attention_qkvpacked"] * 2]


class Names:
    """Mixed into a mode: the names of what it sees."""

    def __init__(self):
        super().__init__()
        self.names = []

    def call(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class OperatorNames(Names, TorchDispatchMode):
    __torch_dispatch__ = Names.call


class FunctionNames(Names, torch.overrides.TorchFunctionMode):
    __torch_function__ = Names.call


@pytest.mark.parametrize("mode", [OperatorNames, FunctionNames])
def test_modes_see_the_operator(direct_calls, mode):
    with mode() as seen:
        blur_pool2d(torch.randn(1, 2, 6, 6), TAPS)
    assert "vitfast.blur_pool2d.default" in seen.names
    assert not direct_calls


@pytest.mark.parametrize("all_threads", [False, True])
def test_profilers_see_the_operator(direct_calls, all_threads):
    config = torch.profiler._ExperimentalConfig(profile_all_threads=all_threads)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, experimental_config=config) as profile:
        blur_pool2d(torch.randn(1, 2, 6, 6), TAPS)
    assert "vitfast::blur_pool2d" in {event.key for event in profile.key_averages()}
    assert not direct_calls


def test_traces_have_the_operator(direct_calls):
    x = torch.randn(1, 2, 6, 6)
    traced = torch.jit.trace(lambda x: blur_pool2d(x, TAPS), x, check_trace=False)
    assert "vitfast::blur_pool2d" in str(traced.graph)
    norm = (None, None, torch.zeros(2), torch.full((2,), 4.0), 0.0)
    folded = make_fx(lambda x: blur_pool2d(x, TAPS, norm=norm))(
        x
    )  # by PyTorch, for the kernels of other devices do not
    (call,) = (node for node in folded.graph.nodes if "blur_pool2d" in str(node.target))
    assert call.args[7:9] == (None, None)
    assert_close(folded(x), blur_pool2d(x, TAPS) / 2)
    direct_calls.clear()
    assert "vitfast.blur_pool2d" in str(make_fx(lambda x: blur_pool2d(x, TAPS))(x).graph)
    assert not direct_calls


class Tagged(torch.Tensor):
    """A subclass that PyTorch hands its own operators."""


def test_what_the_dispatcher_has_to_see_meets_it(direct_calls):
    values = torch.randn(1, 2, 6, 6)
    expected = blur_pool2d(values, TAPS)
    direct_calls.clear()
    assert_close(blur_pool2d(values.as_subclass(Tagged), TAPS).as_subclass(torch.Tensor), expected)
    assert_close(blur_pool2d(torch._neg_view(values), TAPS), -expected)
    assert not direct_calls
    assert_close(torch.func.vmap(lambda x: blur_pool2d(x, TAPS))(values[None])[0], expected)
    x = values.clone().requires_grad_()
    many = torch.autograd.grad(blur_pool2d(x, TAPS), x, torch.ones(3, *expected.shape), is_grads_batched=True)[0]
    assert_close(many[0], torch.autograd.grad(blur_pool2d(x, TAPS).sum(), x)[0])


@pytest.mark.parametrize(
    "unsuited",
    [
        torch.randn(1, 2, 6, 6).as_subclass(Tagged),
        torch.randn(1, 2, 6, 6).int(),
        torch.zeros(1, 2, 6, 6, device="meta"),
        torch._efficientzerotensor((1, 2, 6, 6)),
        torch._neg_view(torch.randn(1, 2, 6, 6)),
        torch.randn(1, 2, 6, 6).to_sparse(),
        "x",
    ],
    ids=["subclass", "integers", "meta", "zeros without memory", "negated", "sparse", "string"],
)
def test_unsuited_arguments_are_told(unsuited):
    kernel = torch.outer(TAPS, TAPS)
    with pytest.raises(_C.direct.Unsuited):
        _C.direct.blur_pool2d(unsuited, kernel, [1, 1], [1, 1, 1, 1], 1, *NO_PROLOGUE)


def test_errors_are_those_of_the_operator():
    with pytest.raises(RuntimeError, match="stride takes 2 numbers"):
        _C.direct.blur_pool2d(torch.randn(1, 2, 6, 6), torch.ones(3, 3), [1], [1, 1, 1, 1], 1, *NO_PROLOGUE)


def test_results_outlive_their_inputs():
    x = torch.randn(4, 8, 40, 40)
    expected = blur_pool2d(x, TAPS).clone()
    results = [blur_pool2d(x, TAPS) for _ in range(10)]
    del x
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.skipif(platform.system() != "Linux", reason="the memory of a process is read as Linux tells it")
def test_results_are_freed():
    x = torch.randn(4, 8, 80, 40)  # 400 KB
    blur_pool2d(x, TAPS)
    before = resident_bytes()
    for _ in range(2000):
        blur_pool2d(x, TAPS)
    assert resident_bytes() - before < 4e8  # of 800 MB; AddressSanitizer holds back 256


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_threads():
    maps = [torch.randn(1, 4, 12, size) for size in range(8, 48)]
    expected = [blur_pool2d(x, TAPS, stride=2) for x in maps]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda x: blur_pool2d(x, TAPS, stride=2), maps * 20))
    assert all(torch.equal(one, expected[i % len(maps)]) for i, one in enumerate(found))
