"""Eigenvalues of symmetric matrices and of the Hessians of models."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hessian_cases import dense_hessian, made, ragged, vit
from torch.testing import assert_close

from vitfast.hessian import HessianOperator, LanczosState, power_iteration, top_eigenvalues


class Counting:
    """A matrix that counts the vectors it was multiplied with, and may fail."""

    def __init__(self, matrix, fails_at=None):
        self.matrix, self.shape, self.dtype, self.device = matrix, matrix.shape, matrix.dtype, matrix.device
        self.products, self.fails_at = 0, fails_at

    def __matmul__(self, vectors):
        self.products += vectors.shape[1]
        if self.fails_at is not None and self.products >= self.fails_at:
            raise KeyboardInterrupt
        return self.matrix @ vectors


def symmetric(values, seed=0, dtype=torch.float64):
    """A matrix with these eigenvalues, and its eigenvectors."""
    values = torch.as_tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))[0]
    matrix = q @ torch.diag(values) @ q.T
    return (0.5 * (matrix + matrix.T)).to(dtype), q


def hessian_like(size=300):
    """Most eigenvalues near zero, a few large ones of both signs."""
    values = 0.01 * torch.linspace(-1, 1, size, dtype=torch.float64) ** 3
    values[:6] = torch.tensor([10.0, -7.0, 5.0, 4.9, -3.0, 2.0])
    return values


def wanted(values, k, which):
    key = {"LM": values.abs(), "LA": values, "SA": -values}[which]
    return values[key.argsort(descending=True)[:k]]


@pytest.mark.parametrize("which", ["LM", "LA", "SA"])
@pytest.mark.parametrize("block_size", [1, 2, 4])
@pytest.mark.parametrize("basis_size", [None, 9])
def test_finds_what_is_asked_for(which, block_size, basis_size):
    values = hessian_like()
    matrix, _ = symmetric(values)
    k = 2 if which == "SA" else 4
    operator = Counting(matrix)
    pairs = top_eigenvalues(operator, k, which, 1e-8, block_size=block_size, basis_size=basis_size)
    assert pairs.converged.all()
    assert pairs.products == operator.products
    assert_close(pairs.values, wanted(values, k, which))
    assert_close(pairs.vectors.T @ pairs.vectors, torch.eye(k, dtype=torch.float64))
    residuals = torch.linalg.vector_norm(matrix @ pairs.vectors - pairs.values * pairs.vectors, dim=0)
    assert_close(residuals, pairs.residuals, rtol=0.05, atol=1e-12)


def test_takes_few_products():
    """Tens, where power iteration takes hundreds for the same residual."""
    matrix, _ = symmetric(hessian_like())
    pairs = top_eigenvalues(matrix, 5, tol=1e-3)
    assert pairs.converged.all()
    assert pairs.products <= 20
    powers = power_iteration(matrix, 5, iterations=1000, tol=1e-9)
    assert_close(powers.values, pairs.values, rtol=1e-4, atol=0)
    assert powers.products > 10 * pairs.products


@pytest.mark.parametrize("block_size", [1, 3])
def test_a_start_that_knows_the_eigenvectors_takes_fewer_products(block_size):
    matrix, q = symmetric(hessian_like())
    known = q[:, :3] + 1e-3 * q[:, 10:13]
    start = known.sum(1) if block_size == 1 else known
    plain = top_eigenvalues(matrix, 3, block_size=block_size, tol=1e-6)
    pairs = top_eigenvalues(matrix, 3, block_size=block_size, tol=1e-6, start=100 * start.float())
    assert pairs.converged.all()
    assert pairs.products < plain.products
    assert_close(pairs.values, plain.values)


@pytest.mark.parametrize("columns", [(), (1,), (2,)])
def test_a_start_that_lacks_eigenvectors_does_not_hide_them(columns):
    matrix, q = symmetric(hessian_like())
    start = q[:, 6:8].sum(1) if columns == () else q[:, 6 : 6 + columns[0]]
    pairs = top_eigenvalues(matrix, 4, tol=1e-8, start=start, block_size=2)
    assert_close(pairs.values, wanted(hessian_like(), 4, "LM"))


def test_a_start_of_zeros_is_as_good_as_none():
    matrix, _ = symmetric(hessian_like())
    pairs = top_eigenvalues(matrix, 4, start=torch.zeros(300))
    assert_close(pairs.vectors, top_eigenvalues(matrix, 4).vectors)


def test_results_of_a_start_with_a_graph_have_none():
    matrix, q = symmetric(hessian_like())
    pairs = top_eigenvalues(matrix, 2, start=q[:, 0].clone().requires_grad_())
    assert not pairs.values.requires_grad
    assert not pairs.vectors.requires_grad


def test_blocks_find_all_of_a_multiple_eigenvalue():
    values = torch.cat((torch.tensor([3.0, 3.0, 3.0, 1.0]), torch.zeros(40)))
    matrix, _ = symmetric(values)
    assert_close(top_eigenvalues(matrix, 3, block_size=3).values, torch.full((3,), 3.0, dtype=torch.float64))


@pytest.mark.parametrize("values", [[2.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0], [5.0, 0.0, 0.0, 0.0, 0.0]])
@pytest.mark.parametrize("block_size", [1, 3])
def test_spaces_that_are_exhausted(values, block_size):
    matrix, _ = symmetric(values)
    k = len(values)
    pairs = top_eigenvalues(matrix, k, block_size=min(block_size, k))
    assert_close(pairs.values.sort()[0], torch.tensor(sorted(values), dtype=torch.float64), atol=1e-12, rtol=1e-9)
    assert_close(pairs.vectors.T @ pairs.vectors, torch.eye(k, dtype=torch.float64))


def test_float32_converges_to_its_precision():
    values = hessian_like()
    matrix, _ = symmetric(values, dtype=torch.float32)
    pairs = top_eigenvalues(matrix, 5, tol=1e-4)
    assert pairs.converged.all()
    assert pairs.values.dtype == torch.float32
    assert_close(pairs.values.double(), wanted(values, 5, "LM"), rtol=1e-5, atol=1e-5)


def test_an_interrupted_solve_keeps_its_state_and_goes_on(tmp_path):
    matrix, _ = symmetric(hessian_like())
    expected = top_eigenvalues(matrix, 4, tol=1e-10)
    state = LanczosState()
    with pytest.raises(KeyboardInterrupt):
        top_eigenvalues(Counting(matrix, fails_at=10), 4, tol=1e-10, state=state)
    assert state.products == 9
    state.save(tmp_path / "state.pt")
    operator = Counting(matrix)
    pairs = top_eigenvalues(operator, 4, tol=1e-10, state=LanczosState.load(tmp_path / "state.pt"))
    assert pairs.products == 9 + operator.products == expected.products
    assert_close(pairs.values, expected.values)


def test_more_eigenvalues_from_the_same_state():
    matrix, _ = symmetric(hessian_like())
    state = LanczosState()
    top_eigenvalues(matrix, 2, state=state)
    operator = Counting(matrix)
    pairs = top_eigenvalues(operator, 5, state=state)
    assert pairs.converged.all()
    assert operator.products < top_eigenvalues(matrix, 5).products
    with pytest.raises(ValueError, match="the state is that of an operator of 300 rows; this one has 4"):
        top_eigenvalues(torch.eye(4), state=state)


def test_stops_where_it_is_told_and_says_so():
    matrix, _ = symmetric(torch.linspace(0.9, 1, 200))
    seen = []
    pairs = top_eigenvalues(matrix, 3, tol=1e-9, max_products=12, callback=seen.append)
    assert pairs.products == 12
    assert not pairs.converged.all()
    assert [step.products for step in seen] == list(range(1, 13))


def test_a_gradient_as_start():
    model, inputs, targets = made(vit, side=8, batch=16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    operator = HessianOperator(model, F.cross_entropy, [(inputs, targets)])
    pairs = top_eigenvalues(operator, 5, tol=1e-3, start=operator.gradient())
    plain = top_eigenvalues(operator, 5, tol=1e-3)
    assert pairs.products <= plain.products
    assert_close(pairs.values, plain.values, rtol=1e-4, atol=0)


def test_hessians_of_models():
    model, inputs, targets = made(vit, side=8, batch=4)
    expected = torch.linalg.eigvalsh(dense_hessian(model, inputs, targets))
    operator = HessianOperator(model, F.cross_entropy, [(inputs, targets)])
    pairs = top_eigenvalues(operator, 5, tol=1e-6)
    assert_close(pairs.values, wanted(expected, 5, "LM"))
    assert operator.products == pairs.products


def test_decay_moves_every_eigenvalue():
    model, _, _, batches = ragged()
    plain = top_eigenvalues(HessianOperator(model, F.cross_entropy, batches), 3, "LA", 1e-10)
    decayed = top_eigenvalues(HessianOperator(model, F.cross_entropy, batches, weight_decay=0.25), 3, "LA", 1e-10)
    assert_close(decayed.values, plain.values + 0.25)


def test_power_iteration_reports_its_residuals():
    matrix, _ = symmetric(hessian_like())
    pairs = power_iteration(matrix, 2, iterations=3)
    assert pairs.products == 6
    residuals = torch.linalg.vector_norm(matrix @ pairs.vectors - pairs.values * pairs.vectors, dim=0)
    assert_close(pairs.residuals, residuals)
    assert not pairs.converged.any()


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("k must be between 1 and n = 4; got 5", {"k": 5}),
        ("which must be one of LM, LA, SA; got 'SM'", {"which": "SM"}),
        ("tol must be positive; got 0", {"tol": 0}),
        ("block_size must be between 1 and n = 4; got 0", {"block_size": 0}),
        (r"the operator must be square; got \(4, 3\)", {"operator": torch.ones(4, 3)}),
        (r"start must be \(4,\) or \(4, c\) with c up to block_size = 1; got \(3,\)", {"start": torch.ones(3)}),
        (r"block_size = 1; got \(4, 2\)", {"start": torch.ones(4, 2)}),
        ("start must be finite", {"start": torch.full((4,), torch.nan)}),
    ],
)
def test_bad_arguments(message, arguments):
    with pytest.raises(ValueError, match=message):
        top_eigenvalues(**{"operator": torch.eye(4)} | arguments)
