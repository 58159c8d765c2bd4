"""Checks of the modules' options."""

from __future__ import annotations

from numbers import Integral


def is_integer(value: object) -> bool:
    """Whether ``value`` is an integer, NumPy's included; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def positive_integer(name: str, value: int) -> int:
    """``value`` as an int, which must be at least 1."""
    if not is_integer(value):
        raise TypeError(f"{name} must be an integer; got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1; got {value}")
    return int(value)
