"""How far each stored weight may be from the float one in its scheme, by which a written package is judged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edgebake.scheme import Scheme, parse
from edgebake_targets._coreml_compress import mask_of
from edgebake_targets._coreml_constants import Constant, stored_parts
from edgebake_targets._coreml_package import Package, Payload, array_of, payload_of
from edgebake_targets._coreml_schemes import blocks, counts_of
from edgebake_targets._coreml_vectors import nearest, of_vectors, vectors
from edgebake_targets._coreml_weights import Held

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def allowed(package: Package, constant: Constant, held: Held) -> Any:
    """Largest error of each value: half a step of its scale, the nearest entry of its table, rounding of a float.

    Of a pruned weight, the whole value where it is not among the largest.
    """
    import numpy as np

    exact, scheme = held.values.astype(np.float64), parse(held.scheme)
    if scheme.family != "sparse":
        return _rounded(package, constant, exact, scheme, held)
    within = _rounded(package, constant, exact, scheme.inner or parse("fp16"), held)
    return np.where(mask_of(scheme, held.values, held.axis), within, abs(exact))


def _rounded(
    package: Package, constant: Constant, exact: NDArray[np.float64], scheme: Scheme, held: Held
) -> NDArray[np.float64]:
    import numpy as np

    if scheme.family == "float":
        return np.asarray(abs(exact) * 2.0**-10 + 2.0**-24)
    counts = counts_of(held.scheme, exact.shape, held.axis)
    if scheme.family == "integer":
        return _half_step(exact, counts, scheme.weight_bits)
    if scheme.vector > 1:
        return _to_nearest_vector(exact, held.axis, _array(package, constant, "lut").reshape(-1, scheme.vector))
    tables = np.sort(_array(package, constant, "lut").reshape(*counts, -1))
    scale = _array(package, constant, "scale") if scheme.scaled else np.ones(())
    within = np.empty(exact.shape)
    for at, block in blocks(exact.shape, counts):
        within[block] = _to_nearest((exact / np.where(scale == 0, 1, scale))[block], tables[at])
    return np.asarray(within * scale)


def _array(package: Package, constant: Constant, part: str) -> NDArray[Any]:
    return array_of(payload_of(package, stored_parts(constant)[part])).astype("float64")


def table_of(package: Package, constant: Constant) -> Payload:
    """The tables or the scales of a compressed weight, or what is not zero of it."""
    stored = stored_parts(constant)
    return payload_of(package, next(stored[name] for name in ("lut", "scale", "nonzero_data") if name in stored))


def _half_step(exact: NDArray[np.float64], counts: Sequence[int], bits: int) -> NDArray[np.float64]:
    import numpy as np

    sizes = [size // count for size, count in zip(exact.shape, counts, strict=True)]
    split = [n for pair in zip(counts, sizes, strict=True) for n in pair]
    step: NDArray[np.float64] = abs(exact).reshape(split).max(axis=tuple(range(1, len(split), 2)))
    step = step / (2 ** (bits - 1) - 1)
    for axis, size in enumerate(sizes):
        step = np.repeat(step, size, axis)
    return step / 2 * (1 + 2.0**-9) + 2.0**-24  # scales are float16, rounded up; 2**-24 is its smallest number


def _to_nearest(exact: NDArray[np.float64], table: NDArray[np.float64]) -> NDArray[np.float64]:
    import numpy as np

    right = np.clip(np.searchsorted(table, exact), 1, len(table) - 1)
    nearest: NDArray[np.float64] = np.minimum(abs(exact - table[right - 1]), abs(exact - table[right]))
    slack: float = 1e-6 * abs(table).max()  # the table was searched for float32 values
    return nearest * (1 + 1e-9) + slack


def _to_nearest_vector(exact: NDArray[np.float64], axis: int, table: NDArray[np.float64]) -> NDArray[np.float64]:
    """The distance to the nearest vector of the table, which no value of it can be farther off than."""
    import numpy as np

    rows = vectors(exact, axis, table.shape[1])
    distance = np.sqrt(np.square(rows - table[nearest(rows, table)]).sum(axis=1, keepdims=True))
    slack: float = 1e-3 * abs(table).max()  # distances were compared in float32
    return of_vectors(np.repeat(distance, table.shape[1], axis=1), exact.shape, axis) + slack
