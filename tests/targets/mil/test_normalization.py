"""Normalisation against its formulas in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from edgebake_targets.mil.call import Mode, Unsupported
from mil_ops import assert_close, run

Array = npt.NDArray[Any]

WORST = {"outputs": ("float16",), "rounding": Mode.FP16_WORST}


def _random(shape: tuple[int, ...], seed: int = 0) -> Array:
    """Values that float16 holds, as every value is in the mode that rounds them."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float16).astype(np.float32)


def _both(name: str, expected: Array, **inputs: Any) -> None:
    assert_close(run(name, **inputs), expected)
    assert_close(run(name, **inputs, **WORST), expected, 0.01)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (2, 4, 3, 2), (1, 2, 3, 1, 2), (3, 5, 1, 1)])
@pytest.mark.parametrize("scaled", [True, False])
def test_batch_norm(shape: tuple[int, ...], scaled: bool) -> None:
    x, mean, gamma, beta = _random(shape), *(_random((shape[1],), seed) for seed in (1, 2, 3))
    variance = np.abs(_random((shape[1],), 4)) + 0.1
    channels = (np.moveaxis(x.astype(np.float64), 1, -1) - mean) / np.sqrt(variance + (0.1 if scaled else 1e-5))
    expected = np.moveaxis(channels * gamma + beta if scaled else channels, -1, 1)
    optional = {"gamma": gamma, "beta": beta, "epsilon": 0.1} if scaled else {}
    _both("batch_norm", expected, x=x, mean=mean, variance=variance, **optional)


@pytest.mark.parametrize("shape", [(1, 2, 1), (2, 3, 5), (2, 4, 3, 2), (3, 1, 4, 4), (1, 5, 1, 3)])
@pytest.mark.parametrize("scaled", [True, False])
def test_instance_norm(shape: tuple[int, ...], scaled: bool) -> None:
    x, gamma, beta = _random(shape), _random((shape[1],), 2), _random((shape[1],), 3)
    axes = tuple(range(2, len(shape)))
    wide = x.astype(np.float64)
    epsilon = 0.1 if scaled else 1e-5
    expected = (wide - wide.mean(axes, keepdims=True)) / np.sqrt(wide.var(axes, keepdims=True) + epsilon)
    if scaled:
        expected = np.moveaxis(np.moveaxis(expected, 1, -1) * gamma + beta, -1, 1)
    optional = {"gamma": gamma, "beta": beta, "epsilon": epsilon} if scaled else {}
    _both("instance_norm", expected, x=x, **optional)


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((6,), None),
        ((2, 3, 4), None),
        ((2, 3, 4), [-1]),
        ((2, 3, 4), [2, 1]),
        ((2, 3, 4), [1]),
        ((2, 3, 4, 5), [0, -1]),
        ((1, 4, 1, 3, 2), [1]),
        ((3, 1), [1]),
    ],
)
@pytest.mark.parametrize("given", [("gamma", "beta"), ("gamma",), ("beta",), ()])
def test_layer_norm(shape: tuple[int, ...], axes: list[int] | None, given: tuple[str, ...]) -> None:
    """gamma has the shape of the normalised dimensions, in their order in x, whatever the order of the axes."""
    x, rank = _random(shape), len(shape)
    chosen = tuple(sorted(a % rank for a in (range(rank) if axes is None else axes)))
    optional: dict[str, Any] = {name: _random(tuple(shape[a] for a in chosen), len(name)) for name in given}
    wide, epsilon = x.astype(np.float64), 0.01 if given else 1e-5
    expected = (wide - wide.mean(chosen, keepdims=True)) / np.sqrt(wide.var(chosen, keepdims=True) + epsilon)
    seen = [shape[a] if a in chosen else 1 for a in range(rank)]
    if "gamma" in optional:
        expected = expected * optional["gamma"].reshape(seen)
    if "beta" in optional:
        expected = expected + optional["beta"].reshape(seen)
    if given:
        optional["epsilon"] = epsilon
    _both("layer_norm", expected, x=x, axes=axes, **optional)


def test_layer_norm_in_half_loses_a_row_whose_squares_overflow() -> None:
    x = np.array([[400.0, -400.0], [1.0, -1.0]])
    assert_close(run("layer_norm", x=x, axes=[-1]), [[1, -1], [1, -1]])
    assert_close(run("layer_norm", x=x, axes=[-1], **WORST), [[0, 0], [1, -1]], 1e-3)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 4), (2, 2, 3, 4), (3, 1, 1, 5), (2, 2, 1, 3, 2)])
def test_l2_norm(shape: tuple[int, ...]) -> None:
    x = _random(shape)
    wide = x.astype(np.float64)
    for epsilon in (None, 0.5):
        total = (wide**2).sum((-3, -2, -1), keepdims=True) + (1e-6 if epsilon is None else epsilon)
        _both("l2_norm", wide / np.sqrt(total), x=x, epsilon=epsilon)


def test_layer_norm_refuses_an_axis_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="layer_norm along axis 2 of a tensor of rank 2"):
        run("layer_norm", x=np.ones((2, 2)), axes=[2])


def test_l2_norm_needs_three_dimensions() -> None:
    with pytest.raises(Unsupported, match="l2_norm of rank 2"):
        run("l2_norm", x=np.ones((2, 2)))


@pytest.mark.parametrize("shape", [(1, 1, 2, 1), (2, 6, 1, 3), (1, 5, 2, 3), (2, 3, 4, 1), (1, 8, 1, 1)])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_local_response_norm(shape: tuple[int, ...], size: int) -> None:
    x = _random(shape)
    expected = torch.nn.functional.local_response_norm(torch.tensor(x), size, 0.3, 0.6, 2.0).numpy()
    _both("local_response_norm", expected, x=x, size=size, alpha=0.3, beta=0.6, k=2.0)


def test_local_response_norm_defaults_and_formula() -> None:
    x = np.array([1.0, 2.0, 30.0]).reshape(1, 3, 1, 1)
    sums = np.array([1 + 4, 1 + 4 + 900, 4 + 900]).reshape(1, 3, 1, 1)
    assert_close(run("local_response_norm", x=x, size=3), x / (1 + 1e-4 / 3 * sums) ** 0.75)


def test_local_response_norm_is_only_certain_for_images() -> None:
    with pytest.raises(Unsupported, match="local_response_norm of rank 3: over what it sums is only certain for rank"):
        run("local_response_norm", x=np.ones((1, 3, 2)), size=3)
