"""What the figures say in words, and that unusual numbers can be drawn; the pages' tests look at their form."""

import re

import pytest
import torch

from vitfast.analysis.calibration import reliability_diagram
from vitfast.train import EpochLog, figures
from vitfast.train.attention_view import AttentionView


def label(svg):
    return re.search(r'aria-label="([^"]*)"', svg).group(1)


def logs(epochs, nll=0.5):
    return [EpochLog(epoch, 0.4, 0.9, nll, 0.875, 1.0) for epoch in range(1, epochs + 1)]


@pytest.mark.parametrize("epochs", [1, 2, 300])
def test_curves_tell_where_they_end(epochs):
    curves = [("AlterNet", figures.FIRST, logs(epochs)), ("ResNet", figures.SECOND, logs(epochs, nll=1e-6))]
    assert "AlterNet ends at 87.5 %" in label(figures.accuracy_curves("a", curves))
    assert "AlterNet ends at 0.500 nats" in label(figures.loss_curves("l", curves))


def test_bars_are_medians():
    svg = figures.step_bars("s", [("one\nline", figures.FIRST, [0.001, 0.003, 0.9, 0.002])])
    assert label(svg) == "Median time of a training step: one line 2.5 ms"


@pytest.mark.parametrize("confidence", [0.5, 1.0])
def test_a_reliability_diagram_of_one_bin(confidence):
    logits = torch.tensor([[confidence, 1 - confidence]] * 3).log()
    svg = figures.reliability("r", "A & <B>", figures.FIRST, reliability_diagram(logits, torch.tensor([0, 0, 1])))
    assert label(svg).startswith("Reliability diagram of A &amp; &lt;B>: expected calibration error ")


def view(heads, window, map_size):
    received = torch.rand(2, *map_size)
    by_offset = torch.full((heads, 2 * window[0] - 1, 2 * window[1] - 1), torch.nan)  # one place in every window
    by_offset[:, window[0] - 1, window[1] - 1] = 1
    return AttentionView("block", map_size, window, received, by_offset, torch.zeros(heads), 0.0)


def test_attention_of_few_heads_uneven_maps_and_no_distance():
    views = [view(1, (2, 3), (1, 1)), view(3, (4, 4), (6, 5))]
    for images in (torch.zeros(1, 1, 4, 4, dtype=torch.uint8), torch.zeros(2, 3, 5, 4, dtype=torch.uint8)):
        svg = figures.attention_on_images("i", images, views)
        assert f"{len(images)} held-out images in 2 attention blocks" in label(svg)
    assert figures.attention_by_offset("o", views, heads=2).count("head 2") >= 1
    assert "block 2 0.00 to 0.00 places" in label(figures.attention_distances("d", figures.FIRST, views))
