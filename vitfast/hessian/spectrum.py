"""The largest Hessian eigenvalues of many small batches: the protocol of "How Do Vision Transformers Work?".

For each batch of an augmented training set (16 images in the paper, a tenth of the set), the five eigenvalues that are
largest in magnitude, of the negative log-likelihood with L2 regularisation. Gathered over batches they show what
training meets: where losses are not convex, and how sharp they are.

Source: Park & Kim, ICLR 2022, section 2 and appendix A.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitfast.hessian.eigen import top_eigenvalues
from vitfast.hessian.operator import HessianOperator

__all__ = ["MaxEigenvalueSpectrum", "max_eigenvalue_spectrum"]


@dataclass(frozen=True)
class MaxEigenvalueSpectrum:
    """The eigenvalues that are largest in magnitude, by batch.

    Attributes:
        values: (batches, k).
        converged: whether each residual is small enough, (batches, k).
        products: how many products with a vector they took in all.
    """

    values: Tensor
    converged: Tensor
    products: int

    @property
    def negative_proportion(self) -> float:
        """NEP, the share of negative eigenvalues: how far the losses are from convex."""
        return (self.values < 0).double().mean().item()

    @property
    def mean_positive(self) -> float:
        """APE, the mean of the positive eigenvalues: how sharp the losses are. NaN if there are none."""
        return self.values[self.values > 0].double().mean().item()

    def histogram(self, bins: int = 50) -> tuple[Tensor, Tensor]:
        """The density of the gathered eigenvalues, (bins,), and the edges of the bins, (bins + 1,)."""
        return torch.histogram(self.values.double().flatten().cpu(), bins, density=True)

    def plot(self, path: str | Path, *, bins: int = 50, title: str = "Largest Hessian eigenvalues") -> None:
        """Draws the histogram into a picture whose name says its format.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from matplotlib.figure import Figure

        density, edges = self.histogram(bins)
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        axes.stairs(density, edges, fill=True, alpha=0.7)
        axes.axvline(0, color="black", linewidth=0.8)
        subtitle = f"{100 * self.negative_proportion:.1f} % negative, mean of the positive {self.mean_positive:.4g}"
        axes.set(xlabel="eigenvalue", ylabel="density", title=f"{title}\n{subtitle}")
        figure.savefig(path)


def max_eigenvalue_spectrum(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    data: Iterable[tuple[Any, Any]],
    *,
    k: int = 5,
    weight_decay: float = 0.0,
    tol: float = 1e-3,
    seed: int = 0,
    progress: bool = False,
    **options,
) -> MaxEigenvalueSpectrum:
    r"""The k eigenvalues that are largest in magnitude, for each batch on its own.

    Args:
        model, loss_fn, weight_decay: as in `HessianOperator`: L2 regularisation is
            :math:`\frac{\lambda}{2} |\theta|^2`, which moves every eigenvalue by ``weight_decay``.
        data: batches (inputs, targets), read one at a time.
        k: eigenvalues of a batch.
        tol: relative residual of each.
        seed: of the starting vectors.
        progress: a bar over batches, by tqdm.
        options: others of `HessianOperator`, of which ``keep_primals`` is on unless ``curvature`` is another.

    Raises:
        ValueError: there are no data; and as `HessianOperator`.
    """
    if progress:
        from tqdm import tqdm

        data = tqdm(data, desc="batches")
    options.setdefault("keep_primals", options.get("curvature", "hessian") == "hessian")
    found = []
    for batch in data:
        operator = HessianOperator(model, loss_fn, [batch], weight_decay=weight_decay, **options)
        found.append(top_eigenvalues(operator, k, "LM", tol, seed=seed))
    if not found:
        raise ValueError("data yields no batches; a generator that was used up must be made anew")
    return MaxEigenvalueSpectrum(
        torch.stack([pairs.values for pairs in found]),
        torch.stack([pairs.converged for pairs in found]),
        sum(pairs.products for pairs in found),
    )
