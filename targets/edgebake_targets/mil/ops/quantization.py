"""Affine quantization of activations: quantize, dequantize."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from edgebake_targets.mil.call import Call, Operator, Unsupported
from edgebake_targets.mil.ops._shapes import position

_RANGES = {"int8": (-128, 127, torch.int8), "uint8": (0, 255, torch.uint8)}


def _along_axis(call: Call, name: str, x: torch.Tensor) -> torch.Tensor | None:
    """A scale or zero point as float32 that broadcasts with ``x``."""
    value = call.get(name)
    if value is None or value.ndim == 0:
        return None if value is None else value.float()
    axis = position(call, call.integer("axis"), x.ndim)
    if value.ndim != 1 or len(value) != x.shape[axis]:
        raise ValueError(f"{call.operator} with a {name} of {list(value.shape)} on an axis of {x.shape[axis]}")
    return value.float().reshape([-1 if i == axis else 1 for i in range(x.ndim)])


def quantize(call: Call) -> torch.Tensor:
    """``clip(round(input / scale) + zero_point)``; halves go to the even neighbour."""
    x, kind = call["input"], call.text("output_dtype")
    if kind not in _RANGES:
        raise Unsupported(f"quantize to {kind}")
    low, high, held = _RANGES[kind]
    scale, zero = _along_axis(call, "scale", x), _along_axis(call, "zero_point", x)
    if scale is None:
        raise Unsupported("quantize without scale")
    steps = (x / scale).round()
    return (steps if zero is None else steps + zero).clamp(low, high).to(held)


def dequantize(call: Call) -> torch.Tensor:
    """``(input - zero_point) * scale``."""
    x = call["input"]
    scale, zero = _along_axis(call, "scale", x), _along_axis(call, "zero_point", x)
    if scale is None:
        raise Unsupported("dequantize without scale")
    return (x.float() if zero is None else x.float() - zero) * scale


OPERATORS: Mapping[str, Operator] = {"dequantize": dequantize, "quantize": quantize}
