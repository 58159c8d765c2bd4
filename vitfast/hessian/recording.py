"""Operations on tangents, recorded as they run, and run again for other tangents without the function they came from.

A gradient with tangents is linear in these. What the function does around them, its Python, autograd and the primal
results of operations that have a rule, is the same in every run: a recording leaves it out, and of the operations those
that no result depends on.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vitfast.hessian.deferred import Deferred, version_of
from vitfast.hessian.nested import leaves_of
from vitfast.hessian.program import Tape
from vitfast.ops.backend import in_use

__all__ = ["Pair", "Recording", "pair", "pairs_in", "parts"]


class Pair:
    """A tensor and K tangents of it, (K, *shape), as rules take and return them."""

    __slots__ = ("_primal", "tangents")

    def __init__(self, primal: Tensor | Deferred, tangents: Tensor | None):
        self._primal, self.tangents = primal, tangents

    @property
    def primal(self) -> Tensor:
        """The tensor. One that was deferred is computed."""
        if type(self._primal) is Deferred:
            self._primal = self._primal.read()
        return self._primal

    @property
    def held(self) -> Tensor | Deferred:
        """The tensor, deferred if nobody has read it."""
        if type(self._primal) is Deferred and self._primal.value is not None:
            self._primal = self._primal.value
        return self._primal

    @property
    def shape(self) -> torch.Size:
        """Of the primal."""
        return self._primal.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the primal."""
        return self._primal.dtype

    def dim(self) -> int:
        """Of the primal."""
        return self._primal.dim()

    def take(self, tangents: Tensor) -> None:
        """Has these tangents, in the dtype of the primal."""
        self.tangents = tangents if tangents.dtype == self.dtype else tangents.to(self.dtype)


def pair(primal: Tensor | Deferred, tangents: Tensor | None) -> Pair | Tensor | Deferred:
    """A tensor with these tangents; a plain one if there are none."""
    return primal if tangents is None else Pair(primal, tangents)


def parts(x: Any) -> tuple[Any, Tensor | None]:
    """The primal of a tensor, and its tangents if it has some."""
    return (x.primal, x.tangents) if isinstance(x, Pair) else (x, None)


def pairs_in(x: Any) -> Iterator[Pair]:
    """In lists and tuples, in order."""
    return (leaf for leaf in leaves_of(x) if isinstance(leaf, Pair))


@dataclass(slots=True)
class _Step:
    """One operation: function(*args, **options), whose results have tangents for the pairs of ``results``."""

    function: Callable[..., Any]
    args: Sequence[Any]
    options: dict[str, Any]
    results: list[Pair]
    done: list[Pair] = field(default_factory=list)
    """Whose tangents nobody needs after it."""

    def operands(self) -> Iterator[Any]:
        """All tensors, pairs and numbers that it reads."""
        yield from leaves_of(self.args)
        yield from leaves_of(tuple(self.options.values()))

    def tensors(self) -> Iterator[Tensor]:
        """Those, and the primals of the pairs, but for what nobody has read."""
        for operand in self.operands():
            tensor = operand.held if isinstance(operand, Pair) else operand
            if isinstance(tensor, Tensor):
                yield tensor


_MOST_PROGRAMS = 4  # of a recording: as many counts of vectors, each with constants of its own


class Recording:
    """Of one run. Its pairs hold tangents only while they are needed, and primals for as long as it lives."""

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        """Forgets the run."""
        self._steps: list[_Step] = []
        self._inputs: list[Pair] = []
        self._results: list[Pair | None] | None = None
        self._versions: dict[int, tuple[Tensor, int]] = {}
        self._programs: OrderedDict[tuple, Callable] = OrderedDict()  # those used last at the end
        self._has_programs = True

    def __len__(self) -> int:
        """The operations that are run again."""
        return len(self._steps)

    # ---- while it runs ----

    def input(self, primal: Tensor) -> Pair:
        """The place of the tangents that are given for a tensor."""
        self._inputs.append(Pair(primal, None))
        return self._inputs[-1]

    def add(self, function: Callable[..., Any], args: Sequence[Any], options: dict[str, Any], results: list[Pair]):
        """What has run. The tensors among its arguments must not change from now on."""
        step = _Step(function, args, options, results)
        self._steps.append(step)
        for tensor in step.tensors():
            self._versions.setdefault(id(tensor), (tensor, version_of(tensor)))

    def end(self, results: list[Pair | None]) -> None:
        """Keeps what leads to these results."""
        needed = {id(result) for result in results}
        steps = []
        for step in reversed(self._steps):
            if needed.isdisjoint(map(id, step.results)):
                continue
            for place in (*step.results, *pairs_in(tuple(step.operands()))):
                if id(place) not in needed:
                    needed.add(id(place))
                    step.done.append(place)
            steps.append(step)
        read = {id(tensor) for step in steps for tensor in step.tensors()}
        # What is left out may have read tensors that others here were computed from.
        read |= {id(operand) for step in self._steps for operand in step.operands() if isinstance(operand, Tensor)}
        read |= {id(place.primal) for place in self._inputs}
        self._steps, self._results = steps[::-1], results
        self._versions = {key: version for key, version in self._versions.items() if key in read}

    # ---- again ----

    def is_current(self) -> bool:
        """Whether a run is complete, and its tensors have not been changed in place since, as far as PyTorch knows."""
        return self._results is not None and all(
            version_of(tensor) == version for tensor, version in self._versions.values()
        )

    @torch.no_grad()
    def replay(self, tangents: Sequence[Tensor]) -> list[Tensor | None]:
        """The tangents of the results for other tangents of the inputs, to be read only."""
        # All that rules decide by, beside what does not change.
        key = (*in_use(), *((t.shape[0], t.stride(), t.dtype) for t in tangents))
        # Triton's kernels are not called by the dispatcher: no tape would see them.
        if not self._has_programs or "triton" in key or any(t.device.type != "cpu" for t in tangents):
            return self._run(tangents)
        if key in self._programs:
            self._programs.move_to_end(key)
            return self._programs[key](*tangents)
        with Tape(tangents) as tape:
            results = self._run(tangents)
        program = tape.program(results)
        if program is None:
            self._has_programs = False  # nor would it have one for other tangents
            return results
        self._programs[key] = program
        while len(self._programs) > _MOST_PROGRAMS:
            self._programs.popitem(last=False)
        return results

    def _run(self, tangents: Sequence[Tensor]) -> list[Tensor | None]:
        """Rule by rule."""
        try:
            for place, given in zip(self._inputs, tangents, strict=True):
                place.take(given)
            for step in self._steps:
                results = step.function(*step.args, **step.options)
                if type(results) is Pair:  # the usual case
                    step.results[0].take(results.tangents)
                else:
                    for place, result in zip(step.results, pairs_in(results), strict=True):
                        place.take(result.tangents)
                for place in step.done:
                    place.tangents = None
            return [None if place is None else place.tangents for place in self._results]
        finally:
            for place in (*self._inputs, *(result for step in self._steps for result in step.results)):
                place.tangents = None
