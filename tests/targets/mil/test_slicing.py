"""Slices against numpy's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgebake_targets.mil.call import Unsupported
from mil_ops import run

SHAPES = [(1,), (6,), (4, 5), (1, 7, 1), (3, 2, 4), (2, 3, 1, 4), (2, 2, 3, 2, 2)]


def _case(shape: tuple[int, ...], seed: int) -> tuple[dict[str, Any], tuple[int | slice, ...]]:
    """Random parameters with their numpy slice; a squeezed axis is taken at an index within it."""
    random = np.random.default_rng([seed, *shape])
    rank = len(shape)
    size = np.array(shape)
    begin, end = (random.integers(-size - 1, size + 2) for _ in range(2))
    stride = random.choice([-3, -2, -1, 1, 1, 2, 3], rank)
    from_start, to_end, single = (random.random(rank) < chance for chance in (0.3, 0.3, 0.2))
    begin = np.where(single, random.integers(-size, size), begin)
    parameters = {"begin": begin, "end": end, "stride": stride}
    parameters |= {"begin_mask": from_start, "end_mask": to_end, "squeeze_mask": single}
    chosen = tuple(
        int(0 if from_start[i] else begin[i])
        if single[i]
        else slice(None if from_start[i] else int(begin[i]), None if to_end[i] else int(end[i]), int(stride[i]))
        for i in range(rank)
    )
    return parameters, chosen


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.bool_])
def test_slice_by_index(shape: tuple[int, ...], dtype: Any) -> None:
    x = (np.random.default_rng(0).standard_normal(shape) * 50).astype(dtype)
    for seed in range(25):
        parameters, chosen = _case(shape, seed)
        result = run("slice_by_index", x=x, **parameters).numpy()
        assert result.dtype == x.dtype
        np.testing.assert_array_equal(result, x[chosen], strict=True)


def test_slice_by_index_without_its_optional_parameters() -> None:
    x = np.arange(12.0, dtype=np.float32).reshape(3, 4)
    np.testing.assert_array_equal(run("slice_by_index", x=x, begin=[1, -3], end=[3, -1]).numpy(), x[1:3, -3:-1])


@pytest.mark.parametrize("shape", SHAPES)
def test_slice_update(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    for seed in range(25):
        parameters, chosen = _case(shape, seed)
        expected = x.copy()
        update = np.random.default_rng(seed).standard_normal(np.shape(expected[chosen])).astype(np.float32)
        expected[chosen] = update
        np.testing.assert_array_equal(run("slice_update", x=x, update=update, **parameters).numpy(), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_slice_by_size(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    for seed in range(10):
        random = np.random.default_rng(seed)
        begin = random.integers(0, np.array(shape) + 1)
        size = [int(random.choice([-1, random.integers(0, n - b + 1)])) for n, b in zip(shape, begin, strict=True)]
        part = tuple(slice(b, None if s == -1 else b + s) for b, s in zip(begin, size, strict=True))
        counted = [b - n if b < n and seed % 2 else b for n, b in zip(shape, begin, strict=True)]  # from the end
        np.testing.assert_array_equal(run("slice_by_size", x=x, begin=counted, size=size).numpy(), x[part])


X = np.zeros((2, 3), np.float32)


@pytest.mark.parametrize(
    ("operator", "inputs", "text"),
    [
        (
            "slice_by_index",
            {"begin": [0, 3], "end": [1, 1], "squeeze_mask": [False, True]},
            "slice_by_index takes index 3 of an axis of 3",
        ),
        ("slice_by_size", {"begin": [0, 2], "size": [1, 2]}, "slice_by_size takes 2 from 2 on an axis of 3"),
        ("slice_by_size", {"begin": [0, -4], "size": [1, 2]}, "takes 2 from -4 on an axis of 3"),
    ],
)
def test_what_does_not_fit_is_refused(operator: str, inputs: dict[str, Any], text: str) -> None:
    with pytest.raises(Unsupported, match=text):
        run(operator, x=X, **inputs)


@pytest.mark.parametrize(
    ("operator", "inputs", "text"),
    [
        ("slice_by_index", {"begin": [0], "end": [1]}, "rank 2 with parameters of another length"),
        ("slice_by_index", {"begin": [0, 0], "end": [1, 1], "stride": [1, 0]}, "a stride of 0"),
        ("slice_by_size", {"begin": [0], "size": [1]}, "rank 2 with parameters of another length"),
        (
            "slice_update",
            {"update": np.zeros((2, 2)), "begin": [0, 0], "end": [2, 3]},
            "a slice of .2, 3. with values of .2, 2.",
        ),
    ],
)
def test_sizes_that_contradict_each_other_cannot_be(operator: str, inputs: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        run(operator, x=X, **inputs)
