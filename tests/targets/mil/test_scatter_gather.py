"""Gathering and scattering against loops over every index."""

from __future__ import annotations

import operator as arithmetic
from functools import partial
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgebake_targets.mil.call import Unsupported
from mil_ops import run

MODES = {
    "update": lambda old, new: new,
    "add": arithmetic.add,
    "sub": arithmetic.sub,
    "mul": arithmetic.mul,
    "div": arithmetic.truediv,
    "max": max,
    "min": min,
}


def numbers(shape: tuple[int, ...], seed: int = 0) -> NDArray[Any]:
    return np.random.default_rng([seed, *shape]).uniform(0.5, 2, shape).astype(np.float32)


def indices(shape: tuple[int, ...], size: int, seed: int = 0, negative: bool = False) -> NDArray[Any]:
    return np.random.default_rng([seed, *shape]).integers(-size if negative else 0, size, shape).astype(np.int32)


@pytest.mark.parametrize("opset", ["CoreML5", "CoreML6", "CoreML8"])
@pytest.mark.parametrize(
    ("shape", "axis", "at"),
    [
        ((5,), 0, ()),
        ((5,), -1, (3,)),
        ((4, 3), 1, (2, 2)),
        ((2, 3, 4), -2, (1,)),
        ((2, 1, 4), 1, (2, 0)),
        ((3, 2, 2, 2), 0, (4,)),
    ],
)
def test_gather(shape: tuple[int, ...], axis: int, at: tuple[int, ...], opset: str) -> None:
    """Negative indices count from the end until iOS 16."""
    x, where = numbers(shape), indices(at, shape[axis], negative=opset != "CoreML8")
    expected = np.zeros(shape[: axis % len(shape)] + at + shape[axis % len(shape) + 1 :], np.float32)
    for place in np.ndindex(*expected.shape):
        before, middle = place[: axis % len(shape)], place[axis % len(shape) :][: len(at)]
        expected[place] = x[(*before, where[middle], *place[len(before) + len(at) :])]
    np.testing.assert_array_equal(run("gather", x=x, indices=where, axis=axis, opset=opset).numpy(), expected)


@pytest.mark.parametrize(
    ("shape", "at", "axis", "batch"),
    [
        ((2, 5), (2, 3), 1, 1),
        ((2, 3, 5), (2, 3, 4), 2, 2),
        ((2, 3, 5), (2, 4), 2, 1),
        ((2, 3, 4, 5), (2, 3), -1, 2),
        ((1, 4, 2), (1,), 1, 1),
    ],
)
def test_gather_in_batches(shape: tuple[int, ...], at: tuple[int, ...], axis: int, batch: int) -> None:
    x, where = numbers(shape), indices(at, shape[axis])
    expected = np.zeros(shape[: axis % len(shape)] + at[batch:] + shape[axis % len(shape) + 1 :], np.float32)
    for group in np.ndindex(*shape[:batch]):
        expected[group] = np.take(x[group], where[group], axis % len(shape) - batch)
    np.testing.assert_array_equal(run("gather", x=x, indices=where, axis=axis, batch_dims=batch).numpy(), expected)


@pytest.mark.parametrize("opset", ["CoreML6", "CoreML7"])
@pytest.mark.parametrize(
    ("shape", "axis", "count"), [((5,), 0, 2), ((3, 4), 1, 6), ((3, 4), -2, 1), ((2, 3, 4), 1, 0), ((1, 1, 1), -1, 3)]
)
def test_gather_along_axis(shape: tuple[int, ...], axis: int, count: int, opset: str) -> None:
    x = numbers(shape)
    at = tuple(count if i == axis % len(shape) else size for i, size in enumerate(shape))
    where = indices(at, shape[axis], negative=opset == "CoreML6")
    expected = np.take_along_axis(x, where.astype(np.int64), axis)
    np.testing.assert_array_equal(
        run("gather_along_axis", x=x, indices=where, axis=axis, opset=opset).numpy(), expected
    )


@pytest.mark.parametrize(
    ("shape", "at", "batch"),
    [
        ((5,), (3, 1), 0),
        ((2, 3), (4, 2), 0),
        ((2, 3, 4), (2, 2, 2), 0),
        ((2, 3, 4), (2, 5, 1), 1),
        ((2, 3, 4, 2), (2, 3, 1, 1), 2),
        ((2, 3), (0, 1), 0),
    ],
)
def test_gather_nd(shape: tuple[int, ...], at: tuple[int, ...], batch: int) -> None:
    x = numbers(shape)
    depth = at[-1]
    where = np.stack([indices(at[:-1], size, seed) for seed, size in enumerate(shape[batch : batch + depth])], -1)
    expected = np.zeros(at[:-1] + shape[batch + depth :], np.float32)
    for place in np.ndindex(*at[:-1]):
        expected[place] = x[(*place[:batch], *where[place])]
    np.testing.assert_array_equal(run("gather_nd", x=x, indices=where, batch_dims=batch).numpy(), expected)


@pytest.mark.parametrize("mode", [*MODES, None])
@pytest.mark.parametrize(
    ("shape", "axis", "at"),
    [((4,), 0, (6,)), ((3, 4), 1, (2,)), ((3, 4), -2, (5,)), ((2, 3, 4), 1, (2, 2)), ((1, 2), 0, (0,))],
)
def test_scatter(shape: tuple[int, ...], axis: int, at: tuple[int, ...], mode: str | None) -> None:
    """Several updates of one place count one after the other; without a mode they are added."""
    data, first = numbers(shape), axis % len(shape)
    where = indices(at, shape[axis])
    updates = numbers(shape[:first] + at + shape[first + 1 :], 1)
    expected = data.copy()
    for place in np.ndindex(*updates.shape):
        target = (*place[:first], where[place[first : first + len(at)]], *place[first + len(at) :])
        expected[target] = MODES[mode or "add"](expected[target], updates[place])
    result = run("scatter", data=data, indices=where, updates=updates, axis=axis, mode=mode)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("mode", [*MODES, None])
@pytest.mark.parametrize(
    ("shape", "axis", "count"), [((4,), 0, 7), ((3, 4), 1, 6), ((3, 4), -2, 1), ((2, 3, 2), 1, 0), ((1, 1, 1), 0, 3)]
)
def test_scatter_along_axis(shape: tuple[int, ...], axis: int, count: int, mode: str | None) -> None:
    data = numbers(shape)
    at = tuple(count if i == axis % len(shape) else size for i, size in enumerate(shape))
    where, updates = indices(at, shape[axis]), numbers(at, 1)
    expected = data.copy()
    for place in np.ndindex(*at):
        target = list(place)
        target[axis] = where[place]
        expected[tuple(target)] = MODES[mode or "add"](expected[tuple(target)], updates[place])
    result = run("scatter_along_axis", data=data, indices=where, updates=updates, axis=axis, mode=mode)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("mode", [*MODES, None])
@pytest.mark.parametrize(
    ("shape", "at"), [((4,), (5, 1)), ((2, 3), (6, 2)), ((2, 3, 2), (2, 2, 1)), ((2, 3, 2), (0, 2)), ((1, 1), (2, 1))]
)
def test_scatter_nd(shape: tuple[int, ...], at: tuple[int, ...], mode: str | None) -> None:
    data = numbers(shape)
    where = np.stack([indices(at[:-1], size, seed) for seed, size in enumerate(shape[: at[-1]])], -1)
    updates = numbers(at[:-1] + shape[at[-1] :], 1)
    expected = data.copy()
    for place in np.ndindex(*updates.shape):
        target = (*where[place[: len(at) - 1]], *place[len(at) - 1 :])
        expected[target] = MODES[mode or "add"](expected[target], updates[place])
    result = run("scatter_nd", data=data, indices=where, updates=updates, mode=mode)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "div"])
def test_scatter_of_integers(mode: str | None) -> None:
    data, updates = np.arange(4, dtype=np.int32), np.array([5, -2, 7], np.int32)
    expected = data.copy()
    for index, update in zip([1, 1, 3], updates, strict=True):
        expected[index] = MODES[mode](expected[index], update)
    result = run("scatter", data=data, indices=[1, 1, 3], updates=updates, mode=mode)
    assert result.numpy().dtype == np.int32
    np.testing.assert_array_equal(result.numpy(), expected)


def test_scatter_with_negative_indices_before_ios17() -> None:
    put = partial(run, "scatter", data=np.zeros(3), indices=[-1], updates=[5.0], mode="update")
    assert put(opset="CoreML6").tolist() == [0, 0, 5]


X = np.zeros((2, 3), np.float32)


@pytest.mark.parametrize(
    ("operator", "inputs", "text"),
    [
        ("gather", {"x": X, "indices": [-1]}, "gather at index -1 of an axis of 2: Core ML does not define the result"),
        ("gather", {"x": X, "indices": [2]}, "gather at index 2 of an axis of 2"),
        ("gather", {"x": X, "indices": [-3], "opset": "CoreML6"}, "gather at index -3 of an axis of 2"),
        ("gather", {"x": X, "indices": [5], "validate_indices": True}, "index 5 of an axis of 2: Core ML refuses it"),
        ("gather_along_axis", {"x": X, "indices": [[3, 0, 0]]}, "gather_along_axis at index 3 of an axis of 2"),
        ("gather_nd", {"x": X, "indices": [[0, 3]]}, "gather_nd at index 3 of an axis of 3"),
        ("scatter", {"data": X, "indices": [2], "updates": np.zeros((1, 3))}, "scatter at index 2 of an axis of 2"),
        ("scatter", {"data": X, "indices": [0], "updates": X[:1], "mode": "xor"}, "scatter in the mode 'xor'"),
        ("scatter", {"data": [1, 2], "indices": [0], "updates": [2], "mode": "div"}, "'div' of integers"),
        ("scatter_nd", {"data": X, "indices": [[-1]], "updates": X[:1]}, "scatter_nd at index -1 of an axis of 2"),
    ],
)
def test_what_core_ml_does_not_define_is_refused(operator: str, inputs: dict[str, Any], text: str) -> None:
    with pytest.raises(Unsupported, match=text):
        run(operator, **inputs)


@pytest.mark.parametrize(
    ("operator", "inputs", "text"),
    [
        ("gather", {"x": X, "indices": [[0]], "axis": 1, "batch_dims": 1}, "with batch_dims 1, axis 1"),
        ("gather_nd", {"x": X, "indices": [[0, 0, 0]]}, "gather_nd of .2, 3. at .1, 3."),
        ("scatter", {"data": X, "indices": [0], "updates": np.zeros((1, 2))}, "updates of .1, 2. where .1, 3. belong"),
        ("scatter_nd", {"data": X, "indices": [[0, 0, 0]], "updates": [1.0]}, "scatter_nd to .2, 3. at .1, 3."),
        (
            "scatter_along_axis",
            {"data": X, "indices": [[0]], "updates": [[1.0]]},
            "scatter_along_axis to .2, 3. at .1, 1.",
        ),
    ],
)
def test_sizes_that_contradict_each_other_cannot_be(operator: str, inputs: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        run(operator, **inputs)
