"""How compressed constants of Core ML decode, by the text of op sets iOS 16 and iOS 18; plain numpy.

Integers come unpacked, in int8 or uint8. The result has the type of the scale or of the table, so whoever wants float32
or float64 hands these over in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edgebake_targets._coreml_package import Payload, array_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

_BLOCK = 2**17  # values looked up at once: numpy takes 8 bytes for each index


def affine(data: Array, scale: Array, zero_point: Array, axis: int) -> Array:
    """iOS 16: ``(data - zero_point) * scale``, each one number or one per index of ``axis``."""
    if not -data.ndim <= axis < data.ndim:
        raise ValueError(f"data of {list(data.shape)} scaled along axis {axis}")
    values: Array = data.astype(scale.dtype)
    values -= _along(zero_point.astype(scale.dtype), data.shape, axis)
    values *= _along(scale, data.shape, axis)
    return values


def _along(value: Array, shape: Sequence[int], axis: int) -> Array:
    if value.ndim == 0:
        return value
    if value.shape != (shape[axis],):
        raise ValueError(f"{list(value.shape)} scales or zero points along axis {axis} of data of {list(shape)}")
    return value.reshape([-1 if i == axis % len(shape) else 1 for i in range(len(shape))])


def blockwise(data: Array, scale: Array, offset: Array | None) -> Array:
    """iOS 18: ``(data - offset) * scale``; each scale and offset holds for a block of ``data``."""
    blocks, single = _blocks(data.shape, scale.shape)
    if offset is not None and offset.shape != scale.shape:
        raise ValueError(f"offsets of {list(offset.shape)} with scales of {list(scale.shape)}")
    values: Array = data.astype(scale.dtype)
    view = values.reshape(blocks)
    if offset is not None:
        view -= offset.astype(scale.dtype).reshape(single)
    view *= scale.reshape(single)
    return values


def _blocks(shape: Sequence[int], counts: Sequence[int]) -> tuple[list[int], list[int]]:
    """The shape with every axis split in (blocks, size of a block), and the same with blocks of one."""
    if len(shape) != len(counts) or any(size % max(count, 1) for size, count in zip(shape, counts, strict=True)):
        raise ValueError(f"{list(shape)} with {list(counts)} per axis: the blocks do not fit")
    pairs = [(count, size // max(count, 1)) for size, count in zip(shape, counts, strict=True)]
    return [n for pair in pairs for n in pair], [n for count, _ in pairs for n in (count, 1)]


def packed_table(indices: Array, table: Array, shape: Sequence[int]) -> Array:
    """iOS 16: a stream of indices of as many bits as the flat table needs, in row-major order of ``shape``."""
    import numpy as np

    count = int(np.prod(shape, dtype=np.int64))
    bits = table.size.bit_length() - 1
    if table.size != 1 << bits:
        raise ValueError(f"a table of {table.size} entries: not a power of two")
    unpacked = _unpacked(indices, bits, count)
    flat = np.empty(count, table.dtype)
    for start in range(0, count, _BLOCK):
        flat[start : start + _BLOCK] = table[unpacked[start : start + _BLOCK]]
    return flat.reshape(shape)


def _unpacked(stream: Array, bits: int, count: int) -> Array:
    data = memoryview(stream.tobytes())
    if len(data) * 8 < count * bits or not 1 <= bits <= 8:
        raise ValueError(f"{len(data)} bytes for {count} numbers of {bits} bits")
    return array_of(Payload(dtype=f"uint{bits}", bits=bits, shape=(count,), data=data, key=None))


def table(indices: Array, tables: Array, axis: int | None) -> Array:
    """iOS 18: one table per group of ``indices``; vectors of a table lie along ``axis`` of the result."""
    import numpy as np

    *counts, palettes, width = tables.shape
    if width > 1 and axis is None:
        raise ValueError("a table of vectors without vector_axis")
    blocks, _ = _blocks(indices.shape, counts)
    entries = tables.reshape(-1, width)
    group = np.zeros((1,) * indices.ndim, np.intp)  # which table each index reads, up to broadcasting
    for i, (count, size) in enumerate(zip(blocks[::2], blocks[1::2], strict=True)):
        along = (np.arange(count * size) // max(size, 1)).reshape([-1 if i == j else 1 for j in range(indices.ndim)])
        group = group * count + (along if count > 1 else 0)
    if indices.size and indices.max() >= palettes:
        raise ValueError(f"index {indices.max()} of a table of {palettes}")
    at = 0 if axis is None else axis % indices.ndim
    values = np.empty((*indices.shape[: at + 1], width, *indices.shape[at + 1 :]), tables.dtype)
    vectors = np.moveaxis(values, at + 1, -1)
    rows = max(1, _BLOCK * len(indices) // max(indices.size, 1))
    for start in range(0, len(indices), rows):
        part = slice(start, start + rows)
        vectors[part] = entries[(group[part] if len(group) > 1 else group) * palettes + indices[part]]
    return values.reshape([size * width if i == at else size for i, size in enumerate(indices.shape)])


def packed_sparse(values: Array, mask: Array, shape: Sequence[int]) -> Array:
    """iOS 16: ``mask`` is a stream of bits in row-major order of ``shape``."""
    import numpy as np

    return sparse(values, _unpacked(mask, 1, int(np.prod(shape, dtype=np.int64))).reshape(shape))


def sparse(values: Array, mask: Array) -> Array:
    """iOS 18: ``values`` in row-major order where ``mask`` is set, zero elsewhere."""
    import numpy as np

    places = mask != 0
    if values.shape != (np.count_nonzero(places),):
        raise ValueError(f"{list(values.shape)} values for a mask of {np.count_nonzero(places)}")
    dense = np.zeros(mask.shape, values.dtype)
    dense[places] = values
    return dense


def table_sparse(mask: Array, indices: Array, tables: Array, axis: int | None) -> tuple[Array, Array]:
    """iOS 18: the mask and the values of a sparse tensor whose indices are looked up."""
    import numpy as np

    dense = table(sparse(indices, mask), tables, axis)
    wide = mask if tables.shape[-1] == 1 or axis is None else np.repeat(mask, tables.shape[-1], axis=axis)
    return wide, dense[wide != 0]


def blockwise_sparse(mask: Array, data: Array, scale: Array, offset: Array | None) -> tuple[Array, Array]:
    """iOS 18: the mask and the values of a sparse tensor that is shifted and scaled."""
    return mask, blockwise(sparse(data, mask), scale, offset)[mask != 0]
