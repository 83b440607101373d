"""Arithmetic, comparison and logic on two tensors with numpy's broadcasting."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from edgebake_targets.mil.call import Call, Operator, Unsupported


def _plain(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    return lambda call: function(call["x"], call["y"])


def _floor_div(call: Call) -> Tensor:
    return torch.div(*_dividends(call), rounding_mode="floor")


def _real_div(call: Call) -> Tensor:
    """Integers lose the fraction, as their integer result type says."""
    x, y = _dividends(call)
    if x.is_floating_point() or y.is_floating_point():
        return torch.div(x, y)
    # Not torch's own truncation: it ends the process where the smallest integer is divided by -1.
    floor = torch.div(x, y, rounding_mode="floor")
    return floor + ((torch.remainder(x, y) != 0) & ((x < 0) != (y < 0)))


def _mod(call: Call) -> Tensor:
    """The remainder takes the divisor's sign, as in Python."""
    return torch.remainder(*_dividends(call))


def _pow(call: Call) -> Tensor:
    x, y = call["x"], call["y"]
    if not x.is_floating_point() and not y.is_floating_point() and bool((y < 0).any()):
        raise Unsupported("pow of an integer with a negative exponent: the result is no integer")
    return torch.pow(x, y)


def _dividends(call: Call) -> tuple[Tensor, Tensor]:
    x, y = call["x"], call["y"]
    if not x.is_floating_point() and not y.is_floating_point() and bool((y == 0).any()):
        raise Unsupported(f"{call.operator} of an integer by zero")
    return x, y


OPERATORS: Mapping[str, Operator] = {
    "add": _plain(torch.add),
    "equal": _plain(torch.eq),
    "floor_div": _floor_div,
    "greater": _plain(torch.gt),
    "greater_equal": _plain(torch.ge),
    "less": _plain(torch.lt),
    "less_equal": _plain(torch.le),
    "logical_and": _plain(torch.logical_and),
    "logical_or": _plain(torch.logical_or),
    "logical_xor": _plain(torch.logical_xor),
    "maximum": _plain(torch.maximum),
    "minimum": _plain(torch.minimum),
    "mod": _mod,
    "mul": _plain(torch.mul),
    "not_equal": _plain(torch.ne),
    "pow": _pow,
    "real_div": _real_div,
    "sub": _plain(torch.sub),
}
