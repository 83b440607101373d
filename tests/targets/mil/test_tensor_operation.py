"""Operators that join, cut, fill, pad, sort and mark, against numpy and naive loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgebake_targets.mil.call import Mode, Unsupported
from mil_ops import run

SHAPES = [(1,), (5,), (2, 3), (1, 4, 1), (2, 3, 4), (3, 1, 2, 2), (2, 1, 3, 2, 2)]
DTYPES = [np.float32, np.int32, np.bool_, np.int8]


def numbers(shape: tuple[int, ...], seed: int = 0, dtype: Any = np.float32) -> NDArray[Any]:
    return (np.random.default_rng([seed, *shape]).standard_normal(shape) * 20).astype(dtype)


def same(result: Tensor, expected: Any) -> None:
    expected = np.asarray(expected)
    assert result.numpy().dtype == expected.dtype
    np.testing.assert_array_equal(result.numpy(), expected, strict=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("axis", [0, -1])
def test_concat(shape: tuple[int, ...], axis: int) -> None:
    parts = [numbers(tuple(n + k if i == axis % len(shape) else n for i, n in enumerate(shape)), k) for k in range(3)]
    same(run("concat", values=tuple(parts), axis=axis), np.concatenate(parts, axis))
    same(run("concat", values=(parts[0],), axis=axis), parts[0])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("axis", [0, -1])
def test_concat_interleaved(shape: tuple[int, ...], axis: int) -> None:
    parts = [numbers(shape, seed) for seed in range(3)]
    expected = np.concatenate(parts, axis)
    for turn, part in enumerate(parts):
        place = [slice(None)] * len(shape)
        place[axis] = slice(turn, None, 3)
        expected[tuple(place)] = part
    same(run("concat", values=tuple(parts), axis=axis, interleave=True), expected)


def test_concat_of_scalars() -> None:
    same(run("concat", values=(3, 4), axis=0), np.array([3, 4], np.int32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), [((), 0), ((3,), -1), ((3,), 0), ((2, 3), 1), ((2, 3), -3)])
def test_stack(shape: tuple[int, ...], axis: int, dtype: Any) -> None:
    parts = [numbers(shape, seed, dtype) for seed in range(3)]
    same(run("stack", values=tuple(np.asarray(p) for p in parts), axis=axis), np.stack(parts, axis))


@pytest.mark.parametrize(
    ("shape", "axis", "parameters", "bounds"),
    [
        ((6,), 0, {"num_splits": 3}, [2, 4]),
        ((6,), 0, {"num_splits": 1}, []),
        ((2, 6), -1, {"split_sizes": [1, 2, 3]}, [1, 3]),
        ((2, 6), 1, {"split_sizes": [6, 0], "num_splits": 2}, [6]),
        ((4, 1, 3), 0, {"num_splits": 4}, [1, 2, 3]),
        ((0, 3), 0, {"num_splits": 2}, [0]),
    ],
)
def test_split(shape: tuple[int, ...], axis: int, parameters: dict[str, Any], bounds: list[int]) -> None:
    x = numbers(shape)
    results = run("split", x=x, axis=axis, **parameters)
    expected = np.split(x, bounds, axis)
    assert len(results) == len(expected)
    for result, part in zip(results, expected, strict=True):
        same(result, part)


@pytest.mark.parametrize("shape", SHAPES)
def test_tile(shape: tuple[int, ...]) -> None:
    times = np.random.default_rng(0).integers(1, 4, len(shape))
    x = numbers(shape)
    same(run("tile", x=x, reps=times), np.tile(x, times))


@pytest.mark.parametrize("shape", [[], [1], [2, 3], [0, 2], [2, 1, 2, 1, 2]])
@pytest.mark.parametrize("value", [None, 2.5, np.int32(7), True])
def test_fill(shape: list[int], value: Any) -> None:
    expected = np.full(shape, 0 if value is None else value, np.float32 if isinstance(value, float | None) else None)
    same(run("fill", shape=np.array(shape, np.int32), value=value), expected)
    same(run("fill_like", ref_tensor=np.zeros(shape, np.int8), value=value), expected)


@pytest.mark.parametrize("shape", [(), *SHAPES, (0, 3)])
def test_shape_and_identity(shape: tuple[int, ...]) -> None:
    x = numbers(shape)
    same(run("shape", x=x), np.array(shape, np.int32))
    same(run("identity", x=x), x)


@pytest.mark.parametrize(
    ("shape", "axis", "expected"),
    [
        ((3,), -1, (1, 3)),
        ((3,), None, (3, 1)),
        ((4, 3), -1, (4, 3)),
        ((2, 3, 2), -1, (6, 2)),
        ((5, 5, 2), 1, (5, 10)),
        ((2, 3), 0, (1, 6)),
    ],
)
def test_flatten2d(shape: tuple[int, ...], axis: int | None, expected: tuple[int, ...]) -> None:
    x = numbers(shape)
    same(run("flatten2d", x=x, axis=axis), x.reshape(expected))


@pytest.mark.parametrize("dtype", [np.int32, np.float32, np.float16])
@pytest.mark.parametrize(("start", "end", "step"), [(0, 5, 1), (2, 9, 3), (5, 0, -2), (0, 0, 1), (3, 1, 1), (-4, 5, 2)])
def test_range_1d(start: int, end: int, step: int, dtype: Any) -> None:
    expected = np.arange(dtype(start), dtype(end), dtype(step))
    inputs = {"start": dtype(start), "end": dtype(end), "step": dtype(step)}
    result = run("range_1d", outputs=(np.dtype(dtype).name,), **inputs)
    np.testing.assert_array_equal(result.numpy(), expected)


@pytest.mark.parametrize(("dtype", "count"), [(np.float32, 10), (np.float16, 10)])
def test_range_1d_counts_in_the_declared_type(dtype: Any, count: int) -> None:
    """0.1 is smaller in float16, so that eleven would fit; the converter's count is ten."""
    inputs = {"start": dtype(0), "end": dtype(1), "step": dtype(0.1)}
    assert len(run("range_1d", outputs=(np.dtype(dtype).name,), **inputs)) == count


@pytest.mark.parametrize(("shape", "axis"), [((), -1), ((4,), None), ((4,), 0), ((2, 3), 1), ((2, 3), -3)])
@pytest.mark.parametrize(("on", "off"), [(None, None), (2.5, -1.0), (np.int32(3), None), (None, np.int32(9))])
def test_one_hot(shape: tuple[int, ...], axis: int | None, on: Any, off: Any) -> None:
    """An index outside the vector marks nothing."""
    indices = np.random.default_rng(0).integers(-2, 5, shape).astype(np.int32)
    place = axis if axis is not None else -1
    kind = np.float32 if isinstance(on, float) else np.int32
    expected = np.full((*shape, 3), 0 if off is None else off, kind)
    for where in np.ndindex(*shape):
        if 0 <= indices[where] < 3:
            expected[(*where, indices[where])] = 1 if on is None else on
    result = run("one_hot", indices=indices, one_hot_vector_size=3, axis=axis, on_value=on, off_value=off)
    same(result, np.moveaxis(expected, -1, place))


@pytest.mark.parametrize("shape", [*SHAPES, (0, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_non_zero(shape: tuple[int, ...], dtype: Any) -> None:
    x = np.where(np.random.default_rng(0).random(shape) < 0.5, 0, numbers(shape)).astype(dtype)
    expected = [list(where) for where in np.ndindex(*shape) if x[where] != 0]
    same(run("non_zero", x=x), np.array(expected, np.int32).reshape(-1, len(shape)))


@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (2, 5), (5, 2), (2, 3, 4), (0, 2)])
@pytest.mark.parametrize(("lower", "upper"), [(None, None), (0, -1), (-1, 0), (0, 0), (1, 2), (9, 9)])
def test_band_part(shape: tuple[int, ...], lower: int | None, upper: int | None) -> None:
    for dtype in DTYPES:
        x = numbers(shape, dtype=dtype)
        expected = x.copy()
        for place in np.ndindex(*shape):
            m, n = place[-2:]
            low, high = (-1 if v is None else v for v in (lower, upper))
            if (0 <= low < m - n) or (0 <= high < n - m):
                expected[place] = 0
        same(run("band_part", x=x, lower=lower, upper=upper), expected)


@pytest.mark.parametrize("mode", [None, "constant", "reflect", "replicate"])
@pytest.mark.parametrize(
    ("shape", "amounts"),
    [
        ((5,), [2, 1]),
        ((3, 4), [2, 3]),
        ((3, 4), [1, 0, 0, 2]),
        ((2, 3, 4), [1, 1, 0, 0, 3, 2]),
        ((2, 2, 2, 2, 2), [0, 1, 1, 0]),
        ((2,), [0, 0]),
    ],
)
def test_pad(shape: tuple[int, ...], amounts: list[int], mode: str | None) -> None:
    x = numbers(shape)
    pairs = [(0, 0)] * (len(shape) - len(amounts) // 2) + list(zip(amounts[::2], amounts[1::2], strict=True))
    if mode in (None, "constant"):
        same(run("pad", x=x, pad=amounts, mode=mode), np.pad(x, pairs))
        same(run("pad", x=x, pad=amounts, mode=mode, constant_val=-1.5), np.pad(x, pairs, constant_values=-1.5))
    else:
        same(run("pad", x=x, pad=amounts, mode=mode), np.pad(x, pairs, {"replicate": "edge"}.get(mode, mode)))


def test_pad_of_integers_and_empty_axes() -> None:
    same(run("pad", x=np.array([1, 2], np.int8), pad=[1, 1]), np.array([0, 1, 2, 0], np.int8))
    same(run("pad", x=np.zeros((0, 2)), pad=[1, 0, 0, 0], constant_val=3.0), np.full((1, 2), 3, np.float32))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ascending", [None, False, True])
def test_topk_and_argsort(shape: tuple[int, ...], ascending: bool | None) -> None:
    """Equal values keep their order in both directions."""
    for axis in (0, -1):
        x = np.round(numbers(shape) / 10).astype(np.float32)
        order = np.argsort(x if ascending else -x, axis=axis, kind="stable")
        same(run("argsort", x=x, axis=axis, ascending=ascending), order.astype(np.int32))
        k = (shape[axis] + 1) // 2
        chosen = np.take(order, range(k), axis)
        values, indices = run("topk", x=x, k=k, axis=axis, ascending=ascending)
        same(indices, chosen.astype(np.int32))
        same(values, np.take_along_axis(x, chosen, axis))


def test_topk_of_older_and_newer_op_sets() -> None:
    x = np.array([[3, 1, 2]], np.int8)
    values, indices = run("topk", x=x)
    assert (values.tolist(), indices.tolist()) == ([[3]], [[0]])
    assert run("topk", x=x, k=2, return_indices=False).tolist() == [[3, 2]]
    assert run("topk", x=x, k=-1, ascending=True)[0].tolist() == [[1, 2, 3]]
    assert run("argsort", x=np.array([0, 255, 7], np.uint8)).tolist() == [1, 2, 0]


@pytest.mark.parametrize("shape", [*SHAPES, (0, 3)])
@pytest.mark.parametrize("exclusive", [None, True])
@pytest.mark.parametrize("reverse", [None, True])
def test_cumsum(shape: tuple[int, ...], exclusive: bool | None, reverse: bool | None) -> None:
    for dtype, axis in ((np.float32, 0), (np.int32, -1)):
        x = numbers(shape, dtype=dtype)
        expected = np.zeros_like(x)
        for place in np.ndindex(*shape):
            here, row = place[axis], list(place)
            row[axis] = slice(here + bool(exclusive), None) if reverse else slice(0, here + (not exclusive))
            expected[place] = x[tuple(row)].sum(dtype=np.float64 if dtype is np.float32 else dtype)
        result = run("cumsum", x=x, axis=axis, exclusive=exclusive, reverse=reverse)
        assert result.numpy().dtype == x.dtype
        np.testing.assert_allclose(result.numpy(), expected, rtol=1e-5, atol=1e-4)


def test_cumsum_rounds_every_running_sum_where_sums_are_half() -> None:
    x = np.full(3000, 1, np.float32)
    result = run("cumsum", x=x, outputs=("float16",), rounding=Mode.FP16_WORST)
    assert result.tolist()[:2048] == list(range(1, 2049))
    assert set(result.tolist()[2048:]) == {2048.0}
    assert run("cumsum", x=x).tolist()[-1] == 3000


X = np.zeros((2, 3), np.float32)


@pytest.mark.parametrize(
    ("operator", "inputs", "text"),
    [
        ("split", {"x": X, "axis": 1}, "split without num_splits"),
        ("tile", {"x": X, "reps": [2**20, 2**20]}, "more than 2147483648 values"),
        ("fill", {"shape": [2**16, 2**16]}, "fill to the shape .65536, 65536.: more than 2147483648 values"),
        ("range_1d", {"start": 0, "end": 1, "step": 0}, "range_1d with a step of 0"),
        ("range_1d", {"start": 0.0, "end": float("inf"), "step": 1.0}, "range_1d from 0.0 to inf by 1.0"),
        ("range_1d", {"start": 0.0, "end": 1e10, "step": 1.0}, "more than 2147483648 values"),
        ("pad", {"x": X, "pad": [1, 1], "mode": "circular"}, "pad in the mode 'circular'"),
        ("pad", {"x": X, "pad": [3, 0], "mode": "reflect"}, "pad reflects .3, 0. on an axis of 3; at most 2 are there"),
        ("pad", {"x": np.zeros(0), "pad": [1, 0], "mode": "replicate"}, "replicates the edge of an axis of 0"),
    ],
)
def test_what_does_not_fit_is_refused(operator: str, inputs: dict[str, Any], text: str) -> None:
    with pytest.raises(Unsupported, match=text):
        run(operator, **inputs)


@pytest.mark.parametrize(
    ("operator", "inputs", "text"),
    [
        ("concat", {"values": (X, X[:, :2]), "axis": 1, "interleave": True}, "concat interleaves tensors of different"),
        ("concat", {"values": (X, X), "axis": 2}, "concat along axis 2 of a tensor of rank 2"),
        ("split", {"x": X, "axis": 1, "num_splits": 2}, "split of an axis of 3 in parts of .1, 1."),
        ("split", {"x": X, "axis": 1, "split_sizes": [4, -1]}, "split of an axis of 3 in parts of .4, -1."),
        ("tile", {"x": X, "reps": [2]}, "tile of a tensor of rank 2 with reps .2."),
        ("fill", {"shape": [2, -1]}, "fill to the shape .2, -1.: a size is negative"),
        ("flatten2d", {"x": X, "axis": 3}, "flatten2d at axis 3 of a tensor of rank 2"),
        (
            "one_hot",
            {"indices": [1], "one_hot_vector_size": 2, "axis": 2},
            "one_hot along axis 2 of a tensor of rank 2",
        ),
        ("band_part", {"x": [1.0]}, "band_part of a tensor of rank 1; it needs matrices"),
        ("pad", {"x": X, "pad": [1, 1, 1]}, "pad of .1, 1, 1. on a tensor of rank 2"),
        ("pad", {"x": X, "pad": [1, -1]}, "pad of .1, -1. on a tensor of rank 2"),
        ("topk", {"x": X, "k": 4}, "topk takes 4 of an axis of 3"),
        ("topk", {"x": X, "k": -1, "opset": "CoreML6"}, "topk takes -1 of an axis of 3"),
        ("cumsum", {"x": X, "axis": 2}, "cumsum along axis 2 of a tensor of rank 2"),
    ],
)
def test_sizes_that_contradict_each_other_cannot_be(operator: str, inputs: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        run(operator, **inputs)


def test_results_do_not_share_memory_that_is_written() -> None:
    x = torch.ones(2, 2)
    run("pad", x=x, pad=[1, 1]).zero_()
    run("fill_like", ref_tensor=x).add_(1)
    assert x.tolist() == [[1, 1], [1, 1]]
