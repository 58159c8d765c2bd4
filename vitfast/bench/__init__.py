"""Benchmarks: every operator against the best PyTorch path, on this machine, with the error beside the time.

`vitfast bench` and the pytest-benchmark suite in ``benchmarks/`` run the same cases:

- `case`: what a case is. One file per operator defines its cases, and `models` those of whole models; `cases` finds
  them by name. `libraries` imports what the models come from;
- `timing`, `memory`, `rates`: one measurement each, on the CPU and on NVIDIA GPUs;
- `processes`: implementations in processes of their own; `precompile`: compiles peers ahead;
- `runner`: measures cases and makes the report, `table`: prints it.
"""

from vitfast.bench.case import Case, Variant, Workload
from vitfast.bench.registry import cases
from vitfast.bench.runner import run
from vitfast.bench.table import format_report

__all__ = ["Case", "Variant", "Workload", "cases", "format_report", "run"]
