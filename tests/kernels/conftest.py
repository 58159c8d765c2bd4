"""A fixture of the tests on a GPU."""

from __future__ import annotations

import pytest
import torch

import vitfast


@pytest.fixture
def triton_on_gpu():
    """Forces the kernels, and keeps plain PyTorch, which the tolerance is taken from, at float32's full precision."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    with vitfast.backend("triton"):
        yield
    torch.backends.cuda.matmul.allow_tf32 = before
