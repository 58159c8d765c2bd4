"""The Hessian of a loss over a data set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
import torch.nn.functional as F
from hessian_cases import Normalised, Perceptron, dense_hessian, made, ragged
from torch import nn
from torch.testing import assert_close

from vitfast.hessian import HessianOperator, gauss_newton_product


def eye(operator):
    return torch.eye(operator.shape[0], dtype=torch.float64)


def test_batches_count_by_their_samples_and_decay_is_exact():
    model, inputs, targets, batches = ragged()
    operator = HessianOperator(model, F.cross_entropy, batches, weight_decay=0.3)
    expected = dense_hessian(model, inputs, targets) + 0.3 * eye(operator)
    assert_close(operator.to_dense(), expected)
    assert operator.products == len(expected)
    assert_close(operator @ torch.ones(len(expected), dtype=torch.float64), expected.sum(1))
    parameters = list(model.parameters())
    loss = F.cross_entropy(model(inputs), targets) + 0.15 * sum(p.square().sum() for p in parameters)
    assert operator.loss() == pytest.approx(loss.item())
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
    assert_close(operator.gradient(), gradient)


def test_dictionaries_of_directions():
    model, inputs, targets, batches = ragged()
    operator = HessianOperator(model, F.cross_entropy, batches)
    directions = {
        name: torch.randn(2, *value.shape, dtype=torch.float64) for name, value in operator.parameters().items()
    }
    products = operator @ directions
    expected = dense_hessian(model, inputs, targets) @ operator.layout.flatten_rows(directions).T
    assert_close(operator.layout.flatten_rows(products).T, expected)


@pytest.mark.parametrize("params", [["last"], ["last.weight", "last.bias"], lambda name: name.startswith("last")])
def test_some_parameters(params):
    model, inputs, targets, batches = ragged()
    operator = HessianOperator(model, F.cross_entropy, batches, params=params)
    assert list(operator.parameters()) == ["last.weight", "last.bias"]
    assert_close(operator.to_dense(), dense_hessian(model, inputs, targets)[-21:, -21:])


def test_frozen_parameters_are_left_out():
    model, inputs, targets, batches = ragged()
    model.first.requires_grad_(False)
    operator = HessianOperator(model, F.cross_entropy, batches)
    assert_close(operator.to_dense(), dense_hessian(model, inputs, targets))


def test_kept_graphs_give_the_same_and_follow_the_parameters():
    model, inputs, targets, batches = ragged()
    options = {"weight_decay": 0.1, "params": lambda name: name != "norm.bias"}
    kept = HessianOperator(model, F.cross_entropy, batches, keep_primals=True, **options)
    plain = HessianOperator(model, F.cross_entropy, batches, **options)
    for _ in range(2):
        assert_close(kept.to_dense(), plain.to_dense())
        assert_close(kept @ torch.ones(kept.shape[0], dtype=torch.float64), plain.to_dense().sum(1))
        with torch.no_grad():
            model.last.weight += 0.1
    linear = nn.Linear(5, 1).double()  # of whose loss no gradient depends on a parameter
    flat = HessianOperator(linear, lambda out, y: out.mean(), [(inputs, targets)], keep_primals=True)
    assert not flat.to_dense().any()
    with pytest.raises(ValueError, match="keep_primals is for curvature='hessian'"):
        HessianOperator(model, F.cross_entropy, batches, keep_primals=True, curvature="gauss_newton")


def test_gauss_newton():
    model, inputs, targets, batches = ragged()
    operator = HessianOperator(model, F.cross_entropy, batches, curvature="gauss_newton")
    params = operator.parameters()
    expected = gauss_newton_product(
        lambda p: torch.func.functional_call(model, p, (inputs,)),
        lambda out: F.cross_entropy(out, targets),
        params,
        eye(operator),
    )
    assert_close(operator.to_dense(), expected)
    assert torch.linalg.eigvalsh(operator.to_dense()).min() > -1e-12


@pytest.mark.parametrize("training", [False, True])
def test_batch_normalisation_in_both_modes_and_untouched(training):
    model, inputs, targets = made(Normalised, batch=8)
    model.train(training)
    operator = HessianOperator(model, F.cross_entropy, [(inputs, targets)])
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    found = operator.to_dense()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert model.norm.track_running_stats
    assert_close(found, dense_hessian(model, inputs, targets))


def test_dropout_is_refused_or_frozen():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    inputs, targets = torch.randn(6, 5, dtype=torch.float64), torch.arange(6) % 3
    batches = [(inputs[:4], targets[:4]), (inputs[4:], targets[4:])]
    with pytest.raises(ValueError, match="2 is a dropout in training mode"):
        HessianOperator(model, F.cross_entropy, batches)
    operator = HessianOperator(model, F.cross_entropy, batches, dropout="frozen", chunk=7)
    state = torch.random.get_rng_state()
    dense = operator.to_dense()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert_close(dense, dense.T)
    assert_close(operator @ eye(operator)[:, 3], dense[:, 3])
    other = HessianOperator(model, F.cross_entropy, batches, dropout="frozen", seed=1)
    assert not torch.allclose(other.to_dense(), dense)


def test_augmentation_is_frozen():
    model, inputs, targets = made(Perceptron, batch=8)

    class Augmented:
        def __iter__(self):
            yield inputs + torch.randn_like(inputs), targets

    operator = HessianOperator(model, F.cross_entropy, Augmented())
    assert torch.equal(operator.to_dense(), operator.to_dense())


def test_scipy_finds_the_eigenvalues():
    model, inputs, targets, batches = ragged()
    operator = HessianOperator(model, F.cross_entropy, batches).to_scipy()
    values = scipy.sparse.linalg.eigsh(operator, 3, which="LM", return_eigenvectors=False)
    expected = torch.linalg.eigvalsh(dense_hessian(model, inputs, targets))
    expected = expected[expected.abs().argsort(descending=True)[:3]]
    np.testing.assert_allclose(np.sort(values), np.sort(expected.numpy()), rtol=1e-8)
    assert operator.matmat(np.ones((operator.shape[0], 2))).shape == (operator.shape[0], 2)


def test_float32_models_have_float32_products():
    model, inputs, targets, _ = ragged()
    operator = HessianOperator(model.float(), F.cross_entropy, [(inputs.float(), targets)])
    assert operator.dtype == torch.float32
    assert (operator @ torch.ones(operator.shape[0], dtype=torch.float64)).dtype == torch.float32


def test_memory_stays_flat():
    """Products leave nothing behind: no graph, no gradient of a parameter, no tensor."""
    import gc

    model, _, _, batches = ragged()
    operator = HessianOperator(model, F.cross_entropy, batches)
    vector = torch.randn(operator.shape[0], dtype=torch.float64)

    def tensors():
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    operator @ vector
    before = tensors()
    for _ in range(20):
        operator @ vector
    assert tensors() <= before
    assert all(parameter.grad is None for parameter in model.parameters())


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "data yields no batches", {"data": []}),
        (ValueError, "data yields no batches", {"data": iter(())}),
        (TypeError, r"data must yield pairs \(inputs, targets\); got Tensor", {"data": [torch.ones(2)]}),
        (ValueError, "'middle' names no parameter", {"params": ["first", "middle"]}),
        (ValueError, "params chooses no parameter", {"params": lambda name: False}),
        (ValueError, "curvature must be one of hessian, gauss_newton; got 'fisher'", {"curvature": "fisher"}),
        (ValueError, "dropout must be one of refuse, frozen; got 'on'", {"dropout": "on"}),
        (ValueError, r"loss_fn must return a scalar, the mean over the batch; got \(4,\)", {"loss_fn": "none"}),
    ],
)
def test_bad_arguments(error, message, change):
    model, _, _, batches = ragged()
    arguments = {"model": model, "loss_fn": F.cross_entropy, "data": batches} | change
    if arguments["loss_fn"] == "none":
        arguments["loss_fn"] = lambda out, y: F.cross_entropy(out, y, reduction="none")
    with pytest.raises(error, match=message):
        HessianOperator(**arguments)


def test_a_model_without_gradients():
    model, _, _, batches = ragged()
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        HessianOperator(model.requires_grad_(False), F.cross_entropy, batches)


def test_vectors_of_the_wrong_size():
    model, _, _, batches = ragged()
    operator = HessianOperator(model, F.cross_entropy, batches)
    with pytest.raises(ValueError, match="vectors must have the shape"):
        operator @ torch.ones(3, dtype=torch.float64)


def test_a_loss_that_is_not_finite_names_its_batch():
    model, _, _, batches = ragged()
    batches[1] = (batches[1][0] * torch.nan, batches[1][1])
    operator = HessianOperator(model, F.cross_entropy, batches)
    with pytest.raises(FloatingPointError, match="the loss of batch 1 is nan"):
        operator @ torch.ones(operator.shape[0], dtype=torch.float64)
    with pytest.raises(FloatingPointError, match="the loss of batch 0 is nan"):
        HessianOperator(model, F.cross_entropy, batches[1:])


def test_a_random_loss_is_refused():
    model, _, _, batches = ragged()
    with pytest.raises(ValueError, match="something in the model or the loss is random"):
        HessianOperator(model, lambda out, y: F.cross_entropy(out, y) * (1 + torch.rand(())), batches)


# ---- several processes -----------------------------------------------------------------------------------------------


def test_processes_share_the_batches(tmp_path):
    """Two processes of torchrun, by gloo over the loopback device, find what one finds."""
    model, _, _, batches = ragged()
    operator = HessianOperator(model, F.cross_entropy, batches, weight_decay=0.1)
    script = Path(__file__).with_name("in_two_processes.py")
    # Its processes meet at a port that another may take in the meantime: they are started anew then.
    options = ["--standalone", "--nproc-per-node=2", "--max-restarts=3"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(script), str(tmp_path)]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    options = {"capture_output": True, "text": True, "cwd": script.parents[1], "env": environment, "check": False}
    done = subprocess.run(command, **options)
    if "Gloo connectFullMesh failed" in done.stderr:  # gloo aborts now and then while its processes connect
        done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert_close(found["dense"], operator.to_dense())
        assert_close(found["gradient"], operator.gradient())
        assert found["loss"] == pytest.approx(operator.loss())


class Scaled(nn.Module):
    """With a buffer that enters through a value alone."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("scale", torch.randn(4))

    def forward(self, x):
        return self.linear(x.tanh()) * self.scale.exp()


def changed_buffer(operator):
    operator.model.scale = torch.randn(4, dtype=torch.float64)


def transposed_weight(operator):
    operator.model.linear.weight.data = operator.model.linear.weight.data.t()


def changed_data(operator):
    operator._batches[0][1][0].mul_(2)


def other_loss(operator):
    operator.loss_fn = lambda out, y: F.cross_entropy(out, y) ** 2


@pytest.mark.parametrize("change", [changed_buffer, transposed_weight, changed_data, other_loss])
def test_kept_values_of_a_function_that_has_changed_are_made_anew(change):
    torch.manual_seed(0)
    model, batch = Scaled().double(), (torch.randn(5, 4, dtype=torch.float64), torch.randint(4, (5,)))
    kept = HessianOperator(model, F.cross_entropy, [batch], keep_primals=True)
    vector = torch.randn(kept.shape[0], dtype=torch.float64)
    for _ in range(8):  # what is freed may come to lie where it lay before
        kept @ vector
        change(kept)
        expected = HessianOperator(model, kept.loss_fn, [batch]) @ vector
        assert_close(kept @ vector, expected)


def test_kept_values_know_autocast_and_inference_mode():
    torch.manual_seed(0)
    model, batch = Scaled(), (torch.randn(5, 4), torch.randint(4, (5,)))
    kept, plain = (HessianOperator(model, F.cross_entropy, [batch], keep_primals=keep) for keep in (True, False))
    vector = torch.randn(kept.shape[0])
    with torch.inference_mode():
        first = kept @ vector
    assert_close(first.clone(), plain @ vector)
    assert_close(kept @ vector, plain @ vector)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(kept @ vector, plain @ vector)


def test_the_size_of_a_chunk_costs_one_call_of_the_model():
    calls = []
    model = Scaled()
    model.register_forward_hook(lambda *_: calls.append(1))
    operator = HessianOperator(model, F.cross_entropy, [(torch.randn(5, 4), torch.randint(4, (5,)))])
    vectors, made = torch.randn(operator.shape[0], 3), len(calls)
    operator @ vectors
    assert len(calls) == made + 2
    operator @ vectors
    assert len(calls) == made + 3


@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_no_vectors_have_no_products(chunk):
    model, _, _, batches = ragged()
    operator = HessianOperator(model, F.cross_entropy, batches, chunk=chunk)
    assert (operator @ torch.zeros(operator.shape[0], 0, dtype=operator.dtype)).shape == (operator.shape[0], 0)


@pytest.mark.parametrize("chunk", [0, -1])
def test_chunks_have_vectors(chunk):
    model, _, _, batches = ragged()
    with pytest.raises(ValueError, match=f"chunk must be at least 1, or None; got {chunk}"):
        HessianOperator(model, F.cross_entropy, batches, chunk=chunk)
