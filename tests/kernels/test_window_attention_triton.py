"""The Triton kernels of window attention in Triton's interpreter, on the CPU.

Triton decides when it is imported whether it interprets, so the tests stand in interpreted_window_attention.py and run
in a process of their own. The interpreter takes a millisecond for each program: maps are as small as they can be.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_interpreted_kernels():
    tests = Path(__file__).with_name("interpreted_window_attention.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
