"""Runs one operator of the interpreter on plain numbers, lists and arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from edgebake_targets.mil.call import Call, Mode, TensorType
from edgebake_targets.mil.operators import operators


def run(
    operator: str,
    *,
    opset: str = "CoreML8",
    outputs: tuple[str, ...] = ("float32",),
    rounding: Mode = Mode.FP32,
    **inputs: Any,
) -> Any:
    """What the operator returns. A number is a tensor of rank 0, a list or an array one of its own shape.

    ``rounding`` is the mode of the call: operators have parameters of the name ``mode``.
    """
    values = {name: _value(value) for name, value in inputs.items() if value is not None}
    types = tuple(TensorType(dtype=dtype, shape=()) for dtype in outputs)
    call = Call(operator=operator, inputs=values, outputs=types, name="test", opset=opset, mode=rounding)
    return operators()[operator](call)


def _value(value: Any) -> Any:
    if isinstance(value, str | torch.Tensor):
        return value
    if isinstance(value, tuple):  # the values of a variadic parameter
        return [_value(one) for one in value]
    array = np.asarray(value)
    if array.dtype.kind == "f":
        return torch.tensor(array, dtype=torch.float32)
    if array.dtype == np.int64:
        return torch.tensor(array, dtype=torch.int32)
    if array.dtype == np.uint16:
        return torch.tensor(array.astype(np.int32))
    return torch.tensor(array)


def assert_close(result: torch.Tensor, expected: Any, tolerance: float = 1e-5) -> None:
    """Same shape and values, measured against the largest finite expected value; Inf and NaN in the same places."""
    expected = np.asarray(expected)
    assert tuple(result.shape) == expected.shape
    finite = np.abs(expected[np.isfinite(expected)])
    scale = max(float(finite.max()), 1.0) if finite.size else 1.0
    np.testing.assert_allclose(result.numpy(), expected, rtol=tolerance, atol=tolerance * scale)
