"""Operators that only rearrange: reshape, transpose, squeeze, reverse, windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch

from edgebake_targets.mil.call import Call, Operator, Unsupported
from edgebake_targets.mil.ops._shapes import bounded, position, positions


def _inherited(call: Call, asked: Sequence[int], given: Sequence[int]) -> list[int]:
    """``asked`` with each 0 replaced by the size of ``given`` that it stands for.

    Until iOS 16 the one at the same index, and the ranks must agree; since iOS 17 counted from the right, and 1 where
    ``given`` has no such axis.
    """
    if 0 not in asked:
        return list(asked)
    if not call.since(7):
        if len(asked) != len(given):
            raise Unsupported(f"reshape of {list(given)} to {list(asked)}: before iOS 17 a 0 needs the same rank")
        return [old if new == 0 else new for new, old in zip(asked, given, strict=True)]
    shift = len(given) - len(asked)
    return [new or (given[i + shift] if i + shift >= 0 else 1) for i, new in enumerate(asked)]


def reshape(call: Call) -> torch.Tensor:
    """``0`` inherits a size, one ``-1`` takes what is left."""
    x, asked = call["x"], call.integers("shape")
    shape = _inherited(call, asked, x.shape)
    if shape.count(-1) > 1:
        raise ValueError(f"reshape to {asked}: more than one -1")
    if -1 in shape:
        others = prod(size for size in shape if size != -1)
        if not others or x.numel() % others:
            raise ValueError(f"reshape of {list(x.shape)} to {asked}: -1 has no size that fits")
        shape[shape.index(-1)] = x.numel() // others
    if min(shape, default=0) < 0 or prod(shape) != x.numel():
        raise ValueError(f"reshape of {list(x.shape)} to {asked}: {x.numel()} values do not fit")
    return x.reshape(shape)


def reshape_like(call: Call) -> torch.Tensor:
    """The new shape is put together from parts of the shapes of other tensors."""
    names = ("ref_tensors", "begins", "ends", "end_masks")
    parts = [call.many(name) for name in names]
    if len({len(part) for part in parts}) != 1:
        raise ValueError(f"reshape_like with {', '.join(names)} of different lengths")
    shape: list[int] = []
    for reference, begin, end, to_the_end in zip(*parts, strict=True):
        shape += reference.shape[int(begin) : None if bool(to_the_end) else int(end)]
    x = call["x"]
    if prod(shape) != x.numel():
        raise ValueError(f"reshape_like of {list(x.shape)} to {shape}: {x.numel()} values do not fit")
    return x.reshape(shape)


def expand_dims(call: Call) -> torch.Tensor:
    """Axes of size one; ``axes`` count in the result."""
    x, axes = call["x"], call.integers("axes")
    new = positions(call, axes, x.ndim + len(axes))
    if len(new) != len(axes):
        raise ValueError(f"expand_dims with axes {axes}: one is named twice")
    for axis in new:
        x = x.unsqueeze(axis)
    return x


def squeeze(call: Call) -> torch.Tensor:
    """Drops axes of size one; those of another size stay even when they are named."""
    x = call["x"]
    axes = positions(call, call.integers("axes", range(x.ndim)), x.ndim)
    return x.reshape([size for axis, size in enumerate(x.shape) if axis not in axes or size != 1])


def transpose(call: Call) -> torch.Tensor:
    """The axes in the order of ``perm``."""
    x, order = call["x"], call.integers("perm")
    if sorted(position(call, axis, x.ndim) for axis in order) != list(range(x.ndim)):
        raise ValueError(f"transpose of a tensor of rank {x.ndim} with perm {order}")
    return x.permute(order)


def reverse(call: Call) -> torch.Tensor:
    """The elements along ``axes``, or all axes, in reverse order."""
    x = call["x"]
    return x.flip(positions(call, call.integers("axes", range(x.ndim)), x.ndim))


def reverse_sequence(call: Call) -> torch.Tensor:
    """Of each row along ``batch_axis`` the first ``lengths[row]`` elements along ``seq_axis`` are turned round."""
    x, lengths = call["x"], call["lengths"].reshape(-1).long()
    along = position(call, call.integer("seq_axis", 0), x.ndim)
    batch = position(call, call.integer("batch_axis", 0), x.ndim)
    if along == batch:
        raise Unsupported(f"reverse_sequence with seq_axis and batch_axis both {along}")
    if len(lengths) != x.shape[batch] or (len(lengths) and not 0 <= lengths.min() <= lengths.max() <= x.shape[along]):
        raise Unsupported(f"reverse_sequence of {list(x.shape)} with lengths {lengths.tolist()}")
    lengths = lengths.reshape([-1 if axis == batch else 1 for axis in range(x.ndim)])
    here = torch.arange(x.shape[along]).reshape([-1 if axis == along else 1 for axis in range(x.ndim)])
    return x.take_along_dim(torch.where(here < lengths, lengths - 1 - here, here), along)


def sliding_windows(call: Call) -> torch.Tensor:
    """All windows along ``axis``; the elements of a window lie along the axis behind it."""
    x, size, stride = call["x"], call.integer("size"), call.integer("stride", 1)
    axis = position(call, call.integer("axis"), x.ndim)
    if not 0 < size <= x.shape[axis] or stride < 1:
        raise ValueError(f"sliding_windows of {size} every {stride} on an axis of {x.shape[axis]}")
    bounded(call, [*x.shape[:axis], (x.shape[axis] - size) // stride + 1, size, *x.shape[axis + 1 :]])
    return x.unfold(axis, size, stride).movedim(-1, axis + 1)


OPERATORS: Mapping[str, Operator] = {
    "expand_dims": expand_dims,
    "reshape": reshape,
    "reshape_like": reshape_like,
    "reverse": reverse,
    "reverse_sequence": reverse_sequence,
    "sliding_windows": sliding_windows,
    "squeeze": squeeze,
    "transpose": transpose,
}
