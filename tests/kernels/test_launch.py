"""The launches of a call are made once for all calls that agree in what decides them. A kernel that notes what it gets
stands in for a compiled one, which would need a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vitfast.kernels import launch as launches
from vitfast.kernels.launch import Launch, run


@dataclass
class Kernel:
    """``calls`` are the arguments of every launch in order; what `run` asks of a kernel and of a compiled one."""

    calls: list[tuple] = field(default_factory=list)
    params: Any = tuple(SimpleNamespace(name=name) for name in ("x_ptr", "y_ptr", "sums_ptr", "scale"))

    def __getitem__(self, grid):
        def start(*arguments, **named):
            if named:
                arguments = tuple(named[parameter.name] for parameter in self.params)
            self.calls.append((grid[0], *arguments))
            return self

        return start


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(launches, "_known", {})


@pytest.fixture
def kernel():
    return Kernel()


@pytest.fixture
def make(kernel):
    def make(x, y, *, scale):
        make.count += 1
        sums = x.new_empty((2, 3), dtype=torch.float64)
        arguments = {"x_ptr": x, "y_ptr": y, "sums_ptr": sums, "scale": scale}
        return [Launch(kernel, 7, arguments, num_warps=1, num_stages=1)], sums

    make.count = 0
    return make


def is_same(a, b):
    return a.data_ptr() == b.data_ptr() and a.stride() == b.stride()


def test_what_was_made_is_launched_on_new_tensors(kernel, make):
    for _ in range(3):
        x, y = torch.zeros(4, 5), torch.zeros(5)
        sums = run(make, x, y, scale=2.0)
        programs, *tensors, scale = kernel.calls[-1]
        assert (programs, scale) == (7, 2.0)
        assert all(map(is_same, tensors, (x, y, sums)))
        assert (sums.shape, sums.dtype) == ((2, 3), torch.float64)
    assert make.count == 1
    assert len(kernel.calls) == 3


@pytest.mark.parametrize(
    "other",
    [
        lambda x, y: (x.double(), y, 2.0),
        lambda x, y: (x.T, y, 2.0),
        lambda x, y: (x, y[:4], 2.0),
        lambda x, y: (x, torch.zeros(6)[1:], 2.0),
        lambda x, y: (x, None, 2.0),
        lambda x, y: (x, y, 3.0),
    ],
    ids=["dtype", "strides", "shape", "alignment", "none", "options"],
)
def test_what_decides_launches_has_them_made_anew(kernel, make, other):
    x, y = torch.zeros(5, 5), torch.zeros(5)
    run(make, x, y, scale=2.0)
    *tensors, scale = other(x, y)
    run(make, *tensors, scale=scale)
    run(make, *tensors, scale=scale)
    assert make.count == 2
    assert kernel.calls[-1][-1] == scale
    for got, given in zip(kernel.calls[-1][1:3], tensors, strict=True):
        assert got is None if given is None else is_same(got, given)


def test_one_tensor_in_two_places_does_not_tie_them(kernel, make):
    x, y = torch.zeros(5), torch.ones(5)
    run(make, x, x, scale=1.0)
    run(make, x, y, scale=1.0)
    assert make.count == 1
    assert all(map(is_same, kernel.calls[-1][1:3], (x, y)))


def test_no_more_is_remembered_than_a_limit(make, monkeypatch):
    monkeypatch.setattr(launches, "_MOST_KNOWN", 3)
    for size in range(1, 9):
        run(make, torch.zeros(size), None, scale=1.0)
        assert len(launches._known) <= 3
