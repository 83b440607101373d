"""Random operators: shapes, seeds, and the moments of what is drawn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edgebake_targets.mil.call import Unsupported
from edgebake_targets.mil.operators import operators
from edgebake_targets.mil.ops.randomness import RANDOM
from mil_ops import run

MANY = 200_000


def _near(values: Tensor, mean: float, deviation: float) -> None:
    """Within five standard errors, for the mean and for the deviation."""
    error = 5 * deviation / np.sqrt(len(values))
    assert float(values.mean()) == pytest.approx(mean, abs=error + 1e-9)
    assert float(values.std()) == pytest.approx(deviation, abs=2 * error + 1e-9)


@pytest.mark.parametrize("operator", ["random_bernoulli", "random_normal", "random_uniform"])
@pytest.mark.parametrize("shape", [[1], [3], [2, 3], [2, 0], [2, 1, 2, 1, 3]])
def test_shapes_and_seeds(operator: str, shape: list[int]) -> None:
    first, again, other, free = (run(operator, shape=shape, seed=seed).double() for seed in (3, 3, 4, -1))
    assert all(list(value.shape) == shape for value in (first, again, other, free))
    assert torch.equal(first, again)
    assert operator == "random_bernoulli" or first.numel() == 0 or not torch.equal(first, other)


@pytest.mark.parametrize("probability", [None, 0.0, 0.2, 0.9, 1.0])
def test_bernoulli(probability: float | None) -> None:
    values = run("random_bernoulli", shape=[MANY], prob=probability, seed=0)
    assert values.dtype == torch.float32
    assert set(values.unique().tolist()) <= {0.0, 1.0}
    chance = 0.5 if probability is None else probability
    _near(values.double(), chance, (chance * (1 - chance)) ** 0.5)


@pytest.mark.parametrize(("mean", "deviation"), [(None, None), (3.0, 0.5), (-2.0, 0.0), (0.0, 10.0), (None, 2.0)])
def test_normal(mean: float | None, deviation: float | None) -> None:
    values = run("random_normal", shape=[MANY], mean=mean, stddev=deviation, seed=0).double()
    _near(values, mean or 0, 1 if deviation is None else deviation)
    if deviation != 0:
        inside = ((values - (mean or 0)).abs() < (deviation or 1)).double().mean().item()
        assert inside == pytest.approx(0.6827, abs=0.01)


@pytest.mark.parametrize(("low", "high"), [(None, None), (-3.0, 5.0), (2.0, 2.0), (0.5, None), (None, 100.0)])
def test_uniform(low: float | None, high: float | None) -> None:
    bottom, top = 0.0 if low is None else low, 1.0 if high is None else high
    values = run("random_uniform", shape=[MANY], low=low, high=high, seed=0).double()
    assert bottom <= values.min()
    assert values.max() < top or bottom == top
    _near(values, (bottom + top) / 2, (top - bottom) / 12**0.5)


@pytest.mark.parametrize("mode", [None, "logits", "probs"])
@pytest.mark.parametrize("shape", [(4,), (1,), (2, 3), (2, 2, 5)])
def test_categorical(shape: tuple[int, ...], mode: str | None) -> None:
    """Probabilities need not sum to one; what is drawn is a float."""
    x = np.random.default_rng(0).uniform(0.1, 2, shape).astype(np.float32)
    weights = x if mode == "probs" else np.exp(x)
    drawn = run("random_categorical", x=x, mode=mode, size=20_000, seed=1)
    assert (drawn.shape, drawn.dtype) == ((*shape[:-1], 20_000), torch.float32)
    for row in np.ndindex(*shape[:-1]):
        shares = np.bincount(drawn[row].numpy().astype(int), minlength=shape[-1]) / 20_000
        np.testing.assert_allclose(shares, weights[row] / weights[row].sum(), atol=0.02)
    assert run("random_categorical", x=x, mode=mode).shape == (*shape[:-1], 1)


def test_every_random_operator_is_listed_as_one() -> None:
    assert frozenset(name for name in operators() if name.startswith("random_")) == RANDOM


@pytest.mark.parametrize(
    ("operator", "inputs", "text"),
    [
        ("random_normal", {"shape": [2**20, 2**20]}, "random_normal to the shape .*more than 2147483648 values"),
        ("random_categorical", {"x": [1.0], "mode": "odds"}, "random_categorical in the mode 'odds'"),
    ],
)
def test_what_cannot_be_drawn_is_refused(operator: str, inputs: dict[str, Any], text: str) -> None:
    with pytest.raises(Unsupported, match=text):
        run(operator, **inputs)
