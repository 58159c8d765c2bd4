"""Comparing a module with the one it replaces."""

import torch


def output_and_gradients(module, x, *args, **kwargs):
    """By name: the output, and the gradients of a function of it."""
    x = x.detach().requires_grad_()
    out = module(x, *args, **kwargs)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    names, parameters = zip(*module.named_parameters(), strict=True)
    grads = torch.autograd.grad((out * weight).sum(), (x, *parameters))
    return {"output": out, **dict(zip(("x", *names), grads, strict=True))}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
