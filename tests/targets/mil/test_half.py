"""The worst float16 order, against loops over numpy's float16 numbers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from edgebake_targets.mil import half

Array = npt.NDArray[Any]


def _running_sum(terms: Iterable[Any]) -> np.float16:
    total = np.float16(0)
    with np.errstate(over="ignore", invalid="ignore"):
        for term in terms:
            total = np.float16(total + np.float16(term))
    return total


def _products(a: Array, b: Array) -> list[np.float16]:
    with np.errstate(over="ignore"):
        return [np.float16(np.float16(p) * np.float16(q)) for p, q in zip(a, b, strict=True)]


def _random(*shape: int, seed: int = 0, scale: float = 1.0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32) * np.float32(scale)


def test_to_half_rounds_to_nearest_even_and_overflows_to_infinity() -> None:
    x = torch.tensor([1 + 2**-11, 1 + 3 * 2**-11, 65519.0, 65520.0, -1e9, 1e-8])
    assert half.to_half(x).tolist() == [1.0, 1 + 2**-9, 65504.0, np.inf, -np.inf, 0.0]


@pytest.mark.parametrize(
    ("shape", "dims"),
    [((7,), [0]), ((3, 50), [1]), ((3, 50), [-2]), ((2, 3, 4), [0, 2]), ((2, 3, 4), [2, 1, 0]), ((1, 5, 1), [2])],
)
@pytest.mark.parametrize("keepdim", [False, True])
def test_half_sum_adds_one_after_another(shape: tuple[int, ...], dims: list[int], keepdim: bool) -> None:
    x = _random(*shape, scale=3.0)
    axes = sorted(d % len(shape) for d in dims)
    rest = [d for d in range(len(shape)) if d not in axes]
    expected = np.empty([shape[d] for d in rest], np.float32)
    for at in np.ndindex(expected.shape):
        places = dict(zip(rest, at, strict=True))
        inner = itertools.product(*(range(shape[d]) for d in axes))
        expected[at] = _running_sum(
            x[tuple(places.get(d, p[axes.index(d)] if d in axes else 0) for d in range(len(shape)))] for p in inner
        )
    if keepdim:
        expected = expected.reshape([1 if d in axes else n for d, n in enumerate(shape)])
    np.testing.assert_array_equal(half.half_sum(torch.tensor(x), dims, keepdim).numpy(), expected, strict=True)


def test_ones_stop_counting_at_2048_and_large_sums_stay_infinite() -> None:
    assert float(half.half_sum(torch.ones(3000), [0])) == 2048
    assert float(half.half_sum(torch.cat([torch.full((1500,), 1.0), torch.full((99,), 0.5)]), [0])) == 1500
    assert float(half.half_sum(torch.tensor([60000.0, 60000.0, -60000.0]), [0])) == np.inf


@pytest.mark.parametrize("length", [65, 128, 64 * 64, 64 * 65 + 7])
def test_a_long_sum_is_split_into_runs(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half, "LONGEST", 64)
    terms = _random(length, scale=0.01)
    expected: Any = terms
    while len(expected) > 64:
        expected = [_running_sum(expected[at : at + 64]) for at in range(0, len(expected), 64)]
    assert float(half.half_sum(torch.tensor(terms), [0])) == float(_running_sum(expected))


@pytest.mark.parametrize(
    ("x_shape", "y_shape"),
    [((5,), (5,)), ((5,), (5, 3)), ((4, 5), (5,)), ((4, 40), (40, 3)), ((2, 1, 3, 6), (3, 6, 2)), ((1, 1), (1, 1))],
)
def test_half_matmul_rounds_each_product_and_each_sum(x_shape: tuple[int, ...], y_shape: tuple[int, ...]) -> None:
    x, y = _random(*x_shape, seed=1), _random(*y_shape, seed=2)
    result = half.half_matmul(torch.tensor(x), torch.tensor(y)).numpy()
    left = x[None] if x.ndim == 1 else x
    right = y[:, None] if y.ndim == 1 else y
    batch = np.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    left, right = np.broadcast_to(left, (*batch, *left.shape[-2:])), np.broadcast_to(right, (*batch, *right.shape[-2:]))
    expected = np.empty((*batch, left.shape[-2], right.shape[-1]), np.float32)
    for at in np.ndindex(expected.shape):
        expected[at] = _running_sum(_products(left[(*at[:-1],)], right[(*at[:-2], slice(None), at[-1])]))
    np.testing.assert_array_equal(result, expected.reshape(np.matmul(x, y).shape))
    assert np.abs(result - np.matmul(x, y)).max() < 0.05


def test_half_matmul_overflows_where_float32_does_not() -> None:
    x, y = torch.full((1, 2), 300.0), torch.tensor([[300.0], [-300.0]])
    assert not torch.isfinite(half.half_matmul(x, y)).any()
    assert float(x @ y) == 0.0


@pytest.mark.parametrize(
    ("x_shape", "w_shape", "strides", "dilations", "groups"),
    [
        ((2, 3, 9), (4, 3, 3), [2], [1], 1),
        ((1, 4, 5, 6), (6, 2, 2, 3), [1, 2], [2, 1], 2),
        ((1, 3, 4, 4), (3, 1, 1, 1), [1, 1], [1, 1], 3),
        ((1, 2, 3, 3, 3), (2, 2, 2, 1, 2), [1, 1, 1], [1, 1, 2], 1),
    ],
)
def test_half_conv_goes_by_channel_then_position(
    x_shape: tuple[int, ...], w_shape: tuple[int, ...], strides: list[int], dilations: list[int], groups: int
) -> None:
    x, weight = _random(*x_shape, seed=3), _random(*w_shape, seed=4)
    options: dict[str, Any] = {"strides": strides, "dilations": dilations, "groups": groups}
    result = half.half_conv(torch.tensor(x), torch.tensor(weight), **options).numpy()
    expected = np.empty_like(result)
    for n, out, *at in np.ndindex(result.shape):
        first = out // (w_shape[0] // groups) * w_shape[1]
        window = tuple(
            slice(p * s, p * s + (k - 1) * d + 1, d)
            for p, s, k, d in zip(at, strides, w_shape[2:], dilations, strict=True)
        )
        pixels = x[(n, slice(first, first + w_shape[1]), *window)]
        expected[(n, out, *at)] = _running_sum(_products(pixels.reshape(-1), weight[out].reshape(-1)))
    np.testing.assert_array_equal(result, expected)
