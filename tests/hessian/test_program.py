"""Programs of what rules call: the same results with other inputs, nothing kept, nothing stale."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.testing import assert_close

from vitfast.hessian.program import Tape, unseen

CONSTANT = torch.arange(12.0).view(3, 4)


def taped(function, *inputs):
    """The program of a run, of which the tape has seen nothing but these inputs."""
    with Tape(inputs) as tape:
        results = function(*inputs)
    return tape.program(results)


def filled_anew(x):
    out = CONSTANT.new_empty(3, 4)
    torch.add(x, CONSTANT, out=out)
    return [out]


def sum_begun_with_a_constant(x):
    total = CONSTANT * 2
    total += x
    return [total]


def sum_in_a_view_of_a_constant(x):
    total = CONSTANT * 2
    total.view(-1)[:4].add_(x[0])
    return [total, total * 1]


def sum_in_a_view_before_the_result(x):
    total = x * 2
    part = total[1:]
    part.mul_(part)
    return [part, total]


def lists(x):
    first, second = torch.cat([x, CONSTANT, x]).split([4, 5])
    return [first, torch.stack((second, second.sin()), dim=1), *x.unbind(1)]


def two_inputs(x, y):
    return [torch.where(y > 0, x, CONSTANT), None, (x @ y.t()).softmax(0), y]


FUNCTIONS = {
    "filled anew": filled_anew,
    "begun with a constant": sum_begun_with_a_constant,
    "in a view of a constant": sum_in_a_view_of_a_constant,
    "in a view": sum_in_a_view_before_the_result,
    "lists": lists,
    "two inputs": two_inputs,
    "options": lambda x: [torch.sum(x, 1, keepdim=True, dtype=torch.float64), torch.full_like(x, torch.inf)],
    "a transform": lambda x: [torch.vmap(lambda row: row.cumsum(0) * CONSTANT[0])(x)],
    "filled": lambda x: [x + torch.zeros_like(x).fill_(3)],
    "a scalar": lambda x: [x * 0.1 + float("inf"), x.sum()],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_program_gives_the_same_for_other_inputs(name):
    function = FUNCTIONS[name]
    count = 2 if function is two_inputs else 1
    before = CONSTANT.clone()
    program = taped(function, *(torch.randn(3, 4) for _ in range(count)))
    for _ in range(3):
        inputs = [torch.randn(3, 4) for _ in range(count)]
        results = program(*(x.clone() for x in inputs))
        expected = function(*inputs)
        assert len(results) == len(expected)
        for result, other in zip(results, expected, strict=True):
            assert (result is None) == (other is None)
            if result is not None:
                assert_close(result, other, rtol=0, atol=0)
    assert torch.equal(CONSTANT, before)


class Counting(torch.utils._python_dispatch.TorchDispatchMode):
    """Which operations run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.append(operation.__name__)
        return operation(*args, **(kwargs or {}))


def test_what_depends_on_no_input_is_done_once_and_what_nobody_needs_not_at_all():
    def function(x):
        factor = CONSTANT.cos().t().exp()
        x.sin().tan()
        return [x @ factor]

    x = torch.randn(3, 4)
    program = taped(function, x)
    with Counting() as counting:
        program(x)
    assert counting.names == ["mm.default"]


def test_neither_tape_nor_program_holds_what_has_been_used():
    alive = []

    class Watching(Counting):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            alive.append(sum(ref() is not None for ref in seen))
            result = super().__torch_dispatch__(operation, types, args, kwargs)
            seen.append(weakref.ref(result))
            return result

    def function(x):
        for _ in range(9):
            x = x.sin()
        return [x]

    seen = []
    with Watching():
        program = taped(function, torch.randn(4))
    assert len(alive) == 9 + 1
    assert max(alive) <= 2
    seen, alive = [], []
    with Watching():
        program(torch.randn(4))
    assert max(alive) <= 2


def test_neither_tape_nor_program_keeps_constants_for_longer_than_it_lives():
    alive = {}

    def function(x):
        there = torch.ones(4)
        needless, factor = there * 2, there * 3
        alive.update(there=weakref.ref(there), needless=weakref.ref(needless), factor=weakref.ref(factor))
        return [x * factor, x + (needless * 0).sum()]

    gc.disable()
    try:
        program = taped(function, torch.randn(4))
        assert {name for name, ref in alive.items() if ref() is not None} == {"factor"}
        del program
        assert alive["factor"]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "function",
    [
        lambda x: [CONSTANT.view(12)[:3].add_(x)],
        lambda x: [x * 2 if x.sum() > 0 else -x],
        lambda x: [x * x.sum().item()],
        lambda x: [torch.sparse.mm(torch.eye(3).to_sparse(), x[:, None])],
    ],
    ids=["writes to what was there", "looks at values", "reads a number", "sparse"],
)
def test_what_cannot_be_repeated_has_no_program(function):
    before = CONSTANT.clone()
    assert taped(function, torch.ones(3)) is None
    CONSTANT.copy_(before)


def test_inputs_that_cannot_be_told_apart_have_no_program():
    x = torch.ones(3)
    assert taped(lambda x, y: [x + 2 * y], x, x) is None


def test_random_numbers_are_drawn_in_every_run():
    program = taped(lambda x: [x + torch.rand(3)], torch.zeros(3))
    assert not torch.equal(*(program(torch.zeros(3))[0] for _ in range(2)))


def test_what_is_unseen_has_no_program():
    def function(x):
        with unseen():
            return [x.sin()]

    assert taped(function, torch.randn(3)) is None
    assert torch.equal(function(CONSTANT)[0], CONSTANT.sin())
