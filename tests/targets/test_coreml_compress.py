"""Palettes: close to the best there is, exact where there are few values."""

from __future__ import annotations

import numpy as np
import pytest

from edgebake_targets import _coreml, _coreml_compress


@pytest.mark.parametrize(("bits", "count", "worse"), [(4, 3_000, 1.01), (8, 3_000, 1.01), (6, 40_000, 1.15)])
def test_a_palette_is_close_to_the_best_one(bits: int, count: int, worse: float) -> None:
    with _coreml.quiet():
        from coremltools._deps import kmeans1d

    rng = np.random.default_rng(bits)
    values = np.concatenate([rng.standard_normal(count), 6 * rng.standard_normal(40)]).astype(np.float16)[:, None]
    indices, table = _coreml_compress.palettise(values.astype(np.float32), bits, np.float32)
    assert (np.diff(table) >= 0).all()
    errors = np.abs(values.astype(np.float64) - table)
    assert np.array_equal(errors.min(axis=1), np.take_along_axis(errors, indices.astype(np.int64), 1)[:, 0])
    points, counts = _coreml_compress._histogram(values.astype(np.float32))
    best = np.asarray(kmeans1d.cluster(points.tolist(), 2**bits, weights=counts.tolist()).centroids)
    theirs = np.square(np.abs(values.astype(np.float64) - best).min(axis=1)).sum()
    assert np.square(errors.min(axis=1)).sum() <= worse * theirs


def test_a_weight_with_few_values_is_kept_exactly_by_a_palette() -> None:
    values = np.array([[0.5, -0.25, 0.0], [0.5, 1.0, -0.0]], np.float32)
    indices, table = _coreml_compress.palettise(values, 4, np.float16)
    assert table.shape == (16,)
    assert np.array_equal(table[indices].astype(np.float32), values)


def test_a_histogram_is_ascending_for_weights_of_any_size() -> None:
    values = np.random.default_rng(0).standard_normal(3_000_000).astype(np.float32)
    points, counts = _coreml_compress._histogram(values)
    assert (np.diff(points) > 0).all()
    assert counts.sum() == values.size
