"""Implementations in processes of their own, which take turns.

For whole models: how long a step takes depends on what the memory allocator of its process went through. One that keeps
what another implementation freed asks the system for no pages, and one whose heap was just given back does for all. A
process for each is how models are used.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Iterator
from multiprocessing.connection import Connection

import torch

from vitfast.bench import registry
from vitfast.bench.case import Case
from vitfast.bench.timing import CpuTimer

__all__ = ["FLOOR", "ProcessTimer", "Worker", "workers"]

FLOOR = "floor"  # the name of `Workload.floor` among the implementations while they are timed


class Worker:
    """An implementation of a case, from `registry.cases`, on the CPU, in a process of its own; called, it runs once."""

    def __init__(self, case: Case, name: str, dtype: torch.dtype):
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        arguments = (other, case.name, name, dtype, torch.get_num_threads())
        self._process = context.Process(target=_serve, args=arguments, name=f"{case.name} {name}", daemon=True)
        self._process.start()
        other.close()

    def wait(self) -> None:
        """Until it is ready to run."""
        try:
            self._connection.recv()
        except EOFError as error:
            self._process.join()
            raise RuntimeError(
                f"the process for {self._process.name} ended with exit status {self._process.exitcode} before it could "
                "run; what it printed says why"
            ) from error

    def __call__(self) -> None:
        self.sample(1)

    def sample(self, calls: int) -> float:
        """Seconds per call, the mean of ``calls`` calls."""
        self._connection.send(calls)
        return self._connection.recv()

    def stop(self) -> None:
        """Ends the process."""
        with contextlib.suppress(BrokenPipeError):
            self._connection.send(0)
        self._process.join()


class ProcessTimer:
    """Wall-clock time, measured in the process that runs."""

    def sample(self, run: Worker, calls: int) -> float:
        """Seconds per call, the mean of ``calls`` calls."""
        return run.sample(calls)


@contextlib.contextmanager
def workers(case: Case, names: list[str], dtype: torch.dtype) -> Iterator[dict[str, Worker]]:
    """A worker for each of the implementations, ready to run; they end with the block."""
    started = {name: Worker(case, name, dtype) for name in names}
    try:
        for worker in started.values():
            worker.wait()
        yield started
    finally:
        for worker in started.values():
            worker.stop()


def _serve(connection: Connection, case_name: str, name: str, dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    (case,) = (case for case in registry.cases(case_name) if case.name == case_name)
    workload = case.make(torch.device("cpu"), dtype)
    runs = {variant.name: variant.run for variant in workload.variants} | {FLOOR: workload.floor}
    run, timer = runs[name], CpuTimer()
    del workload, runs  # with the other models
    connection.send("ready")
    while calls := connection.recv():
        connection.send(timer.sample(run, calls))
