"""Pooling over one to three spatial dimensions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from edgebake_targets.mil.call import Call, Operator, Unsupported
from edgebake_targets.mil.half import half_sum, to_half
from edgebake_targets.mil.windows import Amounts, flat, padding, windows

_MAX = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)
_AVERAGE = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)


@dataclass(frozen=True, kw_only=True)
class _Geometry:
    """``amounts`` is the declared padding, ``tail`` what the last window needs beyond it where sizes are rounded up."""

    spatial: tuple[int, ...]
    kernel: list[int]
    strides: list[int]
    amounts: Amounts
    tail: list[int]

    def counts(self, with_padding: bool) -> Tensor:
        """How many elements each window holds: an outer product over the dimensions, shaped like an output plane."""
        total = torch.ones(())
        for size, kernel, stride, (before, after), tail in zip(
            self.spatial, self.kernel, self.strides, self.amounts, self.tail, strict=True
        ):
            first = torch.arange(0, size + before + after + tail - kernel + 1, stride) - before
            low, high = (-before, size + after) if with_padding else (0, size)
            total = total.unsqueeze(-1) * ((first + kernel).clamp(max=high) - first.clamp(min=low)).clamp(min=0)
        return total


def _geometry(call: Call) -> _Geometry:
    spatial, kernel = tuple(call["x"].shape[2:]), call.integers("kernel_sizes")
    if not 1 <= len(spatial) <= len(_MAX) or len(kernel) != len(spatial):
        raise ValueError(f"{call.operator} of rank {len(spatial) + 2} by a window of rank {len(kernel)}")
    strides = call.integers("strides", [1] * len(spatial))
    amounts = padding(call, spatial, kernel, strides)
    tail = [0] * len(spatial)
    if call.flag("ceil_mode", False):
        _check_ceil(call, amounts)
        tail = [_tail(*one) for one in zip(spatial, kernel, strides, amounts, strict=True)]
    return _Geometry(spatial=spatial, kernel=kernel, strides=strides, amounts=amounts, tail=tail)


def _check_ceil(call: Call, amounts: Amounts) -> None:
    if len(amounts) > 2 or call.text("pad_type", "valid").startswith("same") or any(a != b for a, b in amounts):
        raise Unsupported(f"{call.operator} with ceil_mode and three dimensions, pad_type same or uneven padding")


def _tail(size: int, kernel: int, stride: int, amounts: tuple[int, int]) -> int:
    """How far the last window reaches past the padding. It is left out if it would start behind the elements."""
    total = size + sum(amounts)
    outputs = -(-(total - kernel) // stride) + 1
    if (outputs - 1) * stride >= size + amounts[0] and sum(amounts) > 0:
        outputs -= 1
    return max(0, (outputs - 1) * stride + kernel - total)


def _padded(x: Tensor, geometry: _Geometry, value: float) -> Tensor:
    amounts = [(a, b + tail) for (a, b), tail in zip(geometry.amounts, geometry.tail, strict=True)]
    return functional.pad(x, flat(amounts), value=value) if any(map(any, amounts)) else x


def _windows(x: Tensor, geometry: _Geometry) -> tuple[Tensor, list[int]]:
    """All windows and the dimensions that lie inside one."""
    view = windows(_padded(x, geometry, 0.0), geometry.kernel, geometry.strides, [1] * len(geometry.kernel))
    return view, list(range(x.ndim, view.ndim))


def _max_pool(call: Call) -> Tensor:
    geometry = _geometry(call)
    _refuse_empty(call, geometry.counts(with_padding=False))
    x = _padded(call["x"], geometry, -math.inf)
    return _MAX[len(geometry.kernel) - 1](x, geometry.kernel, geometry.strides)


def _avg_pool(call: Call) -> Tensor:
    geometry = _geometry(call)
    counts = geometry.counts(with_padding=not call.flag("exclude_padding_from_average", False))
    _refuse_empty(call, counts)
    if call.half_sums:
        return to_half(half_sum(*_windows(call["x"], geometry)) / counts)
    whole = math.prod(geometry.kernel)
    average = _AVERAGE[len(geometry.kernel) - 1](_padded(call["x"], geometry, 0.0), geometry.kernel, geometry.strides)
    return average if bool((counts == whole).all()) else average * (whole / counts)


def _l2_pool(call: Call) -> Tensor:
    geometry = _geometry(call)
    if len(geometry.kernel) > 2:
        raise Unsupported("l2_pool of more than two spatial dimensions")
    squares, inside = _windows(call["x"] * call["x"], geometry)
    if call.half_sums:
        return to_half(torch.sqrt(half_sum(to_half(squares), inside)))
    return torch.sqrt(squares.sum(inside))


def _refuse_empty(call: Call, counts: Tensor) -> None:
    if bool((counts == 0).any()):
        raise Unsupported(f"{call.operator} with a window that holds no element")


OPERATORS: Mapping[str, Operator] = {"avg_pool": _avg_pool, "l2_pool": _l2_pool, "max_pool": _max_pool}
