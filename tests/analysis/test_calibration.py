import math

import pytest
import torch

from vitfast.analysis import calibration


def logits_of(probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).log()


def binary(*confidences):
    """Predictions of class 0 with these confidences."""
    return logits_of([[c, 1 - c] for c in confidences])


def test_accuracy_counts_the_largest_logit():
    logits = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0], [5.0, 4.0]])
    assert calibration.accuracy(logits, torch.tensor([1, 0, 0, 0])) == 0.75


def test_nll_by_hand():
    logits = logits_of([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]])
    expected = -(math.log(0.25) + math.log(0.8)) / 2
    assert calibration.nll(logits, torch.tensor([2, 1])) == pytest.approx(expected, rel=1e-14)


def test_nll_does_not_change_with_an_offset_of_the_logits():
    logits = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    label = torch.tensor([1])
    assert calibration.nll(logits + 300, label) == pytest.approx(calibration.nll(logits, label), rel=1e-12)


def test_nll_far_below_the_smallest_probability():
    logits = torch.tensor([[0.0, -2000.0]])
    assert calibration.nll(logits, torch.tensor([1])) == pytest.approx(2000.0)


def test_nll_accumulates_in_float64():
    n = 2**20
    logits = torch.zeros(n, 2)
    assert calibration.nll(logits, torch.zeros(n, dtype=torch.int64)) == pytest.approx(math.log(2), rel=1e-14)


def test_ece_by_hand():
    # (0, 0.5] holds 0.4 (class 1, wrong); (0.5, 1] holds 0.9 (right), 0.8 (wrong) and 0.7 (right).
    logits = logits_of([[0.3, 0.4, 0.3], [0.9, 0.05, 0.05], [0.8, 0.1, 0.1], [0.7, 0.2, 0.1]])
    labels = torch.tensor([0, 0, 1, 0])
    expected = 1 / 4 * abs(0 - 0.4) + 3 / 4 * abs(2 / 3 - 0.8)
    assert calibration.expected_calibration_error(logits, labels, bins=2) == pytest.approx(expected, rel=1e-12)


def test_confidence_of_exactly_one_is_counted():
    logits = torch.tensor([[0.0, -torch.inf], [0.0, -torch.inf]])
    labels = torch.tensor([0, 1])
    diagram = calibration.reliability_diagram(logits, labels, bins=10)
    assert diagram.count.tolist() == [0] * 9 + [2]
    assert diagram.expected_calibration_error == 0.5


@pytest.mark.parametrize("bins", [1, 2, 10, 15, 100])
def test_every_image_is_in_one_bin(bins):
    generator = torch.Generator().manual_seed(0)
    logits = 40 * torch.randn(2000, 5, generator=generator)
    diagram = calibration.reliability_diagram(logits, torch.zeros(2000, dtype=torch.int64), bins=bins)
    assert diagram.count.sum() == 2000
    assert len(diagram.count) == bins
    filled = diagram.count > 0
    assert (diagram.confidence[filled] > diagram.edges[:-1][filled]).all()
    assert (diagram.confidence[filled] <= diagram.edges[1:][filled]).all()


def test_an_edge_belongs_to_the_bin_below():
    diagram = calibration.reliability_diagram(binary(0.75, 0.7500001), torch.tensor([0, 0]), bins=4)
    assert diagram.count.tolist() == [0, 0, 1, 1]


def test_empty_bins_are_nan_and_do_not_count():
    diagram = calibration.reliability_diagram(binary(0.9, 0.9), torch.tensor([0, 0]), bins=10)
    assert diagram.accuracy[:8].isnan().all()
    assert diagram.expected_calibration_error == pytest.approx(0.1, rel=1e-12)


def test_calibrated_predictions_have_no_error():
    labels = torch.tensor([0, 0, 0, 1])
    assert calibration.expected_calibration_error(binary(0.75, 0.75, 0.75, 0.75), labels) == pytest.approx(0, abs=1e-12)


def test_wilson_interval_by_hand():
    # 95 of 100: centre = (0.95 + 0.019208) / 1.038416, half = 1.96 / 1.038416 * sqrt(0.000475 + 0.00009604)
    low, high = calibration.wilson_interval(0.95, 100)
    assert low == pytest.approx(0.8882490, abs=1e-6)
    assert high == pytest.approx(0.9784575, abs=1e-6)
    assert calibration.wilson_interval(1.0, 100)[0] == pytest.approx(100 / (100 + 1.96**2))
    assert calibration.wilson_interval(1.0, 100)[1] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("logits", "labels", "error", "match"),
    [
        (torch.zeros(3), torch.zeros(3, dtype=torch.int64), ValueError, r"\(n, classes\)"),
        (torch.zeros(3, 2), torch.zeros(4, dtype=torch.int64), ValueError, r"\(3, 2\) and \(4,\)"),
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), ValueError, "at least 1"),
        (torch.zeros(2, 2), torch.zeros(2), TypeError, "int64"),
        (torch.zeros(2, 2), torch.tensor([0, 2]), ValueError, r"0 \.\.\. 1"),
        (torch.full((2, 2), torch.nan), torch.tensor([0, 1]), ValueError, "NaN"),
    ],
)
def test_bad_input_is_named(logits, labels, error, match):
    for metric in (calibration.accuracy, calibration.nll, calibration.expected_calibration_error):
        with pytest.raises(error, match=match):
            metric(logits, labels)


def test_bins_must_be_positive():
    with pytest.raises(ValueError, match="bins"):
        calibration.reliability_diagram(binary(0.9), torch.tensor([0]), bins=0)


# ---- intervals -------------------------------------------------------------------------------------------------------


def test_nll_interval_by_hand():
    logits = logits_of([[0.5, 0.5], [0.25, 0.75], [0.8, 0.2]])
    losses = [math.log(2), math.log(4), -math.log(0.8)]
    mean = sum(losses) / 3
    half = 1.96 * math.sqrt(sum((loss - mean) ** 2 for loss in losses) / 2 / 3)
    low, high = calibration.nll_interval(logits, torch.tensor([0, 0, 0]))
    assert low == pytest.approx(max(0, mean - half))
    assert high == pytest.approx(mean + half)


def sample(n, seed):
    """Predictions that are too confident: 0.9 where 0.75 is right."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(n, generator=generator) > 0.75).long()
    return binary(*[0.9] * n), labels


@pytest.mark.parametrize(
    ("interval", "truth"),
    [
        (calibration.nll_interval, -0.75 * math.log(0.9) - 0.25 * math.log(0.1)),
        (lambda *p: calibration.expected_calibration_error_interval(*p, resamples=100), 0.15),
    ],
)
def test_intervals_cover_the_truth_about_as_often_as_they_say(interval, truth):
    covered = 0
    for seed in range(200):
        low, high = interval(*sample(150, seed))
        covered += low <= truth <= high
    assert 180 <= covered <= 199  # 95 % of 200 is 190, with a standard deviation of 3


def test_ece_interval_is_seeded_and_holds_the_measured_value():
    predictions = sample(60, 0)
    intervals = [calibration.expected_calibration_error_interval(*predictions, seed=seed) for seed in (0, 0, 1)]
    assert intervals[0] == intervals[1] != intervals[2]
    low, high = intervals[0]
    assert 0 <= low < calibration.expected_calibration_error(*predictions) < high <= 1


def test_one_image_has_no_spread():
    with pytest.raises(ValueError, match="at least two images"):
        calibration.nll_interval(binary(0.9), torch.tensor([0]))
