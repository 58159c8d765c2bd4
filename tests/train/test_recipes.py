import math

import pytest
import torch
from torch import nn

from vitfast.train.recipes import Recipe, cosine_schedule, make_optimizer, parameter_groups


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3)
        self.pos_embedding = nn.Parameter(torch.zeros(7, 7))
        self.relative_position_bias_table = nn.Parameter(torch.zeros(49, 2))
        self.frozen = nn.Parameter(torch.zeros(3, 3), requires_grad=False)


def test_norms_biases_and_position_tables_do_not_decay():
    model = nn.Sequential(Block(), nn.Linear(4, 2))
    names = {id(p): name for name, p in model.named_parameters()}
    decay, keep = parameter_groups(model, 0.1)
    assert {names[id(p)] for p in decay["params"]} == {"0.conv.weight", "1.weight"}
    assert {names[id(p)] for p in keep["params"]} == {
        "0.norm.weight",
        "0.norm.bias",
        "0.conv.bias",
        "0.pos_embedding",
        "0.relative_position_bias_table",
        "1.bias",
    }
    assert (decay["weight_decay"], keep["weight_decay"]) == (0.1, 0.0)


@pytest.mark.parametrize(("name", "expected"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_optimizers(name, expected):
    optimizer = make_optimizer(nn.Linear(2, 2), Recipe(epochs=1, optimizer=name, lr=0.1, weight_decay=0.3))
    assert type(optimizer) is expected
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert all(group["lr"] == 0.1 for group in optimizer.param_groups)


def test_an_unknown_optimizer_is_named():
    with pytest.raises(ValueError, match="'adam2'"):
        make_optimizer(nn.Linear(2, 2), Recipe(epochs=1, optimizer="adam2"))


def rates(steps, warmup_steps):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = cosine_schedule(optimizer, steps, warmup_steps)
    for _ in range(steps):
        yield optimizer.param_groups[0]["lr"]
        optimizer.step()
        schedule.step()


def test_cosine_schedule_by_hand():
    expected = [0.25, 0.5, 0.75, 1.0] + [0.5 * (1 + math.cos(math.pi * t / 8)) for t in range(8)]
    assert list(rates(12, 4)) == pytest.approx(expected)
    assert list(rates(3, 0)) == pytest.approx([1.0, 0.75, 0.25])
    assert list(rates(2, 2)) == pytest.approx([0.5, 1.0])
