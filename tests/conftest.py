"""Fixtures for all tests: fixed seeds, uninitialised memory full of NaN, and settings put back after a test."""

from __future__ import annotations

import pytest
import torch

from vitfast.ops import _extension


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Tensors that PyTorch allocates without a value are NaN, and so is the kernels' scratch memory.

    What a kernel forgets to write, or reads without having written it, is seen.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    if _extension.available():
        _extension.require().poison_scratch(True)
    yield
    if _extension.available():
        _extension.require().poison_scratch(False)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads():
    """`torch.set_num_threads`, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def _usable_instruction_sets() -> list[str]:
    return _extension.require().usable_instruction_sets()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "instruction_set" in metafunc.fixturenames:
        metafunc.parametrize("instruction_set", _usable_instruction_sets(), indirect=True)


@pytest.fixture
def instruction_set(request: pytest.FixtureRequest):
    """Runs the test once with every instruction set that this processor has."""
    extension = _extension.require()
    extension.set_instruction_set(request.param)
    yield request.param
    extension.set_instruction_set(None)
