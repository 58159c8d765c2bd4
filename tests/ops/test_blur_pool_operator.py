"""Blur pooling against a literal definition: values, gradients, memory formats, instruction sets, threads."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from helpers import assert_close_to_reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import vitfast
from vitfast import _C
from vitfast.functional import blur_pool2d

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
PASCAL = {
    n: torch.tensor([float(c) for c in row]) / 2 ** (n - 1)
    for n, row in enumerate(
        [[1], [1, 1], [1, 2, 1], [1, 3, 3, 1], [1, 4, 6, 4, 1], [1, 5, 10, 10, 5, 1], [1, 6, 15, 20, 15, 6, 1]], 1
    )
}
NUMPY_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap", "zeros": "constant"}


@dataclass(frozen=True)
class Case:
    """One call; ``taps`` is the length of a Pascal kernel, or the shape of a random one."""

    size: tuple[int, int] = (14, 11)
    taps: int | tuple[int, int] = 3
    stride: int | tuple[int, int] = 2
    mode: str = "reflect"
    padding: int | tuple | None = None
    prologue: bool = False
    activation: str | None = None
    channels_last: bool = False
    batch: int = 2
    channels: int = 21

    def __str__(self):
        return "-".join(f"{value}" for value in vars(self).values() if value is not False).replace(" ", "")

    def but(self, **changes):
        return replace(self, **changes)

    @property
    def kernel(self):
        if isinstance(self.taps, int):
            return PASCAL[self.taps]
        return torch.rand(self.taps, generator=torch.Generator().manual_seed(1)) - 0.3

    @property
    def options(self):
        return {
            "stride": self.stride,
            "padding": self.padding,
            "padding_mode": self.mode,
            "activation": self.activation,
            "temperature": 1.5,
        }

    def tensors(self, dtype=torch.float64, seed=0):
        """(x,), or (x, scale, shift)."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.batch, self.channels, *self.size, generator=generator, dtype=torch.float64)
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        tensors = (x,)
        if self.prologue:
            tensors += (
                0.5 + torch.rand(self.channels, generator=generator, dtype=torch.float64),
                torch.randn(self.channels, generator=generator, dtype=torch.float64),
            )
        return tuple(t.to(dtype) for t in tensors)

    def function(self, x, scale=None, shift=None):
        return blur_pool2d(x, self.kernel, scale=scale, shift=shift, **self.options)


def literal(case, x, scale=None, shift=None):
    """The definition in extended precision, independent of vitfast, for float64 results of any dtype of inputs."""
    u = x.detach().double().numpy().astype(np.longdouble)
    if scale is not None:
        u = u * scale.detach().double().numpy()[:, None, None] + shift.detach().double().numpy()[:, None, None]
    if case.activation == "tanh_relu":
        u = 1.5 * np.tanh(u / 1.5)
    if case.activation is not None:
        u = np.maximum(u, 0)
    if case.activation == "relu6":
        u = np.minimum(u, 6)
    kernel = case.kernel.double().numpy()
    kernel = np.outer(kernel, kernel) if kernel.ndim == 1 else kernel
    rows, columns = kernel.shape
    left, right, top, bottom = case.padding or ((columns - 1) // 2, columns // 2, (rows - 1) // 2, rows // 2)
    u = np.pad(u, ((0, 0), (0, 0), (top, bottom), (left, right)), mode=NUMPY_MODES[case.mode])
    stride = (case.stride, case.stride) if isinstance(case.stride, int) else case.stride
    height, width = ((u.shape[2] - rows) // stride[0] + 1, (u.shape[3] - columns) // stride[1] + 1)
    out = np.zeros((*u.shape[:2], height, width), dtype=np.longdouble)
    for i in range(rows):
        for j in range(columns):
            out += kernel[i, j] * u[:, :, i : i + stride[0] * height : stride[0], j : j + stride[1] * width : stride[1]]
    return torch.from_numpy(out.astype(np.float64))


def results(case, tensors, grad):
    tensors = [t.detach().requires_grad_() for t in tensors]
    output = case.function(*tensors)
    return output.detach(), *torch.autograd.grad(output, tensors, grad.to(output.dtype))


def assert_right(case, dtype=torch.float32):
    tensors = case.tensors(dtype)
    expected = literal(case, *tensors)
    grad = torch.randn(expected.shape, dtype=torch.float64).to(dtype)
    found = results(case, tensors, grad)
    with vitfast.backend("reference"):
        plain = results(case, tensors, grad)
        exact = results(case, tuple(t.double() for t in tensors), grad)
    assert_close(exact[0], expected, rtol=1e-12, atol=1e-12)
    for name, *parts in zip(("output", "x"), found, plain, exact, strict=False):
        if dtype == torch.float64:  # in which nothing is more exact than plain PyTorch
            assert_close(parts[0], parts[2], rtol=1e-12, atol=1e-12)
        else:
            assert_close_to_reference(*parts, name=name)
    if case.prologue:
        terms = largest_gradient_of_u(case, grad)
        assert_sum(found[2], exact[2], terms * tensors[0].double().abs())
        assert_sum(found[3], exact[3], terms)
        # Where nobody asks for these sums, another kernel serves.
        x, *constants = tensors
        (alone,) = torch.autograd.grad(case.function(x.requires_grad_(), *constants), x, grad.to(x.dtype))
        assert_close(alone, found[1])
    return found


def largest_gradient_of_u(case, grad):
    """A bound of the gradient of the blur's input, all of whose terms add up; activations only make it smaller."""
    u = torch.zeros(case.batch, case.channels, *case.size, dtype=torch.float64, requires_grad=True)
    y = blur_pool2d(u, case.kernel.double().abs(), **(case.options | {"activation": None}))
    return torch.autograd.grad(y, u, grad.double().abs())[0]


def assert_sum(found, exact, terms):
    """A sum per channel of terms that are computed in float32 or float64: off by few roundings of each, and its own."""
    eps = torch.finfo(torch.float64 if found.dtype == torch.float64 else torch.float32).eps
    bound = 8 * eps * terms.sum((0, 2, 3)) + torch.finfo(found.dtype).eps * exact.abs()
    assert ((found.double() - exact).abs() <= bound).all()


CASES = [
    *(Case(taps=taps, stride=stride) for taps in range(1, 8) for stride in (1, 2, 3)),
    *(Case(mode=mode, taps=taps) for mode in NUMPY_MODES for taps in (2, 4, 5)),
    *(Case(taps=shape, stride=1, mode=mode) for shape in ((3, 3), (2, 5), (7, 1)) for mode in NUMPY_MODES),
    *(
        Case(size=size, mode=mode, stride=s)
        for size in ((1, 1), (2, 3), (1, 40))
        for mode in NUMPY_MODES
        for s in (1, 2)
    ),
    *(Case(size=(56, 56), taps=taps, stride=stride, batch=1) for taps, stride in ((3, 2), (2, 1), (4, 2))),
    *(Case(size=(9, 70), taps=7, stride=stride, mode="circular") for stride in (1, 2, 5)),
    *(  # many channels: few columns at a time in channels_last
        Case(size=(9, 31), taps=taps, stride=stride, mode=mode, batch=1, channels=200)
        for taps, stride in ((3, 1), (4, 2), ((3, 2), 1), (5, 3))
        for mode in ("reflect", "circular")
    ),
    Case(size=(3, 25), taps=3, stride=1, batch=1, channels=2100),
    Case(stride=(2, 1), taps=(3, 2)),
    Case(padding=(2, 0, 1, 3), mode="zeros"),
    Case(padding=(9, 12, 0, 20), size=(6, 5)),
    Case(padding=(9, 12, 30, 0), size=(3, 4), mode="circular", stride=1),
    Case(size=(130, 3), batch=1, channels=1, taps=5, stride=1),
]


@pytest.mark.parametrize("prologue", [False, True], ids=["plain", "prologue"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case, channels_last, prologue):
    case = case.but(channels_last=channels_last, prologue=prologue, activation="relu" if prologue else None)
    output, x_grad, *_ = assert_right(case)
    if channels_last:
        assert output.is_contiguous(memory_format=torch.channels_last)
        assert x_grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("activation", [None, "relu", "relu6", "tanh_relu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_activations(dtype, activation, channels_last):
    case = Case(activation=activation, prologue=True, channels_last=channels_last, channels=19, size=(20, 37))
    assert_right(case, dtype)
    assert_right(case.but(prologue=False), dtype)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_instruction_sets(instruction_set, dtype, channels_last):
    for case in (Case(), Case(size=(9, 70), mode="circular"), Case(taps=(3, 3), stride=1, size=(20, 18))):
        assert_right(case.but(channels_last=channels_last), dtype)
        assert_right(case.but(channels_last=channels_last, prologue=True, activation="tanh_relu"), dtype)


def test_activation_alone_and_scale_alone():
    assert_right(Case(activation="relu6"))
    x, scale, shift = Case(prologue=True).tensors()
    taps = PASCAL[3]
    assert_close(blur_pool2d(x, taps, scale=scale), blur_pool2d(x * scale[:, None, None], taps))
    assert_close(blur_pool2d(x, taps, shift=shift), blur_pool2d(x + shift[:, None, None], taps))


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("affine", [(True, True), (True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normalisations(dtype, affine, channels_last):
    """Folded by the kernels, or by PyTorch where their tensors need gradients: both as a batch normalisation."""
    case = Case(channels_last=channels_last, size=(20, 37))
    (x,) = case.tensors(dtype)
    # In float32 at least, and not from x's random numbers: where x is the mean, rounding would decide of the gradient.
    wide, generator = torch.promote_types(dtype, torch.float32), torch.Generator().manual_seed(7)
    weight, bias, mean, variance = torch.randn(4, 21, generator=generator, dtype=wide)
    norm = [weight if affine[0] else None, bias if affine[1] else None, mean, variance.square() + 0.1]
    grad = torch.randn(2, 21, 10, 19).to(dtype)

    def in_one_pass(x, *norm):
        return blur_pool2d(x, PASCAL[3].double(), stride=2, norm=(*norm, 1e-2), activation="relu")

    def apart(x, weight, bias, mean, variance):
        z = torch.nn.functional.batch_norm(x, mean, variance, weight, bias, eps=1e-2)
        with vitfast.backend("reference"):
            return blur_pool2d(z.relu(), PASCAL[3].double(), stride=2)

    def run(function, dtype, differentiated):
        of_norm = torch.promote_types(dtype, torch.float32)
        tensors = [x.detach().to(dtype), *(None if t is None else t.detach().to(of_norm) for t in norm)]
        leaves = [t.requires_grad_() for t in tensors[: 3 if differentiated else 1] if t is not None]
        output = function(*tensors)
        return output.detach(), *torch.autograd.grad(output, leaves, grad.to(dtype))

    for differentiated in (False, True):
        plain, exact = run(apart, dtype, differentiated), run(apart, torch.float64, differentiated)
        for found, *others in zip(run(in_one_pass, dtype, differentiated), plain, exact, strict=True):
            if dtype == torch.float64:
                assert_close(found, others[1], rtol=1e-12, atol=1e-12)
            else:
                assert_close_to_reference(found, *others)


def test_normalisations_in_float16():
    x, norm = torch.randn(2, 21, 9, 8).half(), (*torch.randn(3, 21).half(), torch.rand(21).half() + 0.1)
    output = blur_pool2d(x, PASCAL[3], norm=(*norm, 1e-5), activation="relu")
    expected = blur_pool2d(x.float(), PASCAL[3], norm=(*(t.float() for t in norm), 1e-5), activation="relu")
    assert output.dtype == torch.float16
    assert_close(output, expected.half(), rtol=1e-3, atol=1e-5)


def test_float32_scale_beside_bfloat16():
    case = Case(prologue=True)
    x, scale, shift = case.tensors(torch.float32)
    output = case.function(x.bfloat16(), scale, shift)
    assert output.dtype == torch.bfloat16
    assert_close(output.float(), case.function(x.bfloat16().float(), scale, shift), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_the_same_bits_for_any_number_of_threads(threads, channels_last):
    case = Case(size=(70, 40), channels=33, prologue=True, activation="relu", channels_last=channels_last)
    tensors = case.tensors(torch.float32)
    grad = torch.randn(2, 33, 35, 20)
    found = []
    for count in (1, 2, 5):
        threads(count)
        found.append(results(case, tensors, grad))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("prologue", [False, True], ids=["plain", "prologue"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("channels", [16, 17])
def test_large_maps_which_are_written_past_the_caches(channels, channels_last, prologue):
    activation = "relu" if prologue else None
    case = Case((520, 513), 3, 1, "reflect", None, prologue, activation, channels_last, batch=1, channels=channels)
    tensors = case.tensors(torch.float32)
    grad = torch.randn(1, channels, *case.size)
    assert grad.nbytes > 2**24
    found = results(case, tensors, grad)
    half = slice(0, 520 // 2 + 1), slice(0, 520 // 2)  # the upper half of the map, and of what does not see the lower
    small = results(case, (tensors[0][:, :, half[0]], *tensors[1:]), grad[:, :, half[0]])
    assert_close(found[0][:, :, half[1]], small[0][:, :, half[1]], rtol=1e-6, atol=1e-6)
    inner = slice(0, 520 // 2 - 1)  # the gradient of an output at the edge is reflected
    assert_close(found[1][:, :, inner], small[1][:, :, inner], rtol=1e-6, atol=1e-6)
    if prologue:
        exact = results(case, tuple(t.double() for t in tensors), grad)
        terms = largest_gradient_of_u(case, grad)
        assert_sum(found[2], exact[2], terms * tensors[0].double().abs())
        assert_sum(found[3], exact[3], terms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_of_any_dtype(dtype):
    x = torch.randn(2, 3, 9, 8)
    assert_close(blur_pool2d(x, PASCAL[3].to(dtype), stride=2), blur_pool2d(x, PASCAL[3], stride=2), rtol=0, atol=0)


def test_strides_of_neither_memory_format():
    x = torch.randn(2, 14, 11, 5).permute(0, 3, 2, 1)[:, :, ::2]
    assert not x.is_contiguous()
    assert_close(blur_pool2d(x, PASCAL[3]), blur_pool2d(x.contiguous(), PASCAL[3]))


@pytest.mark.parametrize("shape", [(0, 3, 5, 5), (2, 0, 5, 5)])
def test_empty_batches(shape):
    x = torch.randn(shape, requires_grad=True)
    norm = (None, None, torch.zeros(shape[1]), torch.ones(shape[1]), 0.0)
    assert torch.autograd.grad(blur_pool2d(x, PASCAL[3], norm=norm).sum(), x)[0].shape == shape
    scale = torch.ones(shape[1], requires_grad=True)
    output = blur_pool2d(x, PASCAL[3], stride=2, scale=scale, activation="relu")
    assert output.shape == (*shape[:2], 3, 3)
    output.sum().backward()
    assert x.grad.shape == shape
    assert_close(scale.grad, torch.zeros(shape[1]))


def test_nan_and_infinity_pass_as_in_pytorch():
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0, -1.0]).expand(1, 1, 1, 5)
    for activation in (None, "relu", "relu6", "tanh_relu"):
        arguments = {"activation": activation, "temperature": 2.0}
        found = blur_pool2d(x, torch.ones(1), **arguments)
        with vitfast.backend("reference"):
            assert_close(found, blur_pool2d(x, torch.ones(1), **arguments), equal_nan=True)


@settings(deadline=None, max_examples=150)
@given(
    size=st.tuples(st.integers(1, 24), st.integers(1, 40)),
    taps=st.one_of(st.integers(1, 7), st.tuples(st.integers(1, 5), st.integers(1, 5))),
    stride=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    mode=st.sampled_from(list(NUMPY_MODES)),
    channels_last=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    special=st.sampled_from([torch.nan, torch.inf, -torch.inf]),
    data=st.data(),
)
def test_nan_and_infinity_stay_where_they_belong(size, taps, stride, mode, channels_last, dtype, special, data):
    case = Case(size, taps, stride, mode, batch=2, channels=3, channels_last=channels_last)
    (x,) = case.tensors(dtype)
    place = [data.draw(st.integers(0, extent - 1)) for extent in x.shape]
    x[tuple(place)] = special
    x.requires_grad_()
    found = case.function(x)
    with vitfast.backend("reference"):
        expected = case.function(x)
    assert torch.equal(found.isfinite(), expected.isfinite())
    cotangent = torch.ones_like(found)
    spoiled = [data.draw(st.integers(0, extent - 1)) for extent in found.shape]
    cotangent[tuple(spoiled)] = special
    grads = [torch.autograd.grad(output, x, cotangent)[0] for output in (found, expected)]
    assert torch.equal(grads[0].isfinite(), grads[1].isfinite())


def test_kernels_of_float64_maps_are_taken_as_they_are():
    """One that was multiplied out in float32 is no outer product in float64."""
    taps = torch.tensor([0.3, 0.45, 0.25, 0.1, 0.2, 0.7, 0.11])
    kernel = torch.outer(taps, taps).double()
    x = torch.randn(1, 2, 20, 20, dtype=torch.float64)
    with vitfast.backend("reference"):
        expected = blur_pool2d(x, kernel)
    assert_close(blur_pool2d(x, kernel), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_is_the_output_alone(channels_last, dtype):
    x = torch.randn(4, 64, 56, 56, dtype=dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    scale, shift = torch.rand(64), torch.rand(64)
    _C.reset_scratch_bytes()
    blur_pool2d(x, PASCAL[3], stride=2, scale=scale, shift=shift, activation="relu")
    assert _C.scratch_bytes() < 0.1 * x.nbytes


@settings(deadline=None, max_examples=60)
@given(
    case=st.builds(
        Case,
        size=st.tuples(st.integers(1, 40), st.integers(1, 80)),
        taps=st.one_of(st.integers(1, 7), st.tuples(st.integers(1, 7), st.integers(1, 7))),
        stride=st.tuples(st.integers(1, 4), st.integers(1, 4)),
        mode=st.sampled_from(list(NUMPY_MODES)),
        prologue=st.booleans(),
        activation=st.sampled_from([None, "relu", "relu6", "tanh_relu"]),
        channels_last=st.booleans(),
        batch=st.integers(1, 3),
        channels=st.integers(31, 50),  # enough values for a mean error, of a map of one pixel too
    ),
    dtype=st.sampled_from(DTYPES),
)
def test_any_case(case, dtype):
    assert_right(case, dtype)


# ---- bad input -------------------------------------------------------------------------------------------------------

X, TAPS, ONES = torch.randn(2, 3, 8, 8), torch.tensor([0.25, 0.5, 0.25]), torch.ones(3)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "x must be a torch.Tensor", {"x": [1.0]}),
        (TypeError, "x must be float32", {"x": X.int()}),
        (TypeError, "kernel must be a torch.Tensor", {"kernel": [1, 2, 1]}),
        (TypeError, "scale must have the dtype of x", {"scale": torch.ones(3, dtype=torch.float64)}),
        (TypeError, "stride must be an integer", {"stride": 1.5}),
        (TypeError, "padding must be an integer", {"padding": (1, 1, 1, 0.5)}),
        (TypeError, "temperature must be a number", {"temperature": "hot"}),
        (ValueError, r"x must have the shape \(B, C, H, W\)", {"x": X[0]}),
        (ValueError, "at least one row", {"x": X[:, :, :0]}),
        (ValueError, "kernel must have the shape", {"kernel": torch.ones(8)}),
        (ValueError, "kernel must have the shape", {"kernel": torch.ones(1, 3, 3)}),
        (ValueError, "one value per channel", {"shift": torch.ones(4)}),
        (ValueError, "bias of norm must have one value", {"norm": (None, ONES[:2], ONES, ONES, 0.1)}),
        (ValueError, "either norm or these two", {"scale": ONES, "norm": (None, None, ONES, ONES, 0.1)}),
        (ValueError, "eps of norm must be a number, and not neg", {"norm": (None, None, ONES, ONES, -0.1)}),
        (ValueError, "eps of norm must be a number, and not neg", {"norm": (None, None, ONES, ONES, ONES[0])}),
        (TypeError, "norm must be .weight, bias, running_mean", {"norm": (ONES, ONES)}),
        (TypeError, "norm must be .weight, bias, running_mean", {"norm": torch.nn.BatchNorm2d(3)}),
        (TypeError, "running_var of norm must be a torch.Tensor", {"norm": (None, None, ONES, None, 0.1)}),
        (TypeError, "running_mean of norm must have the dtype", {"norm": (None, None, ONES.half(), ONES, 0.1)}),
        (ValueError, "stride must be at least 1", {"stride": 0}),
        (ValueError, "padding must not be negative", {"padding": -1}),
        (ValueError, "padding_mode must be one of", {"padding_mode": "mirror"}),
        (ValueError, "takes no padding", {"padding_mode": "none", "padding": 1}),
        (ValueError, "activation must be one of", {"activation": "gelu"}),
        (ValueError, "temperature must be positive", {"temperature": 0.0}),
        (ValueError, "temperature must be positive", {"temperature": float("inf")}),
        (ValueError, "at least as large as the kernel", {"x": X[:, :, :2], "padding_mode": "none"}),
        (ValueError, "on one device", {"kernel": TAPS.to("meta")}),
    ],
)
def test_bad_arguments(error, message, arguments):
    with pytest.raises(error, match=message):
        blur_pool2d(**({"x": X, "kernel": TAPS} | arguments))


@pytest.mark.parametrize(
    "changes",
    [
        {"x": X[0]},
        {"x": X[:, :, ::2]},
        {"kernel": TAPS.double()},
        {"kernel": torch.ones(3, 8).double()},
        {"kernel": torch.ones(3, 3).half()},
        {"stride": [0, 1]},
        {"stride": [1]},
        {"padding": [1, 1]},
        {"padding": [-1, 0, 0, 0]},
        {"padding_mode": 4},
        {"activation": 7},
        {"scale": torch.ones(2)},
        {"shift": torch.ones(3).double()},
        {"mean": ONES},
        {"variance": ONES},
        {"mean": ONES, "variance": ONES[:2]},
        {"mean": ONES.double(), "variance": ONES},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_the_operator_itself_stays_within_bounds(changes):
    arguments = {
        "x": X,
        "kernel": torch.ones(3, 3).double(),
        "stride": [1, 1],
        "padding": [1, 1, 1, 1],
        "padding_mode": 0,
        "scale": None,
        "shift": None,
        "mean": None,
        "variance": None,
        "eps": 0.0,
        "activation": 0,
        "temperature": 1.0,
    }
    torch.ops.vitfast.blur_pool2d(**arguments)
    with pytest.raises(RuntimeError):
        torch.ops.vitfast.blur_pool2d(**(arguments | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"grad": torch.randn(2, 3, 7, 8)},
        {"size": [8]},
        {"size": [9, 8]},
        {"activation": 0},
        {"x": None},
        {"x": None, "activation": 0},
        {"mean": ONES},
        {"x": torch.randn(2, 3, 8, 9)},
        {"x": X.double()},
        {"x": X.contiguous(memory_format=torch.channels_last)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_the_backward_operator_itself_stays_within_bounds(changes):
    arguments = {
        "grad": torch.randn(2, 3, 8, 8),
        "x": X,
        "kernel": torch.ones(3, 3).double(),
        "size": [8, 8],
        "stride": [1, 1],
        "padding": [1, 1, 1, 1],
        "padding_mode": 0,
        "scale": None,
        "shift": None,
        "mean": None,
        "variance": None,
        "eps": 0.0,
        "activation": 1,
        "temperature": 1.0,
        "sums": True,
    }
    torch.ops.vitfast.blur_pool2d_backward(**arguments)
    with pytest.raises(RuntimeError):
        torch.ops.vitfast.blur_pool2d_backward(**(arguments | changes))
