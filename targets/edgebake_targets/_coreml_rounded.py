"""What a weight is after a scheme rounded and pruned it, without a program that holds it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgebake.scheme import Scheme, parse
from edgebake_targets._coreml_compress import channel_scales, mask_of, palettise, palettise_blocks, quantise
from edgebake_targets._coreml_decompress import blockwise, table
from edgebake_targets._coreml_schemes import counts_of
from edgebake_targets._coreml_vectors import palettise_vectors

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[Any]
    Dtype = type[np.floating[Any]]


def rounded(
    scheme: str, values: NDArray[np.float32], axis: int, dtype: Dtype, sensitivity: NDArray[np.float32] | None
) -> NDArray[np.float32]:
    """``values`` as ``_coreml_operators`` stores them, scales and tables in ``dtype``; ``axis``: output channels."""
    import numpy as np

    parsed = parse(scheme)
    if parsed.family == "sparse":
        return _sparse(parsed, values, axis, dtype, sensitivity)
    if parsed.family == "float":
        return values.astype(dtype).astype(np.float32)
    if parsed.vector > 1:
        indices, entries = palettise_vectors(values, axis, parsed.vector, parsed.weight_bits, dtype, sensitivity)
        return table(indices, _wide(entries).reshape(*(1 for _ in values.shape), *entries.shape), axis)
    counts = counts_of(scheme, values.shape, axis)
    if parsed.family == "integer":
        q, scale = quantise(values, counts, parsed.weight_bits, dtype)
        return blockwise(q, _wide(scale), None)
    scale = _wide(channel_scales(values, axis, dtype)) if parsed.scaled else np.ones((1,) * values.ndim, np.float32)
    divided = values / np.where(scale == 0, 1, scale)
    weighed = None if sensitivity is None else sensitivity * scale**2
    indices, tables = palettise_blocks(divided.astype(np.float32), counts, parsed.weight_bits, dtype, weighed)
    return table(indices, _wide(tables)[..., None], None) * scale


def _sparse(
    scheme: Scheme, values: NDArray[np.float32], axis: int, dtype: Dtype, sensitivity: NDArray[np.float32] | None
) -> NDArray[np.float32]:
    import numpy as np

    mask = mask_of(scheme, values, axis)
    if scheme.inner is None:
        return _wide(values.astype(dtype)) * mask
    if scheme.inner.family == "integer":
        return rounded(scheme.inner.name, values * mask, axis, dtype, None)
    within = None if sensitivity is None else sensitivity[mask]
    indices, entries = palettise(values[mask], scheme.inner.weight_bits, dtype, within)
    dense = np.zeros(values.shape, np.float32)
    dense[mask] = _wide(entries)[indices]
    return dense


def _wide(values: Array) -> NDArray[np.float32]:
    import numpy as np

    return values.astype(np.float32)
