"""Compiles the peers of many cases at a time, before anything is measured.

One after the other they would take most of a benchmark run. Each process compiles one case; all that it shares with the
process that measures is torch.compile's cache on disk.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch

from vitfast.bench import registry
from vitfast.bench.case import Case

__all__ = ["precompile"]

_MOST_PROCESSES = 8


def precompile(
    cases: list[Case], device: torch.device, dtypes: list[torch.dtype], announce: Callable[[str], None]
) -> None:
    """Fills the cache for these cases, which must be from `registry.cases`. Starts processes, by spawning."""
    compiling = [case for case in cases if case.compiles]
    jobs = [(case.name, device, dtype, torch.get_num_threads()) for dtype in dtypes for case in compiling]
    processes = min(len(jobs), os.cpu_count() or 1, _MOST_PROCESSES)
    if processes <= 1:
        return
    announce(f"compiling the torch.compile peers of {len(jobs)} cases, {processes} at a time (not counted)")
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(_compile, *job) for job in jobs]
        for done, future in enumerate(as_completed(futures), 1):
            future.result()
            announce(f"compiled {done} of {len(jobs)}")


def _compile(name: str, device: torch.device, dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)  # the generated code has the number in it
    torch.compiler.reset()
    (case,) = (case for case in registry.cases(name) if case.name == name)
    for variant in case.make(device, dtype).variants:
        if variant.compiled:
            with contextlib.suppress(Exception):  # it fails once more, and is reported, where it is measured
                variant.run()
