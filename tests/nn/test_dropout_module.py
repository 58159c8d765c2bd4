import pytest
import torch

from vitfast.nn import MCDropout


@pytest.mark.parametrize("training", [False, True])
def test_drops_with_its_probability_in_both_modes(training):
    torch.manual_seed(0)
    out = MCDropout(0.25).train(training)(torch.ones(100_000, dtype=torch.float64))
    assert set(out.unique().tolist()) == {0.0, 1 / 0.75}
    assert abs((out == 0).double().mean() - 0.25) < 6 * (0.25 * 0.75 / 100_000) ** 0.5


def test_without_dropout_values_pass():
    x = torch.randn(5)
    assert torch.equal(MCDropout(0.0)(x), x)


def test_bad_input():
    with pytest.raises(ValueError, match="p must be at least 0 and less than 1; got 1"):
        MCDropout(1.0)
    assert repr(MCDropout(0.1)) == "MCDropout(p=0.1)"
