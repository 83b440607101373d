"""Order along an axis: topk, argsort, cumsum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from edgebake_targets.mil.call import Call, Operator
from edgebake_targets.mil.ops._shapes import position


def topk(call: Call) -> Any:
    """The ``k`` largest (smallest when ``ascending``), sorted; of equal values the first comes first."""
    x, k = call["x"], call.integer("k", 1)
    axis = position(call, call.integer("axis", -1), x.ndim)
    if k == -1 and call.since(7):
        k = x.shape[axis]
    if not 0 <= k <= x.shape[axis]:
        raise ValueError(f"topk takes {k} of an axis of {x.shape[axis]}")
    values, indices = x.sort(dim=axis, descending=not call.flag("ascending", False), stable=True)
    values = values.narrow(axis, 0, k)
    return (values, indices.narrow(axis, 0, k).int()) if call.flag("return_indices", True) else values


def argsort(call: Call) -> torch.Tensor:
    """Of equal values the first comes first, whichever the direction."""
    x = call["x"]
    axis = position(call, call.integer("axis", -1), x.ndim)
    return x.argsort(dim=axis, descending=not call.flag("ascending", False), stable=True).int()


def cumsum(call: Call) -> torch.Tensor:
    """Running sums, each without its own element when ``exclusive``, from the end when ``reverse``."""
    x = call["x"]
    axis = position(call, call.integer("axis", 0), x.ndim)
    backwards = call.flag("reverse", False)
    if backwards:
        x = x.flip(axis)
    if call.flag("exclusive", False) and x.shape[axis]:
        x = torch.cat([torch.zeros_like(x.narrow(axis, 0, 1)), x.narrow(axis, 0, x.shape[axis] - 1)], axis)
    sums = _running_half(x, axis) if call.half_sums else x.cumsum(axis, dtype=x.dtype)
    return sums.flip(axis) if backwards else sums


def _running_half(x: torch.Tensor, axis: int) -> torch.Tensor:
    sums, total = [], torch.zeros_like(x.select(axis, 0)) if x.shape[axis] else None
    for part in x.unbind(axis):
        total = (part if total is None else total + part).half().float()
        sums.append(total)
    return torch.stack(sums, axis) if sums else x


OPERATORS: Mapping[str, Operator] = {"argsort": argsort, "cumsum": cumsum, "topk": topk}
