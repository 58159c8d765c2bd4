"""All benchmark cases. An operator is added by naming its file here."""

from __future__ import annotations

from fnmatch import fnmatchcase

from vitfast.bench import attention, window_attention
from vitfast.bench.case import Case

__all__ = ["cases"]

_OPERATORS = (window_attention, attention)


def cases(pattern: str = "*") -> list[Case]:
    """The cases whose name contains the shell pattern, in a fixed order.

    >>> [case.name for case in cases("swin_t_stage4/*")]
    ['window_attention/swin_t_stage4/forward', 'window_attention/swin_t_stage4/forward_backward']
    """
    return [case for operator in _OPERATORS for case in operator.CASES if fnmatchcase(case.name, f"*{pattern}*")]
