"""What a run of rules calls in the end, as one straight function.

Rules look at layouts, dtypes and what there are kernels for, and find the same every time. A `Tape` writes down which
operations of the dispatcher they call, and a program calls these alone. What depends on no input is computed once.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)

from vitfast.hessian.nested import leaves_of, mapped

__all__ = ["Tape", "unseen"]

aten = torch.ops.aten

UNWRITTEN = {aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default}
UNWRITTEN |= {aten.new_empty.default, aten.new_empty_strided.default}
"""Operations that make memory for another one to write to: anew in every run."""

METHODS = {
    aten.expand.default: Tensor.expand,
    aten.new_empty.default: Tensor.new_empty,
    aten.permute.default: Tensor.permute,
    aten.select.int: Tensor.select,
    aten.squeeze.dim: Tensor.squeeze,
    aten.t.default: Tensor.t,
    aten.transpose.int: Tensor.transpose,
    aten.unbind.int: Tensor.unbind,
    aten.view.default: Tensor.view,
}
"""Operations -> methods that do the same in two thirds of the time: the others look for their arguments' types."""


class _Value:
    """A tensor of a run: an input, a result, or one that was there before.

    Attributes:
        constant: the tensor, if it depends on no input.
        is_written: whether an operation writes to its memory; of values that are no views.
        was_there: before the run.
    """

    __slots__ = ("_viewed", "constant", "is_written", "was_there")

    def __init__(self, constant: Tensor | None = None, viewed: _Value | None = None, was_there: bool = False):
        self.constant, self._viewed, self.was_there = constant, viewed, was_there
        self.is_written = False

    @property
    def memory(self) -> _Value:
        """The value whose memory it has: its own, or that of which it is a view."""
        return self if self._viewed is None else self._viewed


@dataclass(slots=True)
class _Call:
    """results = operation(*args, **options), with values for tensors.

    Attributes:
        operands: the values that it reads or writes.
        writes: whether it writes to some of them.
        is_repeatable: whether the same arguments have the same results, and these are nobody's to write to.
    """

    operation: Callable
    args: tuple
    options: dict[str, Any]
    results: Any
    operands: list[_Value]
    writes: bool
    is_repeatable: bool


def _values_in(x: Any) -> Iterator[_Value]:
    return (leaf for leaf in leaves_of(x) if isinstance(leaf, _Value))


@functools.cache
def _written(operation) -> list[tuple[int, str]]:
    """Places and names of the arguments that it changes."""
    arguments = enumerate(operation._schema.arguments)
    return [(i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write]


class Tape(TorchDispatchMode):
    """Writes down the operations on plain tensors that run while it is on.

    Attributes:
        is_complete: whether it has seen all that a program would have to do.
    """

    def __init__(self, inputs: Sequence[Tensor]):
        super().__init__()
        # By the ids of tensors. It does not hold them: all tangents of a run would be in memory at once.
        self._values: dict[int, tuple[weakref.ref, _Value]] = {}
        self._calls: list[_Call] = []
        self._inputs = [self._new(x, _Value()) for x in inputs]
        self.is_complete = len({id(x) for x in inputs}) == len(inputs)  # or nobody could tell them apart

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # PyTorch would import all of it, which takes a second, to tell it to keep away

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        options = kwargs or {}
        results = operation(*args, **options)
        if self.is_complete:
            self._note(operation, args, options, results)
        else:
            self._calls.clear()
            self._values.clear()
        return results

    def _note(self, operation, args: tuple, options: dict[str, Any], results: Any) -> None:
        """Writes down a call."""
        # Of other layouts memory is not known, and of a transform, whose tensors are wrapped, only a part is seen.
        tensors = (x for x in leaves_of((args, *options.values(), results)) if isinstance(x, Tensor))
        if any(x.layout != torch.strided or is_functorch_wrapped_tensor(x) for x in tensors):
            self.is_complete = False
            return
        operands: list[_Value] = []
        memories: dict[int, _Value] = {}

        def given(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            value = self._known(x)
            operands.append(value)
            memories[x.untyped_storage()._cdata] = value.memory
            return value

        def made(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            value = self._value(x)
            if value is None:
                constant = x if is_repeatable and depends_on_no_input else None
                value = self._new(x, _Value(constant, memories.get(x.untyped_storage()._cdata)))
            return value

        args, options = mapped(given, args), {name: mapped(given, x) for name, x in options.items()}
        changed = (args[i] if i < len(args) else options.get(name) for i, name in _written(operation))
        written = [value.memory for value in _values_in(list(changed))]
        for memory in written:
            memory.is_written = True
            self.is_complete &= not memory.was_there
        is_repeatable = operation not in UNWRITTEN and torch.Tag.nondeterministic_seeded not in operation.tags
        depends_on_no_input = all(value.constant is not None for value in operands)
        values = mapped(made, results)
        self._calls.append(_Call(operation, args, options, values, operands, bool(written), is_repeatable))

    def _value(self, x: Tensor) -> _Value | None:
        tensor, value = self._values.get(id(x), (None, None))
        return value if tensor is not None and tensor() is x else None

    def _new(self, x: Tensor, value: _Value) -> _Value:
        self._values[id(x)] = weakref.ref(x), value
        return value

    def _known(self, x: Tensor) -> _Value:
        """The value of a tensor, a new one if it was there before."""
        value = self._value(x)
        return self._new(x, _Value(x, was_there=True)) if value is None else value

    def program(self, results: Sequence[Tensor | None]) -> Callable[..., list[Tensor | None]] | None:
        """inputs -> what these results of the run become with them, to be read only; None if the tape has not seen how
        they came about."""
        calls = self._calls_of_every_run()
        if not self.is_complete:
            return None
        returned = [None if x is None else self._known(x) for x in results]
        source = _Source()
        source.add(f"def program({', '.join(map(source.text, self._inputs))}):")
        lines = []
        needed = set(_values_in(returned))
        for call in reversed(calls):
            if not call.writes and needed.isdisjoint(_values_in(call.results)):
                continue
            used = dict.fromkeys(v for v in (*_values_in(call.results), *call.operands) if v.constant is None)
            lines.append((call, [value for value in used if value not in needed]))
            needed.update(used)
        for call, done in reversed(lines):
            source.call(call)
            if done:
                source.add(f"    del {', '.join(map(source.text, done))}")
        source.add(f"    return {source.text(returned)}")
        return source.function("program")

    def _calls_of_every_run(self) -> list[_Call]:
        """Those whose results are not the same in every run, or are written to; no result of theirs is a constant."""
        calls = []
        for call in self._calls:
            results = list(_values_in(call.results))
            is_constant = call.is_repeatable and all(value.constant is not None for value in call.operands)
            if is_constant and not any(value.memory.is_written for value in results):
                continue
            for value in results:
                value.constant = None
            if not results and not call.writes:
                self.is_complete = False  # somebody has looked at values, and may do something else in another run
            calls.append(call)
        return calls


def unseen() -> AbstractContextManager:
    """For what a tape must not see, and so cannot make a program of: forward mode under a dispatch mode crashes in some
    of PyTorch's operations. While there is a tape, other modes do not see it either."""
    tapes = [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, Tape)]
    for tape in tapes:
        tape.is_complete = False
    return _disable_current_modes() if tapes else nullcontext()


class _Source:
    """The source of a function in Python, and the objects that it names."""

    def __init__(self):
        self._lines: list[str] = []
        self._names: dict[Any, str] = {}
        self._objects: dict[str, Any] = {}

    def add(self, line: str) -> None:
        """The next line."""
        self._lines.append(line)

    def call(self, call: _Call) -> None:
        """The lines of a call."""
        given = [*map(self.text, call.args), *(f"{name}={self.text(x)}" for name, x in call.options.items())]
        line = f"{self.text(METHODS.get(call.operation, call.operation))}({', '.join(given)})"
        if isinstance(call.results, (list, tuple)):
            made = (self.text(x) if isinstance(x, _Value) else "_" for x in call.results)
            line = f"{''.join(f'{name}, ' for name in made)}= {line}"
        elif isinstance(call.results, _Value):
            line = f"{self.text(call.results)} = {line}"
        self.add(f"    {line}")

    def text(self, x: Any) -> str:
        """An expression for a value, a constant, or lists of these."""
        if isinstance(x, (list, tuple)):
            return f"[{', '.join(map(self.text, x))}]"
        if x is None or type(x) in (int, bool):
            return repr(x)
        if isinstance(x, _Value) and x.constant is None:
            return self._names.setdefault(x, f"t{len(self._names)}")
        x = x.constant if isinstance(x, _Value) else x
        name = self._names.setdefault(id(x), f"c{len(self._names)}")
        self._objects[name] = x  # which keeps it, and so its id
        return name

    def function(self, name: str) -> Callable:
        """The function."""
        exec("\n".join(self._lines), self._objects)
        return self._objects.pop(name)  # its own globals: the two would keep each other
