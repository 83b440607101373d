"""Activations against their formulas in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.special

from edgebake_targets.mil.call import Mode, Unsupported
from mil_ops import assert_close, run

Array = npt.NDArray[Any]

SHAPES = [(), (1,), (9,), (3, 4), (1, 5, 1), (2, 3, 2, 2), (1, 2, 1, 3, 2), (0, 2)]


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


CASES: dict[str, Any] = {
    "clamped_relu": ({"alpha": 0.3, "beta": 1.5}, lambda x: np.minimum(1.5, np.where(x >= 0, x, 0.3 * x))),
    "elu": ({"alpha": 0.7}, lambda x: np.where(x > 0, x, 0.7 * (np.exp(x) - 1))),
    "gelu": ({}, lambda x: 0.5 * x * (1 + scipy.special.erf(x / np.sqrt(2)))),
    "gelu exact": ({"mode": "EXACT"}, lambda x: x * scipy.special.ndtr(x)),
    "gelu tanh": (
        {"mode": "TANH_APPROXIMATION"},
        lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    ),
    "gelu sigmoid": ({"mode": "SIGMOID_APPROXIMATION"}, lambda x: x * _sigmoid(1.702 * x)),
    "leaky_relu": ({"alpha": 0.1}, lambda x: np.where(x >= 0, x, 0.1 * x)),
    "linear_activation": ({"alpha": 2.0, "beta": -0.5}, lambda x: 2.0 * x - 0.5),
    "relu": ({}, lambda x: np.maximum(x, 0)),
    "relu6": ({}, lambda x: np.clip(x, 0, 6)),
    "scaled_tanh": ({"alpha": 1.7, "beta": 0.6}, lambda x: 1.7 * np.tanh(0.6 * x)),
    "sigmoid": ({}, _sigmoid),
    "sigmoid_hard": ({"alpha": 0.2, "beta": 0.5}, lambda x: np.clip(0.2 * x + 0.5, 0, 1)),
    "silu": ({}, lambda x: x * _sigmoid(x)),
    "softplus": ({}, lambda x: np.logaddexp(0, x)),
    "softsign": ({}, lambda x: x / (1 + np.abs(x))),
    "thresholded_relu": ({"alpha": 0.8}, lambda x: np.where(x >= 0.8, x, 0)),
}


def _random(shape: tuple[int, ...], seed: int = 0, scale: float = 4.0) -> Array:
    return (np.random.default_rng([seed, *shape]).standard_normal(shape) * scale).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_activation(case: str, shape: tuple[int, ...]) -> None:
    parameters, formula = CASES[case]
    x = _random(shape)
    assert_close(run(case.split(maxsplit=1)[0], x=x, **parameters), formula(x.astype(np.float64)))


@pytest.mark.parametrize("case", CASES)
def test_zero_and_large_values(case: str) -> None:
    parameters, formula = CASES[case]
    x = np.array([0.0, -0.0, 80.0, -80.0], np.float32)
    assert_close(run(case.split(maxsplit=1)[0], x=x, **parameters), formula(x.astype(np.float64)))


def test_softplus_does_not_overflow() -> None:
    assert run("softplus", x=[1000.0, -1000.0]).tolist() == [1000.0, 0.0]


@pytest.mark.parametrize("shape", [(1, 4, 1), (2, 3, 5), (2, 4, 3, 2), (1, 2, 3, 1, 2), (3, 1, 2)])
def test_parameters_per_channel(shape: tuple[int, ...]) -> None:
    x = _random(shape)
    alpha, beta = _random((shape[1],), 1, 1.0), _random((shape[1],), 2, 1.0)
    channels = np.moveaxis(x.astype(np.float64), 1, -1)
    rectified = np.where(channels > 0, channels, alpha * channels)
    assert_close(run("prelu", x=x, alpha=alpha), np.moveaxis(rectified, -1, 1))
    soft = alpha * np.logaddexp(0, beta * channels)
    assert_close(run("softplus_parametric", x=x, alpha=alpha, beta=beta), np.moveaxis(soft, -1, 1))


@pytest.mark.parametrize(
    ("shape", "axis"), [((5,), None), ((5,), 0), ((2, 3), -2), ((2, 3, 4), 1), ((1, 3, 1, 2), -1), ((2, 1, 3, 2, 2), 1)]
)
def test_softmax(shape: tuple[int, ...], axis: int | None) -> None:
    x = _random(shape)
    expected = scipy.special.softmax(x.astype(np.float64), axis=-1 if axis is None else axis)
    assert_close(run("softmax", x=x, axis=axis), expected)
    worst = run("softmax", x=x, axis=axis, outputs=("float16",), rounding=Mode.FP16_WORST)
    assert_close(worst, expected, 2e-3 * 4)


def test_softmax_of_many_equal_values_loses_its_sum_in_half() -> None:
    """In float16 a sum of ones stops at 2048: every share of 4096 is twice what it should be."""
    assert_close(run("softmax", x=np.zeros(4096)), np.full(4096, 1 / 4096), 1e-7)
    worst = run("softmax", x=np.zeros(4096), outputs=("float16",), rounding=Mode.FP16_WORST)
    assert worst.tolist() == [1 / 2048] * 4096


def test_gelu_refuses_an_unknown_mode() -> None:
    with pytest.raises(Unsupported, match="gelu with the mode QUICK"):
        run("gelu", x=[1.0], mode="QUICK")


def test_as_measured_on_macs() -> None:
    """Values from coremltools' own tests of these operators."""
    x = np.array([[-1.0, 2.0, -3.0], [4.0, -5.0, 6.0]])
    assert run("clamped_relu", x=x, alpha=2.0, beta=1.0).tolist() == [[-2, 1, -6], [1, -10, 1]]
    rows = np.array([[-1.0, 3, 6], [-1, 2, -3], [4, -5, 6]]).reshape(1, 3, 1, 3)
    expected = [[1.81427e-02, 12, 24], [1.3427734e-02, 20, 7.1525574e-07], [72, 0, 108]]
    result = run("softplus_parametric", x=rows, alpha=[1.0, 2.0, 3.0], beta=[4.0, 5.0, 6.0])
    assert_close(result.reshape(3, 3), expected)
