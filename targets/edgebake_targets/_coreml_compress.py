"""Rounds weights to integers or to tables of values, or drops the smallest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edgebake import lattice
from edgebake.scheme import Scheme
from edgebake_targets._coreml_schemes import blocks, channel_counts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_LLOYD_ROUNDS = 300
_SMALL = 8192  # different values
_FEW = 8  # levels


def quantise(
    values: NDArray[np.float32], counts: Sequence[int], bits: int, dtype: type[np.floating[Any]]
) -> tuple[NDArray[np.int8], NDArray[Any]]:
    """Symmetric integers with one scale per block: ``values ~ q * scale``, error at most ``scale / 2`` everywhere.

    Returns ``q`` (int8, shape of ``values``) and ``scale`` (``dtype``, shape ``counts``: blocks along each axis). The
    most negative integer is not used. Scales are rounded up to ``dtype``, so that the largest value never clips. Blocks
    that already are integers times a scale in ``dtype`` keep both.
    coremltools' own pass divides by zero on a channel of zeros.
    """
    import numpy as np

    split = [n for size, count in zip(values.shape, counts, strict=True) for n in (count, size // count)]
    apart = values.astype(np.float64).reshape(split)
    within = tuple(range(1, len(split), 2))
    exact = np.abs(apart).max(axis=within) / (2 ** (bits - 1) - 1)
    scale = exact.astype(dtype)
    scale = np.where(scale < exact, np.nextafter(scale, dtype(np.inf)), scale)
    scale = np.where(exact == 0, dtype(1), scale).astype(dtype)
    q = np.rint(apart / np.expand_dims(scale.astype(np.float64), within)).astype(np.int8)
    if bits <= 8:
        _keep_integers(values.reshape(split), q, scale, bits)
    return q.reshape(values.shape), scale


def _keep_integers(values: NDArray[Any], q: NDArray[np.int8], scale: NDArray[Any], bits: int) -> None:
    """Put into ``q`` (blocks and what is in them in turns) and ``scale`` what blocks of ``values`` were made of."""
    import numpy as np

    order = (*range(0, q.ndim, 2), *range(1, q.ndim, 2))
    rows = np.transpose(values, order).reshape(scale.size, -1)
    kept, steps, found = lattice.integers(rows, bits)
    found &= steps.astype(scale.dtype) == steps
    blocks = np.transpose(q, order)  # a view of q
    at = found.reshape(scale.shape)
    blocks[at] = kept[found].reshape(-1, *blocks.shape[scale.ndim :])
    scale[at] = steps[found]


def prune(values: NDArray[np.float32], kept: int) -> NDArray[np.bool_]:
    """Where the ``kept`` largest magnitudes of ``values`` are; of equal ones, the first in row-major order."""
    import numpy as np

    mask = np.zeros(values.size, np.bool_)
    mask[np.argsort(-np.abs(values.ravel()), kind="stable")[:kept]] = True
    return mask.reshape(values.shape)


def prune_groups(values: NDArray[np.float32], stay: int, of: int, axis: int) -> NDArray[np.bool_]:
    """Where the ``stay`` largest magnitudes of every ``of`` neighbours along ``axis`` are; of equal ones, the first."""
    import numpy as np

    apart = np.moveaxis(np.abs(values), axis, -1)
    groups = apart.reshape(-1, of)
    mask = np.zeros(groups.shape, np.bool_)
    np.put_along_axis(mask, np.argsort(-groups, axis=1, kind="stable")[:, :stay], True, axis=1)
    return np.ascontiguousarray(np.moveaxis(mask.reshape(apart.shape), -1, axis))


def mask_of(scheme: Scheme, values: NDArray[np.float32], axis: int) -> NDArray[np.bool_]:
    """Where values stay in a sparse ``scheme``; ``axis`` is that of the output channels."""
    if scheme.stay:
        return prune_groups(values, *scheme.stay, 1 - axis)
    return prune(values, scheme.kept(values.size))


def channel_scales(values: NDArray[np.float32], axis: int, dtype: type[np.floating[Any]]) -> NDArray[Any]:
    """The largest magnitude of each output channel: what the weight under a scaled palette is divided by, unless 0."""
    import numpy as np

    others = tuple(i for i in range(values.ndim) if i != axis)
    largest: NDArray[Any] = np.abs(values).max(axis=others).astype(dtype)
    return largest.reshape(channel_counts(values.shape, axis))


def palettise_blocks(
    values: NDArray[np.float32],
    counts: Sequence[int],
    bits: int,
    dtype: type[np.floating[Any]],
    sensitivity: NDArray[np.float32] | None = None,
) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """``palettise`` block by block; the tables have the shape ``(*counts, 2**bits)``."""
    import numpy as np

    indices, tables = np.empty(values.shape, np.uint8), np.empty((*counts, 2**bits), dtype)
    for at, part in blocks(values.shape, counts):
        weight = None if sensitivity is None else sensitivity[part]
        indices[part], tables[at] = palettise(values[part], bits, dtype, weight)
    return indices, tables


def palettise(
    values: NDArray[np.float32],
    bits: int,
    dtype: type[np.floating[Any]],
    sensitivity: NDArray[np.float32] | None = None,
) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """Each weight's nearest entry (uint8, shape of ``values``) of a table of ``2**bits`` values (``dtype``, ascending).

    k-means in one dimension on the histogram of the half-precision values, without random numbers; with
    ``sensitivity`` the sum of squared errors times it is what becomes small.
    """
    import numpy as np

    points, counts = _histogram(values, sensitivity)
    if len(points) <= 2**bits:
        centres = np.concatenate([points, np.repeat(points[-1:], 2**bits - len(points))])
    else:
        centres = (_optimum if len(points) <= _SMALL or 2**bits <= _FEW else _lloyd)(points, counts, 2**bits)
    table = np.sort(centres.astype(dtype))
    exact = table.astype(np.float64)
    indices = np.searchsorted((exact[1:] + exact[:-1]) / 2, values.astype(np.float64).ravel())
    return indices.astype(np.uint8).reshape(values.shape), table


def _histogram(
    values: NDArray[np.float32], sensitivity: NDArray[np.float32] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The different half-precision values, ascending, and how often each occurs, or its sum of ``sensitivity``.

    Counted by bit pattern: ``np.unique`` of numpy 2.4 returns 11 million float16 values out of order.
    """
    import numpy as np

    patterns = values.astype(np.float16).view(np.uint16).ravel()
    weights = None if sensitivity is None else sensitivity.ravel()
    counts = np.bincount(patterns, weights, minlength=1 << 16)
    counts[0x0000] += counts[0x8000]  # minus zero
    counts[0x8000] = 0
    used = np.flatnonzero(counts)
    points = used.astype(np.uint16).view(np.float16).astype(np.float64)
    order = np.argsort(points)
    return points[order], counts[used][order].astype(np.float64)


def _optimum(points: NDArray[np.float64], counts: NDArray[np.float64], levels: int) -> NDArray[np.float64]:
    """The best centres, by dynamic programming; 0.8 s for ``_SMALL`` points and 256 levels.

    Few levels are as fast for all 63,489 half-precision values, and there Lloyd's algorithm ends far from the best.
    """
    import numpy as np
    from coremltools._deps import kmeans1d

    return np.array(kmeans1d.cluster(points.tolist(), levels, weights=counts.tolist()).centroids)


def _lloyd(points: NDArray[np.float64], counts: NDArray[np.float64], levels: int) -> NDArray[np.float64]:
    """Lloyd's algorithm (IEEE Trans. Inf. Theory 28(2), 1982) in milliseconds, 0.1 to 3 % above the best squared error
    (30 % for 256 levels and fat tails).

    It starts at quantiles of density**(1/3), the optimum for many levels (Panter and Dite, Proc. IRE 39(1), 1951),
    which needs many points per level to be a good start.
    """
    import numpy as np

    width = np.gradient(points)
    spread = np.cumsum(width * np.cbrt(counts / width))
    centres = np.interp((np.arange(levels) + 0.5) / levels, spread / spread[-1], points)
    total = np.concatenate([[0.0], np.cumsum(counts)])
    moment = np.concatenate([[0.0], np.cumsum(counts * points)])
    for _ in range(_LLOYD_ROUNDS):
        edges = np.concatenate([[0], np.searchsorted(points, (centres[1:] + centres[:-1]) / 2), [len(points)]])
        members = np.diff(total[edges])
        means = np.diff(moment[edges]) / np.maximum(members, 1.0)
        moved = np.where(members > 0, means, centres)
        if np.array_equal(moved, centres):
            break
        centres = moved
    return centres
