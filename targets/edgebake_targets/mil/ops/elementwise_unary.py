"""Functions of one element, casts among them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from edgebake_targets.mil.call import Call, Operator, Unsupported
from edgebake_targets.mil.half import to_half

# What a cast may name -> (how the type is held, smallest, largest value of an integer type).
_INTEGERS = {
    "int8": (torch.int8, -(2**7), 2**7 - 1),
    "uint8": (torch.uint8, 0, 2**8 - 1),
    "int16": (torch.int16, -(2**15), 2**15 - 1),
    "uint16": (torch.int32, 0, 2**16 - 1),
    "int32": (torch.int32, -(2**31), 2**31 - 1),
    "uint32": (torch.int64, 0, 2**32 - 1),
    "int64": (torch.int64, -(2**63), 2**63 - 1),
}
_FLOATS = ("fp16", "fp32", "float16", "float32")


def _plain(function: Callable[[Tensor], Tensor]) -> Operator:
    return lambda call: function(call["x"])


def _cast(call: Call) -> Tensor:
    x, dtype = call["x"], call.text("dtype")
    if dtype in _FLOATS:
        return x.float()
    if dtype == "bool":
        return x != 0
    if dtype not in _INTEGERS:
        raise Unsupported(f"cast to {dtype}")
    held, smallest, largest = _INTEGERS[dtype]
    if x.is_floating_point():
        x = torch.trunc(x)
        if not bool(((x >= smallest) & (x < largest + 1)).all()):
            raise Unsupported(f"cast to {dtype} of a value that is not finite or outside {smallest} .. {largest}")
    wrapped = x.to(torch.int64)
    return (wrapped % (largest + 1) if dtype.startswith("u") else wrapped).to(held)


def _clip(call: Call) -> Tensor:
    alpha, beta = call.number("alpha"), call.number("beta")
    if call.since(7) and alpha >= beta:
        raise Unsupported(f"clip to {alpha} .. {beta}: since iOS 17 alpha has to be the smaller one")
    return torch.clamp(torch.clamp(call["x"], min=alpha), max=beta)


def _exp2(call: Call) -> Tensor:
    x = call["x"]
    if x.is_floating_point():
        return torch.exp2(x)
    shifted = torch.bitwise_left_shift(torch.ones_like(x), x.clamp(min=0))
    return torch.where(x < 0, torch.zeros_like(x), shifted)


def _inverse(call: Call) -> Tensor:
    return torch.reciprocal(call["x"] + _epsilon(call, 1e-4))


def _log(call: Call) -> Tensor:
    return torch.log(call["x"] + _epsilon(call, 1e-45))


def _rsqrt(call: Call) -> Tensor:
    return torch.rsqrt(call["x"] + _epsilon(call, 1e-12))


def _square(call: Call) -> Tensor:
    return call["x"] * call["x"]


def _threshold(call: Call) -> Tensor:
    return torch.maximum(call["x"], call["alpha"])


def _epsilon(call: Call, default: float) -> Tensor:
    """A left out epsilon has the result's type: in float16 those of log and rsqrt are zero."""
    epsilon = call.get("epsilon")
    if epsilon is not None:
        return epsilon
    value = torch.tensor(default)
    return to_half(value) if getattr(call.outputs[0], "dtype", "") == "float16" else value


OPERATORS: Mapping[str, Operator] = {
    "abs": _plain(torch.abs),
    "acos": _plain(torch.acos),
    "asin": _plain(torch.asin),
    "atan": _plain(torch.atan),
    "atanh": _plain(torch.atanh),
    "cast": _cast,
    "ceil": _plain(torch.ceil),
    "clip": _clip,
    "cos": _plain(torch.cos),
    "cosh": _plain(torch.cosh),
    "erf": _plain(torch.erf),
    "exp": _plain(torch.exp),
    "exp2": _exp2,
    "floor": _plain(torch.floor),
    "inverse": _inverse,
    "log": _log,
    "logical_not": _plain(torch.logical_not),
    "round": _plain(torch.round),
    "rsqrt": _rsqrt,
    "sign": _plain(torch.sign),
    "sin": _plain(torch.sin),
    "sinh": _plain(torch.sinh),
    "sqrt": _plain(torch.sqrt),
    "square": _square,
    "tan": _plain(torch.tan),
    "tanh": _plain(torch.tanh),
    "threshold": _threshold,
}
