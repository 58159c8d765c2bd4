"""Progress of long work: a bar where there is a terminal, silence elsewhere.

Functions that take long have an argument ``track``, called as ``track(iterable, description, total)`` and iterated in
its place. The default, `silent`, shows nothing, so that the library prints only when it is asked to.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

__all__ = ["Track", "bar", "silent"]

T = TypeVar("T")
Track = Callable[[Iterable[T], str, int], Iterable[T]]


def silent(iterable: Iterable[T], description: str, total: int) -> Iterable[T]:
    """Shows nothing."""
    return iterable


def bar(iterable: Iterable[T], description: str, total: int) -> Iterator[T]:
    """A bar on standard error that vanishes when it is full; nothing in a log file, which cannot redraw a line."""
    from tqdm import tqdm

    return iter(tqdm(iterable, description, total, leave=False, dynamic_ncols=True, disable=not sys.stderr.isatty()))
