r"""The largest or smallest eigenvalues of a symmetric operator, by block Lanczos and by power iteration.

**Block Lanczos.** A basis V of a Krylov space, orthonormal, grows by a block Q of b vectors: W = A Q gives the columns
V^T W of the projected matrix T = V^T A V, and what is left of W, orthogonalised twice against all of V, the next block.
Eigenpairs (theta, y) of T give Ritz pairs (theta, V y), whose residuals are known without another product: with the
factor R of the next block, |A V y - theta V y| = |R y_last|. When the basis is full, it restarts from its best Ritz
vectors and the next block (a thick restart).

Sources: Golub & Underwood, "The Block Lanczos Method for Computing Eigenvalues", 1977; Wu & Simon, "Thick-Restart
Lanczos Method for Large Symmetric Eigenvalue Problems", SIAM J. Matrix Anal. Appl. 2000.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["Eigenpairs", "LanczosState", "power_iteration", "top_eigenvalues"]

WHICH = ("LM", "LA", "SA")


@dataclass(frozen=True)
class Eigenpairs:
    r"""Eigenvalues, by magnitude, from the largest or from the smallest on, as they were asked for.

    Attributes:
        values: (k,).
        vectors: (n, k), orthonormal.
        residuals: :math:`|A v - \lambda v|`, (k,).
        converged: whether each residual is at most tol times the eigenvalue, (k,).
        products: how many products with a vector it took.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    converged: Tensor
    products: int


@dataclass
class LanczosState:
    """Where a solve stands: made empty, given to `top_eigenvalues`, and true after every step of it.

    A solve that ended, or was interrupted, goes on from its state; one that needs more eigenvalues too.

    Attributes:
        basis: (n, m), orthonormal; None before the first step.
        projected: T, (m, m).
        block: the next block, (n, b).
        factor: R of the next block, by which it couples to the last columns of the basis.
        products: so far.
    """

    basis: Tensor | None = None
    projected: Tensor | None = None
    block: Tensor | None = None
    factor: Tensor | None = None
    products: int = 0

    def save(self, path: str | Path) -> None:
        """Writes the state to a file."""
        torch.save(vars(self), path)

    @classmethod
    def load(cls, path: str | Path) -> LanczosState:
        """Reads what `save` wrote."""
        return cls(**torch.load(path, weights_only=True))


def top_eigenvalues(
    operator,
    k: int = 1,
    which: str = "LM",
    tol: float = 1e-3,
    *,
    start: Tensor | None = None,
    block_size: int = 1,
    basis_size: int | None = None,
    max_products: int | None = None,
    seed: int = 0,
    state: LanczosState | None = None,
    callback: Callable[[Eigenpairs], None] | None = None,
) -> Eigenpairs:
    r"""k eigenvalues of a symmetric operator by block Lanczos with full reorthogonalisation and thick restarts.

    Args:
        operator: anything with ``shape`` (n, n), ``dtype``, ``device`` and ``operator @ (n, b)``: a `HessianOperator`,
            a symmetric tensor.
        k: how many eigenvalues.
        which: "LM", the largest in magnitude; "LA", the largest; "SA", the smallest.
        tol: an eigenvalue has converged when its residual is at most ``tol`` times its magnitude.
        start: (n,) or up to ``block_size`` columns: what eigenvectors are looked for in first, to which random numbers
            are added; random numbers alone if None. Most of a loss's gradient lies among the eigenvectors of the
            largest eigenvalues: ``start=operator.gradient()`` spares up to a seventh of the products. But an
            eigenvector that ``start`` hardly has may be missed where others have converged before it comes up, the
            sooner the larger ``tol`` and the smaller ``k``: random numbers favour none. Of no effect if ``state`` is
            not empty.
        block_size: vectors of a product. Blocks find eigenvalues of multiplicity up to their size, and products of many
            vectors are cheaper, but more of them are needed.
        basis_size: vectors that are kept, max(4 k, 32) and three blocks at least if None; so much memory is needed.
        max_products: stop there; 10 n if None, but at least 1000.
        seed: of the random numbers.
        state: is kept up to date, and gone on from if it is not empty.
        callback: called after every step with the present Ritz pairs, without their vectors.

    Returns:
        The eigenpairs, converged or not.

    Raises:
        ValueError: an option is out of range, the operator is not square, ``start`` does not fit or is not finite, or
            the state is another operator's.

    >>> matrix = torch.diag(torch.tensor([1.0, -4.0, 2.0, 3.0]))
    >>> top_eigenvalues(matrix, 2).values
    tensor([-4.,  3.])
    """
    size = _check(operator, k, which, tol)
    if not 1 <= block_size <= size:
        raise ValueError(f"block_size must be between 1 and n = {size}; got {block_size}")
    if start is not None:
        _check_start(start, size, block_size)
    smallest = min(size, k + 3 * block_size)
    # A residual says that a pair is one of the operator's, not that none was missed. A Krylov space of twice as many
    # dimensions as pairs has met them all, but for starts that lack one.
    enough = min(size, 2 * k + 1)
    basis_size = min(size, max(basis_size or max(4 * k, 32), smallest))
    max_products = max(10 * size, 1000) if max_products is None else max_products
    state = LanczosState() if state is None else state
    generator = torch.Generator().manual_seed(seed)
    if state.basis is None:
        first = _first_block(operator, size, block_size, start, generator)
        state.basis, state.projected = first[:, :0], first.new_zeros(0, 0, dtype=torch.float64)
        state.block, state.factor = torch.linalg.qr(first)[0], first.new_zeros(block_size, 0, dtype=torch.float64)
    elif state.basis.shape[0] != size:
        raise ValueError(f"the state is that of an operator of {state.basis.shape[0]} rows; this one has {size}")
    while True:
        pairs = _ritz_pairs(state, k, which, tol)
        if callback is not None and pairs is not None:
            callback(pairs)
        done = pairs is not None and len(pairs.values) == k and bool(pairs.converged.all())
        if (done and state.products >= enough) or state.block.shape[1] == 0 or state.products >= max_products:
            break
        if state.basis.shape[1] + state.block.shape[1] > basis_size:
            _restart(state, k, which, basis_size)
        _step(operator, state, generator)
    return _ritz_pairs(state, k, which, tol, vectors=True)


def _first_block(operator, size: int, width: int, start: Tensor | None, generator: torch.Generator) -> Tensor:
    """(n, width): columns of ``start``, each with random numbers of a tenth of its squared norm; then random ones."""
    block = _random(operator, size, width, generator)
    if start is None:
        return block
    columns = (start[:, None] if start.dim() == 1 else start).detach().to(block.device, block.dtype)
    norms = torch.linalg.vector_norm(columns, dim=0)
    given, random = columns / norms, block[:, : columns.shape[1]]
    mixed = given + 0.1**0.5 * random / torch.linalg.vector_norm(random, dim=0)
    return torch.cat((torch.where(norms > 0, mixed, random), block[:, columns.shape[1] :]), 1)


def _check_start(start: Tensor, size: int, width: int) -> None:
    shape = tuple(start.shape)
    if shape != (size,) and (len(shape) != 2 or shape[0] != size or shape[1] > width):
        raise ValueError(f"start must be ({size},) or ({size}, c) with c up to block_size = {width}; got {shape}")
    if not torch.isfinite(start).all():
        raise ValueError("start must be finite; it holds NaN or infinity")


def _step(operator, state: LanczosState, generator: torch.Generator) -> None:
    """The block joins the basis, and the next one comes from its products."""
    block = state.block
    basis = torch.cat((state.basis.T, block.T)).T  # vector by vector: one more is a plain copy behind the others
    image = operator @ block
    old, new = state.basis.shape[1], basis.shape[1]
    coupling = basis.T @ image
    rest = image - basis @ coupling
    correction = basis.T @ rest  # once more: what rounding left of the first time
    rest = rest - basis @ correction
    columns = (coupling + correction).double()
    projected = columns.new_zeros(new, new)
    projected[:old, :old] = state.projected
    projected[:, old:] = columns
    projected[old:, :old] = columns[:old].T
    projected[old:, old:] = 0.5 * (columns[old:] + columns[old:].T)
    width = min(block.shape[1], basis.shape[0] - new)
    following, factor = _orthonormal(rest, basis, width, generator)
    products = state.products + block.shape[1]
    # All at once: an interrupt before this line leaves the state as it was.
    vars(state).update(basis=basis, projected=projected, block=following, factor=factor.double(), products=products)


def _orthonormal(rest: Tensor, basis: Tensor, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``width`` orthonormal columns, orthogonal to the basis, that span ``rest``, and R with rest = Q R.

    Directions that ``rest`` lacks, because an invariant space was found, are filled with random ones.
    """
    if width == 0:
        return rest[:, :0], rest.new_zeros(0, rest.shape[1])
    q, r = torch.linalg.qr(rest)
    q = q[:, :width]
    scale = torch.linalg.matrix_norm(rest) + torch.finfo(rest.dtype).tiny
    lost = r.diagonal()[:width].abs() <= 10 * torch.finfo(rest.dtype).eps * scale
    small = scale <= torch.finfo(rest.dtype).eps
    if bool(lost.any()) or bool(small):
        q = torch.where(lost | small, _random(rest, len(rest), width, generator), q)
        for _ in range(2):
            q = torch.linalg.qr(q - basis @ (basis.T @ q))[0]
    return q, q.T @ rest


def _ritz_pairs(state: LanczosState, k: int, which: str, tol: float, vectors: bool = False) -> Eigenpairs | None:
    if state.basis.shape[1] == 0:
        return None
    values, y = torch.linalg.eigh(state.projected)
    chosen = _best(values, k, which)
    values, y = values[chosen], y[:, chosen]
    coupled = state.factor.shape[1]  # the columns of the basis that A takes out of its span: the last ones
    residuals = torch.linalg.vector_norm(state.factor @ y[len(y) - coupled :], dim=0)
    # Of eigenvalues that are rounding errors of the largest, nothing better can be known.
    floor = torch.finfo(state.basis.dtype).eps * state.projected.abs().max()
    converged = residuals <= tol * torch.maximum(values.abs(), floor)
    found = state.basis @ y.to(state.basis.dtype) if vectors else state.basis[:, :0]
    kind = state.basis.dtype
    return Eigenpairs(values.to(kind), found, residuals.to(kind), converged, state.products)


def _restart(state: LanczosState, k: int, which: str, basis_size: int) -> None:
    """The best Ritz vectors become the basis; the next block couples to all of them."""
    values, y = torch.linalg.eigh(state.projected)
    room = basis_size - state.block.shape[1]
    kept = _best(values, max(1, min(k + (room - k) // 2, room - 1)), which)
    coupled = state.factor.shape[1]
    factor = state.factor @ y[len(y) - coupled :, kept]
    basis = (y[:, kept].T.to(state.basis.dtype) @ state.basis.T).T
    vars(state).update(basis=basis, projected=torch.diag(values[kept]), factor=factor)


def _best(values: Tensor, k: int, which: str) -> Tensor:
    """The places of the k that are wanted, the most wanted first."""
    key = {"LM": -values.abs(), "LA": -values, "SA": values}[which]
    return key.argsort()[:k]


def power_iteration(operator, k: int = 1, *, iterations: int = 100, tol: float = 1e-3, seed: int = 0) -> Eigenpairs:
    r"""Power iteration with deflation, as studies of loss landscapes did it: for comparison with them.

    One eigenvalue after the other, the largest in magnitude first, until it changes by less than ``tol`` of itself or
    ``iterations`` are over. That says little about the residual, which is often a tenth of the eigenvalue: see
    ``residuals`` and ``converged``. `top_eigenvalues` takes far fewer products.

    Args:
        operator, k, seed: as in `top_eigenvalues`.
        iterations: the most products for an eigenvalue.
        tol: the relative change at which to stop; and what ``converged`` compares residuals with.

    Raises:
        ValueError: an option is out of range, or the operator is not square.
    """
    size = _check(operator, k, "LM", tol)
    generator = torch.Generator().manual_seed(seed)
    found = _random(operator, size, 0, generator)
    values, residuals, products = [], [], 0
    for _ in range(k):
        direction, value = _random(operator, size, 1, generator), None
        for _ in range(iterations):
            vector = direction - found @ (found.T @ direction)
            vector = vector / torch.linalg.vector_norm(vector)
            direction = operator @ vector
            products += 1
            before, value = value, (vector * direction).sum()
            if before is not None and (value - before).abs() <= tol * (value.abs() + 1e-6):
                break
        found = torch.cat((found, vector), 1)
        values.append(value)
        residuals.append(torch.linalg.vector_norm(direction - value * vector))
    values, residuals = torch.stack(values), torch.stack(residuals)
    return Eigenpairs(values, found, residuals, residuals <= tol * values.abs(), products)


def _check(operator, k: int, which: str, tol: float) -> int:
    if len(operator.shape) != 2 or operator.shape[0] != operator.shape[1]:
        raise ValueError(f"the operator must be square; got {tuple(operator.shape)}")
    size = operator.shape[0]
    if not 1 <= k <= size:
        raise ValueError(f"k must be between 1 and n = {size}; got {k}")
    if which not in WHICH:
        raise ValueError(f"which must be one of {', '.join(WHICH)}; got {which!r}")
    if not tol > 0:
        raise ValueError(f"tol must be positive; got {tol}")
    return size


def _random(like, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Standard normal numbers, the same on every device and in every process."""
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(like.device, like.dtype)
