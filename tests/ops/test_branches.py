"""Fused residual branches against their definitions, in float64: values, gradients, dropped samples, blocks of rows."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from derivatives import leaves
from helpers import assert_close_to_reference
from torch.testing import assert_close

import vitfast
from vitfast import reference
from vitfast.bench import memory
from vitfast.ops import branches
from vitfast.ops.branches import Depth, Norm

CHANNELS, HIDDEN, EPS = 48, 96, 1e-5
FACTORS = [None, (1.25, 0.0, 1.25, 1.25, 0.0), (0.0, 2.0, 1.0, 0.5, 0.5), (0.0,) * 5, (1.0,) * 5]
DEPTHS = [Depth(5, factors) for factors in FACTORS]


def make(shape=(5, 3, 7), sizes=(), seed=0):
    """x, weight and bias of a normalisation, and weights and biases of linear layers with (outputs, inputs)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size, scale=1.0):
        return scale * torch.randn(*size, generator=generator)

    layers = [(normal(*size, scale=size[1] ** -0.5), normal(size[0])) for size in sizes]
    return (3 + normal(*shape, CHANNELS), 1 + 0.5 * normal(CHANNELS), normal(CHANNELS), *itertools.chain(*layers))


def residual_mlp(depth):
    return lambda x, w, b, *weights: (branches.residual_mlp(x, Norm(w, b, EPS), weights, depth),)


def plain_residual_mlp(depth):
    return lambda x, w, b, *weights: (
        x + depth.scaled(reference.mlp(F.layer_norm(x, (CHANNELS,), w, b, EPS), *weights)),
    )


def norm_linear(depth):
    return lambda x, w, b, *layer: branches.norm_linear(x, Norm(w, b, EPS), *layer, depth)


def plain_norm_linear(depth):
    return lambda x, w, b, *layer: (F.linear(F.layer_norm(x, (CHANNELS,), w, b, EPS)[depth.kept], *layer), x.clone())


def attention_branch(depth):
    """Both halves, with something that mixes the tokens of a sample in place of attention."""

    def function(x, w, b, weight1, bias1, weight2, bias2):
        y, x = branches.norm_linear(x, Norm(w, b, EPS), weight1, bias1, depth)
        return (branches.add_linear(x, y.sin() + y.cumsum(1).cos(), weight2, bias2, depth),)

    return function


def plain_attention_branch(depth):
    def function(x, w, b, weight1, bias1, weight2, bias2):
        y = F.linear(F.layer_norm(x, (CHANNELS,), w, b, EPS), weight1, bias1)
        return (x + depth.scaled(F.linear(y.sin() + y.cumsum(1).cos(), weight2, bias2)),)

    return function


MLP = ((HIDDEN, CHANNELS), (CHANNELS, HIDDEN))
BRANCHES = {
    "mlp": (residual_mlp, plain_residual_mlp, MLP),
    "norm_linear": (norm_linear, plain_norm_linear, ((64, CHANNELS),)),
    "attention": (attention_branch, plain_attention_branch, MLP),
}


def results(function, tensors, seed=1):
    """Outputs and gradients of all tensors."""
    tensors = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    outputs = function(*tensors)
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(output.shape, generator=generator).to(output.dtype) for output in outputs]
    wanted = [t for t in tensors if t is not None]
    return *(o.detach() for o in outputs), *torch.autograd.grad(outputs, wanted, grads)


def assert_exact(name, depth, tensors):
    """Outputs and gradients by the tolerance rule."""
    ours, plain, _ = BRANCHES[name]
    exact = results(plain(depth), [t if t is None else t.double() for t in tensors])
    for i, values in enumerate(zip(results(ours(depth), tensors), results(plain(depth), tensors), exact, strict=True)):
        assert_close_to_reference(*values, name=f"{name} {i}")


@pytest.mark.parametrize("depth", DEPTHS, ids=lambda depth: str(depth.factors))
@pytest.mark.parametrize("name", BRANCHES)
def test_outputs_and_gradients(name, depth, instruction_set):
    assert_exact(name, depth, make(sizes=BRANCHES[name][2]))


@pytest.mark.parametrize("name", BRANCHES)
@pytest.mark.parametrize("rows", [1, 4, 7, 40, 1000])
def test_rows_go_through_in_blocks(name, rows, monkeypatch):
    monkeypatch.setattr(branches, "BLOCK_ROWS", rows)
    for depth in DEPTHS:
        assert_exact(name, depth, make(sizes=BRANCHES[name][2]))


@pytest.mark.parametrize("count", [0, 1, 2047, 3071, 3073, 100_000])
def test_blocks_cover_the_rows(count):
    x = torch.empty(max(count, 1), 1).expand(max(count, 1), CHANNELS)
    factors = None if count else (0.0,)
    blocks = [block.rows for block in branches._Rows(Depth(len(x), factors), x).blocks()]
    assert [row for rows in blocks for row in range(rows.start, rows.stop)] == list(range(count))
    assert max((rows.stop - rows.start for rows in blocks), default=0) <= 1.5 * branches.BLOCK_ROWS


@pytest.mark.parametrize("name", BRANCHES)
@pytest.mark.parametrize("shape", [(5, 1), (5, 600), (5, 13, 13)], ids=str)
def test_shapes_of_maps(name, shape):
    assert_exact(name, DEPTHS[1], make(shape, BRANCHES[name][2]))


@pytest.mark.parametrize("name", BRANCHES)
def test_without_biases_and_affine_parameters(name):
    x, weight, _, *layers = make(sizes=BRANCHES[name][2])
    layers = [t if t.dim() == 2 else None for t in layers]
    for depth in DEPTHS:
        assert_exact(name, depth, (x, weight, None, *layers))
        assert_exact(name, depth, (x, None, None, *layers))


@pytest.mark.parametrize("name", BRANCHES)
def test_maps_with_strides(name):
    ours, plain, sizes = BRANCHES[name]
    x, *others = make((3, 5, 7), sizes)
    for map_ in (x.transpose(0, 1), x[:1, :1].expand(5, 5, 7, CHANNELS), x.flip(0).repeat(2, 1, 1, 1)[::2][:1].mT.mT):
        depth = Depth(len(map_), tuple([1.5, 0.0, 1.5, 1.5, 0.0][: len(map_)]))
        for found, expected in zip(
            results(ours(depth), (map_, *others)), results(plain(depth), (map_, *others)), strict=True
        ):
            assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BRANCHES)
def test_gradients_of_any_subset(name):
    ours, _, sizes = BRANCHES[name]
    tensors, depth = make(sizes=sizes), DEPTHS[1]
    every = leaves(tensors)
    everything = torch.autograd.grad(sum(output.sum() for output in ours(depth)(*every)), every)
    for i in range(len(tensors)):
        for others in ({i}, set(range(len(tensors))) - {i}):
            some = [t.clone().requires_grad_(j in others) for j, t in enumerate(tensors)]
            outputs = [o for o in ours(depth)(*some) if o.requires_grad]
            found = torch.autograd.grad(sum(o.sum() for o in outputs), [some[j] for j in sorted(others)])
            for j, gradient in zip(sorted(others), found, strict=True):
                assert_close(gradient, everything[j])


@pytest.mark.parametrize("depth", DEPTHS[:3], ids=lambda depth: str(depth.factors))
@pytest.mark.parametrize("name", BRANCHES)
def test_double_backward(name, depth):
    ours, plain, sizes = BRANCHES[name]

    def twice(function, tensors):
        def gradients(*tensors):
            loss = sum(o.sin().square().sum() for o in function(*tensors))
            return torch.autograd.grad(loss, tensors, create_graph=True)

        return results(gradients, tensors)

    tensors = make(sizes=sizes)
    exact = twice(plain(depth), [t.double() for t in tensors])
    for values in zip(twice(ours(depth), tensors), twice(plain(depth), tensors), exact, strict=True):
        assert_close_to_reference(*values, name=name, roundings=2)


@pytest.mark.parametrize("name", BRANCHES)
def test_many_gradients_at_once(name):
    ours, _, sizes = BRANCHES[name]
    tensors = leaves(make(sizes=sizes))
    outputs = ours(DEPTHS[1])(*tensors)
    grads = [torch.randn(3, *o.shape) for o in outputs]
    batched = torch.autograd.grad(outputs, tensors, grads, retain_graph=True, is_grads_batched=True)
    for i in range(3):
        one = torch.autograd.grad(outputs, tensors, [g[i] for g in grads], retain_graph=True)
        for found, expected in zip((b[i] for b in batched), one, strict=True):
            assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BRANCHES)
def test_without_gradients_the_outputs_are_the_same(name):
    ours, _, sizes = BRANCHES[name]
    tensors = make(sizes=sizes)
    with torch.no_grad():
        plain = ours(DEPTHS[1])(*leaves(tensors))
    for found, expected in zip(plain, ours(DEPTHS[1])(*leaves(tensors)), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", BRANCHES)
def test_the_same_bits_for_any_number_of_threads(name, threads):
    tensors, found = make((5, 300), BRANCHES[name][2]), []
    for count in (1, 2, 3):
        threads(count)
        found.append(results(BRANCHES[name][0](DEPTHS[1]), tensors))
    # What matrix products and sums a task has may depend on the threads, not the order of any sum.
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            assert torch.equal(one, other)


def test_a_branch_that_is_dropped_is_not_computed():
    x, *others = make((2, 5), MLP)
    x[1] = torch.inf
    (output,) = residual_mlp(Depth(2, (2.0, 0.0)))(x, *others)
    assert torch.equal(output[1], x[1])
    assert output[0].isfinite().all()


def test_a_tensor_in_two_places():
    x, weight, bias, *layers = make(sizes=((CHANNELS, CHANNELS), (CHANNELS, CHANNELS)))
    tensors = leaves((x, weight, bias, *layers[:2]))

    def twice(function):
        def shared(x, weight, bias, *layer):
            return function(x, weight, bias, *layer, *layer)

        loss = shared(*tensors)[0].sin().sum()
        first = torch.autograd.grad(loss, tensors, create_graph=True)
        return *first, *torch.autograd.grad(sum(g.sin().sum() for g in first), tensors)

    for found, expected in zip(twice(residual_mlp(DEPTHS[1])), twice(plain_residual_mlp(DEPTHS[1])), strict=True):
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_gradients_are_tensors_of_their_own():
    tensors = leaves(make(sizes=MLP))
    gradients = torch.autograd.grad(residual_mlp(DEPTHS[0])(*tensors)[0].sum(), tensors)
    assert len({gradient.untyped_storage().data_ptr() for gradient in gradients}) == len(gradients)


def test_an_output_that_nobody_uses():
    x, weight, bias, *layer = leaves(make(sizes=((64, CHANNELS),)))
    output, again = norm_linear(DEPTHS[1])(x, weight, bias, *layer)
    (found,) = torch.autograd.grad(output.sin().sum(), x, retain_graph=True)
    plain, _ = plain_norm_linear(DEPTHS[1])(x, weight, bias, *layer)
    assert_close(found, torch.autograd.grad(plain.sin().sum(), x)[0], rtol=1e-4, atol=1e-5)
    assert_close(torch.autograd.grad(again.sum(), x)[0], torch.ones_like(x))


def test_memory_of_the_backward_is_the_hidden_values():
    rows = 10 * branches.BLOCK_ROWS
    tensors = leaves(make((10, rows // 10), MLP))
    hidden, map_ = 4 * rows * HIDDEN, 4 * rows * CHANNELS
    depth = Depth(10)

    def train():
        return torch.autograd.grad(residual_mlp(depth)(*tensors)[0].sum(), tensors)

    # The hidden values, the output, its gradient (one number that is expanded, and copied), and some blocks.
    assert memory.extra_bytes(train, torch.device("cpu")) < hidden + 2 * map_ + 0.4 * hidden


def test_changing_what_was_saved_is_noticed():
    tensors = leaves(make(sizes=MLP))
    (output,) = residual_mlp(DEPTHS[0])(*tensors)
    with torch.no_grad():
        tensors[3].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


# ---- when they serve -----------------------------------------------------------------------------------------------


def served(x=None, weights=None, vectors=None):
    some_x, weight, bias, *layers = make(sizes=MLP)
    return branches.serves(
        some_x if x is None else x,
        layers[::2] if weights is None else weights,
        vectors or [weight, bias, *layers[1::2]],
    )


def test_what_serves(instruction_set):
    assert served() == (instruction_set != "baseline")


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.zeros(5, 3, CHANNELS, dtype=torch.float64)},
        {"x": torch.zeros(0, 3, CHANNELS)},
        {"x": torch.zeros(CHANNELS)},
        {"weights": [torch.zeros(40, CHANNELS)]},
        {"weights": [torch.zeros(CHANNELS, 40)]},
        {"weights": [torch.zeros(CHANNELS, HIDDEN).t()]},
        {"weights": [torch.zeros(HIDDEN, CHANNELS, dtype=torch.bfloat16)]},
        {"vectors": [torch.zeros(CHANNELS, dtype=torch.float64)]},
        {"vectors": [torch.zeros(2 * CHANNELS)[::2]]},
    ],
    ids=str,
)
def test_what_does_not_serve(change):
    assert not served(**change)


def test_when_they_do_not_serve():
    with torch.autocast("cpu", torch.bfloat16):
        assert not served()
    with vitfast.backend("reference"):
        assert not served()
    found = []
    torch.func.vmap(lambda x: (found.append(branches.serves(x, [], [])), x)[1])(torch.zeros(2, 5, 3, CHANNELS))
    assert found == [False]


# ---- direct calls of the operators ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": torch.tensor([0, 15])}, "index must be of rows of the map"),
        ({"index": torch.tensor([-1, 0])}, "index must be of rows of the map"),
        ({"index": torch.tensor([0, 1], dtype=torch.int32)}, "index must be contiguous in int64"),
        ({"index": torch.tensor([], dtype=torch.int64)}, "a block must have rows"),
        ({"weight": torch.zeros(64, 32)}, "matrices must be"),
        ({"weight": torch.zeros(40, CHANNELS)}, "a multiple of 16 outputs"),
        ({"x": torch.zeros(15, CHANNELS).double()}, "matrices must be"),
        ({"x": torch.zeros(CHANNELS)}, "a map must be a matrix"),
        ({"bias": torch.zeros(63)}, "vectors must be"),
        ({"out": torch.zeros(3, 64)}, "matrices must be"),
        ({"out": torch.zeros(64, 2).t()}, "matrices must be"),
    ],
    ids=str,
)
def test_direct_calls_stay_within_bounds(change, message):
    arguments = {
        "x": torch.zeros(15, CHANNELS),
        "index": torch.tensor([0, 14]),
        "norm_weight": None,
        "norm_bias": None,
        "eps": EPS,
        "weight": torch.zeros(64, CHANNELS),
        "bias": None,
        "out": torch.zeros(2, 64),
    }
    torch.ops.vitfast.norm_linear(*arguments.values())
    with pytest.raises(RuntimeError, match=message):
        torch.ops.vitfast.norm_linear(*(arguments | change).values())


ROWS, SOME = 15, 2
MAP, SMALL_MAP = torch.zeros(ROWS, CHANNELS), torch.zeros(SOME, CHANNELS)
INDEX, SCALE, WEIGHT = torch.tensor([0, 14]), torch.ones(SOME), torch.zeros(64, CHANNELS)
DIRECT = {
    "add_linear": (MAP, torch.zeros(SOME, 64), INDEX, SCALE, torch.zeros(CHANNELS, 64), None, MAP.clone()),
    "add_linear_backward": (
        *(MAP, torch.zeros(SOME, 64), INDEX, SCALE, torch.zeros(CHANNELS, 64), False, torch.zeros(SOME, 64)),
        *(torch.zeros(CHANNELS, 64), torch.zeros(CHANNELS)),
    ),
    "norm_linear_backward": (
        *(torch.zeros(SOME, 64), MAP, MAP, INDEX, None, None, EPS, WEIGHT, False, MAP.clone()),
        *(torch.zeros(CHANNELS), torch.zeros(CHANNELS), WEIGHT.clone(), torch.zeros(64)),
    ),
    "residual_mlp": (
        *(MAP, INDEX, SCALE, None, None, EPS, WEIGHT, None, torch.zeros(CHANNELS, 64), None, MAP.clone()),
        torch.zeros(SOME, 64),
    ),
    "residual_mlp_backward": (
        *(MAP, MAP, INDEX, SCALE, None, None, EPS, WEIGHT, torch.zeros(CHANNELS, 64), torch.zeros(SOME, 64), False),
        *(MAP.clone(), torch.zeros(CHANNELS), torch.zeros(CHANNELS), WEIGHT.clone(), torch.zeros(64)),
        *(torch.zeros(CHANNELS, 64), torch.zeros(CHANNELS)),
    ),
}


@pytest.mark.parametrize("name", DIRECT)
def test_no_argument_of_another_size_is_taken(name):
    """Each tensor in turn with one row, column or element less, in another dtype, or with other strides."""
    operator, arguments = getattr(torch.ops.vitfast, name), DIRECT[name]
    operator(*arguments)
    for i, argument in enumerate(arguments):
        if not isinstance(argument, torch.Tensor):
            continue
        others = [argument[:-1], argument.double()]
        if argument is not INDEX:
            others.append(argument.repeat(2, *(1,) * (argument.dim() - 1))[::2])
        else:
            others = [INDEX.int(), torch.tensor([0, 15]), torch.tensor([-1, 3]), INDEX[:1]]
        if argument.dim() == 2:
            others += [argument[:, :-16], argument.flatten()]
        for other in others:
            with pytest.raises(RuntimeError, match="residual branch"):
                operator(*arguments[:i], other, *arguments[i + 1 :])
