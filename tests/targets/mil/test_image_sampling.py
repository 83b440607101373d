"""Boxes, affine maps and coordinate fields: values measured on Macs, torch's grid_sample, loops over padded images."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from edgebake_targets.mil.call import Unsupported
from mil_ops import assert_close, run

Array = npt.NDArray[Any]

SQUARE = np.arange(1.0, 17.0).reshape(1, 1, 4, 4)
TWO = np.array([11.0, 22.0, 33.0, 44.0]).reshape(1, 1, 2, 2)


def _random(shape: tuple[int, ...], low: float | None = None, high: float | None = None) -> Array:
    random = np.random.default_rng(list(shape))
    values = random.standard_normal(shape) if low is None or high is None else random.uniform(low, high, shape)
    return values.astype(np.float32)


@pytest.mark.parametrize(
    ("box", "size", "normalized", "expected"),
    [
        ([1, 1, 2, 2], 2, False, [6, 7, 10, 11]),
        ([1, 1, 2, 2], 1, False, [8.5]),
        ([1, 1, 2, 2], 4, False, np.add.outer(np.linspace(6, 10, 4), np.linspace(0, 1, 4)).reshape(-1)),
        ([0, 0, 1 / 3, 1 / 3], 2, True, [1, 2, 5, 6]),
        ([2, 2, 1, 1], 2, False, [11, 10, 7, 6]),
    ],
)
@pytest.mark.parametrize("opset", ["CoreML5", "CoreML6", "CoreML8"])
@pytest.mark.parametrize("indexed", [True, False])
def test_crop_resize_as_measured(
    box: list[float], size: int, normalized: bool, expected: Any, opset: str, indexed: bool
) -> None:
    inputs = {"x": SQUARE, "target_height": size, "target_width": size, "sampling_mode": "ALIGN_CORNERS"}
    if opset == "CoreML8":
        inputs |= {"boxes": [box], "box_indices": [0] if indexed else None}
    else:
        inputs["roi"] = np.array([[0.0, *box] if indexed else box]).reshape(1, 1, -1, 1, 1)
    result = run("crop_resize", opset=opset, **inputs, normalized_coordinates=normalized)
    assert_close(result, np.reshape(expected, (1, 1, size, size) if opset == "CoreML8" else (1, 1, 1, size, size)))


@pytest.mark.parametrize("pad_value", [None, 0.0, 1.0, 10.0])
@pytest.mark.parametrize("opset", ["CoreML6", "CoreML7"])
def test_crop_resize_beyond_the_image_as_measured(pad_value: float | None, opset: str) -> None:
    boxes = np.array([[0.1, 0.3, 1.3, 1.0], [0.5, 1.8, 1.0, 0.3], [0.0, 0.4, 0.6, 0.7]])
    inputs = {"x": SQUARE, "target_height": 2, "target_width": 2, "sampling_mode": "ALIGN_CORNERS"}
    if opset == "CoreML7":
        inputs |= {"boxes": boxes, "box_indices": [0, 0, 0]}
    else:
        inputs["roi"] = np.insert(boxes, 0, 0, axis=1).reshape(3, 1, 5, 1, 1)
    result = run("crop_resize", opset=opset, **inputs, normalized_coordinates=True, pad_value=pad_value)
    p = 0.0 if pad_value is None else pad_value
    expected = np.array([3.1, 5.2, p, p, p, 7.9, p, 13.9, 2.2, 3.1, 9.4, 10.3])
    assert_close(result, expected.reshape((3, 1, 2, 2) if opset == "CoreML7" else (3, 1, 1, 2, 2)))


def _bilinear(image: Array, row: float, column: float) -> Array:
    """One value between four elements of (channels, height, width)."""
    top, left = math.floor(row), math.floor(column)
    bottom, right = min(top + 1, image.shape[1] - 1), min(left + 1, image.shape[2] - 1)
    upper = image[:, top, left] * (1 - column + left) + image[:, top, right] * (column - left)
    lower = image[:, bottom, left] * (1 - column + left) + image[:, bottom, right] * (column - left)
    return upper * (1 - row + top) + lower * (row - top)


def _spaced(start: Any, end: Any, outputs: int, mode: str) -> list[float]:
    size = end - start + 1
    spacing, first = {
        "ALIGN_CORNERS": ((size - 1) / max(outputs - 1, 1), (size - 1) / 2 if outputs == 1 else 0),
        "STRICT_ALIGN_CORNERS": ((size - 1) / max(outputs - 1, 1), 0),
        "DEFAULT": (size / outputs, 0),
        "OFFSET_CORNERS": (max(1, size - 1) / outputs, 0.5 * max(1, size - 1) / outputs),
        "UNALIGN_CORNERS": (size / outputs, 0.5 * size / outputs - 0.5),
    }[mode]
    return [start + min(size - 1, max(0, first + i * spacing)) for i in range(outputs)]


@pytest.mark.parametrize(
    "mode", ["ALIGN_CORNERS", "STRICT_ALIGN_CORNERS", "DEFAULT", "OFFSET_CORNERS", "UNALIGN_CORNERS"]
)
@pytest.mark.parametrize("order", ["CORNERS_HEIGHT", "CORNERS_WIDTH", "CENTER_SIZE_HEIGHT", "CENTER_SIZE_WIDTH"])
@pytest.mark.parametrize("target", [(1, 1), (3, 2), (2, 6)])
def test_crop_resize_of_boxes_inside(mode: str, order: Any, target: tuple[int, int]) -> None:
    """Five random boxes in images of two channels, given in elements after a spatial scale of a half."""
    x = _random((3, 2, 6, 9))
    random = np.random.default_rng(7)
    top, left = random.uniform(0, 2, 5), random.uniform(0, 3, 5)
    bottom, right = top + random.uniform(0, 3, 5), left + random.uniform(0, 5, 5)
    indices = random.integers(0, 3, 5)
    expected = np.empty((5, 2, *target))
    for n, i, j in np.ndindex(5, *target):
        row = _spaced(top[n], bottom[n], target[0], mode)[i]
        column = _spaced(left[n], right[n], target[1], mode)[j]
        expected[n, :, i, j] = _bilinear(x[indices[n]], row, column)
    given = [top, left, bottom, right]
    if order.startswith("CENTER"):
        given = [(top + bottom) / 2, (left + right) / 2, bottom - top, right - left]
    if order.endswith("WIDTH"):
        given = [given[1], given[0], given[3], given[2]]
    inputs = {"x": x, "boxes": 2 * np.stack(given, 1), "box_indices": indices, "spatial_scale": 0.5}
    inputs |= {"target_height": target[0], "target_width": target[1]}
    result = run("crop_resize", **inputs, box_coordinate_mode=f"{order}_FIRST", sampling_mode=mode)
    assert_close(result, expected, 1e-4)


def test_crop_resize_shapes() -> None:
    """Before iOS 17 a region without an index is cut out of every image; later the first box is of the first image."""
    x = _random((2, 3, 5, 5))
    roi = np.array([[0.0, 0, 4, 4], [1, 1, 2, 2]]).reshape(2, 1, 4, 1, 1)
    sizes = {"target_height": 5, "target_width": 5, "sampling_mode": "ALIGN_CORNERS"}
    result = run("crop_resize", opset="CoreML6", x=x, roi=roi, **sizes)
    assert result.shape == (2, 2, 3, 5, 5)
    assert_close(result[0], x)
    assert_close(run("crop_resize", x=x, boxes=[[0.0, 0, 4, 4]] * 2, **sizes), x)
    assert run("crop_resize", x=x, boxes=np.zeros((0, 4)), **sizes).shape == (0, 3, 5, 5)
    assert run("crop_resize", x=x, boxes=[[0.0, 0, 4, 4]]).shape == (1, 3, 1, 1)


def test_crop_resize_refusals() -> None:
    with pytest.raises(Unsupported, match="before iOS 16 its values are not defined"):
        roi = np.array([0.0, 0, 4, 4]).reshape(1, 1, 4, 1, 1)
        run("crop_resize", opset="CoreML5", x=SQUARE, roi=roi, target_height=2, sampling_mode="ALIGN_CORNERS")
    with pytest.raises(Unsupported, match=r"the sampling mode UNALIGN_CORNERS from 2.0 back to 1.0"):
        run("crop_resize", x=SQUARE, boxes=[[2.0, 2, 1, 1]], sampling_mode="UNALIGN_CORNERS")
    with pytest.raises(Unsupported, match="crop_resize of image 3 of 1"):
        run("crop_resize", x=SQUARE, boxes=[[0.0, 0, 1, 1]], box_indices=[3])
    with pytest.raises(Unsupported, match="box_coordinate_mode CORNERS"):
        run("crop_resize", x=SQUARE, boxes=[[0.0, 0, 1, 1]], box_coordinate_mode="CORNERS")


AFFINE = {"sampling_mode": "bilinear", "padding_mode": "constant", "padding_value": 0.0}
AFFINE |= {"coordinates_mode": "normalized_minus_one_to_one", "align_corners": True}


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((3, 3), [10.7525, 2.5025, 0, 1.98, 0, 0, 0, 0, 0]), ((2, 5), [10.7525, 5.94, 2.5025, 0.44, 0, 0, 0, 0, 0, 0])],
)
def test_affine_as_measured(sizes: tuple[int, int], expected: list[float]) -> None:
    inputs = {"x": TWO, "transform_matrix": [[-1.0, -2.0, -3.7, -1.0, 3.5, 1.2]], **AFFINE}
    result = run("affine", **inputs, output_height=sizes[0], output_width=sizes[1])
    assert_close(result, np.reshape(expected, (1, 1, *sizes)))


@pytest.mark.parametrize(
    ("shape", "matrices", "sizes"),
    [
        ((1, 1, 3, 3), 1, (3, 3)),
        ((2, 3, 4, 5), 2, (2, 7)),
        ((3, 1, 5, 2), 1, (6, 2)),
        ((2, 2, 1, 4), 2, (3, 3)),
        ((1, 2, 8, 8), 1, (4, 4)),
    ],
)
def test_affine_is_torchs(shape: tuple[int, ...], matrices: int, sizes: tuple[int, int]) -> None:
    x, matrix = torch.tensor(_random(shape)), torch.tensor(_random((matrices, 2, 3)))
    places = torch.nn.functional.affine_grid(matrix.expand(shape[0], 2, 3), [*shape[:2], *sizes], align_corners=True)
    expected = torch.nn.functional.grid_sample(x, places, align_corners=True).numpy()
    inputs = {"x": x, "transform_matrix": matrix.reshape(-1, 6), **AFFINE}
    assert_close(run("affine", **inputs, output_height=sizes[0], output_width=sizes[1]), expected, 1e-4)


@pytest.mark.parametrize(
    "changed",
    [{"align_corners": False}, {"padding_value": 1.0}, {"sampling_mode": "nearest"}, {"output_width": 1}],
)
def test_affine_refusals(changed: dict[str, Any]) -> None:
    inputs = {"x": TWO, "transform_matrix": np.zeros((1, 6)), "output_height": 2, "output_width": 2, **AFFINE}
    with pytest.raises(Unsupported, match=r"affine (to 2 x|with a padding_value)"):
        run("affine", **(inputs | changed))


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    ("sampling", "padding", "value", "mode", "align", "fractional", "integral"),
    [
        ("bilinear", "constant", 6.17, "normalized_minus_one_to_one", True, [8.585, 6.17, 27.5, 6.17], [27.5, 44] * 2),
        ("nearest", "border", -1.0, "unnormalized", False, [11, 11, 11, 44], [11, 44] * 2),
        ("bilinear", "reflection", -1.0, "normalized_zero_to_one", True, [22, 36.3, 11, 34.1], [11, 44] * 2),
        ("nearest", "symmetric", -1.0, "normalized_zero_to_one", False, [22, 33, 11, 33], [11, 44] * 2),
    ],
)
def test_resample_as_measured(
    sampling: str,
    padding: str,
    value: float,
    mode: str,
    align: bool | None,
    fractional: list[float],
    integral: list[float],
    whole: bool,
) -> None:
    at = np.array([0, 0, 1, 1, 0, 0, 1, 1]) if whole else np.array([-1, -2, -3.7, -1, 0, 0, 3.5, 1.2])
    inputs = {"sampling_mode": sampling, "padding_mode": padding, "padding_value": value, "coordinates_mode": mode}
    result = run("resample", x=TWO, coordinates=at.reshape(1, 2, 2, 2), **inputs, align_corners=align)
    assert_close(result, np.reshape(integral if whole else fractional, (1, 1, 2, 2)))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 4, 5), (1, 2, 7, 2), (3, 1, 2, 6), (1, 4, 3, 3)])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize("sampling", ["bilinear", "nearest"])
def test_resample_is_torchs(shape: tuple[int, ...], padding: str, align: bool | None, sampling: str) -> None:
    """Torch mirrors at the outer edge where corners are not aligned, which is ``symmetric`` here."""
    x, at = torch.tensor(_random(shape)), torch.tensor(_random((shape[0], 5, 3, 2), -3, 3))
    expected = torch.nn.functional.grid_sample(x, at, sampling, padding, align_corners=align).numpy()
    names = {"zeros": "constant", "reflection": "reflection" if align else "symmetric"}
    inputs = {"x": x, "coordinates": at, "sampling_mode": sampling, "padding_mode": names.get(padding, padding)}
    inputs |= {"padding_value": 0.0, "coordinates_mode": "normalized_minus_one_to_one", "align_corners": align}
    assert_close(run("resample", **inputs), expected, 1e-4)


@pytest.mark.parametrize("padding", ["constant", "border", "reflection", "symmetric"])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_paddings_are_those_of_a_padded_row(padding: str, size: int) -> None:
    """Unnormalized positions far outside, read from a row that numpy padded."""
    row = _random((size,))
    margin = 2 * size - 2
    numpy_mode: Any = {"constant": "constant", "border": "edge", "reflection": "reflect", "symmetric": "symmetric"}[
        padding
    ]
    options: dict[str, Any] = {"constant_values": 7.0} if padding == "constant" else {}
    padded = np.pad(row.astype(np.float64), margin, mode=numpy_mode, **options)
    at = np.linspace(-margin, size - 1 + margin, 37)
    expected = np.interp(at, np.arange(-margin, size + margin), padded)
    coordinates = np.stack([at, np.zeros_like(at)], -1).reshape(1, 1, -1, 2)
    inputs = {"x": np.tile(row, (1, 1, 3, 1)), "coordinates": coordinates, "sampling_mode": "bilinear"}
    inputs |= {"padding_mode": padding, "padding_value": 7.0, "coordinates_mode": "unnormalized"}
    assert_close(run("resample", **inputs, align_corners=True), expected.reshape(1, 1, 1, -1), 1e-4)


def test_resample_refusals() -> None:
    inputs = {"x": TWO, "coordinates": np.zeros((1, 1, 1, 2)), "padding_value": 0.0, "align_corners": True}
    with pytest.raises(Unsupported, match="padding_mode wrap"):
        run("resample", **inputs, sampling_mode="nearest", padding_mode="wrap", coordinates_mode="unnormalized")
    with pytest.raises(Unsupported, match="sampling_mode cubic"):
        run("resample", **inputs, sampling_mode="cubic", padding_mode="border", coordinates_mode="unnormalized")
    with pytest.raises(Unsupported, match="coordinates_mode pixels"):
        run("resample", **inputs, sampling_mode="nearest", padding_mode="border", coordinates_mode="pixels")
