"""The memory a call needs beyond its inputs and its results."""

from __future__ import annotations

import json
import os
import tempfile
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from vitfast.bench.case import Run
from vitfast.ops import _extension

__all__ = ["extra_bytes"]


def extra_bytes(run: Run, device: torch.device) -> int:
    """The most memory held at one time during ``run()``, less that of the results.

    Counted is what comes from PyTorch's allocator, whoever asks for it, and on the CPU the scratch memory of vitfast's
    kernels, which they allocate themselves.
    """
    peak, results = _cuda_peak(run, device) if device.type == "cuda" else _cpu_peak(run)
    return peak - sum(tensor.nbytes for tensor in results)


def _cuda_peak(run: Run, device: torch.device) -> tuple[int, tuple[Tensor, ...]]:
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    results = run()
    return torch.cuda.max_memory_allocated(device) - before, results


def _cpu_peak(run: Run) -> tuple[int, tuple[Tensor, ...]]:
    """PyTorch keeps no peak for the CPU, but the profiler's trace has each allocation, and each release as negative.

    It also has each call of vitfast's operators, during which there is scratch memory.
    """
    extension = _extension.require()
    extension.reset_scratch_bytes()
    kept = extension.keep_result_bytes(0)  # results come from PyTorch's allocator then
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler reports on itself, on standard error
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            results = run()
    finally:
        extension.keep_result_bytes(kept)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"]
    scratch = extension.scratch_bytes()  # the largest of any call, counted for all
    for event in events:
        if event["name"].startswith("vitfast::"):
            changes += [(event["ts"], scratch), (event["ts"] + event["dur"], -scratch)]
    held = accumulate(change for _, change in sorted(changes))
    return max(held, default=0), results
