"""Resizing and cropping of the last dimensions, by separable interpolation.

Where nearest neighbours lie is documented nowhere; what is done here is what the operators are tested to do on Macs:
``upsample_nearest_neighbor`` takes element floor(i * in / out), the resizing operators floor((i + 1/2) * in / out).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from edgebake_targets.mil.call import Call, Operator, Unsupported
from edgebake_targets.mil.ops._shapes import bounded


def grid(start: float, end: float, outputs: int, mode: str) -> Tensor:
    """Where ``outputs`` samples lie between two positions that are both inside, as the sampling mode spaces them."""
    size, i = end - start + 1, torch.arange(outputs, dtype=torch.float32)
    if mode in {"STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"}:  # the only modes whose formula reads for an inverted box
        if outputs == 1:
            return torch.tensor([(start + end) / 2 if mode == "ALIGN_CORNERS" else float(start)])
        return torch.linspace(start, end, outputs)  # ends exactly at the end, never beside it
    if end < start:
        raise Unsupported(f"the sampling mode {mode} from {start} back to {end}")
    if mode == "DEFAULT":
        offsets = i * (size / outputs)
    elif mode == "OFFSET_CORNERS":
        offsets = (i + 0.5) * (max(1.0, size - 1) / outputs)
    elif mode == "UNALIGN_CORNERS":
        offsets = (i + 0.5) * (size / outputs) - 0.5
    else:
        raise Unsupported(f"the sampling mode {mode}")
    return start + offsets.clamp(0, size - 1)


def interpolate(x: Tensor, positions: Tensor, axis: int) -> Tensor:
    """``x`` at fractional positions along one axis; positions outside are those of the nearest edge."""
    positions = positions.clamp(0, x.shape[axis] - 1)
    low = positions.floor()
    after = x.index_select(axis, (low + 1).clamp(max=x.shape[axis] - 1).long())
    fraction = (positions - low).reshape(-1, *[1] * (-1 - axis))
    return torch.lerp(x.index_select(axis, low.long()), after, fraction)


def _resized(call: Call, sizes: list[int], mode: str) -> Tensor:
    """Linear interpolation of the last dimensions, of images in torch's own modes by torch's kernel."""
    x = call["x"]
    bounded(call, [*x.shape[: x.ndim - len(sizes)], *sizes])
    own = {"STRICT_ALIGN_CORNERS": True, "UNALIGN_CORNERS": False}.get(mode)
    if own is not None and len(sizes) == 2 and x.numel() > 0 and min(sizes) > 0:
        planes = x.reshape(1, -1, *x.shape[-2:])
        result = functional.interpolate(planes, sizes, mode="bilinear", align_corners=own)
        return result.reshape(*x.shape[:-2], *sizes)
    for axis, outputs in zip(range(-len(sizes), 0), sizes, strict=True):
        x = interpolate(x, grid(0, x.shape[axis] - 1, outputs, mode), axis)
    return x


def _nearest(call: Call, sizes: list[int], *, twice_offset: int) -> Tensor:
    """Element floor((i + offset) * in / out) of the last dimensions, in whole numbers: no rounding decides."""
    x = call["x"]
    bounded(call, [*x.shape[: x.ndim - len(sizes)], *sizes])
    for axis, outputs in zip(range(-len(sizes), 0), sizes, strict=True):
        places = (2 * torch.arange(outputs) + twice_offset) * x.shape[axis] // (2 * outputs)
        x = x.index_select(axis, places)
    return x


def _scaled(call: Call) -> list[int]:
    """Height and width that the scale factors ask for, rounded down in the precision of the factors."""
    one = torch.ones((), dtype=torch.int32)
    scales = [call.inputs.get(f"scale_factor_{name}", one) for name in ("height", "width")]
    sizes = call["x"].shape[-2:]
    return [math.floor(float(scale.reshape(()) * size)) for scale, size in zip(scales, sizes, strict=True)]


def _upsample_nearest_neighbor(call: Call) -> Tensor:
    return _nearest(call, _scaled(call), twice_offset=0)


def _upsample_bilinear(call: Call) -> Tensor:
    """The spacing follows from the sizes, not from the scale factors."""
    align = call.flag("align_corners", True)
    half_pixel = call.flag("half_pixel_centers", not align)
    if align and half_pixel:
        raise Unsupported("upsample_bilinear with align_corners and half_pixel_centers at once")
    mode = "STRICT_ALIGN_CORNERS" if align else "UNALIGN_CORNERS" if half_pixel else "DEFAULT"
    return _resized(call, _scaled(call), mode)


def _resize_nearest_neighbor(call: Call) -> Tensor:
    sizes = [call.integer("target_size_height"), call.integer("target_size_width")]
    return _nearest(call, sizes, twice_offset=1)


def _resize_bilinear(call: Call) -> Tensor:
    sizes = [call.integer("target_size_height", 1), call.integer("target_size_width", 1)]
    return _resized(call, sizes, call.text("sampling_mode", "DEFAULT"))


def _resize(call: Call) -> Tensor:
    """The last ``resized_dims`` sizes come from the end of ``shape``; a zero there keeps the size."""
    x, dims = call["x"], call.integer("resized_dims")
    kind, mode = call.text("interpolation_mode", "LINEAR"), call.text("sampling_mode", "DEFAULT")
    if kind == "NEAREST_NEIGHBOR" and mode not in {"DEFAULT", "UNALIGN_CORNERS"}:
        raise Unsupported(
            f"resize to nearest neighbours with the sampling mode {mode}: where they lie is not documented"
        )
    if kind not in {"NEAREST_NEIGHBOR", "LINEAR"} or (kind == "LINEAR" and not x.is_floating_point()):
        raise Unsupported(f"resize of {x.dtype} with the interpolation mode {kind}")
    asked = call.integers("shape")
    if not 0 <= dims <= min(len(asked), x.ndim):
        raise ValueError(f"resize of the last {dims} dimensions of {x.ndim}, with {len(asked)} sizes")
    sizes = [asked[axis] or x.shape[axis] for axis in range(-dims, 0)]
    return _resized(call, sizes, mode) if kind == "LINEAR" else _nearest(call, sizes, twice_offset=1)


def _crop(call: Call) -> Tensor:
    x = call["x"]
    (top, bottom), (left, right) = call.integers("crop_height"), call.integers("crop_width")
    return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right].clone()


OPERATORS: Mapping[str, Operator] = {
    "crop": _crop,
    "resize": _resize,
    "resize_bilinear": _resize_bilinear,
    "resize_nearest_neighbor": _resize_nearest_neighbor,
    "upsample_bilinear": _upsample_bilinear,
    "upsample_nearest_neighbor": _upsample_nearest_neighbor,
}
