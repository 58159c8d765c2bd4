"""The Triton kernels of window attention in Triton's interpreter: interpreted_window_attention.py, as a process."""

from __future__ import annotations

from interpreter import assert_tests_pass


def test_interpreted_kernels():
    assert_tests_pass("interpreted_window_attention.py")
