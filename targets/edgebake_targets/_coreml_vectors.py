"""Palettes of vectors: an index for each few neighbouring output channels.

Numerics: Lloyd's algorithm (IEEE Trans. Inf. Theory 28(2), 1982) from the starting points of k-means++ (Arthur and
Vassilvitskii, SODA 2007), seeded, on at most ``_SAMPLE`` vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_SEED = 2007
_SAMPLE = 2**15
_ROUNDS = 30
_CHUNK = 2**14  # vectors compared with a table at once


def palettise_vectors(
    values: NDArray[np.float32],
    axis: int,
    width: int,
    bits: int,
    dtype: type[np.floating[Any]],
    sensitivity: NDArray[np.float32] | None = None,
) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """Each vector's nearest entry (uint8, ``axis`` divided by ``width``) of a table ``(2**bits, width)`` in ``dtype``.

    ``axis`` is that of the output channels. With ``sensitivity`` a vector counts as much as the mean of its values'.
    """
    import numpy as np

    rows = vectors(values, axis, width)
    weights = np.ones(len(rows)) if sensitivity is None else vectors(sensitivity, axis, width).mean(axis=1)
    random = np.random.Generator(np.random.Philox(key=_SEED))
    some = np.sort(random.permutation(len(rows))[:_SAMPLE])
    table = _kmeans(rows[some], weights[some].astype(np.float64), 2**bits, random).astype(dtype)
    shape = [size // width if i == axis else size for i, size in enumerate(values.shape)]
    indices = nearest(rows, table.astype(np.float32)).astype(np.uint8)
    return of_vectors(indices[:, None], shape, axis), table


def vectors(values: NDArray[Any], axis: int, width: int) -> NDArray[Any]:
    """``values`` as rows of ``width`` neighbours along ``axis``."""
    import numpy as np

    return np.moveaxis(values, axis, -1).reshape(-1, width)


def of_vectors(rows: NDArray[Any], shape: Sequence[int], axis: int) -> NDArray[Any]:
    """Rows back in an array of ``shape``."""
    import numpy as np

    last = [size for i, size in enumerate(shape) if i != axis] + [shape[axis]]
    return np.ascontiguousarray(np.moveaxis(rows.reshape(last), -1, axis))


def nearest(rows: NDArray[Any], table: NDArray[Any]) -> NDArray[np.intp]:
    """The index of the nearest row of ``table`` for each row; of equal ones the first."""
    import numpy as np

    found = np.empty(len(rows), np.intp)
    squares = np.square(table).sum(axis=1)
    for start in range(0, len(rows), _CHUNK):
        part = slice(start, start + _CHUNK)
        found[part] = (squares - 2 * rows[part] @ table.T).argmin(axis=1)
    return found


def _kmeans(
    rows: NDArray[np.float32], weights: NDArray[np.float64], count: int, random: np.random.Generator
) -> NDArray[np.float32]:
    import numpy as np

    centres = _spread(rows, weights, count, random)
    for _ in range(_ROUNDS):
        at = nearest(rows, centres)
        members = np.bincount(at, weights, count)
        sums = [np.bincount(at, weights * column, count) for column in rows.T]
        means = np.stack(sums, axis=1) / np.maximum(members, 1e-300)[:, None]
        moved = np.where(members[:, None] > 0, means, centres).astype(np.float32)
        if np.array_equal(moved, centres):
            break
        centres = moved
    return centres


def _spread(
    rows: NDArray[np.float32], weights: NDArray[np.float64], count: int, random: np.random.Generator
) -> NDArray[np.float32]:
    """k-means++: each next point is drawn by its squared distance to those that are there."""
    import numpy as np

    centres = np.empty((count, rows.shape[1]), np.float32)
    chances = weights
    closest = np.full(len(rows), np.inf)
    for i in range(count):
        total = np.cumsum(chances)
        drawn = np.searchsorted(total, random.random() * total[-1], "right") if total[-1] > 0 else 0
        centres[i] = rows[min(int(drawn), len(rows) - 1)]
        closest = np.minimum(closest, np.square(rows - centres[i]).sum(axis=1))
        chances = weights * closest
    return centres
