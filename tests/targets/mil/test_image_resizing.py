"""Resizing: values measured on Macs (coremltools' own tests of these operators), torch's interpolation, loops."""

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

MODES = ["STRICT_ALIGN_CORNERS", "ALIGN_CORNERS", "DEFAULT", "OFFSET_CORNERS", "UNALIGN_CORNERS"]
SHAPES = [(1, 2, 2), (2, 3, 4, 5), (1, 1, 1, 1), (1, 2, 7, 3), (2, 1, 2, 5, 4)]
TARGETS = [(5, 3), (1, 1), (4, 9), (2, 2)]


def _random(shape: tuple[int, ...]) -> Array:
    return np.random.default_rng(list(shape)).standard_normal(shape).astype(np.float32)


def grid_point(i: int, size: int, outputs: int, mode: str) -> float:
    """Position ``i`` as the documentation of resize_bilinear states it."""
    if mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        if outputs == 1:
            return (size - 1) / 2 if mode == "ALIGN_CORNERS" else 0.0
        at = i * (size - 1) / (outputs - 1)
    elif mode == "DEFAULT":
        at = i * (size - size / outputs) / (outputs - 1) if outputs > 1 else 0.0
    elif mode == "OFFSET_CORNERS":
        delta = max(1, size - 1) / outputs
        at = 0.5 * delta + i * delta
    else:
        at = i * size / outputs + 0.5 * size / outputs - 0.5
    return min(size - 1, max(0.0, at))


def _along(x: Array, axis: int, outputs: int, mode: str) -> Array:
    """Linear interpolation along one axis, one output after the other."""
    rows = []
    for i in range(outputs):
        at = grid_point(i, x.shape[axis], outputs, mode)
        low, high = math.floor(at), min(math.floor(at) + 1, x.shape[axis] - 1)
        rows.append((1 - at + low) * x.take(low, axis) + (at - low) * x.take(high, axis))
    return np.stack(rows, axis)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("STRICT_ALIGN_CORNERS", [0, 0.25, 0.5, 0.75, 1]),
        ("ALIGN_CORNERS", [0, 0.25, 0.5, 0.75, 1]),
        ("DEFAULT", [0, 0.4, 0.8, 1, 1]),
        ("OFFSET_CORNERS", [0.1, 0.3, 0.5, 0.7, 0.9]),
        ("UNALIGN_CORNERS", [0, 0.1, 0.5, 0.9, 1]),
    ],
)
def test_sampling_modes_as_measured(mode: str, expected: list[float]) -> None:
    x = np.array([0.0, 1.0]).reshape(1, 1, 2)
    assert_close(run("resize_bilinear", x=x, target_size_width=5, sampling_mode=mode), [[expected]])
    assert_close(run("resize", x=x, shape=[1, 1, 5], resized_dims=2, sampling_mode=mode), [[expected]])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("mode", MODES)
def test_resize_bilinear(shape: tuple[int, ...], target: tuple[int, int], mode: str) -> None:
    x = _random(shape)
    expected = _along(_along(x.astype(np.float64), x.ndim - 2, target[0], mode), x.ndim - 1, target[1], mode)
    sizes = {"target_size_height": target[0], "target_size_width": target[1]}
    assert_close(run("resize_bilinear", x=x, **sizes, sampling_mode=mode), expected)
    assert_close(run("resize", x=x, shape=[9, *target], resized_dims=2, sampling_mode=mode), expected)


@pytest.mark.parametrize("dims", [0, 1, 3])
@pytest.mark.parametrize("kind", ["LINEAR", "NEAREST_NEIGHBOR"])
def test_resize_takes_sizes_from_the_end_and_keeps_those_of_zero(dims: int, kind: str) -> None:
    x = _random((2, 3, 4))
    result = run("resize", x=x, shape=[5, 0, 2], resized_dims=dims, interpolation_mode=kind)
    assert result.shape == (2, 3, 4)[: 3 - dims] + (5, 3, 2)[3 - dims :]


def test_resize_defaults() -> None:
    x = _random((1, 2, 3, 4))
    assert_close(run("resize_bilinear", x=x), x[..., :1, :1])
    expected = _along(x.astype(np.float64), 3, 6, "DEFAULT")
    assert_close(run("resize", x=x, shape=[0, 6], resized_dims=2), expected)


@pytest.mark.parametrize("shape", [(1, 2, 4, 5), (2, 1, 3, 3), (1, 1, 1, 6), (1, 3, 8, 2), (2, 2, 5, 7)])
@pytest.mark.parametrize("scales", [(2, 3), (2.5, 2.0), (1.0, 1.6), (3, 1), (0.5, 0.75)])
@pytest.mark.parametrize("align", [True, False])
def test_upsample_bilinear_recomputes_its_scales(
    shape: tuple[int, ...], scales: tuple[float, float], align: bool | None
) -> None:
    x = _random(shape)
    sizes = [math.floor(n * s) for n, s in zip(shape[2:], scales, strict=True)]
    if 0 in sizes:
        sizes, scales = [1, sizes[1]], (1.0, scales[1])
    mode = "STRICT_ALIGN_CORNERS" if align else "UNALIGN_CORNERS"
    expected = _along(_along(x.astype(np.float64), 2, sizes[0], mode), 3, sizes[1], mode)
    inputs = {"x": x, "scale_factor_height": scales[0], "scale_factor_width": scales[1], "align_corners": align}
    assert_close(run("upsample_bilinear", **inputs), expected)


@pytest.mark.parametrize(
    ("align", "half_pixel", "expected"),
    [
        (None, None, [1, 1.2, 1.4, 1.6, 1.8, 2]),
        (True, False, [1, 1.2, 1.4, 1.6, 1.8, 2]),
        (False, True, [1, 1, 4 / 3, 5 / 3, 2, 2]),
        (False, None, [1, 1, 4 / 3, 5 / 3, 2, 2]),
        (False, False, [1, 4 / 3, 5 / 3, 2, 2, 2]),
    ],
)
def test_upsample_bilinear_as_measured(align: bool | None, half_pixel: bool | None, expected: list[float]) -> None:
    inputs = {"x": np.array([1.0, 2.0]).reshape(1, 1, 1, 2), "scale_factor_height": 2, "scale_factor_width": 3}
    result = run("upsample_bilinear", **inputs, align_corners=align, half_pixel_centers=half_pixel)
    assert_close(result, [[[expected, expected]]])


def test_upsample_factors_left_out_are_one() -> None:
    x = _random((1, 2, 3, 4))
    assert_close(run("upsample_bilinear", x=x), x)
    assert_close(run("upsample_nearest_neighbor", x=x), x)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (1.0, 1.0, [[1.5, -2.5, 3.5]]),
        (3.17, 0.67, [[1.5, -2.5]] * 3),
        (2.0, 1.12, [[1.5, -2.5, 3.5]] * 2),
        (1, 2, [[1.5, 1.5, -2.5, -2.5, 3.5, 3.5]]),
    ],
)
def test_upsample_nearest_neighbor_as_measured(height: Any, width: Any, expected: list[list[float]]) -> None:
    x = np.array([1.5, -2.5, 3.5]).reshape(1, 1, 1, 3)
    assert_close(
        run("upsample_nearest_neighbor", x=x, scale_factor_height=height, scale_factor_width=width), [[expected]]
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scales", [(2, 2), (1, 3), (1.5, 2.5), (4, 1)])
def test_upsample_nearest_neighbor_is_torchs(shape: tuple[int, ...], scales: tuple[float, float]) -> None:
    x = _random(shape)
    sizes = [math.floor(n * s) for n, s in zip(shape[-2:], scales, strict=True)]
    image = torch.tensor(x).reshape(1, -1, *shape[-2:])
    expected = torch.nn.functional.interpolate(image, size=sizes, mode="nearest").reshape(*shape[:-2], *sizes)
    inputs = {"scale_factor_height": scales[0], "scale_factor_width": scales[1]}
    assert_close(run("upsample_nearest_neighbor", x=x, **inputs), expected.numpy())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("target", TARGETS)
def test_resize_nearest_neighbor_looks_from_half_pixels(shape: tuple[int, ...], target: tuple[int, int]) -> None:
    x = _random(shape)
    image = torch.tensor(x).reshape(1, -1, *shape[-2:])
    expected = torch.nn.functional.interpolate(image, size=target, mode="nearest-exact").reshape(*shape[:-2], *target)
    sizes = {"target_size_height": target[0], "target_size_width": target[1]}
    assert_close(run("resize_nearest_neighbor", x=x, **sizes), expected.numpy())
    resized = {"shape": list(target), "resized_dims": 2, "interpolation_mode": "NEAREST_NEIGHBOR"}
    assert_close(run("resize", x=x, **resized), expected.numpy())
    whole = (x * 9).astype(np.int32)
    assert run("resize", x=whole, **resized).dtype == torch.int32


def test_resize_nearest_neighbor_as_measured() -> None:
    x = np.array([-6.174, 9.371]).reshape(1, 1, 1, 2, 1)
    resized = {"shape": [1, 1, 3, 2], "resized_dims": 2, "interpolation_mode": "NEAREST_NEIGHBOR"}
    rows = [[-6.174] * 2, [9.371] * 2, [9.371] * 2]
    assert_close(run("resize", x=x, **resized, sampling_mode="DEFAULT"), [[[rows]]])
    x = np.array([0.37, 6.17]).reshape(1, 1, 2, 1)
    result = run("resize_nearest_neighbor", x=x, target_size_height=2, target_size_width=3)
    assert_close(result, [[[[0.37] * 3, [6.17] * 3]]])


@pytest.mark.parametrize(
    ("shape", "height", "width"),
    [
        ((1, 1, 4, 4), [0, 1], [1, 1]),
        ((2, 3, 5), [1, 1], [0, 4]),
        ((1, 2, 3, 3), [0, 0], [0, 0]),
        ((2, 2, 2, 6, 3), [2, 3], [1, 0]),
        ((1, 3, 2), [0, 2], [1, 1]),
    ],
)
def test_crop(shape: tuple[int, ...], height: list[int], width: list[int]) -> None:
    x = _random(shape)
    expected = x[..., height[0] : shape[-2] - height[1], width[0] : shape[-1] - width[1]]
    assert_close(run("crop", x=x, crop_height=height, crop_width=width), expected)


def test_refusals() -> None:
    x = np.ones((1, 1, 2))
    with pytest.raises(Unsupported, match="the sampling mode CENTRES"):
        run("resize_bilinear", x=x, sampling_mode="CENTRES")
    with pytest.raises(Unsupported, match="align_corners and half_pixel_centers at once"):
        run("upsample_bilinear", x=x, align_corners=True, half_pixel_centers=True)
    resized = {"x": x, "shape": [3], "resized_dims": 1}
    with pytest.raises(Unsupported, match="nearest neighbours with the sampling mode ALIGN_CORNERS: where they lie"):
        run("resize", **resized, interpolation_mode="NEAREST_NEIGHBOR", sampling_mode="ALIGN_CORNERS")
    with pytest.raises(Unsupported, match="with the interpolation mode CUBIC"):
        run("resize", **resized, interpolation_mode="CUBIC")
    with pytest.raises(ValueError, match=r"resize_nearest_neighbor to the shape .* size is negative"):
        run("resize_nearest_neighbor", x=x, target_size_height=-1, target_size_width=2)
    with pytest.raises(ValueError, match="resize of the last 2 dimensions of 3, with 1 sizes"):
        run("resize", x=x, shape=[3], resized_dims=2)
    with pytest.raises(Unsupported, match=r"resize of torch.int32 with the interpolation mode LINEAR"):
        run("resize", x=[1, 2], shape=[3], resized_dims=1)
