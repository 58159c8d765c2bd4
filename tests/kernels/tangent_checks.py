"""The tangents that kernels compute, of outputs and of gradients, against the formulas of vitfast.reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from attention_cases import cancelling
from helpers import Inputs, Results, assert_close_to_reference
from torch import Tensor

from vitfast import reference
from vitfast.kernels import attention_tangents, window_attention_tangents
from vitfast.kernels.common import statistics_dtype


@dataclass(frozen=True)
class Operator:
    """The kernels of one operator, the formulas for its output and gradients, what kernels take of a case, and the size
    of what cancels where a result is zero."""

    tangents: Callable
    formulas: tuple[Callable, Callable]
    options: Callable[[Any], tuple]
    cancelling: Callable[[Any, Inputs], Results]

    def by_kernels(self, case: Any, inputs: Inputs, tangents: Inputs, **wanted: bool) -> Results:
        """Tangents of the output and of the gradients; of one of them if ``wanted`` says so."""
        *primals, grad = inputs
        *directions, grad_t = tangents
        wanted = {"want_output": True, "want_gradients": True} | wanted
        return Results(*self.tangents(*primals, grad, grad_t, *directions, *self.options(case), **wanted))

    def by_formulas(self, case: Any, inputs: Inputs, tangents: Inputs) -> Results:
        """The same by plain PyTorch, in the dtype of the inputs."""
        *primals, grad = inputs
        output_tangent, gradients_tangent = self.formulas
        options = case.reference_options
        results = []
        for t in range(next(len(x) for x in tangents if x is not None)):
            *directions, grad_t = (None if x is None else x[t] for x in tangents)
            output_t = output_tangent(*primals, tuple(directions), **options)
            results.append((output_t, *gradients_tangent(grad, *primals, grad_t, tuple(directions), **options)))
        return Results(*(None if parts[0] is None else torch.stack(parts) for parts in zip(*results, strict=True)))

    def assert_right(self, case: Any, inputs: Inputs, tangents: Inputs) -> None:
        """Holds the kernels to the tolerance rule; tensors may be on any device.

        float64 has nothing more exact to be measured against here: it only has to be no narrower on the way.
        """
        results, plain = self.by_kernels(case, inputs, tangents), self.by_formulas(case, inputs, tangents)
        exact_inputs, exact_tangents = (x.map(lambda t: t.cpu().double()) for x in (inputs, tangents))
        exact = self.by_formulas(case, exact_inputs, exact_tangents)
        terms = self.cancelling(case, exact_inputs)
        for name, result, one, truth, term in zip(Results._fields, results, plain, exact, terms, strict=True):
            if truth is None:
                assert result is None
            elif result.dtype == torch.float64:
                torch.testing.assert_close(result.cpu(), truth, rtol=1e-13, atol=1e-13)
            else:
                # Tensor cores add up products of 16 bits less exactly than float32 could, which callers round.
                if result.is_cuda and name == "bias" and inputs.query.dtype.itemsize == 2:
                    result, one = result.to(inputs.query.dtype), one.to(inputs.query.dtype)
                result, one = result.cpu(), one.cpu()
                # With one key there is nothing but zeros: only roundings are left, of terms that cancel.
                if term is not None and truth.numel() and not truth.any():
                    result, one, truth = result + term.to(result.dtype), one + term.to(one.dtype), truth + term
                # For a single query or key, PyTorch multiplies a GPU's vectors by kernels that add up in pairs.
                sequences = inputs.query.dim() == 4
                single = sequences and inputs.query.is_cuda and 1 in (inputs.query.shape[2], inputs.key.shape[2])
                assert_close_to_reference(result, one, truth, name, roundings=8 if single else 1)

    def assert_one_result_does_not_depend_on_the_other(self, case: Any, inputs: Inputs, tangents: Inputs) -> None:
        """The output or the gradients alone are what they are together, and the output needs no gradient."""
        both = self.by_kernels(case, inputs, tangents)
        without_grad = inputs._replace(grad=None), tangents._replace(grad=None)
        output, *others = self.by_kernels(case, *without_grad, want_gradients=False)
        # The interpreter's bits are the same. A GPU runs other code, of which other products are fused with sums.
        exactly = {} if output.is_cuda else {"rtol": 0, "atol": 0}
        assert_same = partial(torch.testing.assert_close, **exactly)
        assert_same(output, both.output)
        assert others == [None] * 4
        output, *gradients = self.by_kernels(case, inputs, tangents, want_output=False)
        assert output is None
        for gradient, same in zip(gradients, both[1:], strict=True):
            assert_same(gradient, same)


ATTENTION = Operator(
    attention_tangents.tangents,
    (reference.attention_tangent, reference.attention_backward_tangent),
    lambda case: (case.reference_options["scale"],),
    cancelling,
)
WINDOW_ATTENTION = Operator(
    window_attention_tangents.tangents,
    (reference.window_attention_tangent, reference.window_attention_backward_tangent),
    lambda case: (case.window, case.shift, case.reference_options["scale"]),
    lambda case, inputs: Results(*(None for _ in Results._fields)),  # kernels leave zeros of them
)


def with_tangents(
    inputs: Inputs, count: int = 1, given: tuple[str, ...] = Inputs._fields, seed: int = 1
) -> tuple[Inputs, Inputs]:
    """Inputs as kernels take them, and ``count`` tangents of each of those that are ``given``; the others are None.

    The bias has the dtype of the scores and, in attention, all keys.
    """
    bias = inputs.bias
    if bias is not None:
        bias = bias.to(statistics_dtype(bias.dtype))
        if bias.dim() == 4:
            bias = bias.expand(*bias.shape[:-1], inputs.key.shape[2])
    inputs = inputs._replace(bias=bias)
    generator = torch.Generator().manual_seed(seed)
    tangents = (
        torch.randn(count, *x.shape, generator=generator, dtype=torch.float64).to(x)
        if x is not None and name in given
        else None
        for name, x in inputs._asdict().items()
    )
    return inputs, Inputs(*tangents)


def sliced_tangents(x: Tensor) -> Tensor:
    """The same tangents as every second of twice as many, the others being NaN."""
    whole = x.new_full((2 * len(x), *x.shape[1:]), torch.nan)
    whole[::2] = x
    return whole[::2]


def tangents_last(x: Tensor) -> Tensor:
    """The same tangents side by side in memory."""
    return x.movedim(0, -1).contiguous().movedim(-1, 0)
