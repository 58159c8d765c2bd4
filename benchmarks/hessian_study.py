"""How long Hessian eigenvalues take, and how the cost of products grows: `python benchmarks/hessian_study.py`.

Solvers, on a small ViT on scikit-learn's digits, early in its training, where the spectrum is flat, and after it, where
a few eigenvalues stand out: the five eigenvalues of largest magnitude to a relative residual |Hv - lambda v| / |lambda|
of 1e-3, by block Lanczos (`vitfast.hessian.top_eigenvalues`), by `scipy.sparse.linalg.eigsh` on curvlinops' operator,
and by PyHessian, whose power iteration stops by the change of the eigenvalue: with its default, and as far as it gets
within a number of steps. Residuals are measured afterwards, in float64 sums, with the same operator for all.

Gradients: seconds of one product with and without kept values, of models with random weights, as multiples of a
gradient in plain PyTorch that is measured in the same rounds.

Memory: the most that one and eight products take beyond vectors and results, the model's graph included: of ours all at
once and one by one, of PyHessian's way, a graph with double backward, and of curvlinops.

Growth: seconds of a product while the number of vectors, tokens, layers or batches doubles, beside what theory says,
the growth of the counted operations.

Machine and versions go into the JSON beside every figure. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import vitfast
from vitfast import hessian, train
from vitfast.bench.case import OURS, Run, Workload
from vitfast.bench.environment import machine, versions
from vitfast.bench.hessian import MODELS, PLAIN, make_workload
from vitfast.bench.memory import extra_bytes
from vitfast.bench.timing import CpuTimer, interleave

TOP, TOLERANCE = 5, 1e-3
RECIPES = {"early": train.Recipe(epochs=6), "trained": train.Recipe(epochs=60, lr=1e-3)}


def trained_vit(recipe: train.Recipe) -> tuple[nn.Module, Tensor, Tensor, float]:
    """A model, 64 images and labels, and its accuracy on held-out images."""
    torch.manual_seed(0)
    data = train.load("digits", image_size=32, max_train=1000)
    shape = {"image_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3, "in_channels": 1}
    model = vitfast.create_model("vit_ti", num_classes=10, **shape)
    log = train.train(model, data, recipe)[-1]
    images = data.normalize(data.train.images[:64])
    return model.eval(), images, data.train.labels[:64], log.held_out_accuracy


def solvers() -> list[dict]:
    """One record for each model and solver."""
    return [record for name in RECIPES for record in _solvers(name)]


def _solvers(name_of_model: str) -> list[dict]:
    model, images, labels, accuracy = trained_vit(RECIPES[name_of_model])
    print(f"{name_of_model}: {accuracy:.1%} of held-out images", flush=True)
    data = [(images, labels)]
    judge = hessian.HessianOperator(model, F.cross_entropy, data)

    def record(name: str, solve: Callable[[], tuple[Tensor, Tensor, int]]) -> dict:
        start = time.perf_counter()
        values, vectors, products = solve()
        seconds = time.perf_counter() - start
        order = values.abs().argsort(descending=True)
        values, vectors = values[order], vectors[:, order]
        residuals = ((judge @ vectors).double() - vectors.double() * values.double()).norm(
            dim=0
        ) / values.double().abs()
        result = {
            "model": name_of_model,
            "solver": name,
            "seconds": seconds,
            "products": products,
            "eigenvalues": values.tolist(),
            "largest_relative_residual": residuals.max().item(),
            "held_out_accuracy": accuracy,
        }
        print(f"{name:36} {seconds:7.1f} s {products:5} products, residual {residuals.max():.1e}", flush=True)
        return result

    records = []
    for keep in (False, True):
        for block in (1, 2, 4):
            operator = hessian.HessianOperator(model, F.cross_entropy, data, keep_primals=keep)

            kept = ", values kept" if keep else ""
            records.append(record(f"vitfast, blocks of {block}{kept}", partial(_lanczos, operator, block)))
        operator = hessian.HessianOperator(model, F.cross_entropy, data, keep_primals=keep)
        records.append(record(f"vitfast, from the gradient{kept}", partial(_lanczos, operator, 1, True)))
    records += [record(name, solve) for name, solve in _peers(model, images, labels)]
    return records


def _lanczos(operator: hessian.HessianOperator, block: int, from_gradient: bool = False) -> tuple[Tensor, Tensor, int]:
    """Values, vectors and products; the time of the gradient counts as well."""
    start = operator.gradient() if from_gradient else None
    pairs = hessian.top_eigenvalues(operator, TOP, "LM", TOLERANCE, start=start, block_size=block)
    return pairs.values, pairs.vectors, pairs.products


def _peers(model: nn.Module, images: Tensor, labels: Tensor):
    from curvlinops import HessianLinearOperator
    from pyhessian import hessian as pyhessian
    from scipy.sparse.linalg import LinearOperator, eigsh

    def scipys():
        parameters = list(model.parameters())
        operator = HessianLinearOperator(
            model, nn.CrossEntropyLoss(), parameters, [(images, labels)], check_deterministic=False
        ).to_scipy()
        count = 0

        def matvec(vector):
            nonlocal count
            count += 1
            return operator.matvec(vector)

        counted = LinearOperator(operator.shape, matvec, dtype=operator.dtype)
        with vitfast.backend("reference"):
            values, vectors = eigsh(counted, TOP, which="LM", tol=TOLERANCE)
        return torch.from_numpy(values.copy()), torch.from_numpy(vectors.copy()), count

    def power_iteration(steps: int, tol: float):
        def solve():
            with vitfast.backend("reference"):
                found = pyhessian(model, nn.CrossEntropyLoss(), data=(images, labels), cuda=False)
                count = 0
                grad = torch.autograd.grad

                def counted(*args, **kwargs):
                    nonlocal count
                    count += 1
                    return grad(*args, **kwargs)

                torch.autograd.grad = counted
                try:
                    values, vectors = found.eigenvalues(maxIter=steps, tol=tol, top_n=TOP)
                finally:
                    torch.autograd.grad = grad
            flat = torch.stack([torch.cat([part.flatten() for part in vector]) for vector in vectors], 1)
            return torch.tensor(values), flat, count

        return solve

    yield "curvlinops and scipy's eigsh", scipys
    yield "PyHessian, its own stop", power_iteration(100, 1e-3)
    yield "PyHessian, at most 400 steps", power_iteration(400, 1e-6)


def gradients() -> list[dict]:
    """One record for each model: the medians of 11 rounds."""
    records = []
    for name, options in MODELS.items():
        make = partial(make_workload, options, device=torch.device("cpu"), dtype=torch.float32)
        gradient, product, kept = (
            make(products=0, keep=False),
            make(products=1, keep=False),
            make(products=1, keep=True),
        )
        runs = {
            "gradient": _run_of(gradient, PLAIN),
            "gradient, vitfast": _run_of(gradient, OURS),
            "product": _run_of(product, OURS),
            "product, values kept": _run_of(kept, OURS),
            "product, kept graph": _run_of(kept, PLAIN),
        }
        seconds = {way: statistics.median(times) for way, times in interleave(runs, CpuTimer(), 11).items()}
        in_gradients = {way: value / seconds["gradient"] for way, value in seconds.items()}
        records.append({"model": name, "seconds": seconds, "in_gradients": in_gradients})
        print(name, ", ".join(f"{way} {value:.2f}" for way, value in in_gradients.items()), flush=True)
    return records


def memory() -> list[dict]:
    """One record for each model and number of products: bytes."""
    records, cpu = [], torch.device("cpu")
    for (name, options), products in itertools.product(MODELS.items(), (1, 8)):
        make = partial(make_workload, options, products, keep=False, device=cpu, dtype=torch.float32)
        together, one_by_one = make(), make(chunk=1)
        runs = {
            "vitfast, one by one": _run_of(one_by_one, OURS),
            "vitfast, all at once": _run_of(together, OURS),
            "graph": _run_of(together, "double_backward"),
            "curvlinops": _run_of(together, "curvlinops"),
        }
        taken = {}
        for way, run in runs.items():
            run()  # operators are made in the first call
            taken[way] = extra_bytes(run, cpu)
        share = taken["vitfast, one by one"] / min(taken["graph"], taken["curvlinops"])
        records.append({"model": name, "products": products, "bytes": taken, "share_of_the_least_of_peers": share})
        megabytes = ", ".join(f"{way} {size / 1e6:.0f} MB" for way, size in taken.items())
        print(f"{name}, {products} products: {megabytes}; {share:.0%} of the least of peers", flush=True)
    return records


def _run_of(workload: Workload, name: str) -> Run:
    return next(variant.run for variant in workload.variants if variant.name == name)


def growth() -> list[dict]:
    """One record for each size: seconds of a product of K vectors, the median of 3."""
    base = {"vectors": 2, "patch_size": 4, "depth": 3, "batches": 1, "embed_dim": 96}
    series = {
        "vectors": [{"vectors": k} for k in (1, 2, 4, 8, 16)],
        "tokens": [{"patch_size": p} for p in (8, 4, 2)],
        "layers": [{"depth": d} for d in (1, 2, 4, 8)],
        "width": [{"embed_dim": d} for d in (48, 96, 192, 384)],
        "batches": [{"batches": b} for b in (1, 2, 4)],
    }
    records = []
    for name, sizes in series.items():
        before = None
        for size in sizes:
            result = {"series": name, **base, **size, **_seconds_of_product(**(base | size))}
            if before is not None:
                result["grows"] = result["seconds"] / before["seconds"]
                result["operations_grow"] = result["operations"] / before["operations"]
            print(json.dumps(result), flush=True)
            records.append(result)
            before = result
    return records


def _seconds_of_product(vectors: int, patch_size: int, depth: int, batches: int, embed_dim: int) -> dict:
    torch.manual_seed(0)
    shape = {"image_size": 32, "patch_size": patch_size, "depth": depth, "embed_dim": embed_dim, "num_heads": 3}
    model = vitfast.create_model("vit_ti", num_classes=10, **shape).eval()
    data = [(torch.randn(16, 3, 32, 32), torch.randint(10, (16,))) for _ in range(batches)]
    operator = hessian.HessianOperator(model, F.cross_entropy, data, chunk=vectors)
    directions = torch.randn(operator.shape[0], vectors)
    with FlopCounterMode(display=False) as counter, vitfast.backend("reference"):
        F.cross_entropy(model(data[0][0]), data[0][1]).backward()
    times = []
    for _ in range(4):
        start = time.perf_counter()
        operator @ directions
        times.append(time.perf_counter() - start)
    operations = counter.get_total_flops() * (1 + 2 * vectors) * batches
    return {"seconds": statistics.median(times[1:]), "operations": operations, "parameters": operator.shape[0]}


def main() -> None:
    """Runs what is asked for and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("solvers", "gradients", "memory", "growth"))
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "cpu_hessian_study.json")
    arguments = parser.parse_args()
    results: dict = {"machine": machine(torch.device("cpu")), "versions": versions()}
    for name, run in (("solvers", solvers), ("gradients", gradients), ("memory", memory), ("growth", growth)):
        if arguments.only in (None, name):
            results[name] = run()
    arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
