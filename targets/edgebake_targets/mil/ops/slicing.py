"""Slices as numpy takes them: slice_by_index, slice_by_size, slice_update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from edgebake_targets.mil.call import Call, Operator, Unsupported


@dataclass(frozen=True, kw_only=True)
class _Slice:
    """``forward`` slices have positive strides only; the ``turned`` axes are then to be reversed."""

    forward: tuple[slice, ...]
    turned: list[int]
    squeezed: list[int]


def _slice(call: Call, shape: Sequence[int]) -> _Slice:
    """What ``begin``, ``end``, ``stride`` and the masks select of a tensor of ``shape``."""
    rank, off = len(shape), [False] * len(shape)
    begin, end, stride = call.integers("begin"), call.integers("end"), call.integers("stride", [1] * rank)
    from_start, to_end = call.flags("begin_mask", off), call.flags("end_mask", off)
    single = call.flags("squeeze_mask", off)
    if {len(part) for part in (begin, end, stride, from_start, to_end, single)} != {rank}:
        raise ValueError(f"{call.operator} of a tensor of rank {rank} with parameters of another length")
    forward, turned = [], []
    for axis, size in enumerate(shape):
        if single[axis]:
            chosen = _one(call, 0 if from_start[axis] else begin[axis], size)
        elif stride[axis] == 0:
            raise ValueError(f"{call.operator} with a stride of 0")
        else:
            first, last = None if from_start[axis] else begin[axis], None if to_end[axis] else end[axis]
            chosen = range(*slice(first, last, stride[axis]).indices(size))
        if chosen.step < 0 and chosen:
            turned.append(axis)
            chosen = chosen[::-1]
        forward.append(slice(chosen.start, chosen.stop, chosen.step) if chosen else slice(0, 0))
    return _Slice(forward=tuple(forward), turned=turned, squeezed=[axis for axis in range(rank) if single[axis]])


def _one(call: Call, index: int, size: int) -> range:
    if not -size <= index < size:
        raise Unsupported(f"{call.operator} takes index {index} of an axis of {size}")
    return range(index % size, index % size + 1)


def slice_by_index(call: Call) -> torch.Tensor:
    """``x[begin:end:stride]`` per axis; a mask leaves a bound open, a squeezed axis is indexed and dropped."""
    x = call["x"]
    chosen = _slice(call, x.shape)
    part = x[chosen.forward]
    if chosen.turned:
        part = part.flip(chosen.turned)
    return part.squeeze(chosen.squeezed) if chosen.squeezed else part


def slice_update(call: Call) -> torch.Tensor:
    """A copy of ``x`` whose slice, chosen as in ``slice_by_index``, holds ``update``."""
    x, update = call["x"], call["update"]
    chosen = _slice(call, x.shape)
    result = x.clone()
    place = result[chosen.forward]
    expected = [size for axis, size in enumerate(place.shape) if axis not in chosen.squeezed]
    if list(update.shape) != expected:
        raise ValueError(f"slice_update of a slice of {expected} with values of {list(update.shape)}")
    place.copy_(update.reshape(place.shape).flip(chosen.turned))
    return result


def slice_by_size(call: Call) -> torch.Tensor:
    """``size`` elements from ``begin`` on per axis; -1 takes all that follow."""
    x, begin, size = call["x"], call.integers("begin"), call.integers("size")
    if len(begin) != x.ndim or len(size) != x.ndim:
        raise ValueError(f"slice_by_size of a tensor of rank {x.ndim} with parameters of another length")
    for axis, (first, count) in enumerate(zip(begin, size, strict=True)):
        start = first + x.shape[axis] if first < 0 else first
        stop = x.shape[axis] if count == -1 else start + count
        if not 0 <= start <= stop <= x.shape[axis]:
            raise Unsupported(f"slice_by_size takes {count} from {first} on an axis of {x.shape[axis]}")
        x = x.narrow(axis, start, stop - start)
    return x


OPERATORS: Mapping[str, Operator] = {
    "slice_by_index": slice_by_index,
    "slice_by_size": slice_by_size,
    "slice_update": slice_update,
}
