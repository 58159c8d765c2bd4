"""Small models, losses and data, and their Hessians in full."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import vitfast

IMAGES = {"num_classes": 3, "in_channels": 1}


class Perceptron(nn.Module):
    """With a layer normalisation and a GELU, whose forward-mode formulas PyTorch cannot differentiate in reverse."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(F.gelu(self.norm(self.first(x))))


class Normalised(nn.Module):
    """With a batch normalisation."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.norm(self.first(x)).tanh())


def vit():
    return vitfast.create_model(
        "vit_ti", image_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=2, mlp_ratio=2, **IMAGES
    )


def swin():
    return vitfast.create_model(
        "swin_t", image_size=16, patch_size=2, embed_dim=4, depths=(2,), num_heads=(2,), window_size=4, **IMAGES
    )


def alternet():
    return vitfast.create_model("alternet_18", width=2, window_size=4, stem=False, **IMAGES)


def resnet(stem=False):
    return vitfast.create_model("resnet_dnn_smoothing_18", width=2, stem=stem, **IMAGES)


def made(build, batch=4, side=None, seed=0):
    """A model in float64 and evaluation mode, whose parameters all matter, and a batch."""
    torch.manual_seed(seed)
    model = build().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    shape = (5,) if side is None else (1, side, side)
    return model, torch.randn(batch, *shape, dtype=torch.float64), torch.randint(3, (batch,))


def ragged(batch=10):
    """A model and its data: all at once, and in batches of 4, 4 and 2."""
    model, inputs, targets = made(Perceptron, batch=batch)
    return model, inputs, targets, list(zip(inputs.split(4), targets.split(4), strict=True))


def loss_of(model, inputs, targets):
    """The loss as a function of a dictionary of parameters, and these."""
    params = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return lambda p: F.cross_entropy(functional_call(model, p, (inputs,)), targets), params


def dense_hessian(model, inputs, targets):
    """By two passes in reverse for every row, with PyTorch's own operations."""
    with vitfast.backend("reference"):
        parameters = [p for p in model.parameters() if p.requires_grad]
        loss = F.cross_entropy(model(inputs), targets)
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=True)])
        rows = []
        for value in gradient:
            row = torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True)
            rows.append(torch.cat([r.flatten() for r in row]))
    return torch.stack(rows)
