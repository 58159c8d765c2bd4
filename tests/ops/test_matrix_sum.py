"""The kernel for sums of matrix products, against PyTorch's products."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close_to_reference

matrix_sum = torch.ops.vitfast.matrix_sum
K = 3


def factors(rows, depth, columns, second=None, seed=0):
    """K pairs of matrices, a pair of another depth, and K rows."""
    generator = torch.Generator().manual_seed(seed)
    depths = depth, depth if second is None else second
    shapes = [shape for d in depths for shape in ((K, rows, d), (K, d, columns))]
    return [torch.randn(*shape, generator=generator) for shape in (*shapes, (K, columns))]


def computed(a, b, a2, b2, start):
    out = torch.full((K, (a if a2 is None else a2).shape[-2], (b if b2 is None else b2).shape[-1]), torch.nan)
    matrix_sum(a, b, a2, b2, start, out)
    return out


def check(a, b, a2=None, b2=None, start=None):
    def defined(widen):
        total = sum(widen(left) @ widen(right) for left, right in ((a, b), (a2, b2)) if left is not None)
        return (total if start is None else total + widen(start)[..., None, :]).expand(K, -1, -1)

    assert_close_to_reference(computed(a, b, a2, b2, start), defined(lambda t: t), defined(torch.Tensor.double))


SIZES = [(1, 1, 16), (9, 7, 48), (30, 20, 64), (300, 40, 32), (20, 600, 80), (11, 1100, 16)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("turned", [False, True])
def test_is_exact(sizes, turned, instruction_set):
    a, b, a2, b2, start = factors(*sizes, second=sizes[1] + 5)
    if turned:
        b, b2 = (t.mT.contiguous().mT for t in (b, b2))
    check(a, b)
    check(a, b, start=start)
    check(a, b, a2, b2, start)


def test_one_matrix_for_all():
    a, b, a2, b2, start = factors(70, 33, 48)
    check(a, b[0], a2[0], b2)
    check(a[0], b, a2, b2[1].t().contiguous().t(), start[0])
    check(a[0], b[0])
    out = torch.empty(K, 70, 48)
    matrix_sum(None, None, a, b, None, out)
    torch.testing.assert_close(out, a @ b)


def test_parts_of_larger_matrices():
    a, b, *_ = factors(50, 40, 64)
    check(a[:, 3:21, 8:29], b[:, 8:29, 16:48])
    check(a.expand(K, 50, 40)[1].expand(K, 50, 40), b.mT.contiguous()[:, 16:48].mT)
    check(a.transpose(0, 1).contiguous().transpose(0, 1), b)


def test_same_bits_with_any_number_of_threads(threads):
    arguments = factors(301, 530, 112)
    threads(1)
    first = computed(*arguments)
    for count in (2, 3, 8):
        threads(count)
        assert torch.equal(computed(*arguments), first)


def test_direct_calls_keep_within_bounds():
    a, b, a2, b2, start = factors(6, 5, 32)
    out = torch.empty(K, 6, 32)
    for error, arguments in (
        ("out must be", (a, b, a2, b2, start, out[0])),
        ("out must be", (a, b, a2, b2, start, out.mT)),
        ("multiple of 16", (a, b[..., :5], None, None, None, out[..., :5].contiguous())),
        ("out must have elements", (a[:, :0], b, None, None, None, out[:, :0])),
        ("with some depth", (a[..., :4], b, a2, b2, start, out)),
        ("with some depth", (a[..., :0], b[:, :0], a2, b2, start, out)),
        ("with some depth", (a[:, :3], b, a2, b2, start, out)),
        ("factors must be", (a[:2], b, a2, b2, start, out)),
        ("factors must be", (a.double(), b, a2, b2, start, out)),
        ("adjacent in rows of the first", (a.mT.contiguous().mT, b, a2, b2, start, out)),
        ("adjacent in rows of the first", (a, torch.cat([b, b], 2)[..., ::2], a2, b2, start, out)),
        ("start must be", (a, b, a2, b2, start[:, :16], out)),
        ("start must be", (a, b, a2, b2, start[:2], out)),
        ("there must be a product", (a, None, None, b2, start, out)),
    ):
        with pytest.raises(RuntimeError, match=error):
            matrix_sum(*arguments)
