"""Reductions against numpy in float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import Tensor

from edgebake_targets.mil.call import Mode
from mil_ops import run

SHAPES = [(1,), (6,), (3, 4), (1, 5, 1), (2, 3, 4), (2, 1, 3, 2), (2, 2, 1, 3, 2)]
FORMULAS = {
    "reduce_l1_norm": lambda x, **over: np.abs(x).sum(**over),
    "reduce_l2_norm": lambda x, **over: np.sqrt((x * x).sum(**over)),
    "reduce_log_sum": lambda x, **over: np.log(x.sum(**over)),
    "reduce_log_sum_exp": lambda x, **over: np.log(np.exp(x).sum(**over)),
    "reduce_max": np.max,
    "reduce_mean": np.mean,
    "reduce_min": np.min,
    "reduce_prod": np.prod,
    "reduce_sum": np.sum,
    "reduce_sum_square": lambda x, **over: (x * x).sum(**over),
}


def _axes(shape: tuple[int, ...]) -> Iterator[list[int] | None]:
    """All axes, none, each alone counted from either end, and pairs."""
    rank = len(shape)
    yield from ([None, []] if rank else [None])
    yield from ([axis] for axis in range(-rank, rank))
    yield from (list(pair) for pair in itertools.permutations(range(rank), 2))


@pytest.mark.parametrize("operator", FORMULAS)
@pytest.mark.parametrize("shape", SHAPES)
def test_reduce(operator: str, shape: tuple[int, ...]) -> None:
    x = np.random.default_rng([1, *shape]).uniform(0.3, 2, shape).astype(np.float32)
    x = x if operator == "reduce_log_sum" else x * np.random.default_rng(0).choice([-1, 1], shape).astype(np.float32)
    for axes in _axes(shape):
        for keep in (None, True):
            over = {"axis": None if axes is None else tuple(axes), "keepdims": bool(keep)}
            expected = FORMULAS[operator](x.astype(np.float64), **over)
            chosen = None if axes is None else np.array(axes, np.int32)
            result = run(operator, x=x, axes=chosen, keep_dims=keep).numpy()
            assert result.dtype == np.float32
            np.testing.assert_allclose(result, expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("operator", FORMULAS)
def test_reduce_of_integers_cuts_to_integers(operator: str) -> None:
    x = np.array([[1, 2, 3], [4, 5, 7]], np.int32)
    expected = FORMULAS[operator](x.astype(np.float64), axis=1)
    result = run(operator, x=x, axes=[1]).numpy()
    assert result.dtype == np.int32
    np.testing.assert_array_equal(result, expected.astype(np.int32))


@pytest.mark.parametrize("operator", ["reduce_argmax", "reduce_argmin"])
@pytest.mark.parametrize("shape", SHAPES)
def test_reduce_to_an_index(operator: str, shape: tuple[int, ...]) -> None:
    """Of equal values the first counts."""
    x = np.round(np.random.default_rng([2, *shape]).standard_normal(shape)).astype(np.float32)
    for axis, dtype in itertools.product([None, *range(-len(shape), len(shape))], [np.float32, np.int32, np.uint8]):
        values = np.abs(x).astype(dtype)
        find = np.argmax if operator == "reduce_argmax" else np.argmin
        expected = find(values, axis=-1 if axis is None else axis)
        result = run(operator, x=values, axis=axis).numpy()
        assert result.dtype == np.int32
        np.testing.assert_array_equal(result, expected)
        kept = run(operator, x=values, axis=axis, keep_dims=True)
        assert kept.shape == np.expand_dims(expected, -1 if axis is None else axis).shape


def test_log_sum_exp_of_what_exp_cannot_hold() -> None:
    assert run("reduce_log_sum_exp", x=[1000.0, 1000.0]).item() == pytest.approx(1000 + np.log(2))


def _half(operator: str, x: NDArray[Any], **parameters: Any) -> Tensor:
    return run(operator, x=x, outputs=("float16",), rounding=Mode.FP16_WORST, **parameters)


@pytest.mark.parametrize(
    ("operator", "x", "worst", "exact"),
    [
        ("reduce_sum", np.ones(2050), 2048, 2050),
        ("reduce_mean", np.full(100, 1000), np.inf, 1000),
        ("reduce_l1_norm", np.full(70, -1000), np.inf, 70000),
        ("reduce_l2_norm", np.array([300, 1]), np.inf, 300.00167),
        ("reduce_sum_square", np.array([300]), np.inf, 90000),
        ("reduce_log_sum", np.full(70, 1000), np.inf, np.log(70000)),
        ("reduce_log_sum_exp", np.zeros(2050), np.log(2048), np.log(2050)),
        ("reduce_prod", np.array([300, 300, 0.001]), np.inf, 90),
        ("reduce_max", np.array([1, 3]), 3, 3),
    ],
)
def test_sums_in_half_lose_and_overflow(operator: str, x: NDArray[Any], worst: float, exact: float) -> None:
    values = x.astype(np.float32)
    assert _half(operator, values).item() == pytest.approx(worst, rel=1e-3)
    assert run(operator, x=values, outputs=("float16",)).item() == pytest.approx(exact, rel=1e-6)


def test_sums_in_half_keep_the_shape() -> None:
    x = np.ones((2, 3, 4), np.float32)
    for operator in FORMULAS:
        assert _half(operator, x, axes=[0, -1]).shape == (3,)
        assert _half(operator, x, axes=[0, -1], keep_dims=True).shape == (1, 3, 1)


def test_an_axis_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="reduce_sum along axis 2 of a tensor of rank 2"):
        run("reduce_sum", x=np.zeros((2, 3)), axes=[2])
    with pytest.raises(ValueError, match="reduce_argmax along axis -3 of a tensor of rank 2"):
        run("reduce_argmax", x=np.zeros((2, 3)), axis=-3)
