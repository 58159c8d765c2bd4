"""The choice of a backend: forced ones are obeyed or refused with a reason, and put back afterwards."""

from __future__ import annotations

import pytest
import torch

import vitfast
from vitfast.functional import window_attention
from vitfast.ops import backend as backend_module

X = torch.ones(1, 2, 2, 1, 4)


def kernel_calls(run):
    """How often `run` calls an operator of vitfast."""

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls += str(function).startswith("vitfast.")
            return function(*args, **(kwargs or {}))

    with Count() as count:
        run()
    return count.calls


def call():
    return window_attention(X, X, X, window_size=2)


def test_cpu_kernels_serve_cpu_tensors():
    assert kernel_calls(call) == 1
    with vitfast.backend("cpu"):
        assert kernel_calls(call) == 1


def test_reference_calls_no_kernel():
    with vitfast.backend("reference"):
        assert kernel_calls(call) == 0


def test_innermost_backend_holds_and_the_outer_returns():
    with vitfast.backend("reference"):
        with vitfast.backend("cpu"):
            assert kernel_calls(call) == 1
        assert kernel_calls(call) == 0
    assert kernel_calls(call) == 1


def test_backend_is_put_back_after_an_error():
    with pytest.raises(KeyError), vitfast.backend("reference"):
        raise KeyError
    assert kernel_calls(call) == 1


def test_backend_as_a_decorator():
    @vitfast.backend("reference")
    def run():
        return call()

    assert kernel_calls(run) == 0
    assert kernel_calls(call) == 1


@pytest.mark.parametrize("name", ["", "CPU", "gpu", None, 3])
def test_unknown_backend(name):
    with (
        pytest.raises(ValueError, match="must be one of reference, cpu, triton, cuda; got"),
        vitfast.backend(name),
    ):
        call()


def test_backend_without_a_kernel_for_the_operator():
    with (
        vitfast.backend("cuda"),
        pytest.raises(vitfast.BackendError, match="no cuda kernel; it has: cpu, triton, reference"),
    ):
        call()


def test_cpu_backend_refuses_other_devices():
    x = X.to("meta")
    with vitfast.backend("cpu"), pytest.raises(vitfast.BackendError, match=r"are on meta; move them with .cpu\(\)"):
        window_attention(x, x, x, window_size=2)


def test_triton_backend_refuses_cpu_tensors_unless_interpreted(monkeypatch):
    monkeypatch.setattr(backend_module, "triton_interpreted", lambda: False)
    with vitfast.backend("triton"), pytest.raises(vitfast.BackendError, match="TRITON_INTERPRET=1"):
        call()


def test_triton_backend_without_triton(monkeypatch):
    monkeypatch.setattr(backend_module, "triton_available", lambda: False)
    monkeypatch.setattr(backend_module, "triton_interpreted", lambda: True)
    with vitfast.backend("triton"), pytest.raises(vitfast.BackendError, match="pip install triton"):
        call()


def test_errors_are_runtime_errors():
    assert issubclass(vitfast.BackendError, RuntimeError)


def test_operators_with_cuda_kernels_say_how_to_build_them():
    if vitfast.ops._extension.cuda_available():
        pytest.skip("the CUDA kernels are there; tests/kernels/test_blur_pool_gpu.py runs them")
    device = torch.device("cuda")
    with vitfast.backend("cuda"), pytest.raises(vitfast.ExtensionError, match=r"VITFAST_CUDA=1 pip install"):
        backend_module.choose("blur_pool2d", ("cpu", "cuda"), device)
    with pytest.warns(RuntimeWarning, match=r"plain PyTorch on this CUDA device: the CUDA kernels were not built"):
        assert backend_module.choose("blur_pool2d", ("cpu", "cuda"), device) == "reference"
    with vitfast.backend("cuda"), pytest.raises(vitfast.BackendError, match="the tensors of blur_pool2d are on cpu"):
        backend_module.choose("blur_pool2d", ("cpu", "cuda"), torch.device("cpu"))
