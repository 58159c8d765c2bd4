"""The benchmark cases of Hessian-vector products, at sizes that take no time."""

from __future__ import annotations

import pytest
import torch

from vitfast.bench import cases
from vitfast.bench.case import OURS
from vitfast.bench.hessian import make_workload
from vitfast.bench.runner import error_limit, relative_error

SMALL = {"name": "vit_ti", "image_size": 32, "patch_size": 16, "embed_dim": 8, "depth": 1, "num_heads": 2}


@pytest.mark.parametrize(("products", "keep"), [(0, False), (1, False), (3, False), (1, True), (3, True)])
def test_all_implementations_compute_the_same(products, keep):
    workload = make_workload(SMALL, products, keep, torch.device("cpu"), torch.float32)
    assert workload.variants[0].name == OURS
    expected = workload.expected()
    workload.variants[0].run()  # a second run has what the first one kept
    found = {v.name: v.run() for v in workload.variants if v.name != "curvlinops"}
    limit = error_limit(relative_error(found[workload.plain], expected), torch.float32)
    for name, results in found.items():
        assert relative_error(results, expected) <= limit, name
    size = workload.details["parameters"]
    assert expected[0].shape == ((size,) if products == 0 else (size, products))


def test_work_grows_with_the_vectors():
    ways = ((0, False), (1, False), (8, False), (1, True), (8, True))
    one, *products = [make_workload(SMALL, *way, torch.device("cpu"), torch.float32).flops for way in ways]
    assert products == [3 * one, 17 * one, 2 * one, 16 * one]


def test_cases():
    names = [case.name for case in cases("hessian")]
    assert len(names) == 20
    assert "hessian/vit/products_8" in names
    assert not [case for case in cases("*") if case.operator == "hessian"]
