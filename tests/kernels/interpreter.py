"""Runs a file of tests in Triton's interpreter, on the CPU.

Triton decides when it is imported whether it interprets, so these tests stand in files named interpreted_*.py and run
in a process of their own. The interpreter takes a millisecond for each program: shapes are as small as they can be.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def assert_tests_pass(name: str) -> None:
    """Runs the tests of the file ``name`` beside this one."""
    tests = Path(__file__).with_name(name)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
