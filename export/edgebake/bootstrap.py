"""95 % intervals by resampling whole sources: percentile bootstrap, seeded, without a loop over resamples."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
LEVEL = 0.95
CELLS = 1 << 19  # resamples times columns held at once: 4 MiB of float64

Floats = NDArray[np.float64]


def _percentiles(values: Floats) -> tuple[float, float]:
    kept = values[np.isfinite(values)]
    if not len(kept):
        return math.nan, math.nan
    low, high = np.quantile(kept, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def share_interval(hits: Floats, counts: Floats, seed: int) -> tuple[float, float]:
    """Interval of the share ``sum(hits) / sum(counts)``; both (sources,), ``0 <= hits <= counts``.

    When every source hits fully (or none does) resampling would claim certainty; then the open end is Clopper &
    Pearson's (Biometrika 26, 1934) for one trial per source. NaN for fewer than two sources.
    """
    low, high = _resampled(hits, counts, seed)
    if not math.isnan(low) and np.array_equal(hits, counts):
        return 1 - _room(counts), 1.0
    if not math.isnan(low) and not hits.any():
        return 0.0, _room(counts)
    return low, high


def difference_interval(differences: Floats, counts: Floats, seed: int) -> tuple[float, float]:
    """Interval of ``sum(differences) / sum(counts)``; both (sources,); a difference may be negative.

    Where no source differs, either end is what a share of none of them could still be.
    """
    low, high = _resampled(differences, counts, seed)
    if not math.isnan(low) and not differences.any():
        return -_room(counts), _room(counts)
    return low, high


def _room(counts: Floats) -> float:
    """Clopper & Pearson's upper end for no hit in one trial per source."""
    return float(1 - ((1 - LEVEL) / 2) ** (1 / np.count_nonzero(counts)))


def _resampled(hits: Floats, counts: Floats, seed: int) -> tuple[float, float]:
    """Percentiles over resampled sources.

    Sources with equal (hits, counts) are drawn as one multinomial category, which is the same distribution and takes
    two columns instead of thousands for a set of photos.
    """
    sources = len(counts)
    if np.count_nonzero(counts) < 2:
        return math.nan, math.nan
    kinds, multiplicity = np.unique(np.stack([hits, counts], axis=1), axis=0, return_counts=True)
    rng = np.random.default_rng(seed)
    step = max(1, CELLS // len(kinds))
    values: list[Floats] = []
    for start in range(0, RESAMPLES, step):
        drawn = rng.multinomial(sources, multiplicity / sources, size=min(step, RESAMPLES - start))
        sums = drawn @ kinds  # (resamples, 2)
        with np.errstate(invalid="ignore", divide="ignore"):
            values.append(sums[:, 0] / sums[:, 1])
    return _percentiles(np.concatenate(values))


def product_interval(x: Floats, y: Floats, sources: NDArray[Any], count: int, seed: int) -> tuple[float, float]:
    """Interval of the correlation of ``x`` and ``y`` (pairs,) whose i-th value belongs to ``sources[i]`` (pairs, 2).

    A pair weighs the product of how often its two sources were drawn (Owen, "The pigeonhole bootstrap", Annals of
    Applied Statistics 1, 2007), once when both are the same. Given ranks, they are kept from the whole set: re-ranking
    each resample would cost a sort and changes the interval little. NaN for fewer than three sources.
    """
    if count < 3 or len(x) < 3:
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    x, y = x - x.mean(), y - y.mean()
    first, second = sources[:, 0], sources[:, 1]
    crossing = (first != second)[None, :]
    moments = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)  # (pairs, 6)
    step = max(1, CELLS // max(len(x), count))
    values: list[Floats] = []
    for start in range(0, RESAMPLES, step):
        size = min(step, RESAMPLES - start)
        drawn = rng.multinomial(count, np.full(count, 1 / count), size=size).astype(np.float64)  # (resamples, sources)
        weight = drawn[:, first] * np.where(crossing, drawn[:, second], 1.0)
        values.append(_weighted_correlation(weight @ moments))
    return _percentiles(np.concatenate(values))


def _weighted_correlation(sums: Floats) -> Floats:
    """(resamples, 6) weighted sums of 1, x, y, xx, yy, xy -> (resamples,) correlations, NaN where undefined."""
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = sums / sums[:, :1]
        _, x, y, xx, yy, xy = mean.T
        return np.asarray((xy - x * y) / np.sqrt((xx - x * x) * (yy - y * y)))
