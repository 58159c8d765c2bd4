import pytest
import torch

from vitfast.bench.runner import dtype_of


def pytest_addoption(parser):
    group = parser.getgroup("vitfast")
    group.addoption("--bench-device", default="cpu", choices=("cpu", "cuda"), help="where to measure (default: cpu)")
    group.addoption(
        "--bench-dtype",
        default="float32",
        choices=("float32", "float64", "float16", "bfloat16"),
        help="of inputs and results (default: float32)",
    )


@pytest.fixture(scope="session")
def device(request):
    device = torch.device(request.config.getoption("--bench-device"))
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.exit("PyTorch sees no CUDA device here: nothing was measured", returncode=0)
    return device


@pytest.fixture(scope="session")
def dtype(request):
    return dtype_of(request.config.getoption("--bench-dtype"))
