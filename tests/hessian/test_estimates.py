"""Traces, spectral densities, and the largest eigenvalues of many batches."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hessian_cases import dense_hessian, ragged
from torch.testing import assert_close

from vitfast.hessian import HessianOperator, max_eigenvalue_spectrum, spectral_density, trace


def matrix_with(values, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))[0]
    return q @ torch.diag(values.double()) @ q.T


# ---- trace -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace"])
def test_traces_are_unbiased_and_their_errors_true(method):
    matrix = matrix_with(torch.logspace(1, -3, 60) * torch.tensor([1.0, -1.0, 1.0]).repeat(20))
    expected = matrix.trace().item()
    estimates = [trace(matrix, 12, method, seed=seed) for seed in range(200)]
    values = torch.tensor([estimate.value for estimate in estimates])
    deviation = values.std().item()
    assert abs(values.mean().item() - expected) < 4 * deviation / math.sqrt(200)
    reported = torch.tensor([estimate.standard_error for estimate in estimates]).square().mean().sqrt().item()
    assert 0.3 < reported / deviation < 4
    assert all(estimate.products == 12 for estimate in estimates)


@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
def test_traces_of_low_rank_are_exact(method):
    matrix = matrix_with(torch.cat((torch.tensor([5.0, -3.0, 2.0]), torch.zeros(50))))
    assert trace(matrix, 15, method).value == pytest.approx(4.0, abs=1e-9)


def test_decaying_eigenvalues_are_where_xtrace_is_best():
    matrix = matrix_with(torch.logspace(2, -4, 80))
    expected = matrix.trace().item()
    errors = {
        method: sum((trace(matrix, 24, method, seed=seed).value - expected) ** 2 for seed in range(60))
        for method in ("hutchinson", "hutch++", "xtrace")
    }
    assert errors["xtrace"] < errors["hutch++"] < errors["hutchinson"]


def test_the_trace_of_a_hessian():
    model, inputs, targets, batches = ragged()
    operator = HessianOperator(model, F.cross_entropy, batches)
    estimate = trace(operator, 100)
    assert estimate.value == pytest.approx(dense_hessian(model, inputs, targets).trace().item(), rel=0.05)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (r"method must be one of hutchinson, hutch\+\+, xtrace; got 'exact'", {"method": "exact"}),
        ("xtrace needs at least 4 samples; got 3", {"samples": 3}),
        (r"hutch\+\+ has no use for more than 2 n = 8 samples; got 9", {"samples": 9, "method": "hutch++"}),
    ],
)
def test_bad_arguments_of_traces(message, arguments):
    with pytest.raises(ValueError, match=message):
        trace(torch.eye(4), **arguments)


# ---- density ---------------------------------------------------------------------------------------------------------


def test_moments_and_shares_are_those_of_the_eigenvalues():
    values = torch.cat((torch.linspace(-1, 0, 300), torch.linspace(0.5, 2, 100))).double()
    density = spectral_density(matrix_with(values), 40, 16)
    assert density.products == 16 * 40
    assert_close(density.weights.sum(1), torch.ones(16, dtype=torch.float64))
    for power in (1, 2, 3):
        moment, error = density.moment(power)
        assert abs(moment - (values**power).mean().item()) < 4 * error
    assert density.share(-2, 0.25) == pytest.approx(0.75, abs=0.05)
    grid = torch.linspace(-3, 4, 2000, dtype=torch.float64)
    mean, deviation = density.evaluate(grid)
    assert torch.trapezoid(mean, grid).item() == pytest.approx(1, abs=1e-3)
    assert (deviation >= 0).all()


def test_as_many_steps_as_rows_give_the_eigenvalues():
    values = torch.tensor([-2.0, -0.5, 1.0, 4.0]).double()
    density = spectral_density(matrix_with(values), 4, 2)
    assert_close(density.nodes, values.expand(2, 4))


def test_invariant_spaces_end_a_run():
    density = spectral_density(matrix_with(torch.tensor([1.0, 1.0, 3.0, 3.0, 3.0])), 5, 3)
    assert_close(density.weights.sum(1), torch.ones(3, dtype=torch.float64))
    assert density.share(0.99, 3.01) == pytest.approx(1)
    assert spectral_density(torch.zeros(3, 3), 2, 2).share(-1, 1) == pytest.approx(1)


def test_density_of_a_hessian_and_its_picture(tmp_path):
    model, inputs, targets, batches = ragged()
    operator = HessianOperator(model, F.cross_entropy, batches)
    density = spectral_density(operator, 20, 8)
    expected = torch.linalg.eigvalsh(dense_hessian(model, inputs, targets))
    moment, error = density.moment(1)
    assert abs(moment - expected.mean().item()) < 4 * error
    density.plot(tmp_path / "density.svg")
    assert "<svg" in (tmp_path / "density.svg").read_text()
    with pytest.raises(ValueError, match="steps must be between 1 and n"):
        spectral_density(operator, 10**6)
    with pytest.raises(ValueError, match="runs must be at least 1"):
        spectral_density(operator, 3, 0)


# ---- the largest eigenvalues of many batches -------------------------------------------------------------------------


def test_the_spectrum_of_largest_eigenvalues(tmp_path):
    model, _, _, batches = ragged()
    spectrum = max_eigenvalue_spectrum(model, F.cross_entropy, batches, k=3, weight_decay=0.01, tol=1e-8)
    assert spectrum.values.shape == (3, 3)
    for batch, found in zip(batches, spectrum.values, strict=True):
        values = torch.linalg.eigvalsh(dense_hessian(model, *batch)) + 0.01
        assert_close(found, values[values.abs().argsort(descending=True)[:3]])
    positive = spectrum.values[spectrum.values > 0]
    assert spectrum.negative_proportion == pytest.approx(1 - len(positive) / 9)
    assert spectrum.mean_positive == pytest.approx(positive.mean().item())
    density, edges = spectrum.histogram(7)
    assert (density * edges.diff()).sum().item() == pytest.approx(1)
    spectrum.plot(tmp_path / "spectrum.png")
    assert (tmp_path / "spectrum.png").read_bytes()[1:4] == b"PNG"
    with pytest.raises(ValueError, match="data yields no batches"):
        max_eigenvalue_spectrum(model, F.cross_entropy, [])
