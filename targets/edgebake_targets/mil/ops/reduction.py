"""Reductions over axes: sums, norms, extremes and where they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import torch

from edgebake_targets.mil.call import Call, Operator
from edgebake_targets.mil.half import half_sum
from edgebake_targets.mil.ops._shapes import position, positions


@dataclass(frozen=True, kw_only=True)
class _Over:
    """The axes of one reduction and how its sums are formed."""

    axes: list[int]
    keep: bool
    half: bool

    def count(self, x: torch.Tensor) -> int:
        return prod(x.shape[axis] for axis in self.axes)

    def total(self, x: torch.Tensor) -> torch.Tensor:
        return half_sum(x, self.axes, self.keep) if self.half else x.sum(self.axes, keepdim=self.keep)

    def largest(self, x: torch.Tensor) -> torch.Tensor:
        return x.amax(self.axes, keepdim=self.keep)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        for axis in reversed(self.axes):
            if not self.half:
                x = x.prod(axis, keepdim=self.keep)
                continue
            result = torch.ones_like(x.sum(axis))
            for part in x.unbind(axis):
                result = (result * part).half().float()
            x = result.unsqueeze(axis) if self.keep else result
        return x


def _log_sum_exp(over: _Over, x: torch.Tensor) -> torch.Tensor:
    if not over.half:
        return x.logsumexp(over.axes, keepdim=over.keep)
    top = x.amax(over.axes, keepdim=True)
    return over.total((x - top).exp()).log() + over.largest(x)


_FORMULAS: Mapping[str, Callable[[_Over, torch.Tensor], torch.Tensor]] = {
    "reduce_l1_norm": lambda over, x: over.total(x.abs()),
    "reduce_l2_norm": lambda over, x: over.total(x.square()).sqrt(),
    "reduce_log_sum": lambda over, x: over.total(x).log(),
    "reduce_log_sum_exp": _log_sum_exp,
    "reduce_max": lambda over, x: over.largest(x),
    "reduce_mean": lambda over, x: over.total(x) / over.count(x),
    "reduce_min": lambda over, x: x.amin(over.axes, keepdim=over.keep),
    "reduce_prod": lambda over, x: over.product(x),
    "reduce_sum": lambda over, x: over.total(x),
    "reduce_sum_square": lambda over, x: over.total(x.square()),
}
_INEXACT = {"reduce_l2_norm", "reduce_log_sum", "reduce_log_sum_exp", "reduce_mean"}  # of integers, cut to integers


def reduce(call: Call) -> torch.Tensor:
    """Every reduction over ``axes``, by the formula of its name; all axes when none are named."""
    x, keep = call["x"], call.flag("keep_dims", False)
    axes = positions(call, call.integers("axes", range(x.ndim)), x.ndim)
    formula, kind = _FORMULAS[call.operator], x.dtype
    if not kind.is_floating_point:
        x = x.double() if call.operator in _INEXACT else x.long()
    if not axes:  # torch would take none for all
        return formula(_Over(axes=[x.ndim], keep=False, half=call.half_sums), x.unsqueeze(-1)).to(kind)
    return formula(_Over(axes=axes, keep=keep, half=call.half_sums), x).to(kind)


def reduce_argmax(call: Call) -> torch.Tensor:
    """The index of the largest value along ``axis``, the first of several."""
    return _where(call, call["x"])


def reduce_argmin(call: Call) -> torch.Tensor:
    """The index of the smallest value along ``axis``, the first of several."""
    x = call["x"]
    return _where(call, -(x if x.dtype.is_floating_point else x.long()))


def _where(call: Call, x: torch.Tensor) -> torch.Tensor:
    axis = position(call, call.integer("axis", -1), x.ndim)
    return x.argmax(axis, keepdim=call.flag("keep_dims", False)).int()


OPERATORS: Mapping[str, Operator] = {
    **dict.fromkeys(_FORMULAS, reduce),
    "reduce_argmax": reduce_argmax,
    "reduce_argmin": reduce_argmin,
}
