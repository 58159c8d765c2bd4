"""Checks of the modules' options."""

from __future__ import annotations

from numbers import Integral, Real


def is_integer(value: object) -> bool:
    """Whether ``value`` is an integer, NumPy's included; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def positive_integer(name: str, value: int) -> int:
    """``value`` as an int, which must be at least 1."""
    return _integer(name, value, minimum=1)


def non_negative_integer(name: str, value: int) -> int:
    """``value`` as an int, which must be at least 0."""
    return _integer(name, value, minimum=0)


def _integer(name: str, value: int, minimum: int) -> int:
    if not is_integer(value):
        raise TypeError(f"{name} must be an integer; got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}; got {value}")
    return int(value)


def probability(name: str, value: float) -> float:
    """``value`` as a float, which must be at least 0 and less than 1."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number; got {value!r}")
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be at least 0 and less than 1; got {value}")
    return float(value)
