"""A report as text for a terminal."""

from __future__ import annotations

from itertools import groupby

from vitfast.bench.case import OURS

__all__ = ["format_report"]

_LEGEND = (
    "times in ms; ratio: time of the fastest peer over this one's; memory: beyond inputs and results, as a share of",
    "the intermediates that a fused implementation does not write, for models of the original's memory; of copy: of",
    "the best rate of a large copy in this run, then: of the median rate of copies that were timed in turn",
)
_HEADER = (
    f"  {'impl':21}{'median':>10}{'p20':>10}{'p80':>10}{'ratio':>8}{'error':>10}"
    f"{'GFLOP/s':>10}{'of gemm':>9}{'GB/s':>8}{'of copy':>9}{'then':>7}{'memory':>9}"
)


def format_report(report: dict) -> str:
    """All cases, the fastest implementation first, and the summary with what is slower than a peer."""
    lines = [*_LEGEND, ""]
    for (case, dtype), group in groupby(report["records"], key=lambda record: (record["case"], record["dtype"])):
        records = sorted(group, key=lambda record: record["median_s"])
        lines += [f"{case}  {dtype}  ({_details(records[0])})", _HEADER, *map(_row, records), ""]
    return "\n".join(lines + _footer(report))


def _details(record: dict) -> str:
    return ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in record["details"].items()
    )


def _row(record: dict) -> str:
    ratio = "-" if record["ratio"] is None else f"{record['ratio']:.2f}x"
    then = "-" if record["share_of_copy_then"] is None else f"{record['share_of_copy_then']:.0%}"
    times = "".join(f"{record[key] * 1e3:10.3f}" for key in ("median_s", "p20_s", "p80_s"))
    remarks = [] if record["match"] else ["WRONG RESULT"]
    if record["impl"] == OURS and record["ratio"] is not None and record["ratio"] < 1:
        remarks.append("SLOWER")
    if record["impl"] == OURS and record["ratio_limit"] is not None:
        remarks.append(
            f"attention is {record['attention_share']:.0%} of the original, limit {record['ratio_limit']:.2f}x"
        )
        if record["memory_share"] > 1:
            remarks.append("MORE MEMORY")
    return (
        f"  {record['impl']:21}{times}{ratio:>8}{record['error']:10.1e}"
        f"{record['gflops']:10.1f}{record['share_of_gemm']:9.0%}{record['gbs']:8.1f}{record['share_of_copy']:9.0%}{then:>7}"
        f"{record['memory_share']:9.2%}{'  ' if remarks else ''}{', '.join(remarks)}"
    )


def _footer(report: dict) -> list[str]:
    rates, machine = report["rates"], report["machine"]
    gemm = ", ".join(f"{rate:.0f} GFLOP/s in {dtype}" for dtype, rate in rates["gemm_gflops"].items())
    where = machine["gpu"]["name"] if machine["gpu"] else f"{machine['cpu']}, {machine['threads']} threads"
    lines = [
        f"machine: {where}; best rates in this run: matrix product {gemm}; copy {rates['copy_gbs']:.1f} GB/s",
        "",
        f"{'vitfast against the fastest peer':44}{'cases':>6}{'geomean':>9}{'min':>8}{'of gemm':>14}{'memory':>9}",
    ]
    for name, summary in report["summary"].items():
        shares = f"{summary['min_share_of_gemm']:.0%} - {summary['max_share_of_gemm']:.0%}"
        lines.append(
            f"{name:44}{summary['cases']:6}{summary['geomean_ratio']:8.2f}x{summary['min_ratio']:7.2f}x"
            f"{shares:>14}{summary['max_memory_share']:9.2%}"
        )
    slower = [case for summary in report["summary"].values() for case in summary["slower"]]
    lines += ["", f"slower than the fastest peer: {', '.join(slower) or 'none'}"]
    lines += [f"not measured: {s['impl']} of {s['case']} {s['dtype']} ({s['reason']})" for s in report["skipped"]]
    if not report["settings"]["compiled_peers"]:
        lines.append("peers under torch.compile were left out: the ratios are against eager PyTorch alone")
    return lines
