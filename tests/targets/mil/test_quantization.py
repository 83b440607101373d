"""quantize and dequantize against loops over every number."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgebake_targets.mil.call import Unsupported
from mil_ops import run

CASES = [((4,), None), ((2, 3), None), ((2, 3), 0), ((2, 3), -1), ((2, 3, 4), 1), ((1, 1, 5, 2), -2), ((0, 2), 1)]


def _parameters(shape: tuple[int, ...], axis: int | None, kind: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    random = np.random.default_rng([7, *shape])
    size = () if axis is None else (shape[axis],)
    scale = (2.0 ** random.integers(-4, 0, size)).astype(np.float32)
    low, high = np.iinfo(kind).min, np.iinfo(kind).max
    return scale, random.integers(low // 4, high // 4, size).astype(kind)


def _at(value: Any, place: tuple[int, ...], axis: int | None) -> Any:
    return value if axis is None else value[place[axis]]


@pytest.mark.parametrize("kind", [np.int8, np.uint8])
@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize(("shape", "axis"), CASES)
def test_quantize(shape: tuple[int, ...], axis: int | None, shifted: bool, kind: Any) -> None:
    """Halves go to the even neighbour; what does not fit is clipped."""
    x = (np.random.default_rng(0).integers(-120, 120, shape) / 16).astype(np.float32) * 4
    scale, zero = _parameters(shape, axis, kind)
    expected = np.zeros(shape, kind)
    for place in np.ndindex(*shape):
        steps = round(Fraction(float(x[place])) / Fraction(float(_at(scale, place, axis))))
        steps += int(_at(zero, place, axis)) if shifted else 0
        expected[place] = min(max(steps, np.iinfo(kind).min), np.iinfo(kind).max)
    parameters = {"scale": scale, "zero_point": zero if shifted else None, "axis": axis}
    result = run("quantize", input=x, output_dtype=np.dtype(kind).name, **parameters).numpy()
    np.testing.assert_array_equal(result, expected, strict=True)


@pytest.mark.parametrize("kind", [np.int8, np.uint8])
@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize(("shape", "axis"), CASES)
def test_dequantize(shape: tuple[int, ...], axis: int | None, shifted: bool, kind: Any) -> None:
    x = np.random.default_rng(0).integers(np.iinfo(kind).min, np.iinfo(kind).max + 1, shape).astype(kind)
    scale, zero = _parameters(shape, axis, kind)
    expected = np.zeros(shape, np.float32)
    for place in np.ndindex(*shape):
        shift = int(_at(zero, place, axis)) if shifted else 0
        expected[place] = (int(x[place]) - shift) * _at(scale, place, axis)
    parameters = {"scale": scale, "zero_point": zero if shifted else None, "axis": axis}
    np.testing.assert_array_equal(run("dequantize", input=x, **parameters).numpy(), expected, strict=True)


@pytest.mark.parametrize(
    ("operator", "inputs", "text"),
    [
        ("quantize", {"scale": 1.0, "output_dtype": "int4"}, "quantize to int4"),
        ("quantize", {"scale": [1.0, 2.0], "output_dtype": "int8"}, "quantize without axis"),
        ("quantize", {"output_dtype": "int8"}, "quantize without scale"),
        ("dequantize", {}, "dequantize without scale"),
    ],
)
def test_what_does_not_fit_is_refused(operator: str, inputs: dict[str, Any], text: str) -> None:
    with pytest.raises(Unsupported, match=text):
        run(operator, input=np.zeros((2, 3), np.float32), **inputs)


@pytest.mark.parametrize(
    ("operator", "inputs", "text"),
    [
        ("quantize", {"scale": [1.0, 2.0], "output_dtype": "int8", "axis": 1}, "a scale of .2. on an axis of 3"),
        ("dequantize", {"scale": [1.0], "axis": 2}, "dequantize along axis 2 of a tensor of rank 2"),
    ],
)
def test_sizes_that_contradict_each_other_cannot_be(operator: str, inputs: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        run(operator, input=np.zeros((2, 3), np.float32), **inputs)
