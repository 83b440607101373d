"""Palettes of vectors: each vector in its nearest entry, tables close to the clusters of the weights."""

from __future__ import annotations

import numpy as np
import pytest

from edgebake_targets import _coreml_compress, _coreml_vectors


@pytest.mark.parametrize(("shape", "axis", "width"), [((8, 6, 3), 0, 4), ((6, 8, 3), 1, 2), ((8, 5), 0, 2)])
def test_vectors_lie_along_the_output_channels(shape: tuple[int, ...], axis: int, width: int) -> None:
    values = np.arange(np.prod(shape)).reshape(shape)
    rows = _coreml_vectors.vectors(values, axis, width)
    assert set(np.diff(rows, axis=1).ravel()) == {np.prod(shape[axis + 1 :], dtype=int)}  # from channel to channel
    assert np.array_equal(_coreml_vectors.of_vectors(rows, shape, axis), values)


@pytest.mark.parametrize("axis", [0, 1])
def test_clusters_are_found_and_each_vector_is_in_its_nearest(axis: int) -> None:
    random = np.random.default_rng(1)
    centres = np.stack(np.meshgrid([-3, -1, 1, 3], [-3, -1, 1, 3]), -1).reshape(-1, 2)
    rows = (centres[random.integers(0, 16, 3000)] + 0.05 * random.standard_normal((3000, 2))).astype(np.float32)
    values = _coreml_vectors.of_vectors(rows, (60, 100) if axis == 0 else (100, 60), axis)
    indices, table = _coreml_vectors.palettise_vectors(values, axis, 2, 5, np.float16)
    assert table.shape == (32, 2) and indices.shape == ((30, 100) if axis == 0 else (100, 30))
    distances = np.square(rows[:, None] - table.astype(np.float32)).sum(-1)
    at = _coreml_vectors.vectors(indices, axis, 1)[:, 0]
    assert np.allclose(distances[np.arange(3000), at], distances.min(axis=1), atol=1e-5)
    assert np.sqrt(distances.min(axis=1).mean()) < 0.08  # 0.07 within a cluster, 2 between them
    again = _coreml_vectors.palettise_vectors(values, axis, 2, 5, np.float16)
    assert np.array_equal(again[0], indices) and np.array_equal(again[1], table)


def test_two_values_share_bits_better_than_one_by_one() -> None:
    """Neighbours that depend on each other: 6 bits for both keep more than 3 bits for each."""
    random = np.random.default_rng(2)
    first = random.standard_normal((64, 64))
    values = np.empty((128, 64), np.float32)
    values[::2], values[1::2] = first, first + 0.1 * random.standard_normal((64, 64))
    indices, table = _coreml_vectors.palettise_vectors(values, 0, 2, 6, np.float32)
    decoded = _coreml_vectors.of_vectors(table[_coreml_vectors.vectors(indices, 0, 1)[:, 0]], values.shape, 0)
    single, scalar = _coreml_compress.palettise(values, 3, np.float32)
    assert np.square(values - decoded).mean() < 0.5 * np.square(values - scalar[single]).mean()


def test_vectors_that_weigh_more_are_kept_closer() -> None:
    random = np.random.default_rng(3)
    values = random.standard_normal((64, 64)).astype(np.float32)
    sensitivity = np.repeat(np.where(values[::2] > 0, 1, 0.01), 2, axis=0).astype(np.float32)
    errors = {}
    for name, weight in (("plain", None), ("weighed", sensitivity)):
        indices, table = _coreml_vectors.palettise_vectors(values, 0, 2, 4, np.float32, weight)
        rows = table[_coreml_vectors.vectors(indices, 0, 1)[:, 0]]
        decoded = _coreml_vectors.of_vectors(rows, values.shape, 0)
        errors[name] = (sensitivity * np.square(values - decoded)).sum()
    assert errors["weighed"] < 0.7 * errors["plain"]
