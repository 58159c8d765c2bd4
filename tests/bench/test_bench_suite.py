import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_pytest_benchmark_groups_by_case_and_records_the_work(tmp_path):
    path = tmp_path / "out.json"
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-p", "no:cacheprovider"]
    command += ["-k", "alternet_4x4_stage4/forward- and not compile", f"--benchmark-json={path}"]
    command += ["--benchmark-min-rounds=1", "--benchmark-max-time=0", "--benchmark-warmup=off"]
    # pytest-benchmark measures nothing where it finds the variables of pytest-xdist, in which this test may run
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    benchmarks = json.loads(path.read_text())["benchmarks"]
    assert {benchmark["group"] for benchmark in benchmarks} == {"window_attention/alternet_4x4_stage4/forward"}
    assert [b["params"]["impl"] for b in benchmarks] == ["vitfast", "sdpa", "math", "math_channels_first"]
    for benchmark in benchmarks:
        assert set(benchmark["extra_info"]) == {"error", "flops", "bytes", "dtype", "device"}
