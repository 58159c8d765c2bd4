"""Dropout that draws from a posterior: on in evaluation mode too.

Source: Gal & Ghahramani, "Dropout as a Bayesian Approximation: Representing Model Uncertainty in Deep Learning", ICML
2016.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vitfast.nn._checks import probability


class MCDropout(nn.Module):
    """Monte Carlo dropout: each value is zero with probability p, else divided by 1 - p, in training and evaluation.

    A model with such layers predicts something else at each call; `vitfast.predict` averages its predictions.

    Args:
        p: the probability of zero, at least 0 and less than 1.

    >>> MCDropout(0.5).eval()(torch.ones(4))  # some are 0, the others 2
    """

    def __init__(self, p: float = 0.5):
        super().__init__()
        self.p = probability("p", p)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, training=True)

    def extra_repr(self) -> str:
        return f"p={self.p}"
