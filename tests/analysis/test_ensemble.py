import math

import pytest
import torch
from torch import nn

import vitfast
from vitfast.analysis import TemporalSmoothing, sample_predictions, temporal_smoothing


class Draws(nn.Module):
    """Other logits at each call: those of a list, in turn."""

    def __init__(self, logits):
        super().__init__()
        self.logits = list(logits)
        self.modes = []

    def forward(self, x):
        self.modes.append(self.training)
        return self.logits[(len(self.modes) - 1) % len(self.logits)].expand(len(x), -1)


def test_is_the_mean_of_the_probabilities():
    logits = torch.randn(5, 3, dtype=torch.float64)
    expected = logits.softmax(1).mean(0).expand(2, -1)
    torch.testing.assert_close(vitfast.predict(Draws(logits), torch.zeros(2, 4), samples=5), expected)


def test_of_an_ensemble_is_the_mean_over_models_and_samples():
    logits = torch.randn(2, 3, 4, dtype=torch.float64)
    models = [Draws(each) for each in logits]
    expected = logits.softmax(-1).mean((0, 1)).expand(2, -1)
    torch.testing.assert_close(vitfast.predict(models, torch.zeros(2, 4), samples=3), expected)
    torch.testing.assert_close(
        vitfast.predict(nn.ModuleList(models[:1]), torch.zeros(2, 4), samples=3)[0].sum().item(), 1.0
    )


def test_the_logarithm_does_not_underflow():
    model = Draws(torch.tensor([[0.0, -500.0], [0.0, -400.0]]))
    log = vitfast.predict(model, torch.zeros(1, 1), samples=2, logarithm=True)
    torch.testing.assert_close(log[0], torch.tensor([0.0, -400.0 - math.log(2)]))


def test_samples_of_dropout_differ_and_those_of_other_models_do_not():
    x = torch.randn(2, 3, 16, 16)
    dropping = vitfast.create_model("resnet_mcdo_18", num_classes=5, width=4, stem=False)
    first, second = sample_predictions(dropping, x, samples=2)
    assert not torch.equal(first, second)
    plain = vitfast.create_model("resnet_18", num_classes=5, width=4, stem=False)
    first, second = sample_predictions(plain, x, samples=2)
    assert torch.equal(first, second)


def test_models_are_in_evaluation_mode_meanwhile_and_in_their_own_afterwards():
    model = nn.Sequential(Draws(torch.zeros(1, 2)), nn.BatchNorm1d(2).eval()).train()
    model[1].eval()
    vitfast.predict(model, torch.zeros(2, 1))
    assert model[0].modes == [False]
    assert [module.training for module in model.modules()] == [True, True, False]
    model[0].logits = [torch.zeros(1, 3)]  # which the next layer refuses
    with pytest.raises(RuntimeError):
        vitfast.predict(model, torch.zeros(2, 1))
    assert [module.training for module in model.modules()] == [True, True, False]


def test_records_no_gradients_and_computes_in_float32_at_least():
    model = nn.Linear(3, 2).to(torch.bfloat16)
    out = vitfast.predict(model, torch.randn(4, 3, dtype=torch.bfloat16))
    assert out.dtype == torch.float32
    assert not out.requires_grad
    assert next(sample_predictions(model, torch.randn(4, 3, dtype=torch.bfloat16))).grad_fn is None


def test_temporal_smoothing_is_its_formula():
    predictions = torch.rand(6, 2, 3, dtype=torch.float64)
    smoothed = temporal_smoothing(predictions, time_constant=2.5)
    for t in range(6):
        weights = torch.tensor([math.exp(-k / 2.5) for k in range(t + 1)], dtype=torch.float64)
        expected = sum(w * predictions[t - k] for k, w in enumerate(weights)) / weights.sum()
        torch.testing.assert_close(smoothed[t], expected)


def test_temporal_smoothing_of_a_stream():
    smooth = TemporalSmoothing(3)
    torch.testing.assert_close(smooth(torch.ones(2)), torch.ones(2))
    assert (smooth(torch.zeros(2)) < 0.5).all()
    with pytest.raises(ValueError, match=r"the shape of the one before, \(2,\); got \(3,\); reset\(\) begins another"):
        smooth(torch.ones(3))
    smooth.reset()
    torch.testing.assert_close(smooth(torch.ones(3)), torch.ones(3))


def test_temporal_smoothing_of_nothing_is_nothing():
    assert temporal_smoothing(torch.zeros(0, 3), 1.0).shape == (0, 3)


def test_bad_input():
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module or a sequence of them; got str"):
        vitfast.predict("resnet", torch.zeros(1, 2))
    with pytest.raises(ValueError, match="an ensemble needs at least one model"):
        vitfast.predict([], torch.zeros(1, 2))
    with pytest.raises(ValueError, match="samples must be at least 1; got 0"):
        vitfast.predict(model, torch.zeros(1, 2), samples=0)
    with pytest.raises(TypeError, match=r"samples must be an integer; got 2\.0"):
        vitfast.predict(model, torch.zeros(1, 2), samples=2.0)
    with pytest.raises(ValueError, match=r"must return logits, \(B, classes\); Linear returned \(1, 3, 2\)"):
        vitfast.predict(model, torch.zeros(1, 3, 2))
    with pytest.raises(ValueError, match="time_constant must be above 0; got 0"):
        TemporalSmoothing(0)
    with pytest.raises(TypeError, match="time_constant must be a number; got '5'"):
        TemporalSmoothing("5")
    with pytest.raises(ValueError, match="one per time step; got a tensor without dimensions"):
        temporal_smoothing(torch.tensor(1.0), 1.0)
