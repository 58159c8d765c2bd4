"""Lists and tuples, one in the other, as arguments and results of operations hold tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["leaves_of", "mapped"]


def mapped(function: Callable[[Any], Any], x: Any) -> Any:
    """function of whatever is no list or tuple, in lists and tuples like those of x."""
    if not isinstance(x, (list, tuple)):
        return function(x)
    return type(x)([mapped(function, item) if isinstance(item, (list, tuple)) else function(item) for item in x])


def leaves_of(x: Any) -> Iterator[Any]:
    """Whatever is no list or tuple, in order."""
    if isinstance(x, (list, tuple)):
        for item in x:
            yield from leaves_of(item)
    else:
        yield x
