"""Time of a call, on the CPU and on NVIDIA GPUs, in rounds that interleave what is compared.

A sample is the mean of as many calls as fill `MIN_SAMPLE_SECONDS`. Machines drift, so implementations are never
measured one after the other: each round takes one sample of each, and the one that begins changes with every round.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import torch

__all__ = [
    "MIN_SAMPLE_SECONDS",
    "WARM_UP_CALLS",
    "CpuTimer",
    "CudaTimer",
    "Timer",
    "interleave",
    "make_timer",
    "quantile",
]

MIN_SAMPLE_SECONDS = 20e-3
WARM_UP_CALLS = 2

_FLUSH_BYTES = 2**30
_FLUSHES = 4


class Timer(Protocol):
    """Measures a function."""

    def sample(self, run: Callable[[], object], calls: int) -> float:
        """Seconds per call of ``calls`` calls."""


class CpuTimer:
    """Wall-clock time."""

    def sample(self, run: Callable[[], object], calls: int) -> float:
        """Seconds per call, the mean of ``calls`` calls."""
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls


class CudaTimer:
    """Time on the device between two events, with a cold cache.

    Before each call a gigabyte is overwritten, several times: no input is left in the L2 cache, and while the device is
    busy with that (1.2 ms on an H200), Python queues the call's kernels, so short work is not measured as the time to
    launch it.
    """

    def __init__(self, device: torch.device):
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)

    def sample(self, run: Callable[[], object], calls: int) -> float:
        """Seconds per call, the median of ``calls`` calls."""
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
        for start, end in events:
            for _ in range(_FLUSHES):
                self._flush.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize(self._flush.device)
        return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


def make_timer(device: torch.device) -> Timer:
    """The timer for a device."""
    return CudaTimer(device) if device.type == "cuda" else CpuTimer()


def interleave(runs: Mapping[str, Callable[[], object]], timer: Timer, rounds: int) -> dict[str, list[float]]:
    """``rounds`` samples of each, in seconds per call, after a warm-up that is not counted."""
    calls = {}
    for name, run in runs.items():
        for _ in range(WARM_UP_CALLS):
            run()
        calls[name] = math.ceil(max(1.0, MIN_SAMPLE_SECONDS / timer.sample(run, 1)))
    names, seconds = list(runs), {name: [] for name in runs}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(timer.sample(runs[name], calls[name]))
    return seconds


def quantile(values: list[float], q: float) -> float:
    """The q-quantile by linear interpolation between neighbours."""
    position = q * (len(values) - 1)
    below, ordered = int(position), sorted(values)
    above = min(below + 1, len(values) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])
