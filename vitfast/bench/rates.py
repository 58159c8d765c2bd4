"""What this machine can do: its rates at a matrix product and at a copy, as PyTorch reaches them.

They are sampled before the first and after every case, so that they meet the same machine as the cases. The best of
all samples counts: a share of it is never flattered by a slow moment.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from vitfast.bench.timing import make_timer

__all__ = ["Rates", "large_copy"]

_PRODUCT_SIDE = {"cpu": 1536, "cuda": 8192}
_COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}
_CALLS = 3


def large_copy(device: torch.device) -> tuple[Callable[[], object], int]:
    """A copy far larger than the caches, and how many bytes it reads and writes."""
    size = _COPY_BYTES[device.type]
    source = torch.ones(size // 4, device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source), 2 * size


class Rates:
    """The best rates seen: ``gemm_gflops`` of each dtype and ``copy_gbs``."""

    def __init__(self, device: torch.device, dtypes: list[torch.dtype]):
        self._timer = make_timer(device)
        self._device, self._dtypes = device, dtypes
        self.gemm_gflops = dict.fromkeys(dtypes, 0.0)
        self.copy_gbs = 0.0
        self.samples = 0

    def sample(self) -> None:
        """Measures both rates: square products of 2 n^3 operations, and a copy that reads and writes its bytes."""
        side = _PRODUCT_SIDE[self._device.type]
        for dtype in self._dtypes:
            a, b = (torch.randn(side, side, device=self._device, dtype=dtype) for _ in range(2))
            out = torch.empty_like(a)
            seconds = self._best(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))
            self.gemm_gflops[dtype] = max(self.gemm_gflops[dtype], 2 * side**3 / seconds / 1e9)
        copy, moved = large_copy(self._device)
        self.copy_gbs = max(self.copy_gbs, moved / self._best(copy) / 1e9)
        self.samples += 1

    def _best(self, run) -> float:
        run()
        return min(self._timer.sample(run, 1) for _ in range(_CALLS))
