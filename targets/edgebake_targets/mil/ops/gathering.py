"""Reading at computed places: gather, gather_along_axis, gather_nd."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch

from edgebake_targets.mil.call import Call, Operator, Unsupported
from edgebake_targets.mil.ops._shapes import position


def places(call: Call, indices: torch.Tensor, size: int) -> torch.Tensor:
    """Indices on an axis of ``size`` as int64 from 0 on.

    A negative one counts from the end until iOS 16; since then Core ML leaves it undefined, as any other outside.
    """
    lowest = 0 if call.since(7) else -size
    if indices.numel():
        low, high = int(indices.min()), int(indices.max())
        if low < lowest or high >= size:
            wrong = low if low < lowest else high
            verdict = "refuses it" if call.flag("validate_indices", False) else "does not define the result"
            raise Unsupported(f"{call.operator} at index {wrong} of an axis of {size}: Core ML {verdict}")
    indices = indices.long()
    return torch.where(indices < 0, indices + size, indices)


def gather(call: Call) -> torch.Tensor:
    """The slices of ``x`` along ``axis`` at ``indices``; the first ``batch_dims`` axes of both go together."""
    x, indices = call["x"], call["indices"]
    axis, batch = position(call, call.integer("axis", 0), x.ndim), call.integer("batch_dims", 0)
    if not 0 <= batch <= min(axis, indices.ndim) or indices.shape[:batch] != x.shape[:batch]:
        raise ValueError(f"gather of {list(x.shape)} at {list(indices.shape)} with batch_dims {batch}, axis {axis}")
    where = places(call, indices, x.shape[axis])
    shape = x.shape[:axis] + indices.shape[batch:] + x.shape[axis + 1 :]
    if not batch:
        return x.index_select(axis, where.reshape(-1)).reshape(shape)
    count = prod(x.shape[:batch])
    rows = x.movedim(axis, batch).reshape(count, x.shape[axis], *x.shape[batch:axis], *x.shape[axis + 1 :])
    found = rows[torch.arange(count).unsqueeze(1), where.reshape(count, prod(indices.shape[batch:]))]
    return found.movedim(1, 1 + axis - batch).reshape(shape)


def gather_along_axis(call: Call) -> torch.Tensor:
    """One element of ``x`` for each index, at its own place but for ``axis``."""
    x, indices = call["x"], call["indices"]
    axis = position(call, call.integer("axis", 0), x.ndim)
    return x.gather(axis, places(call, indices, x.shape[axis]))


def linear_places(call: Call, indices: torch.Tensor, sizes: torch.Size) -> torch.Tensor:
    """The vectors in the last axis of ``indices`` as places in a flattened tensor of ``sizes``."""
    result = torch.zeros(indices.shape[:-1], dtype=torch.int64)
    for part, size in enumerate(sizes):
        result = result * size + places(call, indices[..., part], size)
    return result


def gather_nd(call: Call) -> torch.Tensor:
    """The slices of ``x`` at the vectors in the last axis of ``indices``."""
    x, indices, batch = call["x"], call["indices"], call.integer("batch_dims", 0)
    depth = batch + indices.shape[-1]
    if batch < 0 or batch >= indices.ndim or depth > x.ndim or indices.shape[:batch] != x.shape[:batch]:
        raise ValueError(f"gather_nd of {list(x.shape)} at {list(indices.shape)} with batch_dims {batch}")
    where = linear_places(call, indices, x.shape[batch:depth])
    count, size = prod(x.shape[:batch]), prod(x.shape[batch:depth])
    where = where.reshape(count, -1) + torch.arange(count).unsqueeze(1) * size if where.numel() else where
    rows = x.reshape(count * size, *x.shape[depth:])
    return rows.index_select(0, where.reshape(-1)).reshape(indices.shape[:-1] + x.shape[depth:])


OPERATORS: Mapping[str, Operator] = {
    "gather": gather,
    "gather_along_axis": gather_along_axis,
    "gather_nd": gather_nd,
}
