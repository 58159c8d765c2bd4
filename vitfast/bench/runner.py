"""Measures cases and makes the report.

A report is a dictionary of basic types, ready for JSON:

- ``machine``, ``versions``, ``command``, ``settings``: where and how it was measured;
- ``rates``: what the machine can do, see `vitfast.bench.rates`;
- ``records``: one per case, dtype and implementation, see `RECORD_KEYS`;
- ``summary``: per family, pass and dtype, from the records of vitfast;
- ``skipped``: peers that could not run, with the type of the error, and cases that cannot be measured here, with the
  reason, under the name of vitfast.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vitfast.bench import environment, memory, timing
from vitfast.bench.case import OURS, Case, Unavailable, Variant, Workload
from vitfast.bench.processes import FLOOR, ProcessTimer, workers
from vitfast.bench.rates import Rates, large_copy
from vitfast.bench.timing import quantile

__all__ = [
    "DEFAULT_ROUNDS",
    "RECORD_KEYS",
    "dtype_name",
    "dtype_of",
    "error_limit",
    "make_records",
    "relative_error",
    "run",
    "summarize",
]

DEFAULT_ROUNDS = 15

COPY = "copy"
"""Among the samples, those of large copies."""

RECORD_KEYS = {
    "case": "operator/shape/pass",
    "family": "the group of the summary",
    "pass": "forward, or forward_backward with all gradients; of models inference or training",
    "dtype": "of the inputs and results",
    "device": "cpu or cuda",
    "impl": "vitfast, or the name of a peer",
    "median_s": "seconds per call, the median of all samples",
    "p20_s": "their 20 % quantile",
    "p80_s": "their 80 % quantile",
    "samples": "how many samples",
    "error": "largest |x - x64| / max |x64| of any result against float64",
    "match": "whether the error is at most twice that of the plain PyTorch path plus one rounding of the dtype",
    "ratio": "median of the fastest matching peer over the median of this implementation; None without such a peer",
    "fastest_peer": "which peer that is",
    "attention_share": "of the original model's time, see vitfast.bench.models; None for operators",
    "ratio_limit": "the ratio that attention in no time would give the model; None for operators",
    "flops": "counted operations; the operator's file in vitfast/bench says which",
    "bytes": "inputs and results, once per pass",
    "gflops": "flops over median_s",
    "gbs": "bytes over median_s",
    "share_of_gemm": "gflops over the rate of a large matrix product of the same dtype in this run",
    "share_of_copy": "gbs over the best rate of a large copy in this run",
    "share_of_copy_then": "gbs over the median rate of large copies that were timed in turn with it; None without them",
    "memory_bytes": "the most memory held beyond inputs and results",
    "memory_share": "of the intermediates that an unfused implementation writes; for models, of the original's memory",
    "details": "shapes",
}


def run(
    cases: list[Case],
    device: torch.device,
    dtypes: list[torch.dtype],
    *,
    rounds: int = DEFAULT_ROUNDS,
    compiled: bool = True,
    command: str = "",
    announce: Callable[[str], None] = lambda line: None,
    until: float = math.inf,
) -> dict:
    """Measures all cases in all dtypes; returns the report.

    Args:
        rounds: samples of each implementation.
        compiled: whether to measure the peers under torch.compile too.
        command: what the user typed, for the report.
        announce: called with a line of text when a case is done.
        until: no case begins after that time of `time.monotonic`; the report lists those that were left out.
    """
    rates = Rates(device, dtypes)
    rates.sample()
    records, skipped = [], []
    jobs = [(case, dtype) for dtype in dtypes for case in cases]
    for number, (case, dtype) in enumerate(jobs, 1):
        if time.monotonic() > until:
            reason = "the time for the benchmark was over"
            left = jobs[number - 1 :]
            skipped += [_identity(one, device, kind) | {"impl": OURS, "reason": reason} for one, kind in left]
            announce(f"{len(left)} cases were not measured: {reason}")
            break
        try:
            measured = _measure(case, device, dtype, rounds, compiled)
        except Unavailable as error:
            skipped.append(_identity(case, device, dtype) | {"impl": OURS, "reason": str(error)})
            announce(f"[{number}/{len(jobs)}] {case.name} {dtype_name(dtype)}: not measured, {error}")
            continue
        rates.sample()
        records += measured.records
        skipped += measured.skipped
        announce(f"[{number}/{len(jobs)}] {_headline(measured.records[0])}")
    for record in records:
        record["share_of_gemm"] = record["gflops"] / rates.gemm_gflops[dtype_of(record["dtype"])]
        record["share_of_copy"] = record["gbs"] / rates.copy_gbs
    return {
        "machine": environment.machine(device),
        "versions": environment.versions(),
        "command": command,
        "settings": {
            "device": device.type,
            "dtypes": [dtype_name(dtype) for dtype in dtypes],
            "rounds": rounds,
            "warm_up_calls": timing.WARM_UP_CALLS,
            "min_sample_s": timing.MIN_SAMPLE_SECONDS,
            "compiled_peers": compiled,
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
        },
        "rates": {
            "gemm_gflops": {dtype_name(dtype): rate for dtype, rate in rates.gemm_gflops.items()},
            "copy_gbs": rates.copy_gbs,
            "samples": rates.samples,
        },
        "records": records,
        "summary": summarize(records),
        "skipped": skipped,
    }


def summarize(records: list[dict]) -> dict[str, dict]:
    """What the records of vitfast say together, for each "family/pass/dtype"."""
    groups: dict[str, list[dict]] = {}
    for record in records:
        if record["impl"] == OURS and record["ratio"] is not None:
            groups.setdefault(f"{record['family']}/{record['pass']}/{record['dtype']}", []).append(record)
    return {name: _summary(group) for name, group in groups.items()}


def _summary(records: list[dict]) -> dict:
    ratios = [record["ratio"] for record in records]
    return {
        "cases": len(records),
        "geomean_ratio": math.exp(sum(map(math.log, ratios)) / len(ratios)),
        "min_ratio": min(ratios),
        "min_share_of_gemm": min(record["share_of_gemm"] for record in records),
        "max_share_of_gemm": max(record["share_of_gemm"] for record in records),
        "max_memory_share": max(record["memory_share"] for record in records),
        "all_match": all(record["match"] for record in records),
        "slower": [record["case"] for record in records if record["ratio"] < 1],
    }


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` -> ``"float32"``."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """The inverse of `dtype_name`."""
    return getattr(torch, name)


@dataclass(frozen=True)
class _Measured:
    """Records of one case, that of vitfast first, and the peers that could not run."""

    records: list[dict]
    skipped: list[dict]


def _measure(case: Case, device: torch.device, dtype: torch.dtype, rounds: int, compiled: bool) -> _Measured:
    torch.compiler.reset()  # every case compiles the same functions; too many versions of one would not be compiled
    workload = case.make(device, dtype)
    variants, errors, skipped = _run_once(workload, compiled)
    extra = {variant.name: memory.extra_bytes(variant.run, device) for variant in variants}
    runs = {variant.name: variant.run for variant in variants}
    if workload.floor is not None:
        runs[FLOOR] = workload.floor
    copied = None
    if workload.beside_copies:  # last: of the implementations, it is ours that meets the caches after a copy
        assert not case.apart, "copies are timed in this process"
        runs[COPY], copied = large_copy(device)
    if case.apart and device.type == "cpu":
        with workers(case, list(runs), dtype) as runs:
            seconds = timing.interleave(runs, ProcessTimer(), rounds)
    else:
        seconds = timing.interleave(runs, timing.make_timer(device), rounds)
    identity = _identity(case, device, dtype)
    limit = error_limit(errors[workload.plain], dtype)
    return _Measured(
        make_records(identity, workload, seconds, errors, limit, extra, copied),
        [identity | {"impl": name, "reason": reason} for name, reason in skipped.items()],
    )


def _identity(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """What records of a case begin with."""
    return {
        "case": case.name,
        "family": case.family,
        "pass": case.phase,
        "dtype": dtype_name(dtype),
        "device": device.type,
    }


def _run_once(workload: Workload, compiled: bool) -> tuple[list[Variant], dict[str, float], dict[str, str]]:
    """The variants that run, their errors, and why the others do not. Ours must run."""
    expected = workload.expected()
    variants, errors, skipped = [], {}, {}
    for variant in workload.variants:
        if variant.compiled and not compiled:
            continue
        try:
            results = variant.run()
        except Exception as error:
            if variant.name in (OURS, workload.plain):
                raise
            skipped[variant.name] = type(error).__name__  # not its message, which may hold paths
            continue
        variants.append(variant)
        errors[variant.name] = relative_error(results, expected)
    return variants, errors, skipped


def relative_error(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The largest |x - x64| / max |x64| of any result; NaN if there is one.

    A result that is zero but for the rounding of float64, such as the gradient of a key's bias, to which softmax is
    blind, is measured against the largest of the results.
    """
    sizes = torch.stack([exact.abs().max() for exact in expected])
    sizes = torch.where(sizes > 1e-12 * sizes.max(), sizes, sizes.max())
    errors = [(result.double() - exact).abs().max() for result, exact in zip(results, expected, strict=True)]
    return float((torch.stack(errors) / sizes).max())


def error_limit(plain_error: float, dtype: torch.dtype) -> float:
    """The largest error of a right result: twice that of the plain PyTorch path plus one rounding of the dtype."""
    return 2 * plain_error + torch.finfo(dtype).eps


def make_records(
    identity: dict,
    workload: Workload,
    seconds: dict[str, list[float]],
    errors: dict[str, float],
    limit: float,
    extra_bytes: dict[str, int],
    copied: int | None = None,
) -> list[dict]:
    """One record per implementation, without the shares of the machine's best rates, which are known at the end."""
    medians = {name: quantile(samples, 0.5) for name, samples in seconds.items()}
    floor = medians.pop(FLOOR, None)
    copy_rate = None if copied is None else copied / medians.pop(COPY)
    matches = {name: errors[name] <= limit for name in medians}
    peers = [name for name in medians if name != OURS and matches[name]]
    fastest = min(peers, key=medians.__getitem__, default=None)
    whole = workload.intermediate_bytes
    if whole is None:
        whole = extra_bytes[workload.plain]
    return [
        identity
        | {
            "impl": name,
            "median_s": median,
            "p20_s": quantile(seconds[name], 0.2),
            "p80_s": quantile(seconds[name], 0.8),
            "samples": len(seconds[name]),
            "error": errors[name],
            "match": matches[name],
            "ratio": None if fastest is None else medians[fastest] / median,
            "fastest_peer": fastest,
            "attention_share": None if floor is None else 1 - floor / medians[workload.plain],
            "ratio_limit": None if floor is None else medians[workload.plain] / floor,
            "flops": workload.flops,
            "bytes": workload.bytes,
            "gflops": workload.flops / median / 1e9,
            "gbs": workload.bytes / median / 1e9,
            "share_of_copy_then": None if copy_rate is None else workload.bytes / median / copy_rate,
            "memory_bytes": extra_bytes[name],
            "memory_share": extra_bytes[name] / whole,
            "details": workload.details,
        }
        for name, median in medians.items()
    ]


def _headline(record: dict) -> str:
    text = f"{record['case']} {record['dtype']}: {record['median_s'] * 1e3:.3g} ms"
    if record["ratio"] is None:
        return f"{text}, no peer to compare with"
    text = f"{text}, {record['ratio']:.2f}x as fast as {record['fastest_peer']}"
    return text if record["ratio_limit"] is None else f"{text}, limit {record['ratio_limit']:.2f}x"
