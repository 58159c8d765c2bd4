"""All benchmark cases. An operator is added by naming its file here."""

from __future__ import annotations

from fnmatch import fnmatchcase

from vitfast.bench import attention, blur_pool, hessian, mlp, models, window_attention
from vitfast.bench.case import Case

__all__ = ["cases"]

_OPERATORS = (window_attention, attention, mlp, blur_pool)


def cases(pattern: str = "*") -> list[Case]:
    """The cases of operators whose name contains the shell pattern, in a fixed order.

    A pattern that begins with ``models`` stands for the cases of whole models whose name begins with it, which need
    other libraries; one that begins with ``hessian`` likewise for products of Hessians. These are never among the
    others.

    >>> [case.name for case in cases("swin_t_stage4/*")]
    ['window_attention/swin_t_stage4/forward', 'window_attention/swin_t_stage4/forward_backward']
    >>> [case.name for case in cases("models/timm_vit")]
    ['models/timm_vit_s/inference', 'models/timm_vit_s/training']
    """
    if pattern.startswith("models"):
        return [case for case in models.CASES if fnmatchcase(case.name, f"{pattern}*")]
    if pattern.startswith("hessian"):
        return [case for case in hessian.CASES if fnmatchcase(case.name, f"{pattern}*")]
    return [case for operator in _OPERATORS for case in operator.CASES if fnmatchcase(case.name, f"*{pattern}*")]
