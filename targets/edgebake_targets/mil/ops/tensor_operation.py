"""Operators that join, cut, fill and measure tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch

from edgebake_targets.mil.call import Call, Operator, Unsupported, Value
from edgebake_targets.mil.ops._shapes import bounded, position


def concat(call: Call) -> torch.Tensor:
    """One behind the other, or taking turns along ``axis`` when ``interleave`` is set."""
    values = call.many("values")
    if all(value.ndim == 0 for value in values):
        return torch.stack(values)
    axis = position(call, call.integer("axis"), values[0].ndim)
    if not call.flag("interleave", False):
        return torch.cat(values, axis)
    if len({value.shape for value in values}) != 1:
        raise ValueError("concat interleaves tensors of different shapes")
    return torch.stack(values, axis + 1).flatten(axis, axis + 1)


def stack(call: Call) -> torch.Tensor:
    """Behind one another along a new axis."""
    values = call.many("values")
    return torch.stack(values, position(call, call.integer("axis"), values[0].ndim + 1))


def split(call: Call) -> tuple[torch.Tensor, ...]:
    """Parts of ``split_sizes`` along ``axis``, or ``num_splits`` equal ones."""
    x = call["x"]
    axis = position(call, call.integer("axis"), x.ndim)
    whole = x.shape[axis]
    if call.get("split_sizes") is not None:
        sizes = call.integers("split_sizes")
    else:
        count = max(call.integer("num_splits"), 1)
        sizes = [whole // count] * count
    if min(sizes, default=-1) < 0 or sum(sizes) != whole:
        raise ValueError(f"split of an axis of {whole} in parts of {sizes}")
    return torch.split_with_sizes(x, sizes, axis)


def tile(call: Call) -> torch.Tensor:
    """The whole of ``x``, ``reps`` times along each axis."""
    x, times = call["x"], call.integers("reps")
    if len(times) != x.ndim:
        raise ValueError(f"tile of a tensor of rank {x.ndim} with reps {times}")
    bounded(call, [size * count for size, count in zip(x.shape, times, strict=True)])
    return x.repeat(times) if x.ndim else x


def _filled(call: Call, shape: list[int]) -> torch.Tensor:
    value = call.get("value")
    value = torch.zeros(()) if value is None else value
    return value.reshape(()).expand(bounded(call, shape)).clone()


def fill(call: Call) -> torch.Tensor:
    """A tensor of ``shape`` that holds one value."""
    return _filled(call, call.integers("shape"))


def fill_like(call: Call) -> torch.Tensor:
    """A tensor of the shape of another that holds one value."""
    return _filled(call, list(call["ref_tensor"].shape))


def shape(call: Call) -> torch.Tensor:
    """The sizes of ``x``."""
    return torch.tensor(call["x"].shape, dtype=torch.int32)


def identity(call: Call) -> Value:
    """``x`` itself, whatever it is."""
    return call.inputs["x"]


def flatten2d(call: Call) -> torch.Tensor:
    """All axes before ``axis`` in one, all others in a second."""
    x, axis = call["x"], call.integer("axis", 1)
    if not -x.ndim <= axis <= x.ndim:
        raise ValueError(f"flatten2d at axis {axis} of a tensor of rank {x.ndim}")
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def range_1d(call: Call) -> torch.Tensor:
    """``start``, ``start + step``, … below ``end``.

    How many is computed in the declared type, as the converter does: rounding decides whether one more fits.
    """
    start, end, step = (call[name].reshape(()) for name in ("start", "end", "step"))
    if step == 0:
        raise Unsupported("range_1d with a step of 0")
    declared = np.float16 if getattr(call.outputs[0], "dtype", "") == "float16" else np.float32
    if start.dtype.is_floating_point:
        steps = (declared(end.item()) - declared(start.item())) / declared(step.item())
    else:
        steps = np.float64((end.item() - start.item()) / step.item())
    if not np.isfinite(steps):
        raise Unsupported(f"range_1d from {start.item()} to {end.item()} by {step.item()}")
    (count,) = bounded(call, [max(0, math.ceil(steps))])
    return start + torch.arange(count, dtype=start.dtype) * step


def one_hot(call: Call) -> torch.Tensor:
    """An index outside the vector, negative ones included, marks nothing."""
    indices, size = call["indices"], call.integer("one_hot_vector_size")
    axis = position(call, call.integer("axis", -1), indices.ndim + 1)
    on, off = call.get("on_value"), call.get("off_value")
    if on is None:
        on = torch.tensor(1, dtype=torch.int32 if off is None else off.dtype)
    if off is None:
        off = torch.zeros((), dtype=on.dtype)
    bounded(call, [*indices.shape, size])
    place = torch.arange(size).reshape([-1 if i == axis else 1 for i in range(indices.ndim + 1)])
    return torch.where(indices.unsqueeze(axis) == place, on.reshape(()), off.reshape(()))


def non_zero(call: Call) -> torch.Tensor:
    """One row of indices for each value that is not zero, in row-major order."""
    return call["x"].nonzero().int()


def band_part(call: Call) -> torch.Tensor:
    """Zero outside ``lower`` diagonals below and ``upper`` above the main one; a negative number keeps all."""
    x, lower, upper = call["x"], call.integer("lower", -1), call.integer("upper", -1)
    if x.ndim < 2:
        raise ValueError(f"band_part of a tensor of rank {x.ndim}; it needs matrices")
    below = torch.arange(x.shape[-2]).unsqueeze(1) - torch.arange(x.shape[-1])
    kept = torch.ones_like(below, dtype=torch.bool)
    if lower >= 0:
        kept &= below <= lower
    if upper >= 0:
        kept &= -below <= upper
    return torch.where(kept, x, torch.zeros((), dtype=x.dtype))


def _padded_constant(call: Call, x: torch.Tensor, axis: int, before: int, after: int) -> torch.Tensor:
    value = call.get("constant_val")
    shape = list(x.shape)
    shape[axis] += before + after
    result = x.new_full(bounded(call, shape), 0 if value is None else value.item())
    result.narrow(axis, before, x.shape[axis]).copy_(x)
    return result


def _padded_reflect(call: Call, x: torch.Tensor, axis: int, before: int, after: int) -> torch.Tensor:
    last = x.shape[axis] - 1
    if max(before, after) > last:
        raise Unsupported(
            f"{call.operator} reflects {[before, after]} on an axis of {last + 1}; at most {last} are there"
        )
    index = torch.arange(-before, last + 1 + after).abs()
    return x.index_select(axis, last - (last - index).abs())


def _padded_replicate(call: Call, x: torch.Tensor, axis: int, before: int, after: int) -> torch.Tensor:
    size = x.shape[axis]
    if not size:
        raise Unsupported(f"{call.operator} replicates the edge of an axis of 0")
    bounded(call, [*x.shape[:axis], size + before + after, *x.shape[axis + 1 :]])
    return x.index_select(axis, torch.arange(-before, size + after).clamp(0, size - 1))


_PADDINGS = {"constant": _padded_constant, "reflect": _padded_reflect, "replicate": _padded_replicate}


def pad(call: Call) -> torch.Tensor:
    """``pad`` holds two numbers for each of the last axes."""
    x, amounts, mode = call["x"], call.integers("pad"), call.text("mode", "constant")
    if mode not in _PADDINGS:
        raise Unsupported(f"pad in the mode {mode!r}")
    if len(amounts) % 2 or len(amounts) > 2 * x.ndim or min(amounts, default=0) < 0:
        raise ValueError(f"pad of {amounts} on a tensor of rank {x.ndim}")
    first = x.ndim - len(amounts) // 2
    for axis, (before, after) in enumerate(zip(amounts[::2], amounts[1::2], strict=True), first):
        if before or after:
            x = _PADDINGS[mode](call, x, axis, before, after)
    return x


OPERATORS: Mapping[str, Operator] = {
    "band_part": band_part,
    "concat": concat,
    "fill": fill,
    "fill_like": fill_like,
    "flatten2d": flatten2d,
    "identity": identity,
    "non_zero": non_zero,
    "one_hot": one_hot,
    "pad": pad,
    "range_1d": range_1d,
    "shape": shape,
    "split": split,
    "stack": stack,
    "tile": tile,
}
