"""Ranges of activations: what histograms keep of what they saw, and where each method cuts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from asking import defaults
from edgebake.target import Asked, find_target
from edgebake_targets._ranges import BINS, METHODS, Seen, chosen


def seen_of(*parts: np.ndarray) -> Seen:
    seen = Seen()
    for part in parts:
        seen.add(part)
    return seen


def rounding_error(values: np.ndarray, low: float, high: float, bits: int = 8) -> float:
    """The mean squared error of ``values`` after rounding to a zero point and 2^bits levels."""
    step = (high - low) / (2**bits - 1)
    zero = np.rint(-low / step)
    rounded = (np.clip(np.rint(values / step) + zero, 0, 2**bits - 1) - zero) * step
    return float(((values - rounded) ** 2).mean())


@pytest.fixture
def heavy() -> np.ndarray:
    """Mostly within 3, with a few outliers of up to 60 on one side."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(100, 1000)).astype(np.float32)
    values[0, :5] = [20, 30, 40, 50, 60]
    return values


def test_a_histogram_that_grows_counts_as_one_that_knew_its_ends_before() -> None:
    rng = np.random.default_rng(1)
    parts = [rng.normal(scale=scale, size=500) for scale in (0.1, 3, 1, 40)]
    grown = seen_of(*parts)
    values = np.concatenate(parts)
    assert (grown.low, grown.high) == (values.min(), values.max())
    edges = grown.start + np.arange(BINS + 1) * grown.span / BINS
    assert np.abs(grown.counts - np.histogram(values, edges)[0]).sum() <= 2  # two values may lie on an edge
    assert grown.counts.sum() == values.size


def test_zeros_are_counted_apart_and_what_is_not_finite_not_at_all() -> None:
    seen = seen_of(np.zeros(10), np.array([0.0, 1.0, -np.inf, np.nan, 3.0]), np.array([]))
    assert (seen.low, seen.high, seen.zeros, int(seen.counts.sum())) == (0.0, 3.0, 11, 2)


def test_minmax_keeps_all_and_needs_no_histogram(heavy: np.ndarray) -> None:
    seen = Seen(counted=False)
    seen.add(heavy)
    assert chosen(seen, "minmax", 8) == (float(heavy.min()), 60.0)
    assert not seen.counts.any()


def test_percentile_cuts_its_share_half_on_each_side(heavy: np.ndarray) -> None:
    low, high = chosen(seen_of(heavy), "percentile", 8, 99.0)
    width = 64 / BINS
    assert low == pytest.approx(np.quantile(heavy, 0.005), abs=2 * width)
    assert high == pytest.approx(np.quantile(heavy, 0.995), abs=2 * width)
    assert chosen(seen_of(heavy), "percentile", 8, 100.0) == chosen(seen_of(heavy), "minmax", 8)


def test_mse_finds_the_cut_that_rounds_best(heavy: np.ndarray) -> None:
    low, high = chosen(seen_of(heavy), "mse", 4)
    found = rounding_error(heavy, low, high, bits=4)
    tried = [rounding_error(heavy, low, end, bits=4) for end in np.linspace(1, 60, 60)]
    assert found < 1.1 * min(tried)
    assert found < 0.5 * rounding_error(heavy, float(heavy.min()), 60.0, bits=4)


def test_entropy_cuts_outliers_and_keeps_the_bulk(heavy: np.ndarray) -> None:
    low, high = chosen(seen_of(heavy), "entropy", 8)
    assert low < -3 and 3 < high < 30


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_zero_and_what_has_no_outliers(method: str) -> None:
    values = np.random.default_rng(2).uniform(0, 6, 20000)
    low, high = chosen(seen_of(np.maximum(values - 1, 0)), method, 8)
    assert low == 0.0 and high == pytest.approx(5.0, rel=0.02)
    assert chosen(seen_of(np.zeros(4)), method, 8) == (0.0, 0.0)


@pytest.mark.parametrize("method", METHODS)
def test_with_16_bits_only_percentile_cuts_what_was_seen(method: str, heavy: np.ndarray) -> None:
    cut = chosen(seen_of(heavy), method, 16)[1] < 60.0
    assert cut == (method == "percentile")


@pytest.mark.parametrize("name", ["executorch-xnnpack", "onnx-cpu", "onnx-mobile", "onnx-qnn"])
def test_a_percentile_that_is_none_is_refused_by_every_target_that_has_the_option(name: str) -> None:
    target: Any = find_target(name)
    for percentile, refused in ((0.0, True), (100.5, True), (100.0, False)):
        options = defaults(target) | {"percentile": percentile}
        asked = Asked(
            scheme="w8a8", module_schemes=(), options=options, device=None, inputs={}, varying=(), channels=None
        )
        found = [(refusal.what, refusal.fix, refusal.key) for refusal in target.refusals(asked)]
        expected = ("percentile is a share in percent", "99.99, say", "options.percentile")
        assert (expected in found) == refused
