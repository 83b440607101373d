"""Pooling against loops over every window."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from edgebake_targets.mil.call import Mode, Unsupported
from mil_ops import assert_close, run

Array = npt.NDArray[Any]

WORST = {"outputs": ("float16",), "rounding": Mode.FP16_WORST}

# x, window, strides, pad
CASES = [
    ((2, 3, 8), [3], [2], [0, 0]),
    ((1, 1, 1), [1], [1], [0, 0]),
    ((1, 2, 6), [2], [4], [1, 0]),
    ((2, 2, 5, 7), [3, 2], [2, 3], [1, 1, 1, 0]),
    ((1, 3, 4, 4), [4, 4], [1, 1], [0, 0, 0, 0]),
    ((1, 2, 6, 5), [2, 3], [1, 2], [0, 1, 2, 2]),
    ((1, 2, 4, 3, 5), [2, 1, 3], [2, 2, 1], [0, 1, 0, 0, 1, 1]),
]


def _random(shape: tuple[int, ...]) -> Array:
    return np.random.default_rng(list(shape)).standard_normal(shape).astype(np.float32)


def _pool(
    x: Array,
    kernel: list[int],
    strides: list[int],
    pads: Any,
    sizes: list[int],
    function: Callable[[Array, int], float],
) -> Array:
    """``function`` of the elements inside a window and of how many places it has within the padded input."""
    result = np.zeros((*x.shape[:2], *sizes))
    for at in np.ndindex(result.shape):
        inside, places = [slice(at[0], at[0] + 1), slice(at[1], at[1] + 1)], 1
        for p, k, s, (before, after), n in zip(at[2:], kernel, strides, pads, x.shape[2:], strict=True):
            first = p * s - before
            inside.append(slice(max(first, 0), max(min(first + k, n), 0)))
            places *= min(first + k, n + after) - first
        result[at] = function(x[tuple(inside)].astype(np.float64).reshape(-1), places)
    return result


FUNCTIONS = {
    "max": ("max_pool", {}, lambda values, places: values.max()),
    "average": ("avg_pool", {}, lambda values, places: values.sum() / places),
    "average inside": ("avg_pool", {"exclude_padding_from_average": True}, lambda values, places: values.mean()),
    "l2": ("l2_pool", {}, lambda values, places: np.sqrt((values**2).sum())),
}


def _check(
    name: str, x: Array, kernel: list[int], steps: list[int], pads: Any, sizes: list[int], **inputs: Any
) -> None:
    operator, parameters, function = FUNCTIONS[name]
    expected = _pool(x, kernel, steps, pads, sizes, function)
    inputs |= {"x": x, "kernel_sizes": kernel, **parameters}
    assert_close(run(operator, **inputs), expected)
    assert_close(run(operator, **inputs, **WORST), expected, 0.01)


@pytest.mark.parametrize(
    ("name", "shape", "kernel", "strides", "pad"),
    [(name, *case) for case in CASES for name in FUNCTIONS if name != "l2" or len(case[1]) < 3],
)
def test_custom_padding(
    name: str, shape: tuple[int, ...], kernel: list[int], strides: list[int], pad: list[int]
) -> None:
    pads = list(zip(pad[::2], pad[1::2], strict=True))
    sizes = [(n + sum(p) - k) // s + 1 for n, p, k, s in zip(shape[2:], pads, kernel, strides, strict=True)]
    _check(name, _random(shape), kernel, strides, pads, sizes, strides=strides, pad_type="custom", pad=pad)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("kind", ["same", "same_lower"])
@pytest.mark.parametrize(("size", "kernel", "stride"), [(7, 2, 1), (7, 3, 2), (8, 4, 3), (5, 5, 2), (4, 1, 2)])
def test_same_padding(name: str, kind: str, size: int, kernel: int, stride: int) -> None:
    total = max(0, (-(-size // stride) - 1) * stride + kernel - size)
    pair = (total // 2, total - total // 2)
    pads = [pair if kind == "same" else pair[::-1]] * 2
    both = [kernel] * 2, [stride] * 2
    _check(name, _random((1, 2, size, size)), *both, pads, [-(-size // stride)] * 2, strides=both[1], pad_type=kind)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_strides_left_out_are_one(name: str) -> None:
    _check(name, _random((1, 2, 5)), [2], [1], [(0, 0)], [4], pad_type="valid", pad=[1, 1])


@pytest.mark.parametrize("operator", ["max_pool", "avg_pool"])
@pytest.mark.parametrize(
    ("shape", "kernel", "stride", "pad"),
    [
        ((1, 2, 7), 2, 2, 0),
        ((1, 2, 8), 3, 2, 1),
        ((2, 2, 6, 9), 3, 2, 1),
        ((1, 1, 5, 5), 2, 3, 1),
        ((1, 3, 4, 10), 3, 3, 0),
    ],
)
@pytest.mark.parametrize("exclude", [False, True])
def test_sizes_rounded_up_are_those_of_torch(
    operator: str, shape: tuple[int, ...], kernel: int, stride: int, pad: int, exclude: bool
) -> None:
    rank = len(shape) - 2
    x = _random(shape)
    options = {} if operator == "max_pool" else {"count_include_pad": not exclude}
    function = getattr(torch.nn.functional, f"{operator}{rank}d")
    expected = function(torch.tensor(x), kernel, stride, pad, ceil_mode=True, **options).numpy()
    inputs = {"x": x, "kernel_sizes": [kernel] * rank, "strides": [stride] * rank, "ceil_mode": True}
    inputs |= {"pad_type": "custom", "pad": [pad, pad] * rank}
    if operator == "avg_pool":
        inputs["exclude_padding_from_average"] = exclude
    assert_close(run(operator, **inputs), expected)
    assert_close(run(operator, **inputs, **WORST), expected, 0.01)


SEVEN = np.arange(1.0, 8.0).reshape(1, 1, 7)
PLANES = np.array([[[-10.0, -6.0], [-7.0, 9.0]], [[-3.0, 0.0], [11.0, 7.0]]])[None]


@pytest.mark.parametrize(
    ("name", "x", "kernel", "stride", "kind", "expected"),
    [
        ("average inside", SEVEN, [3], [3], "same", [1.5, 4, 6.5]),
        ("average", np.array([[[1.0, 2], [3, 4]]])[None], [2, 2], None, "same_lower", [0.25, 0.75, 1, 2.5]),
        ("max", SEVEN, [3], [3], "same", [2, 5, 7]),
        ("max", SEVEN, [1], [2], "valid", [1, 3, 5, 7]),
        ("l2", SEVEN, [3], [3], "same", [2.236068, 7.071068, 9.219544]),
        ("l2", PLANES, [2, 3], [1, 3], "same", [16.309507, 11.401754, 13.379088, 13.038404]),
        ("l2", PLANES, [1, 2], [2, 1], "valid", [11.661904, 3.0]),
    ],
)
def test_as_measured_on_macs(
    name: str, x: Array, kernel: list[int], stride: list[int] | None, kind: str, expected: list[float]
) -> None:
    """Values from coremltools' own tests of these operators."""
    operator, parameters, _ = FUNCTIONS[name]
    result = run(operator, x=x, kernel_sizes=kernel, strides=stride, pad_type=kind, **parameters)
    assert_close(result.reshape(-1), expected)


def test_refusals() -> None:
    plane = {"x": np.ones((1, 1, 5, 5)), "kernel_sizes": [2, 2]}
    with pytest.raises(Unsupported, match="max_pool with ceil_mode and three dimensions, pad_type same or uneven"):
        run("max_pool", **plane, pad_type="same", ceil_mode=True)
    with pytest.raises(Unsupported, match="uneven padding"):
        run("avg_pool", **plane, pad_type="custom", pad=[0, 1, 0, 0], ceil_mode=True)
    with pytest.raises(Unsupported, match="max_pool with a window that holds no element"):
        run("max_pool", **plane, pad_type="custom", pad=[3, 0, 0, 0])
    with pytest.raises(Unsupported, match="avg_pool with a window that holds no element"):
        run("avg_pool", **plane, pad_type="custom", pad=[3, 0, 0, 0], exclude_padding_from_average=True)
    with pytest.raises(Unsupported, match="l2_pool of more than two spatial dimensions"):
        run("l2_pool", x=np.ones((1, 1, 3, 3, 3)), kernel_sizes=[2, 2, 2], pad_type="valid")
    with pytest.raises(ValueError, match="avg_pool of rank 4 by a window of rank 1"):
        run("avg_pool", x=np.ones((1, 1, 3, 3)), kernel_sizes=[2], pad_type="valid")
    with pytest.raises(Unsupported, match="pad_type same_lower in op set CoreML5"):
        run("avg_pool", **plane, pad_type="same_lower", opset="CoreML5")


def test_squares_overflow_in_half() -> None:
    x = {"x": np.full((1, 1, 2), 300.0), "kernel_sizes": [2], "pad_type": "valid"}
    assert_close(run("l2_pool", **x), [[[300 * np.sqrt(2)]]])
    assert run("l2_pool", **x, **WORST).item() == np.inf
