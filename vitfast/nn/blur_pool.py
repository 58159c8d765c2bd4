"""Blur pooling: pooling that keeps to the sampling theorem, `vitfast.functional.blur_pool2d` as modules.

Source: Zhang, "Making Convolutional Networks Shift-Invariant Again", ICML 2019.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitfast import functional
from vitfast.nn._checks import is_integer, non_negative_integer, positive_integer

Padding = int | tuple[int, int] | tuple[int, int, int, int] | str | None


class BlurPool2d(nn.Module):
    """A fixed low-pass filter and subsampling, (B, C, H, W) -> (B, C, H', W').

    The arguments, defaults and results of timm's `BlurPool2d`. Elsewhere: kornia's `BlurPool2D(k, stride)` is
    ``BlurPool2d(filt_size=k, stride=stride, pad_mode="zeros", padding="same")``, and `BlurPool(filt_size=k)` of
    antialiased-cnns is ``BlurPool2d(filt_size=k, padding="same")``.

    Args:
        channels: if given, inputs must have so many.
        filt_size: taps of the filter, 1 to 7.
        stride: one integer or (rows, columns).
        pad_mode: "reflect", "replicate", "circular", or "zeros", which "constant" stands for as well; "none" for no
            padding at all.
        kernel: "pascal", binomial coefficients; "box", the mean; or taps of your own, a sequence of numbers or a tensor
            of shape (K,) or (K, L). All but a tensor are normalised to sum to 1; of them, ``filt_size`` is the length.
        padding: as in `vitfast.functional.blur_pool2d`; "same" for ceil(H / stride) rows and ceil(W / stride) columns;
            None for timm's (stride + filt_size - 2) // 2 on every side.

    The kernel is a buffer that the state dict does not hold: it is no parameter, and is not trained.

    >>> BlurPool2d(64)(torch.randn(2, 64, 56, 56)).shape
    torch.Size([2, 64, 28, 28])
    """

    kernel: Tensor

    def __init__(
        self,
        channels: int | None = None,
        filt_size: int = 3,
        stride: int | tuple[int, int] = 2,
        pad_mode: str = "reflect",
        *,
        kernel: str | Sequence[float] | Tensor = "pascal",
        padding: Padding = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.channels = None if channels is None else positive_integer("channels", channels)
        self.stride = functional.integer_pair("stride", stride)
        self.pad_mode = "zeros" if pad_mode == "constant" else pad_mode
        self.register_buffer("kernel", _kernel(kernel, filt_size).to(device, dtype), persistent=False)
        self.padding = self._padding(padding)

    def _padding(self, padding: Padding) -> int | tuple[int, ...] | None:
        """What `blur_pool2d` takes; its None is "same" here."""
        if self.pad_mode == "none" and padding is None:
            return 0
        if padding is None:
            rows, columns = ((s + k - 2) // 2 for s, k in zip(self.stride, self.kernel.shape, strict=True))
            return (columns, columns, rows, rows)
        if isinstance(padding, str):
            if padding != "same":
                raise ValueError(f"padding must be 'same', numbers or None; got {padding!r}")
            return None
        return padding

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        return functional.blur_pool2d(x, **self.blur_options())

    def blur_options(self) -> dict:
        """The arguments of `vitfast.functional.blur_pool2d` beside x."""
        options = {"stride": self.stride, "padding": self.padding, "padding_mode": self.pad_mode}
        return {"kernel": self.kernel, **options}

    def _check(self, x: Tensor) -> None:
        if self.channels is not None and isinstance(x, Tensor) and x.dim() == 4 and x.shape[1] != self.channels:
            raise ValueError(f"x must have {self.channels} channels, (B, {self.channels}, H, W); got {tuple(x.shape)}")

    def extra_repr(self) -> str:
        taps = "x".join(str(taps) for taps in self.kernel.shape)
        return f"{taps} taps, stride={self.stride}, pad_mode={self.pad_mode!r}, padding={self.padding}"


class MaxBlurPool2d(BlurPool2d):
    """Max pooling of stride 1 and a blur with the stride: anti-aliased max pooling, (B, C, H, W) -> (B, C, H', W').

    kornia's `MaxBlurPool2D(k, stride, pool_size)` is ``MaxBlurPool2d(pool_size, pool_padding=0, filt_size=k,
    stride=stride, pad_mode="zeros", padding="same")``.

    Args:
        pool_size: pixels of the maximum, one integer.
        pool_padding: of the maximum, with minus infinity; as `torch.nn.MaxPool2d`.
        options: those of `BlurPool2d`, by keyword.

    >>> MaxBlurPool2d(3, pool_padding=1)(torch.randn(2, 64, 112, 112)).shape
    torch.Size([2, 64, 56, 56])
    """

    def __init__(self, pool_size: int = 2, *, pool_padding: int = 0, **options):
        super().__init__(**options)
        self.pool_size = positive_integer("pool_size", pool_size)
        self.pool_padding = non_negative_integer("pool_padding", pool_padding)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        return super().forward(F.max_pool2d(x, self.pool_size, stride=1, padding=self.pool_padding))

    def extra_repr(self) -> str:
        return f"pool_size={self.pool_size}, pool_padding={self.pool_padding}, {super().extra_repr()}"


def _kernel(kernel: str | Sequence[float] | Tensor, filt_size: int) -> Tensor:
    """(K, L)."""
    if isinstance(kernel, Tensor):
        taps = kernel.detach()
        return torch.outer(taps, taps) if taps.dim() == 1 else taps.clone()
    if not isinstance(kernel, str):
        taps = torch.tensor([float(tap) for tap in kernel])
        if taps.sum() == 0:
            raise ValueError(f"the taps of kernel must not sum to 0, for they are divided by it; got {list(kernel)}")
    else:
        if not is_integer(filt_size) or not 1 <= filt_size <= 7:
            raise ValueError(f"filt_size must be an integer from 1 to 7; got {filt_size!r}")
        if kernel == "pascal":
            taps = torch.tensor([float(math.comb(filt_size - 1, i)) for i in range(filt_size)])
        elif kernel == "box":
            taps = torch.ones(filt_size)
        else:
            raise ValueError(f"kernel must be 'pascal', 'box' or taps; got {kernel!r}")
    return torch.outer(taps, taps) / taps.sum() ** 2
