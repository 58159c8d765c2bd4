"""Benchmark cases of Hessian-vector products of whole models, on images of 32 x 32 pixels, a batch of 16.

Phases: ``gradient``, for scale; ``products_1`` and ``products_8``, so many products at once with no values kept between
calls; ``kept_1`` and ``kept_8``, with what depends on no vector kept from the call before.

Ours is a `HessianOperator`. Peers, all on the same model in plain PyTorch: ``kept_graph``, the gradient of the product
of gradient and vector on a graph that is made once and kept, vector by vector, as PyHessian does it;
``double_backward``, the same with the graph made in every call; ``func``, `vmap(jvp(grad))` of PyTorch's own
operations; ``curvlinops``, the operator of that package, if it is installed.

Counted work: of the gradient what `torch.utils.flop_counter` counts, and of a product twice that, once more for the
primal work of a call that keeps nothing. The bytes are those of parameters and vectors, read once, and products,
written once.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

from vitfast.bench.case import OURS, Case, Run, Variant, Workload
from vitfast.hessian import HessianOperator
from vitfast.hessian.layout import Layout
from vitfast.models import create_model
from vitfast.ops.backend import backend

__all__ = ["CASES", "MODELS", "PLAIN", "make_workload"]

_SIDE, _BATCH, _CLASSES = 32, 16, 10
PLAIN = "kept_graph"

MODELS = {
    "vit": {"name": "vit_ti", "image_size": _SIDE, "patch_size": 4, "depth": 6},
    "swin": {"name": "swin_t", "image_size": _SIDE, "patch_size": 2, "window_size": 4},
    "alternet_18": {"name": "alternet_18", "stem": False, "window_size": 4},
    "resnet_18": {"name": "resnet_18", "stem": False},
}
# Vectors, and whether values may be kept.
_PHASES = {
    "gradient": (0, False),
    "products_1": (1, False),
    "products_8": (8, False),
    "kept_1": (1, True),
    "kept_8": (8, True),
}


@dataclass(frozen=True)
class _Problem:
    """A model, a batch and vectors."""

    model: nn.Module
    images: Tensor
    labels: Tensor
    vectors: Tensor  # (n, K)

    def loss(self, params: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(self.model, params, (self.images,)), self.labels)

    def parameters(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}

    def to(self, dtype: torch.dtype) -> _Problem:
        model = copy.deepcopy(self.model).to(dtype)
        return _Problem(model, self.images.to(dtype), self.labels, self.vectors.to(dtype))


def make_workload(
    options: dict, products: int, keep: bool, device: torch.device, dtype: torch.dtype, chunk: int | None = None
) -> Workload:
    """The gradient, or so many products, of a model with random weights in evaluation mode; ours ``chunk`` at a time,
    or all at once."""
    torch.manual_seed(0)
    model = create_model(num_classes=_CLASSES, **options).to(device, dtype).eval()
    size = sum(parameter.numel() for parameter in model.parameters())
    images = torch.randn(_BATCH, 3, _SIDE, _SIDE, device=device, dtype=dtype)
    vectors = torch.randn(size, products, device=device, dtype=dtype)
    problem = _Problem(model, images, torch.randint(_CLASSES, (_BATCH,), device=device), vectors)
    with FlopCounterMode(display=False) as counter, backend("reference"):
        _gradient(problem)()
    flops = counter.get_total_flops()
    runs: dict[str, Run] = {}
    if products == 0:
        runs = {OURS: _gradient(problem), PLAIN: _in_plain_pytorch(_gradient(problem))}
    else:
        runs = {OURS: _ours(problem, keep, chunk or products), PLAIN: _kept_graph(problem)}
        if not keep:
            runs["double_backward"] = _in_plain_pytorch(_double_backward(problem))
            runs["func"] = _in_plain_pytorch(_transforms(problem))
            runs["curvlinops"] = _in_plain_pytorch(_curvlinops(problem))
    nbytes = size * vectors.element_size()
    return Workload(
        variants=tuple(Variant(name, run) for name, run in runs.items()),
        plain=PLAIN,
        expected=lambda: _exact(problem, products),
        flops=flops * (2 * products + (0 if keep else 1)),
        bytes=nbytes * (2 + 2 * products),
        intermediate_bytes=None,
        details={**options, "parameters": size, "batch": _BATCH, "vectors": products, "keeps_values": keep},
    )


def _gradient(problem: _Problem) -> Run:
    def run():
        leaves = {name: value.requires_grad_() for name, value in problem.parameters().items()}
        return (_flat(torch.autograd.grad(problem.loss(leaves), list(leaves.values()))),)

    return run


def _ours(problem: _Problem, keep: bool, chunk: int) -> Run:
    """The operator is made once, as peers' graphs and operators are."""

    def run():
        if not made:
            data = [(problem.images, problem.labels)]
            made.append(HessianOperator(problem.model, F.cross_entropy, data, chunk=chunk, keep_primals=keep))
        return (made[0] @ problem.vectors,)

    made: list[HessianOperator] = []
    return run


def _transforms(problem: _Problem) -> Run:
    params = problem.parameters()
    layout = Layout.of(params)

    def product(vector):
        return jvp(grad(problem.loss), (params,), (vector,))[1]

    def run():
        rows = layout.unflatten_rows(problem.vectors.T.contiguous())
        return (layout.flatten_rows(vmap(product)(rows)).T,)

    return run


def _kept_graph(problem: _Problem) -> Run:
    with backend("reference"):
        gradient, leaves = _graph(problem)
    return lambda: (_pulled(problem, gradient, leaves),)


def _double_backward(problem: _Problem) -> Run:
    return lambda: (_pulled(problem, *_graph(problem)),)


def _graph(problem: _Problem) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    leaves = {name: value.requires_grad_() for name, value in problem.parameters().items()}
    tensors = list(leaves.values())
    return torch.autograd.grad(problem.loss(leaves), tensors, create_graph=True), tensors


def _pulled(problem: _Problem, gradient: tuple[Tensor, ...], leaves: list[Tensor]) -> Tensor:
    layout = Layout.of(leaves)
    columns = []
    for vector in problem.vectors.T:
        parts = layout.unflatten(vector.contiguous())
        columns.append(_flat(torch.autograd.grad(gradient, leaves, parts, retain_graph=True)))
    return torch.stack(columns, 1)


def _curvlinops(problem: _Problem) -> Run:
    """The operator is made once, without its check of determinism."""

    def run():
        if not made:
            from curvlinops import HessianLinearOperator

            params = list(problem.model.parameters())
            data = [(problem.images, problem.labels)]
            loss = nn.CrossEntropyLoss()
            made.append(HessianLinearOperator(problem.model, loss, params, data, check_deterministic=False))
        return ((made[0] @ problem.vectors).detach(),)

    made: list = []
    return run


def _in_plain_pytorch(run: Run) -> Run:
    def plain():
        with backend("reference"):
            return run()

    return plain


def _exact(problem: _Problem, products: int) -> tuple[Tensor, ...]:
    exact = problem.to(torch.float64)
    return _in_plain_pytorch(_transforms(exact) if products else _gradient(exact))()


def _flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _case(label: str, options: dict, phase: str, products: int, keep: bool) -> Case:
    names = (OURS, PLAIN)
    if products > 0 and not keep:
        names += ("double_backward", "func", "curvlinops")
    make = partial(make_workload, options, products, keep)
    return Case("hessian", label, phase, f"hessian_{phase}", names, make, compiles=False)


CASES = tuple(_case(label, options, phase, *way) for label, options in MODELS.items() for phase, way in _PHASES.items())
