import json
import math
import platform
from dataclasses import replace

import pytest
import torch

from vitfast import bench
from vitfast.bench import memory, runner, table
from vitfast.bench.case import FORWARD, FORWARD_BACKWARD, OURS, Case, Variant, Workload
from vitfast.bench.rates import Rates
from vitfast.bench.timing import MIN_SAMPLE_SECONDS, CpuTimer, interleave, quantile
from vitfast.bench.window_attention import Layer, make_workload

CPU = torch.device("cpu")


class LoggingTimer:
    """Pretends that every call takes as long as ``durations`` says, and logs who was measured."""

    def __init__(self, durations):
        self.durations, self.log = durations, []

    def sample(self, run, calls):
        self.log.append((run(), calls))
        return self.durations[run()]


def rates(gemm=100.0, copy=10.0):
    """Rates that are given instead of measured."""

    class Fixed(Rates):
        def __init__(self, device, dtypes):
            self.gemm_gflops, self.copy_gbs, self.samples = dict.fromkeys(dtypes, gemm), copy, 0

        def sample(self):
            self.samples += 1

    return Fixed


def tiny_case(phase=FORWARD, extra_variants=()):
    """A real operator at a size that takes no time, with peers of the test's own."""
    layer = Layer(size=4, heads=1, dim=8, window=4, shift=2, batch=1, packed=True)

    def make(device, dtype):
        workload = make_workload(layer, phase, device, dtype)
        eager = tuple(variant for variant in workload.variants if not variant.compiled)
        return Workload(**{**vars(workload), "variants": eager + tuple(extra_variants)})

    return Case("window_attention", "tiny", phase, "tiny", (), make)


@pytest.fixture
def report(monkeypatch):
    monkeypatch.setattr(runner, "Rates", rates())
    cases = [tiny_case(FORWARD), tiny_case(FORWARD_BACKWARD)]
    return bench.run(cases, CPU, [torch.float32], rounds=2, command="vitfast bench tiny")


# ---- timing ----------------------------------------------------------------------------------------------------------


def test_rounds_are_interleaved_and_begin_with_each_in_turn():
    timer = LoggingTimer({"a": 1.0, "b": 1.0, "c": 1.0})
    runs = {name: (lambda name=name: name) for name in "abc"}
    seconds = interleave(runs, timer, rounds=4)
    order = "".join(name for name, _ in timer.log[len(runs) :])  # the first ones choose the number of calls
    assert order == "abc" + "bca" + "cab" + "abc"
    assert {name: len(samples) for name, samples in seconds.items()} == {"a": 4, "b": 4, "c": 4}


def test_short_calls_are_repeated_until_a_sample_is_long_enough():
    timer = LoggingTimer({"short": MIN_SAMPLE_SECONDS / 20, "long": 1.0})
    interleave({name: (lambda name=name: name) for name in ("short", "long")}, timer, rounds=1)
    assert timer.log[2:] == [("short", 20), ("long", 1)]


def test_cpu_timer_calls_as_often_as_it_is_told():
    calls = []
    assert CpuTimer().sample(lambda: calls.append(None), 7) > 0
    assert len(calls) == 7


def test_quantiles():
    values = [5.0, 1.0, 2.0, 4.0, 3.0]
    assert [quantile(values, q) for q in (0.0, 0.2, 0.5, 0.8, 1.0)] == pytest.approx([1.0, 1.8, 3.0, 4.2, 5.0])
    assert quantile([7.0], 0.8) == 7.0


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_memory_counts_what_is_held_at_one_time_beyond_the_results():
    def run():
        first = torch.empty(1000, dtype=torch.uint8)
        del first
        second = torch.empty(3000, dtype=torch.uint8)
        del second
        return (torch.empty(500, dtype=torch.uint8),)

    assert memory.extra_bytes(run, CPU) == 2500  # the result needs less than was free again by then


def test_the_fused_kernel_never_holds_the_scores():
    workload = make_workload(
        Layer(size=56, heads=4, dim=32, window=7, shift=3, batch=4, packed=True), FORWARD, CPU, torch.float32
    )
    fused, plain = (
        memory.extra_bytes(variant.run, CPU) for variant in workload.variants if variant.name in (OURS, workload.plain)
    )
    assert 0 < fused < 0.01 * workload.intermediate_bytes < workload.intermediate_bytes < plain


# ---- records ---------------------------------------------------------------------------------------------------------


def test_copies_are_timed_in_turn_where_a_case_asks_for_them():
    workload = replace(tiny_case().make(CPU, torch.float32), beside_copies=True)
    seconds = {OURS: [2.0, 4.0, 3.0], "math": [1.0] * 3, runner.COPY: [0.5, 8.0, 0.25]}
    records = runner.make_records(
        {}, workload, seconds, dict.fromkeys(seconds, 0.0), 1.0, dict.fromkeys(seconds, 0), 100
    )
    assert [record["impl"] for record in records] == [OURS, "math"]
    assert [record["share_of_copy_then"] for record in records] == pytest.approx(
        [workload.bytes / 3.0 / 200, workload.bytes / 200]
    )


def test_records_have_all_keys_and_the_report_survives_json(report):
    assert set(report) == {
        "machine",
        "versions",
        "command",
        "settings",
        "rates",
        "records",
        "summary",
        "skipped",
    }
    assert json.loads(json.dumps(report)) == report
    assert {frozenset(record) for record in report["records"]} == {frozenset(runner.RECORD_KEYS)}
    assert [(r["case"], r["impl"]) for r in report["records"]] == [
        (f"window_attention/tiny/{phase}", impl)
        for phase in (FORWARD, FORWARD_BACKWARD)
        for impl in (OURS, "sdpa", "math")
    ]
    for record in report["records"]:
        assert record["match"]
        assert record["samples"] == 2
        assert record["p20_s"] <= record["median_s"] <= record["p80_s"]
        assert record["share_of_gemm"] == pytest.approx(record["gflops"] / 100)
        assert record["share_of_copy"] == pytest.approx(record["gbs"] / 10)
        assert record["share_of_copy_then"] is None
    assert report["rates"]["samples"] == 3  # before, between and after
    assert report["command"] == "vitfast bench tiny"


def test_ratio_is_the_fastest_peers_time_over_ones_own(report):
    for phase in (FORWARD, FORWARD_BACKWARD):
        records = {record["impl"]: record for record in report["records"] if record["pass"] == phase}
        fastest = min(("sdpa", "math"), key=lambda impl: records[impl]["median_s"])
        assert {record["fastest_peer"] for record in records.values()} == {fastest}
        assert records[fastest]["ratio"] == 1
        for record in records.values():
            assert record["ratio"] == pytest.approx(records[fastest]["median_s"] / record["median_s"])


def test_a_peer_with_a_wrong_result_is_not_compared_with():
    workload = tiny_case().make(CPU, torch.float32)
    seconds = {OURS: [2.0], "sdpa": [6.0], "math": [4.0], "wrong": [1.0], "nan": [1.0]}
    errors = {OURS: 1e-7, "sdpa": 1e-7, "math": 1e-7, "wrong": 1e-2, "nan": math.nan}
    limit = runner.error_limit(errors["math"], torch.float32)
    records = runner.make_records({}, workload, seconds, errors, limit, dict.fromkeys(seconds, 0))
    assert {record["impl"]: record["match"] for record in records} == {
        OURS: True,
        "sdpa": True,
        "math": True,
        "wrong": False,
        "nan": False,
    }
    assert records[0]["fastest_peer"] == "math"
    assert records[0]["ratio"] == 2


def test_a_peer_that_fails_is_skipped_and_named(monkeypatch):
    def fail():
        raise RuntimeError("in /some/path")

    monkeypatch.setattr(runner, "Rates", rates())
    report = bench.run([tiny_case(extra_variants=[Variant("broken", fail)])], CPU, [torch.float32], rounds=1)
    assert [record["impl"] for record in report["records"]] == [OURS, "sdpa", "math"]
    (skipped,) = report["skipped"]
    assert (skipped["case"], skipped["impl"]) == ("window_attention/tiny/forward", "broken")
    assert skipped["reason"] == "RuntimeError"
    assert "not measured: broken of window_attention/tiny/forward float32 (RuntimeError)" in table.format_report(report)


def test_no_case_begins_when_the_time_is_over(monkeypatch):
    monkeypatch.setattr(runner, "Rates", rates())
    report = bench.run([tiny_case(), tiny_case()], CPU, [torch.float32], rounds=1, until=0.0)
    assert report["records"] == []
    assert [skipped["reason"] for skipped in report["skipped"]] == ["the time for the benchmark was over"] * 2
    assert "the time for the benchmark was over" in table.format_report(report)


def test_the_error_of_an_implementation_is_the_worst_of_its_results():
    exact = (torch.tensor([1.0, -4.0]).double(), torch.tensor([2.0]).double())
    assert runner.relative_error((torch.tensor([1.0, -3.0]), torch.tensor([2.1])), exact) == pytest.approx(0.25)
    assert math.isnan(runner.relative_error((torch.tensor([1.0, math.nan]), torch.tensor([2.0])), exact))


def test_summary_and_what_is_slower():
    def record(case, ratio, impl=OURS):
        return {
            "case": case,
            "family": "f",
            "pass": FORWARD,
            "dtype": "float32",
            "impl": impl,
            "ratio": ratio,
            "share_of_gemm": ratio / 10,
            "memory_share": ratio / 100,
            "match": True,
        }

    (name, summary), *rest = runner.summarize([record("a", 4.0), record("b", 0.5), record("b", 1.0, "sdpa")]).items()
    assert not rest
    assert name == "f/forward/float32"
    assert summary == {
        "cases": 2,
        "geomean_ratio": pytest.approx(math.sqrt(2)),
        "min_ratio": 0.5,
        "min_share_of_gemm": 0.05,
        "max_share_of_gemm": 0.4,
        "max_memory_share": 0.04,
        "all_match": True,
        "slower": ["b"],
    }


def test_the_report_names_no_host_and_no_path(report):
    text = json.dumps(report)
    assert f'"{platform.node()}"' not in text
    assert "/tmp" not in text
    assert "/home" not in text


def test_table_shows_every_implementation_and_marks_what_is_slower_or_wrong(report):
    ours = report["records"][0]
    ours["ratio"], ours["match"] = 0.5, False
    report["summary"] = runner.summarize(report["records"])
    text = table.format_report(report)
    assert text.count("  sdpa ") == text.count("  math ") == 2
    assert "WRONG RESULT, SLOWER" in text
    assert f"slower than the fastest peer: {ours['case']}" in text


# ---- the machine's rates ---------------------------------------------------------------------------------------------


def test_rates_keep_the_best_sample(monkeypatch):
    monkeypatch.setattr("vitfast.bench.rates._PRODUCT_SIDE", {"cpu": 8})
    monkeypatch.setattr("vitfast.bench.rates._COPY_BYTES", {"cpu": 1024})
    measured = Rates(CPU, [torch.float32, torch.float64])
    measured.sample()
    first = dict(measured.gemm_gflops), measured.copy_gbs
    measured.sample()
    assert measured.samples == 2
    assert measured.copy_gbs >= first[1] > 0
    assert all(measured.gemm_gflops[dtype] >= rate > 0 for dtype, rate in first[0].items())
