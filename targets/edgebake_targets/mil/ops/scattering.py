"""Writing at computed places: scatter, scatter_along_axis, scatter_nd."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch

from edgebake_targets.mil.call import Call, Operator, Unsupported
from edgebake_targets.mil.ops._shapes import position
from edgebake_targets.mil.ops.gathering import linear_places, places

_REDUCTIONS = {"mul": "prod", "div": "prod", "max": "amax", "min": "amin"}


def _written(call: Call, rows: torch.Tensor, where: torch.Tensor, updates: torch.Tensor) -> torch.Tensor:
    """``rows`` with each row of ``updates`` merged into the row ``where`` says, one after the other."""
    mode = call.text("mode", "add")
    if mode == "update":
        return _replaced(rows, where, updates)
    if mode in ("add", "sub"):
        return rows.index_add(0, where, updates, alpha=1 if mode == "add" else -1)
    if mode not in _REDUCTIONS:
        raise Unsupported(f"{call.operator} in the mode {mode!r}")
    start = rows
    if mode == "div":
        if not rows.dtype.is_floating_point:
            raise Unsupported(f"{call.operator} in the mode 'div' of integers: Core ML does not say how it rounds")
        start = torch.ones_like(rows)
    index = where.reshape(-1, *[1] * (updates.ndim - 1)).expand_as(updates)
    merged = start.scatter_reduce(0, index, updates, _REDUCTIONS[mode])
    return rows / merged if mode == "div" else merged


def _replaced(rows: torch.Tensor, where: torch.Tensor, updates: torch.Tensor) -> torch.Tensor:
    """Of several updates of one row the last stays; torch leaves open which."""
    last = torch.full((len(rows),), -1, dtype=torch.int64)
    last = last.scatter_reduce(0, where, torch.arange(len(where)), "amax")
    changed = last >= 0
    result = rows.clone()
    result[changed] = updates[last[changed]]
    return result


def _expect(call: Call, updates: torch.Tensor, shape: torch.Size) -> None:
    if updates.shape != shape:
        raise ValueError(f"{call.operator} of updates of {list(updates.shape)} where {list(shape)} belong")


def scatter(call: Call) -> torch.Tensor:
    """Slices along ``axis``, each to the index of its own."""
    data, indices, updates = call["data"], call["indices"], call["updates"]
    axis = position(call, call.integer("axis", 0), data.ndim)
    _expect(call, updates, data.shape[:axis] + indices.shape + data.shape[axis + 1 :])
    where = places(call, indices, data.shape[axis]).reshape(-1)
    rows = data.movedim(axis, 0)
    flat = updates.reshape(data.shape[:axis] + where.shape + data.shape[axis + 1 :]).movedim(axis, 0)
    return _written(call, rows, where, flat).movedim(0, axis)


def scatter_along_axis(call: Call) -> torch.Tensor:
    """Each update at its own place but for ``axis``, where ``indices`` say."""
    data, indices, updates = call["data"], call["indices"], call["updates"]
    axis = position(call, call.integer("axis", 0), data.ndim)
    _expect(call, updates, indices.shape)
    sizes = [size for i, size in enumerate(data.shape) if i != axis]
    if sizes != [size for i, size in enumerate(indices.shape) if i != axis]:
        raise ValueError(f"scatter_along_axis to {list(data.shape)} at {list(indices.shape)} along {axis}")
    where = torch.zeros(indices.shape, dtype=torch.int64)
    for i, size in enumerate(data.shape):
        along = torch.arange(size).reshape([-1 if i == other else 1 for other in range(data.ndim)])
        where = where * size + (places(call, indices, size) if i == axis else along)
    return _written(call, data.reshape(-1), where.reshape(-1), updates.reshape(-1)).reshape(data.shape)


def scatter_nd(call: Call) -> torch.Tensor:
    """Slices at the vectors in the last axis of ``indices``."""
    data, indices, updates = call["data"], call["indices"], call["updates"]
    depth = indices.shape[-1]
    if depth > data.ndim:
        raise ValueError(f"scatter_nd to {list(data.shape)} at {list(indices.shape)}")
    _expect(call, updates, indices.shape[:-1] + data.shape[depth:])
    where = linear_places(call, indices, data.shape[:depth]).reshape(-1)
    rows = data.reshape(prod(data.shape[:depth]), *data.shape[depth:])
    return _written(call, rows, where, updates.reshape(len(where), *data.shape[depth:])).reshape(data.shape)


OPERATORS: Mapping[str, Operator] = {
    "scatter": scatter,
    "scatter_along_axis": scatter_along_axis,
    "scatter_nd": scatter_nd,
}
