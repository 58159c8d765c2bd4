"""A fixture of the tests on a GPU, and how several processes share them."""

from __future__ import annotations

import os

import pytest
import torch

import vitfast


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """With VITFAST_SHARD=2/16, every sixteenth test from the third on: `make gpu-test` runs all shards side by side."""
    shard = os.environ.get("VITFAST_SHARD")
    if shard is None:
        return
    number, count = map(int, shard.split("/"))
    chosen = [item for i, item in enumerate(items) if i % count == number]
    config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % count != number])
    items[:] = chosen


@pytest.fixture
def triton_on_gpu():
    """Forces the kernels, and keeps plain PyTorch, which the tolerance is taken from, at float32's full precision."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    with vitfast.backend("triton"):
        yield
    torch.backends.cuda.matmul.allow_tf32 = before
