"""Hessians of models: products with many vectors at once, eigenvalues, traces, densities.

- `hvp`, `gauss_newton_product`, `fisher_product`: K products in one pass, of any function.
- `HessianOperator`: the Hessian of a model's loss over a data set, ``operator @ vectors``, also for scipy.
- `top_eigenvalues`, `power_iteration`, `trace`, `spectral_density`: of such an operator, or of any symmetric one.
- `max_eigenvalue_spectrum`: the protocol of "How Do Vision Transformers Work?".
"""

from vitfast.hessian.density import SpectralDensity, spectral_density
from vitfast.hessian.eigen import Eigenpairs, LanczosState, power_iteration, top_eigenvalues
from vitfast.hessian.operator import HessianOperator
from vitfast.hessian.products import fisher_product, gauss_newton_product, hvp
from vitfast.hessian.spectrum import MaxEigenvalueSpectrum, max_eigenvalue_spectrum
from vitfast.hessian.traces import TraceEstimate, trace

__all__ = [
    "Eigenpairs",
    "HessianOperator",
    "LanczosState",
    "MaxEigenvalueSpectrum",
    "SpectralDensity",
    "TraceEstimate",
    "fisher_product",
    "gauss_newton_product",
    "hvp",
    "max_eigenvalue_spectrum",
    "power_iteration",
    "spectral_density",
    "top_eigenvalues",
    "trace",
]
