"""The benchmark cases of Hessian-vector products, at sizes that take no time."""

from __future__ import annotations

import pytest
import torch

from vitfast.bench import cases
from vitfast.bench.case import OURS
from vitfast.bench.hessian import make_workload
from vitfast.bench.runner import error_limit, relative_error

SMALL = {"name": "vit_ti", "image_size": 32, "patch_size": 16, "embed_dim": 8, "depth": 1, "num_heads": 2}


@pytest.mark.parametrize("products", [0, 1, 3])
def test_all_implementations_compute_the_same(products):
    workload = make_workload(SMALL, products, torch.device("cpu"), torch.float32)
    assert workload.variants[0].name == OURS
    expected = workload.expected()
    found = {v.name: v.run() for v in workload.variants if v.name != "curvlinops"}
    limit = error_limit(relative_error(found[workload.plain], expected), torch.float32)
    for name, results in found.items():
        assert relative_error(results, expected) <= limit, name
    size = workload.details["parameters"]
    assert expected[0].shape == ((size,) if products == 0 else (size, products))


def test_work_grows_with_the_vectors():
    flops = [make_workload(SMALL, k, torch.device("cpu"), torch.float32).flops for k in (0, 1, 8)]
    assert flops[1:] == [3 * flops[0], 17 * flops[0]]


def test_cases():
    names = [case.name for case in cases("hessian")]
    assert len(names) == 12
    assert "hessian/vit/products_8" in names
    assert not [case for case in cases("*") if case.operator == "hessian"]
