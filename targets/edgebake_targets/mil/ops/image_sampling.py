"""Sampling of images at given places: boxes, affine maps, coordinate fields."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from edgebake_targets.mil.call import Call, Operator, Unsupported
from edgebake_targets.mil.ops._shapes import bounded
from edgebake_targets.mil.ops.image_resizing import grid, interpolate

_Corners = tuple[float, float, float, float]  # top, left, bottom, right


def _crop_resize(call: Call) -> Tensor:
    """Before iOS 17 a region is (n, 1, 4 or 5, 1, 1) and the result has a dimension for the image."""
    x = call["x"]
    if call.since(7):
        boxes = call["boxes"].float()
        indices = call.integers("box_indices", range(len(boxes)))
        return _stacked(
            [_region(call, _chosen(call, x, i)[0], box) for i, box in zip(indices, boxes, strict=True)], call
        )
    regions = call["roi"].reshape(len(call["roi"]), -1)
    images = [_chosen(call, x, int(region[0])) if regions.shape[1] == 5 else x for region in regions]
    return _stacked([_region(call, image, box[-4:]) for image, box in zip(images, regions, strict=True)], call)


def _chosen(call: Call, x: Tensor, index: int) -> Tensor:
    if not 0 <= index < len(x):
        raise Unsupported(f"{call.operator} of image {index} of {len(x)}")
    return x[index : index + 1]


def _stacked(regions: list[Tensor], call: Call) -> Tensor:
    if regions:
        return torch.stack(regions)
    sizes = (call["x"].shape[1], call.integer("target_height", 1), call.integer("target_width", 1))
    return torch.zeros(0, *sizes) if call.since(7) else torch.zeros(0, call["x"].shape[0], *sizes)


def _region(call: Call, image: Tensor, box: Tensor) -> Tensor:
    """One box of ``(..., height, width)``; samples outside the image are ``pad_value``."""
    mode = call.text("sampling_mode", "DEFAULT")
    bounded(call, [*image.shape[:-2], call.integer("target_height", 1), call.integer("target_width", 1)])
    top, left, bottom, right = _corners(call, box, image.shape[-2], image.shape[-1])
    rows = grid(top, bottom, call.integer("target_height", 1), mode)
    columns = grid(left, right, call.integer("target_width", 1), mode)
    inside = [(at >= 0) & (at <= size - 1) for at, size in ((rows, image.shape[-2]), (columns, image.shape[-1]))]
    result = interpolate(interpolate(image, rows, -2), columns, -1)
    whole = inside[0].unsqueeze(-1) & inside[1]
    if bool(whole.all()):
        return result
    if not call.since(6):
        raise Unsupported("crop_resize with a box beyond the image: before iOS 16 its values are not defined")
    return torch.where(whole, result, call.number("pad_value", 0.0))


def _corners(call: Call, box: Tensor, height: int, width: int) -> _Corners:
    mode = call.text("box_coordinate_mode", "CORNERS_HEIGHT_FIRST")
    a, b, c, d = box.tolist()
    if mode.endswith("_WIDTH_FIRST"):
        a, b, c, d = b, a, d, c
    elif not mode.endswith("_HEIGHT_FIRST"):
        raise Unsupported(f"crop_resize with the box_coordinate_mode {mode}")
    if mode.startswith("CENTER_SIZE"):
        a, b, c, d = a - c / 2, b - d / 2, a + c / 2, b + d / 2
    scale = call.number("spatial_scale", 1.0)
    normalized = call.flag("normalized_coordinates", False)
    vertical, horizontal = ((height - 1) * scale, (width - 1) * scale) if normalized else (scale, scale)
    return a * vertical, b * horizontal, c * vertical, d * horizontal


def _affine(call: Call) -> Tensor:
    x, matrix = call["x"], call["transform_matrix"].reshape(-1, 2, 3)
    height, width = call.integer("output_height"), call.integer("output_width")
    bounded(call, [*x.shape[:2], height, width])
    chosen = (call.text("sampling_mode"), call.text("padding_mode"), call.text("coordinates_mode"))
    plain = ("bilinear", "constant", "normalized_minus_one_to_one")
    if tuple(text.lower() for text in chosen) != plain or not call.flag("align_corners") or min(height, width) < 2:
        raise Unsupported(f"affine to {height} x {width} with {', '.join(chosen)}; align_corners is needed")
    if call.number("padding_value") != 0:
        raise Unsupported("affine with a padding_value other than 0")
    down, across = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    ones = torch.ones(height, width)
    places = torch.stack([across.expand(height, width), down.unsqueeze(1).expand(height, width), ones], -1)
    mapped = (places @ matrix.transpose(1, 2).unsqueeze(1)).expand(len(x), -1, -1, -1)
    return _sample_bilinear(x, _unnormalized(mapped, x, "normalized_minus_one_to_one", align=True), 0.0)


def _resample(call: Call) -> Tensor:
    x, align = call["x"], call.flag("align_corners")
    at = _unnormalized(call["coordinates"].float(), x, call.text("coordinates_mode"), align=align)
    padding, kind = call.text("padding_mode"), call.text("sampling_mode")
    outside = call.number("padding_value") if padding == "constant" else None
    at = torch.stack([_folded(at[..., axis], x.shape[-1 - axis], padding) for axis in (0, 1)], -1)
    if kind == "bilinear":
        return _sample_bilinear(x, at, outside)
    if kind == "nearest":
        return _at(x, at.round(), outside)
    raise Unsupported(f"resample with the sampling_mode {kind}")


def _unnormalized(coordinates: Tensor, x: Tensor, mode: str, *, align: bool) -> Tensor:
    """Coordinates (x, y) in elements, 0 being the centre of the first one."""
    if mode == "unnormalized":
        return coordinates
    if mode not in {"normalized_minus_one_to_one", "normalized_zero_to_one"}:
        raise Unsupported(f"the coordinates_mode {mode}")
    size = torch.tensor([x.shape[-1], x.shape[-2]], dtype=torch.float32)
    share = (coordinates + 1) / 2 if mode == "normalized_minus_one_to_one" else coordinates
    return share * (size - 1) if align else share * size - 0.5


def _folded(at: Tensor, size: int, padding: str) -> Tensor:
    """Positions outside brought back to where the padding has its value from."""
    if padding == "constant":
        return at
    if padding == "border":
        return at.clamp(0, size - 1)
    if padding == "symmetric":  # mirrored at the outer edge of the first and last element
        folded = size - (torch.remainder(at + 0.5, 2 * size) - size).abs() - 0.5
        return folded.clamp(0, size - 1)
    if padding != "reflection":
        raise Unsupported(f"resample with the padding_mode {padding}")
    if size == 1:
        return torch.zeros_like(at)
    return size - 1 - (torch.remainder(at, 2 * (size - 1)) - (size - 1)).abs()


def _sample_bilinear(x: Tensor, at: Tensor, outside: float | None) -> Tensor:
    low = at.floor()
    across, down = (at - low).unsqueeze(1).unbind(-1)
    left_top, right_top, left_bottom, right_bottom = (
        _at(x, low + torch.tensor([float(dx), float(dy)]), outside) for dy in (0, 1) for dx in (0, 1)
    )
    top, bottom = torch.lerp(left_top, right_top, across), torch.lerp(left_bottom, right_bottom, across)
    return torch.lerp(top, bottom, down)


def _at(x: Tensor, at: Tensor, outside: float | None) -> Tensor:
    """The elements at whole positions (n, h, w, 2); those outside the image are ``outside``, or of the edge."""
    height, width = x.shape[-2:]
    columns, rows = at.unbind(-1)
    index = rows.clamp(0, height - 1).long() * width + columns.clamp(0, width - 1).long()
    found = x.flatten(2).gather(2, index.flatten(1).unsqueeze(1).expand(-1, x.shape[1], -1))
    found = found.reshape(*x.shape[:2], *at.shape[1:3])
    if outside is None:
        return found
    inside = (rows >= 0) & (rows <= height - 1) & (columns >= 0) & (columns <= width - 1)
    return torch.where(inside.unsqueeze(1), found, outside)


OPERATORS: Mapping[str, Operator] = {"affine": _affine, "crop_resize": _crop_resize, "resample": _resample}
