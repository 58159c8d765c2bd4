"""The Hessian of a model's loss over a data set, as a linear operator."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_flatten

from vitfast.hessian.deferred import version_of
from vitfast.hessian.layout import Layout
from vitfast.hessian.memory import bytes_of_vector, fitting_chunk, hold_freed_memory, release_freed_memory
from vitfast.hessian.products import Way, batched, hessian_products, mapped
from vitfast.hessian.recording import Recording

__all__ = ["HessianOperator"]

CURVATURES = ("hessian", "gauss_newton")
DROPOUTS = ("refuse", "frozen")


class HessianOperator:
    r"""The Hessian of the regularised mean loss, (n, n), which is never formed: ``operator @ vectors``.

    .. math:: H = \nabla^2 \Big[ \frac1N \sum_i \ell(f_\theta(x_i), y_i) + \frac{\lambda}{2} |\theta|^2 \Big]

    with :math:`\lambda` = ``weight_decay``. Batches count by their number of samples, so a smaller last one is weighted
    as it should be. The data are read once, when the operator is made: augmentation stays what it was then.

    Where `torch.distributed` is initialised, every process takes each world-size-th batch, and results are summed over
    processes: ``data`` must be the same everywhere, in the same order.

    Modules stay in the mode they are in. Batch normalisation in training mode uses the statistics of each batch and
    changes no buffer. Dropout in training mode is refused, or its masks are frozen.

    Args:
        model: the parameters are read anew in every product.
        loss_fn: (outputs, targets) -> the mean loss of a batch, a scalar.
        data: batches (inputs, targets), of which ``len(targets)`` is the number of samples.
        weight_decay: :math:`\lambda`.
        params: which parameters: names, a function of a name, or None for all that require a gradient. A name stands
            for itself and for all parameters of a module of that name.
        curvature: "hessian"; or "gauss_newton", which leaves out the curvature of the model's outputs.
        dropout: "refuse" or "frozen": the same masks in every product, drawn anew for each batch.
        chunk: vectors at a time; None for as many as the free memory allows.
        keep_primals: keeps all values that lead to the gradient of every batch. Later products compute tangents only,
            and call neither the model nor ``loss_fn``: single vectors take two thirds of the time, for the memory of
            all these values. They are made anew when parameters, buffers, modes, data or ``loss_fn`` have changed, as
            far as PyTorch counts changes: ``p.data.mul_(2)`` it does not, nor what a module or ``loss_fn`` has beside
            them. With "hessian" only.
        progress: a bar over batches, by tqdm.
        seed: of frozen dropout.

    Raises:
        TypeError: ``data`` holds something else than pairs.
        ValueError: there are no data or no parameters, an option is unknown, dropout is active and refused, or the loss
            is no scalar or is different in a second call.

    >>> operator = HessianOperator(nn.Linear(4, 3), F.cross_entropy, [(torch.randn(8, 4), torch.arange(8) % 3)])
    >>> (operator @ torch.randn(15, 2)).shape
    torch.Size([15, 2])
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        data: Iterable[tuple[Any, Any]],
        *,
        weight_decay: float = 0.0,
        params: Sequence[str] | Callable[[str], bool] | None = None,
        curvature: str = "hessian",
        dropout: str = "refuse",
        chunk: int | None = None,
        keep_primals: bool = False,
        progress: bool = False,
        seed: int = 0,
    ):
        if curvature not in CURVATURES:
            raise ValueError(f"curvature must be one of {', '.join(CURVATURES)}; got {curvature!r}")
        if dropout not in DROPOUTS:
            raise ValueError(f"dropout must be one of {', '.join(DROPOUTS)}; got {dropout!r}")
        if keep_primals and curvature != "hessian":
            raise ValueError(f"keep_primals is for curvature='hessian'; got {curvature!r}")
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be at least 1, or None; got {chunk}")
        self.model, self.loss_fn, self.weight_decay = model, loss_fn, float(weight_decay)
        self.curvature, self.seed, self.progress = curvature, seed, progress
        self._names = _chosen(model, params)
        self.layout = Layout.of(self.parameters())
        self._frozen = dropout == "frozen"
        self._kept: dict[int, tuple[list, list[Tensor], Recording]] | None = {} if keep_primals else None
        self._way = Way()
        self._refuse_dropout()
        self._rank, world = _process()
        batches = list(_pairs(data))
        if not batches:
            raise ValueError("data yields no batches; a generator that was used up must be made anew")
        self._samples = sum(_count(targets) for _, targets in batches)
        self._batches = list(enumerate(batches))[self._rank :: world]
        self._world, self._chunk, self._bytes_of_vector = world, chunk, None
        self.products = 0
        self._probe()
        hold_freed_memory()  # one product needs what the one before has freed
        weakref.finalize(self, release_freed_memory)

    # ---- what it is ----

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n)."""
        return (self.layout.size, self.layout.size)

    @property
    def dtype(self) -> torch.dtype:
        """Of the vectors."""
        return self.model.get_parameter(self._names[0]).dtype

    @property
    def device(self) -> torch.device:
        """Of the vectors."""
        return self.model.get_parameter(self._names[0]).device

    def parameters(self) -> dict[str, Tensor]:
        """The parameters by name, detached, in the order in which a vector holds them."""
        own = dict(self.model.named_parameters())
        return {name: own[name].detach() for name in self._names}

    # ---- products ----

    def __matmul__(self, vectors: Any) -> Any:
        """Products with a vector (n,), with K of them, (n, K), or with a dictionary like `parameters`, maybe with K in
        front of its tensors; in the same form. ``products`` counts the vectors."""
        rows, form = self.layout.rows_of(vectors)
        return self.layout.in_form(self._rows(rows.to(self.device, self.dtype)), form)

    def _rows(self, rows: Tensor) -> Tensor:
        self._refuse_dropout()
        total = torch.zeros_like(rows, memory_format=torch.contiguous_format) if len(self._batches) != 1 else None
        chunk = self._chunk_for(len(rows))
        for index, (inputs, targets) in self._track(self._batches):
            part = self._rows_of_batch(rows, chunk, index, inputs, targets)
            self._require_finite(part, inputs, targets, index)
            share = _count(targets) / self._samples
            total = (part if share == 1 else part.mul_(share)) if total is None else total.add_(part, alpha=share)
        self._sum_over_processes(total)
        self.products += len(rows)
        return total.add_(rows, alpha=self.weight_decay) if self.weight_decay else total

    def _rows_of_batch(self, rows: Tensor, chunk: int, index: int, inputs, targets) -> Tensor:
        products, result = self._products_of(index, inputs, targets), None
        for first in range(0, max(len(rows), 1), chunk):
            with self._fixed(index):
                part = batched(products, self.layout, rows[first : first + chunk], chunk)
            if len(part) == len(rows):
                return part
            if result is None:
                result = part.new_empty(rows.shape)
            result[first : first + chunk] = part
        return result

    def _products_of(self, index: int, inputs, targets) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
        """For a batch: directions -> their products, both by parameter and with K in front."""
        params = self.parameters()
        loss = self._loss_of(inputs, targets)
        if self.curvature == "hessian":
            return hessian_products(loss, params, self._recording_of(index, (inputs, targets)), self._way)

        def outputs_of(p):
            return functional_call(self.model, p, (inputs,))

        with self._fixed(index):
            outputs, pull = vjp(outputs_of, params)
        gradient = grad(lambda out: self.loss_fn(out, targets))

        def product(v):
            outputs_t = jvp(outputs_of, (params,), (v,))[1]
            return pull(jvp(gradient, (outputs,), (outputs_t,))[1])[0]

        return mapped(product)

    def _recording_of(self, index: int, batch: tuple) -> Recording | None:
        """What is kept of a batch, if the model and the batch are still the same."""
        if self._kept is None:
            return None
        modules = list(self.model.modules())
        tensors = [t for module in modules for t in (*module._parameters.values(), *module._buffers.values())]
        tensors = [t for t in (*tensors, *tree_flatten(batch)[0]) if isinstance(t, Tensor)]
        state = self._state(modules, tensors)
        before, _, recording = self._kept.get(index, (None, None, None))
        if before != state:
            recording = Recording()
            kept = [t.detach() for t in tensors]  # lest others come to lie at their places
            self._kept[index] = (state, kept, recording)
        return recording

    def _state(self, modules: list[nn.Module], tensors: list[Tensor]) -> list:
        """What tells whether the function is that of another product: tensors, modes, loss and precision."""
        kind = self.device.type
        return [
            *(self.model, self.loss_fn, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)),
            *((t.data_ptr(), version_of(t), t.shape, t.stride(), t.dtype) for t in tensors),
            *(module.training for module in modules),
        ]

    def _loss_of(self, inputs, targets) -> Callable[[dict[str, Tensor]], Tensor]:
        def loss(params):
            value = self.loss_fn(functional_call(self.model, params, (inputs,)), targets)
            if not isinstance(value, Tensor) or value.dim() != 0:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"loss_fn must return a scalar, the mean over the batch; got {got}")
            return value

        return loss

    def _chunk_for(self, count: int) -> int:
        if count == 1 or self._chunk is not None:
            return self._chunk or 1
        if not self._batches:
            return count
        if self._bytes_of_vector is None:
            index, (inputs, targets) = self._batches[0]
            with self._fixed(index):
                self._bytes_of_vector = bytes_of_vector(self._loss_of(inputs, targets), self.parameters())
        return fitting_chunk(self._bytes_of_vector, count, self.device)

    # ---- loss and gradient ----

    def loss(self) -> float:
        """The regularised mean loss."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with torch.no_grad():
            for index, (inputs, targets) in self._batches:
                with self._fixed(index):
                    value = self._loss_of(inputs, targets)(self.parameters())
                total += value.double() * (_count(targets) / self._samples)
        self._sum_over_processes(total)
        norm = self.layout.flatten(self.parameters()).double().square().sum()
        return float(total + 0.5 * self.weight_decay * norm)

    def gradient(self) -> Tensor:
        """The gradient of the regularised mean loss, (n,)."""
        params = self.parameters()
        total = torch.zeros(self.layout.size, dtype=self.dtype, device=self.device)
        for index, (inputs, targets) in self._track(self._batches):
            with self._fixed(index):
                gradient = self.layout.flatten(grad(self._loss_of(inputs, targets))(params))
            self._require_finite(gradient, inputs, targets, index)
            total += gradient * (_count(targets) / self._samples)
        self._sum_over_processes(total)
        return total + self.weight_decay * self.layout.flatten(params)

    # ---- other views ----

    def to_dense(self) -> Tensor:
        """The matrix (n, n), one product for every column: for small models."""
        return self @ torch.eye(self.layout.size, dtype=self.dtype, device=self.device)

    def to_scipy(self):
        """A `scipy.sparse.linalg.LinearOperator` on NumPy arrays.

        Raises:
            ImportError: scipy is not installed.
        """
        from scipy.sparse.linalg import LinearOperator

        def matmat(array):
            return (self @ torch.as_tensor(array)).cpu().numpy()

        numpy_dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        return LinearOperator(
            self.shape, matvec=lambda v: matmat(v.reshape(-1)), matmat=matmat, rmatvec=matmat, dtype=numpy_dtype
        )

    # ---- keeping it one and the same function ----

    @contextmanager
    def _fixed(self, index: int) -> Iterator[None]:
        """While a batch is computed: its own random numbers, statistics of normalisations untouched."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices) if self._frozen else nullcontext():
            if self._frozen:
                torch.manual_seed(self.seed + index)
            with _statistics_untouched(self.model):
                yield

    def _refuse_dropout(self) -> None:
        if self._frozen:
            return
        for name, module in self.model.named_modules():
            if isinstance(module, _DropoutNd) and module.training and module.p > 0:
                raise ValueError(
                    f"{name or 'the model'} is a dropout in training mode: the loss would be another one in every "
                    "product. Call model.eval(), or freeze its masks with dropout='frozen'"
                )

    def _probe(self) -> None:
        """The loss of the first batch twice: products of what changes from call to call mean nothing."""
        if not self._batches:
            return
        index, (inputs, targets) = self._batches[0]
        losses = []
        with torch.no_grad():
            for _ in range(2):
                with self._fixed(index):
                    losses.append(self._loss_of(inputs, targets)(self.parameters()))
        self._require_finite(losses[0], inputs, targets, index)
        if not torch.allclose(*losses, rtol=1e-4, atol=0):
            raise ValueError(
                f"the loss of the first batch is {losses[0].item():.6g} in one call and {losses[1].item():.6g} in the "
                "next: something in the model or the loss is random. Turn it off, or freeze it with dropout='frozen'"
            )

    def _require_finite(self, result: Tensor, inputs: Any, targets: Any, index: int) -> None:
        """Names the batch whose loss or derivatives are not finite."""
        if result.numel() == 0 or all(math.isfinite(extreme) for extreme in torch.aminmax(result)):
            return
        with torch.no_grad(), self._fixed(index):
            loss = self._loss_of(inputs, targets)(self.parameters()).item()
        what = f"the loss of batch {index} is {loss}"
        raise FloatingPointError(f"{what}, and its derivatives are not finite" if math.isfinite(loss) else what)

    def _sum_over_processes(self, tensor: Tensor) -> None:
        if self._world > 1:
            torch.distributed.all_reduce(tensor)

    def _track(self, batches):
        if not self.progress or self._rank > 0:
            return batches
        from tqdm import tqdm

        return tqdm(batches, desc="batches", leave=False)


def _pairs(data: Iterable) -> Iterator[tuple[Any, Any]]:
    for batch in data:
        if not isinstance(batch, Sequence) or len(batch) != 2:
            raise TypeError(f"data must yield pairs (inputs, targets); got {type(batch).__name__}")
        yield batch[0], batch[1]


def _count(targets: Any) -> int:
    return len(targets)


def _process() -> tuple[int, int]:
    """This process among all, and how many there are."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def _chosen(model: nn.Module, params: Sequence[str] | Callable[[str], bool] | None) -> list[str]:
    """The names of the parameters of an operator."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if params is None:
        if not names:
            raise ValueError("no parameter of the model requires a gradient; call model.requires_grad_()")
        return names
    if callable(params):
        chosen = [name for name in names if params(name)]
    else:
        wanted = [params] if isinstance(params, str) else list(params)
        unknown = [w for w in wanted if not any(name == w or name.startswith(f"{w}.") for name in names)]
        if unknown:
            raise ValueError(
                f"{', '.join(map(repr, unknown))} names no parameter that requires a gradient, nor a module with one"
            )
        chosen = [name for name in names if any(name == w or name.startswith(f"{w}.") for w in wanted)]
    if not chosen:
        raise ValueError("params chooses no parameter that requires a gradient")
    return chosen


@contextmanager
def _statistics_untouched(model: nn.Module) -> Iterator[None]:
    """Batch and instance normalisations in training mode neither read nor update running statistics meanwhile."""
    updating = [
        module
        for module in model.modules()
        if isinstance(module, _NormBase) and module.training and module.track_running_stats
    ]
    statistics = [(module.running_mean, module.running_var) for module in updating]
    for module in updating:
        module.track_running_stats = False
        module.running_mean = module.running_var = None
    try:
        yield
    finally:
        for module, (mean, variance) in zip(updating, statistics, strict=True):
            module.track_running_stats = True
            module.running_mean, module.running_var = mean, variance
