import pytest
import torch

from vitfast.analysis.robustness import gaussian_noise


def test_noise_has_its_deviation_and_stays_in_range():
    images = torch.full((4, 3, 64, 64), 0.5, dtype=torch.float64)
    noisy = gaussian_noise(images, 0.05, torch.Generator().manual_seed(0))
    assert abs((noisy - 0.5).std() - 0.05) < 1e-3
    assert abs((noisy - 0.5).mean()) < 2e-3
    strong = gaussian_noise(images, 5.0)
    assert strong.min() == 0
    assert strong.max() == 1


def test_a_generator_makes_it_repeatable_and_no_deviation_changes_nothing():
    images = torch.rand(2, 1, 8, 8)
    first, second = (gaussian_noise(images, 0.1, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(gaussian_noise(images, 0.0), images)


def test_bad_input():
    with pytest.raises(TypeError, match=r"images must be floating point, from 0 to 1; got torch\.uint8"):
        gaussian_noise(torch.zeros(2, dtype=torch.uint8), 0.1)
    with pytest.raises(ValueError, match=r"deviation must be at least 0; got -0\.1"):
        gaussian_noise(torch.zeros(2), -0.1)
