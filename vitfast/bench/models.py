"""Benchmark cases of whole models: models of timm, torchvision and transformers before and after `vitfast.accelerate`.

Weights are random, images too, 224 x 224 pixels, 8 of them on the CPU and 64 on a GPU. Two passes:

- ``inference``: the forward in evaluation mode, without gradients;
- ``training``: in training mode, with what the model drops by default, the forward, the cross-entropy and the gradients
  of all parameters. No optimizer: a step of it costs the same for both models.

Implementations: ``vitfast`` is the accelerated copy of ``original``, the model as its library makes it, in eager mode.
On the CPU each has a process of its own, and they take turns.

How much faster attention makes a model is limited by the rest of the model. That limit is measured: in the same rounds
as the two models, the accelerated one runs once more, with functions in place of the fused attention that return at
once, with results and gradients of the right shapes that were made beforehand, and with all else, linear layers and
MLPs, as PyTorch computes it. With T and T0 the medians of the original and of this run,

    attention_share = 1 - T0 / T        of the original's time, with all copies, rolls and masks around attention
    ratio_limit = T / T0                = 1 / (1 - attention_share), the ratio of attention that takes no time

What goes beyond the limit, the fused MLPs and linear layers have brought.

Counted work: the matrix products and convolutions of the original, as `torch.utils.flop_counter` counts them. The bytes
are those of images, parameters and logits: read or written once in the forward, read once more in the backward, which
writes the parameters' gradients. Memory is given as a share of what the original holds at most beyond its weights,
their gradients, the images and the logits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from vitfast import functional
from vitfast.bench import libraries
from vitfast.bench.case import OURS, Case, Run, Variant, Workload
from vitfast.models import accelerate
from vitfast.ops.backend import backend

__all__ = ["CASES", "INFERENCE", "ORIGINAL", "TRAINING", "make_workload"]

ORIGINAL = "original"
INFERENCE, TRAINING = "inference", "training"

_SIDE = 224
_SEED = 0


def make_workload(
    model: nn.Module, side: int, batch: int, phase: str, device: torch.device, dtype: torch.dtype
) -> Workload:
    """The workload of one model.

    Args:
        model: maps images to logits, or to an output of transformers that has them, of at least ``batch`` classes.
            It is changed: moved to ``device`` and ``dtype``, and into the mode of ``phase``.
        side: height and width of the images.
        phase: `INFERENCE` or `TRAINING`.
    """
    training = phase == TRAINING
    original = model.to(device, dtype).train(training)
    accelerated = copy.deepcopy(original)
    report = accelerate(accelerated, report=True)
    generator = torch.Generator(device).manual_seed(_SEED)
    images = torch.randn(batch, 3, side, side, generator=generator, device=device, dtype=dtype)
    step = partial(_step, images=images, training=training)
    flops, logits = _count(step(original))
    parameters = sum(parameter.nbytes for parameter in original.parameters())
    forward_bytes = images.nbytes + parameters + logits.nbytes
    return Workload(
        variants=(Variant(OURS, step(accelerated)), Variant(ORIGINAL, step(original))),
        plain=ORIGINAL,
        expected=partial(_exact, original, images, training),
        flops=flops,
        bytes=2 * forward_bytes + parameters if training else forward_bytes,
        intermediate_bytes=None,
        details={
            "batch": batch,
            "side": side,
            "parameters": sum(parameter.numel() for parameter in original.parameters()),
            "replaced": len(report.replaced),
            "kept": len(report.kept),
        },
        floor=_without_attention(step(accelerated)),
    )


def _step(model: nn.Module, images: Tensor, training: bool) -> Run:
    """Results: the logits, and in training the gradients of all parameters. Image i is of class i."""
    parameters, labels = tuple(model.parameters()), torch.arange(len(images), device=images.device)

    def inference():
        with torch.no_grad():
            return (_logits(model, images),)

    def train():
        torch.manual_seed(_SEED)  # every run drops the same
        logits = _logits(model, images)
        return (logits.detach(), *torch.autograd.grad(F.cross_entropy(logits, labels), parameters))

    return train if training else inference


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    output = model(images)
    return output if isinstance(output, Tensor) else output.logits


def _exact(original: nn.Module, images: Tensor, training: bool) -> tuple[Tensor, ...]:
    with _DrawIn(images.dtype):
        return _step(copy.deepcopy(original).double(), images.double(), training)()


class _DrawIn(TorchFunctionMode):
    """Stochastic depth is drawn in ``dtype``: GPUs give every dtype random numbers of its own."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self._dtype = dtype

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not Tensor.bernoulli_:
            return function(*args, **kwargs)
        target, *options = args
        return target.copy_(function(torch.empty_like(target, dtype=self._dtype), *options, **kwargs))


def _count(run: Run) -> tuple[int, Tensor]:
    """The operations of a step, and its first result. Only the plain form of SDPA is counted on every device."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output, *_ = run()
    return counter.get_total_flops(), output


# ---- attention that takes no time ------------------------------------------------------------------------------------


def _without_attention(run: Run) -> Run:
    """The step with functions in place of fused attention that return what was made beforehand, the rest PyTorch's."""
    made: dict[tuple, Tensor] = {}

    def tensor(shape: torch.Size, like: Tensor) -> Tensor:
        key = (shape, like.dtype)
        if key not in made:
            made[key] = torch.full(shape, 0.01, dtype=like.dtype, device=like.device)
        return made[key].detach()  # anew: autograd marks what a Function returns

    def separate(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, **_) -> Tensor:
        return _Ready.apply(tensor, query.shape, query, key, value, bias)

    def packed(qkv: Tensor, bias: Tensor | None = None, **_) -> Tensor:
        return _Ready.apply(tensor, qkv.select(-3, 0).shape, qkv, bias)

    def sequences(query: Tensor, *others: Tensor | None, **_) -> Tensor:
        return separate(query.transpose(1, 2), *others).transpose(1, 2)

    functions = {
        "attention": sequences,
        "attention_qkvpacked": packed,
        "window_attention": separate,
        "window_attention_qkvpacked": packed,
    }

    def without():
        with backend("reference"), mock.patch.multiple(functional, **functions):
            return run()

    return without


class _Ready(torch.autograd.Function):
    """``tensor(shape)`` as the output for any inputs, and more such tensors as their gradients."""

    @staticmethod
    def forward(ctx, tensor: Callable[[torch.Size, Tensor], Tensor], shape: torch.Size, *inputs: Tensor | None):
        ctx.tensor = tensor
        ctx.save_for_backward(*inputs)
        return tensor(shape, inputs[0])

    @staticmethod
    def backward(ctx, grad):
        inputs = ctx.saved_tensors
        return None, None, *(None if x is None else ctx.tensor(x.shape, x) for x in inputs)


# ---- cases -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Model:
    """A model of ``library``: ``build`` makes it of the imported library."""

    library: str
    build: Callable[[ModuleType], nn.Module]


def _transformers_vit(transformers: ModuleType) -> nn.Module:
    shape = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**shape, num_labels=1000))


def _transformers_swin(transformers: ModuleType) -> nn.Module:
    # By default Swin-T. Its drop path draws other numbers in float64, and the error would be that of another model.
    return transformers.SwinForImageClassification(transformers.SwinConfig(num_labels=1000, drop_path_rate=0.0))


_MODELS = {
    "timm_swin_t": _Model("timm", lambda timm: timm.create_model("swin_tiny_patch4_window7_224")),
    "timm_vit_s": _Model("timm", lambda timm: timm.create_model("vit_small_patch16_224")),
    "torchvision_swin_t": _Model("torchvision", lambda torchvision: torchvision.models.swin_t()),
    "transformers_vit_s": _Model("transformers", _transformers_vit),
    "transformers_swin_t": _Model("transformers", _transformers_swin),
}


def _case(name: str, model: _Model, phase: str) -> Case:
    def make(device, dtype):
        library = libraries.load(model.library)
        torch.manual_seed(_SEED)
        batch = 64 if device.type == "cuda" else 8
        return make_workload(model.build(library), _SIDE, batch, phase, device, dtype)

    return Case(
        operator="models",
        label=name,
        phase=phase,
        family=name,
        implementations=(OURS, ORIGINAL),
        make=make,
        compiles=False,
        apart=True,
    )


CASES = tuple(_case(name, model, phase) for name, model in _MODELS.items() for phase in (INFERENCE, TRAINING))
