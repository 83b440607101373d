"""Axes and sizes as the operators of several families read them."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from edgebake_targets.mil.call import Call, Unsupported

# A dynamic shape is only known here: a damaged one must not take all memory (float32: 8 GiB).
LARGEST = 2**31


def position(call: Call, axis: int, rank: int) -> int:
    """``axis`` counted from the front; ValueError when a tensor of ``rank`` has none such."""
    if not -rank <= axis < rank:
        raise ValueError(f"{call.operator} along axis {axis} of a tensor of rank {rank}")
    return axis % rank


def positions(call: Call, axes: Sequence[int], rank: int) -> list[int]:
    """Several axes counted from the front, in rising order and each once."""
    return sorted({position(call, axis, rank) for axis in axes})


def bounded(call: Call, shape: Sequence[int]) -> list[int]:
    """``shape`` when a tensor of it may be made; ValueError for negative sizes, Unsupported for absurd ones."""
    if any(size < 0 for size in shape):
        raise ValueError(f"{call.operator} to the shape {list(shape)}: a size is negative")
    if prod(shape) > LARGEST:
        raise Unsupported(f"{call.operator} to the shape {list(shape)}: more than {LARGEST} values")
    return list(shape)
