"""Constants as torch values, and how a value is brought to its declared type."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from edgebake_targets._coreml_package import Payload, array_of
from edgebake_targets.mil.call import TensorType, Unsupported
from edgebake_targets.mil.program import Constant

# MIL type -> torch type in which its values are held (see edgebake_targets.mil.call).
HELD = {
    **dict.fromkeys(("float16", "float32", "float64", "bfloat16"), torch.float32),
    "bool": torch.bool,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "int4": torch.int8,
    "uint8": torch.uint8,
    "uint16": torch.int32,
    "uint32": torch.int64,
    "uint64": torch.int64,
    **dict.fromkeys(("uint1", "uint2", "uint3", "uint4", "uint6"), torch.uint8),
}
_PIECE = 2**20  # values rounded at once
_ROUNDED = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def value_of(constant: Constant) -> Any:
    """A tensor, text, or a list of them. A float32 tensor is a view of the file's bytes, anything else a copy."""
    if constant.text is not None:
        return constant.text
    if constant.payload is None:
        return [value_of(item) for item in constant.items]
    assert isinstance(constant.type, TensorType)
    return to_held(_tensor(constant.payload), constant.type.dtype)


def bytes_of(constant: Constant) -> int:
    """Memory that ``value_of`` takes beyond the file's own."""
    if constant.payload is None or constant.payload.dtype == "float32":
        return 0
    count = int(np.prod(constant.payload.shape, dtype=np.int64))
    return count * held_type(constant.payload.dtype).itemsize


def _tensor(payload: Payload) -> torch.Tensor:
    if payload.dtype == "bfloat16":
        stored = np.frombuffer(payload.data, np.int16, int(np.prod(payload.shape, dtype=np.int64)))
        return torch.from_numpy(stored.reshape(payload.shape).copy()).view(torch.bfloat16)
    array = array_of(payload)
    if array.dtype in (np.uint16, np.uint32, np.uint64):
        array = array.astype(np.int32 if array.dtype == np.uint16 else np.int64)
    if not array.flags.aligned or not array.flags.writeable:
        array = array.copy()
    return torch.from_numpy(array)


def held_type(dtype: str) -> torch.dtype:
    """The torch type that holds MIL's ``dtype``."""
    if dtype not in HELD:
        raise Unsupported(f"values of type {dtype}")
    return HELD[dtype]


def to_held(value: torch.Tensor, dtype: str) -> torch.Tensor:
    """``value`` in the torch type that holds MIL's ``dtype``; nothing is rounded that fits."""
    return value.to(held_type(dtype))


def rounded(value: torch.Tensor, dtype: str) -> torch.Tensor:
    """The nearest numbers that ``dtype`` can hold, in float32; float16 overflows to infinity."""
    narrow = _ROUNDED.get(dtype)
    return value if narrow is None or value.dtype != torch.float32 else value.to(narrow).to(torch.float32)


def rounded_in_place(value: torch.Tensor, dtype: str) -> torch.Tensor:
    """``rounded`` in the memory of ``value``, a piece at a time: whole copies of a large weight cost its size again."""
    narrow = _ROUNDED.get(dtype)
    if narrow is None or value.dtype != torch.float32 or not value.is_contiguous():
        return rounded(value, dtype)
    flat = value.view(-1)
    for start in range(0, flat.numel(), _PIECE):
        piece = flat[start : start + _PIECE]
        piece.copy_(piece.to(narrow))
    return value
