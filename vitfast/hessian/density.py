r"""The density of a symmetric operator's eigenvalues, by stochastic Lanczos quadrature.

From a random vector, m steps of Lanczos give m nodes :math:`\theta_j`, the eigenvalues of the tridiagonal matrix, and
weights :math:`\tau_j^2`, the squared first components of its eigenvectors: a quadrature of the spectral measure that is
exact for polynomials of degree 2 m - 1. The mean over vectors estimates :math:`\frac1n \sum_i \delta(\lambda -
\lambda_i)`, shown with Gaussians in place of the :math:`\delta`.

Sources: Golub & Welsch, 1969; Lin, Saad & Yang, "Approximating Spectral Densities of Large Matrices", SIAM Review 2016;
Ghorbani, Krishnan & Xiao, "An Investigation into Neural Net Optimization via Hessian Eigenvalue Density", ICML 2019.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["SpectralDensity", "spectral_density"]


@dataclass(frozen=True)
class SpectralDensity:
    r"""Nodes and weights of the quadrature, for each of several random vectors.

    Attributes:
        nodes: (runs, m), eigenvalues.
        weights: (runs, m); those of a run sum to 1.
        products: how many products with a vector it took.
    """

    nodes: Tensor
    weights: Tensor
    products: int

    def moment(self, power: int) -> tuple[float, float]:
        r"""The mean of :math:`\lambda^p` over all eigenvalues, and its standard error over the runs."""
        values = (self.weights * self.nodes**power).sum(1)
        error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return values.mean().item(), error

    def share(self, low: float, high: float) -> float:
        """The share of eigenvalues between two bounds."""
        inside = (self.nodes >= low) & (self.nodes < high)
        return (self.weights * inside).sum(1).mean().item()

    def evaluate(self, grid: Tensor, sigma: float | None = None) -> tuple[Tensor, Tensor]:
        """The density at the points of a grid, and its standard deviation over the runs, each as large as ``grid``.

        Args:
            grid: eigenvalues.
            sigma: standard deviation of the Gaussians; a hundredth of the range of the nodes if None.
        """
        sigma = self.width if sigma is None else sigma
        distance = (grid[None, None] - self.nodes[:, :, None]) / sigma
        gaussians = torch.exp(-0.5 * distance.square()) / (sigma * math.sqrt(2 * math.pi))
        runs = (self.weights[:, :, None] * gaussians).sum(1)
        return runs.mean(0), runs.std(0) if len(runs) > 1 else torch.zeros_like(grid)

    @property
    def width(self) -> float:
        """The default standard deviation of the Gaussians."""
        extent = (self.nodes.max() - self.nodes.min()).item()
        return extent / 100 if extent > 0 else 1.0

    def plot(
        self, path: str | Path, *, points: int = 1000, title: str = "Density of the Hessian's eigenvalues"
    ) -> None:
        """Draws the density, on a logarithmic scale, into a picture whose name says its format.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from matplotlib.figure import Figure

        margin = 4 * self.width
        grid = torch.linspace(self.nodes.min().item() - margin, self.nodes.max().item() + margin, points).double()
        mean, deviation = self.evaluate(grid)
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        top = (mean + deviation).max().item()
        floor = 1e-7 * top
        axes.fill_between(grid, (mean - deviation).clamp_min(floor), mean + deviation, alpha=0.25, linewidth=0)
        axes.semilogy(grid, mean.clamp_min(floor), linewidth=1.2)
        axes.set(xlabel="eigenvalue", ylabel="density", title=title, ylim=(floor, 3 * top))
        figure.savefig(path)


def spectral_density(operator, steps: int = 64, runs: int = 4, *, seed: int = 0) -> SpectralDensity:
    """Estimates the density of eigenvalues; all runs take their steps together, ``runs`` vectors in a product.

    Args:
        operator: as in `vitfast.hessian.top_eigenvalues`.
        steps: m, at most n; of full orthogonalisation, so that ``runs`` times ``steps`` vectors are kept.
        runs: random vectors.
        seed: of these.

    Raises:
        ValueError: there are no steps or no runs, or more steps than the operator has rows.

    >>> density = spectral_density(torch.diag(torch.linspace(-1, 1, 200)), steps=30)
    >>> round(density.share(0, 1), 1)
    0.5
    """
    size = operator.shape[0]
    if not 1 <= steps <= size:
        raise ValueError(f"steps must be between 1 and n = {size}; got {steps}")
    if runs < 1:
        raise ValueError(f"runs must be at least 1; got {runs}")
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(size, runs, generator=generator, dtype=torch.float64).to(operator.device, operator.dtype)
    vectors = [start / torch.linalg.vector_norm(start, dim=0)]
    diagonal = torch.zeros(runs, steps, dtype=torch.float64)
    off_diagonal = torch.zeros(runs, steps, dtype=torch.float64)
    for step in range(steps):
        image = operator @ vectors[-1]
        diagonal[:, step] = (vectors[-1] * image).double().sum(0).cpu()
        basis = torch.stack(vectors)  # [steps so far, n, runs]
        for _ in range(2):
            image = image - torch.einsum("snr,sr->nr", basis, torch.einsum("snr,nr->sr", basis, image))
        norm = torch.linalg.vector_norm(image, dim=0)
        # A run that has found an invariant space ends there: what comes after it has no weight.
        scale = torch.finfo(operator.dtype).eps * diagonal.abs().amax(1).to(norm)
        ended = norm <= 10 * scale
        off_diagonal[:, step] = torch.where(ended, 0.0, norm).double().cpu()
        vectors.append(torch.where(ended, 0.0, image / torch.where(ended, 1.0, norm)))
    tridiagonal = torch.diag_embed(diagonal)
    if steps > 1:
        sides = torch.diag_embed(off_diagonal[:, : steps - 1], offset=1)
        tridiagonal = tridiagonal + sides + sides.mT
    nodes, eigenvectors = torch.linalg.eigh(tridiagonal)
    return SpectralDensity(nodes, eigenvectors[:, 0].square(), runs * steps)
