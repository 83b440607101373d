"""Rounding of weights: palettes close to the best there is, integers within half a step, each in its own block."""

from __future__ import annotations

import numpy as np
import pytest

from edgebake_targets import _coreml_compress, _coreml_schemes
from edgebake_targets._coremltools import quiet


@pytest.mark.parametrize(
    ("bits", "count", "worse"),
    [(4, 3_000, 1.01), (8, 3_000, 1.01), (6, 40_000, 1.15), (1, 40_000, 1.01), (3, 40_000, 1.01)],
)
def test_a_palette_is_close_to_the_best_one(bits: int, count: int, worse: float) -> None:
    with quiet():
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


@pytest.mark.parametrize(("bits", "counts"), [(8, (6, 1, 1)), (4, (6, 1, 1)), (4, (6, 4, 1)), (4, (4, 6, 1))])
def test_integers_are_within_half_a_step_of_their_own_block(bits: int, counts: tuple[int, ...]) -> None:
    values = np.random.default_rng(3).standard_normal((12, 24, 3)).astype(np.float32)
    values *= np.exp(np.random.default_rng(4).standard_normal((12, 24, 1))).astype(np.float32)
    values[:2, :6] = 0  # a block of zeros: its scale would be 0
    q, scale = _coreml_compress.quantise(values, counts, bits, np.float16)
    assert scale.shape == counts and q.shape == values.shape
    top = 2 ** (bits - 1) - 1
    assert abs(q).max() == top
    for at, part in _coreml_schemes.blocks(values.shape, counts):
        step = float(scale[at])
        assert abs(values[part] - q[part] * step).max() <= step / 2 * (1 + 1e-6)
        assert step <= max(abs(values[part]).max() / top * (1 + 2**-10), 2**-24) or not values[part].any()


def test_each_group_of_channels_has_the_palette_of_its_own_values() -> None:
    values = np.random.default_rng(5).standard_normal((8, 6)).astype(np.float32)
    values[4:] *= 100
    indices, tables = _coreml_compress.palettise_blocks(values, (2, 1), 3, np.float32)
    assert tables.shape == (2, 1, 8)
    for group in range(2):
        rows = slice(4 * group, 4 * group + 4)
        alone, table = _coreml_compress.palettise(values[rows], 3, np.float32)
        assert np.array_equal(indices[rows], alone) and np.array_equal(tables[group, 0], table)
    assert abs(tables[0]).max() < 5 < 100 < abs(tables[1]).max()


@pytest.mark.parametrize(
    ("scheme", "shape", "axis", "counts"),
    [
        ("w8", (64, 32, 3, 3), 0, (64, 1, 1, 1)),
        ("w8t", (64, 32, 3, 3), 0, (1, 1, 1, 1)),
        ("w4g16", (64, 32, 3, 3), 0, (64, 2, 1, 1)),
        ("w4g16", (32, 64, 3), 1, (2, 64, 1)),
        ("palette4", (64, 32), 0, (1, 1)),
        ("palette4g16", (64, 32), 0, (4, 1)),
        ("palette4g16", (32, 64), 1, (1, 4)),
    ],
)
def test_scales_and_tables_lie_along_the_axes_of_their_channels(
    scheme: str, shape: tuple[int, ...], axis: int, counts: tuple[int, ...]
) -> None:
    assert _coreml_schemes.counts_of(scheme, shape, axis) == counts


def test_pruning_by_groups_keeps_the_largest_of_each() -> None:
    values = np.array([[3, -1, 0, 2, 0, 0, 0, 0], [-4, 5, 6, 7, 1, 1, 1, 1]], np.float32)
    mask = _coreml_compress.prune_groups(values, 2, 4, 1)
    assert mask.astype(int).tolist() == [[1, 0, 0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 0, 0]]
    assert np.array_equal(_coreml_compress.prune_groups(values.T, 2, 4, 0), mask.T)
    kernels = np.random.default_rng(0).standard_normal((3, 8, 5)).astype(np.float32)
    groups = _coreml_compress.prune_groups(kernels, 1, 4, 1).reshape(3, 2, 4, 5)
    assert (groups.sum(axis=2) == 1).all()
    assert np.array_equal(groups.argmax(axis=2), abs(kernels).reshape(3, 2, 4, 5).argmax(axis=2))


def test_pruning_drops_the_smallest_and_keeps_as_many_as_it_says() -> None:
    values = np.array([[3, -1, 0, 2], [-4, 1, 0, 0]], np.float32)
    assert _coreml_compress.prune(values, 3).tolist() == [[True, False, False, True], [True, False, False, False]]
    assert _coreml_compress.prune(values, 4).tolist() == [[True, True, False, True], [True, False, False, False]]
    assert _coreml_compress.prune(np.zeros((2, 3), np.float32), 2).sum() == 2
