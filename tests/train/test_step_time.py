import copy

import pytest
import torch
from torch import nn

from vitfast import create_model
from vitfast.train.recipes import Recipe
from vitfast.train.step_time import agreement, step_times

RECIPE = Recipe(epochs=1, optimizer="sgd", lr=0.1)


@pytest.fixture
def alternet():
    torch.manual_seed(0)
    return create_model("alternet_18", 3, in_channels=1, width=4, window_size=4, stem=False)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 1, 16, 16, generator=generator), torch.arange(8) % 3


def test_fused_and_plain_steps_agree(alternet, batch):
    before = copy.deepcopy(alternet.state_dict())
    result = agreement(alternet, *batch)
    # The loss is a mean of numbers near log 3, and rounding errors of float32 are some 1e-7 of it.
    assert result.loss_fused == pytest.approx(result.loss_float64, rel=1e-5)
    assert result.loss_plain == pytest.approx(result.loss_float64, rel=1e-5)
    band = torch.finfo(torch.float32).eps
    assert result.gradient_error_fused <= 2 * result.gradient_error_plain + band
    assert 0 < result.gradient_difference <= result.gradient_error_fused + result.gradient_error_plain
    assert all(value.equal(before[name]) for name, value in alternet.state_dict().items())


def test_a_wrong_gradient_is_seen(batch):
    """The measure itself: a layer whose float32 gradient is 1 % too large."""

    class Wrong(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return y if x.dtype == torch.float64 else y.detach() + 1.01 * (y - y.detach())

    result = agreement(nn.Sequential(nn.Flatten(), Wrong(256, 3)), *batch)
    assert result.gradient_error_fused == pytest.approx(0.01, rel=1e-3)
    assert result.gradient_error_plain == pytest.approx(0.01, rel=1e-3)
    assert result.gradient_difference == 0


class Recorder(nn.Module):
    """Tells in ``calls`` when a copy of it is computed, and by which backend."""

    calls: list = []  # noqa: RUF012 - shared by the copies on purpose

    def __init__(self, name):
        super().__init__()
        self.name = name
        self.layer = nn.Linear(256, 3)

    def forward(self, x):
        from vitfast.ops.backend import choose

        Recorder.calls.append((self.name, choose("operator", ("cpu",), x.device), self.training))
        return self.layer(x.flatten(1))


def test_variants_are_measured_in_turn(batch):
    Recorder.calls.clear()
    models = {name: Recorder(name).eval() for name in ("a", "b")}
    before = copy.deepcopy(models["a"].state_dict())
    seconds = step_times({"a": (models["a"], None), "b": (models["b"], "reference")}, *batch, RECIPE, rounds=3)
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}
    assert all(s > 0 for times in seconds.values() for s in times)
    assert [name for name, _, _ in Recorder.calls] == list("abbaabba")
    assert set(Recorder.calls) == {("a", "cpu", True), ("b", "reference", True)}
    assert all(value.equal(before[name]) for name, value in models["a"].state_dict().items())
    assert not models["a"].training
