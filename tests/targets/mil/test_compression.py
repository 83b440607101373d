"""Compressed constants against loops over every weight."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import Tensor

from edgebake_targets import _coreml_decompress as decompress
from edgebake_targets._coreml_package import Payload, array_of
from edgebake_targets.mil.call import Unsupported
from mil_ops import run


def packed(values: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """A stream of ``bits`` per value, the lowest bit first, bytes filled from their lowest bit."""
    stream = "".join(format(int(value), f"0{bits}b")[::-1] for value in np.ravel(values))
    stream += "0" * (-len(stream) % 8)
    return np.array([int(stream[i : i + 8][::-1], 2) for i in range(0, len(stream), 8)], np.uint8)


def same(result: Tensor, expected: Any) -> None:
    np.testing.assert_array_equal(result.numpy(), np.asarray(expected, np.float32), strict=True)


def numbers(shape: tuple[int, ...], low: int, high: int, dtype: Any = np.int32, seed: int = 0) -> NDArray[Any]:
    return np.random.default_rng([seed, *shape]).integers(low, high, shape).astype(dtype)


def scales(shape: tuple[int, ...], seed: int = 0) -> NDArray[Any]:
    """Powers of two, so that every product is exact."""
    return (2.0 ** numbers(shape, -3, 3, seed=seed)).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
@pytest.mark.parametrize(("shape", "axis"), [((4,), 0), ((3, 2), 0), ((3, 2), -1), ((2, 3, 4), 1), ((1, 5, 1, 2), 3)])
@pytest.mark.parametrize("vectors", ["both", "scale", "zero_point", "none"])
def test_affine(shape: tuple[int, ...], axis: int, vectors: str, dtype: Any) -> None:
    size = (shape[axis],)
    data = numbers(shape, np.iinfo(dtype).min, np.iinfo(dtype).max + 1, dtype)
    scale = scales(size if vectors in ("both", "scale") else ())
    zero = numbers(size if vectors in ("both", "zero_point") else (), 0, 100, dtype, 1)
    expected = np.zeros(shape)
    for place in np.ndindex(*shape):
        shift, step = (value[place[axis]] if value.ndim else value for value in (zero, scale))
        expected[place] = (int(data[place]) - int(shift)) * step
    same(run("constexpr_affine_dequantize", quantized_data=data, scale=scale, zero_point=zero, axis=axis), expected)


BLOCKS = [
    ((8,), (2,)),
    ((4, 6), (4, 1)),
    ((4, 6), (2, 3)),
    ((4, 6), (1, 6)),
    ((2, 4, 1, 3), (2, 2, 1, 1)),
    ((3,), (1,)),
]


def _block(place: tuple[int, ...], shape: tuple[int, ...], counts: tuple[int, ...]) -> tuple[int, ...]:
    """Where the value that holds for ``place`` lies among ``counts`` of them per axis."""
    return tuple(i // (size // count) for i, size, count in zip(place, shape, counts, strict=True))


@pytest.mark.parametrize(("shape", "counts"), BLOCKS)
@pytest.mark.parametrize("offset", [None, "int", "float"])
@pytest.mark.parametrize(("low", "high", "dtype"), [(-8, 8, np.int8), (0, 16, np.uint8), (-128, 128, np.int8)])
def test_blockwise(
    shape: tuple[int, ...], counts: tuple[int, ...], offset: str | None, low: int, high: int, dtype: Any
) -> None:
    data, scale = numbers(shape, low, high, dtype), scales(counts)
    shift = None if offset is None else numbers(counts, low, high, dtype, 1) * (0.5 if offset == "float" else 1)
    shift = shift if offset == "float" or shift is None else shift.astype(dtype)
    expected = np.zeros(shape)
    for place in np.ndindex(*shape):
        block = _block(place, shape, counts)
        expected[place] = (int(data[place]) - (0 if shift is None else float(shift[block]))) * scale[block]
    same(run("constexpr_blockwise_shift_scale", data=data, scale=scale, offset=shift), expected)


@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8])
@pytest.mark.parametrize("shape", [(1,), (5,), (3, 7), (2, 3, 4), (1, 1, 3, 3)])
def test_flat_table_of_packed_indices(shape: tuple[int, ...], bits: int) -> None:
    table = scales((2**bits,)) * numbers((2**bits,), -9, 9)
    indices = numbers(shape, 0, 2**bits, np.uint8)
    expected = [table[i] for i in indices.flat]
    result = run(
        "constexpr_lut_to_dense",
        indices=packed(indices, bits),
        lut=table.astype(np.float32),
        shape=np.array(shape, np.int64),
        opset="CoreML6",
    )
    same(result, np.array(expected).reshape(shape))


def test_bits_of_a_byte_count_from_the_lowest() -> None:
    """The example in the operator's own documentation."""
    indices = np.array([0b01101100, 0b11], np.uint8)
    table = np.array([10, 11, 12, 13], np.float32)
    assert run("constexpr_lut_to_dense", indices=indices, lut=table, shape=[5]).tolist() == [10, 13, 12, 11, 13]
    mask = np.array([0b01100], np.uint8)
    assert run("constexpr_sparse_to_dense", nonzero_data=[1.5, 2.5], mask=mask, shape=[5]).tolist() == [
        0,
        0,
        1.5,
        2.5,
        0,
    ]


def _looked_up(indices: NDArray[Any], table: NDArray[Any], axis: int | None) -> NDArray[Any]:
    """Each index replaced by its entry of the table of its group; a vector lies along ``axis``."""
    width = table.shape[-1]
    shape = [size * width if i == axis and width > 1 else size for i, size in enumerate(indices.shape)]
    result = np.zeros(shape, table.dtype)
    for place in np.ndindex(*indices.shape):
        entry = table[(*_block(place, indices.shape, table.shape[:-2]), indices[place])]
        for part in range(width):
            target = list(place)
            if width > 1:
                target[axis] = place[axis] * width + part
            result[tuple(target)] = entry[part]
    return result


TABLES = [
    ((6, 2), (2, 1), 1, None),
    ((6, 2), (6, 1), 1, 0),
    ((4, 6), (2, 3), 1, None),
    ((4,), (1,), 3, 0),
    ((2, 2, 2), (1, 1, 1), 3, 1),
    ((2, 2, 2), (1, 1, 1), 3, 2),
    ((4, 3, 2), (2, 1, 1), 2, 0),
    ((4, 3, 1, 1), (1, 3, 1, 1), 2, -3),
]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize(("shape", "groups", "width", "axis"), TABLES)
def test_tables_of_groups_and_vectors(
    shape: tuple[int, ...], groups: tuple[int, ...], width: int, axis: int | None, bits: int
) -> None:
    indices = numbers(shape, 0, 2**bits, np.uint8)
    table = scales((*groups, 2**bits, width)) * numbers((*groups, 2**bits, width), -9, 9, np.float32)
    expected = _looked_up(indices, table, None if axis is None else axis % len(shape))
    same(run("constexpr_lut_to_dense", indices=indices, lut=table, vector_axis=axis), expected)


def test_a_table_of_integers_gives_integers() -> None:
    table = np.array([5, -7], np.int8).reshape(1, 2, 1)
    result = run("constexpr_lut_to_dense", indices=np.array([1, 0, 1], np.uint8), lut=table)
    np.testing.assert_array_equal(result.numpy(), np.array([-7, 5, -7], np.int8), strict=True)


def test_more_weights_than_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgebake_targets._coreml_decompress._BLOCK", 8)
    indices = numbers((9, 4), 0, 4, np.uint8)
    tables = scales((3, 1, 4, 1))
    same(run("constexpr_lut_to_dense", indices=indices, lut=tables), _looked_up(indices, tables, None))
    flat = run("constexpr_lut_to_dense", indices=packed(indices, 2), lut=tables[0, 0, :, 0], shape=[9, 4])
    same(flat, tables[0, 0, :, 0][indices])


def _mask(shape: tuple[int, ...], seed: int = 3) -> NDArray[np.uint8]:
    return (np.random.default_rng([seed, *shape]).random(shape) < 0.4).astype(np.uint8)


SPARSE = [(1,), (17,), (4, 6), (2, 3, 4), (3, 1, 2, 2)]


@pytest.mark.parametrize("shape", SPARSE)
@pytest.mark.parametrize("dtype", [np.float32, np.int8])
def test_sparse(shape: tuple[int, ...], dtype: Any) -> None:
    mask = _mask(shape)
    values = numbers((int(mask.sum()),), -9, 9, dtype)
    expected, rest = np.zeros(shape, dtype), list(values)
    for place in np.ndindex(*shape):
        if mask[place]:
            expected[place] = rest.pop(0)
    new = run("constexpr_sparse_to_dense", nonzero_data=values, mask=mask)
    old = run("constexpr_sparse_to_dense", nonzero_data=values, mask=packed(mask, 1), shape=np.array(shape, np.int64))
    np.testing.assert_array_equal(new.numpy(), expected, strict=True)
    np.testing.assert_array_equal(old.numpy(), expected, strict=True)


@pytest.mark.parametrize(("shape", "groups", "width", "axis"), TABLES)
def test_sparse_tables(shape: tuple[int, ...], groups: tuple[int, ...], width: int, axis: int | None) -> None:
    """Two results: the mask, widened where vectors are, and the values that it places."""
    mask = _mask(shape)
    indices = numbers((int(mask.sum()),), 0, 4, np.uint8)
    table = scales((*groups, 4, width))
    dense = np.zeros(shape, np.uint8)
    dense[mask == 1] = indices
    axis = None if axis is None else axis % len(shape)
    looked_up = _looked_up(dense, table, axis)
    wide = (
        mask if width == 1 else _looked_up(mask, np.array([0, 1])[:, None].repeat(width, 1)[(None,) * len(shape)], axis)
    )
    inputs = {"indices_mask": mask, "indices_nonzero_data": indices, "lut": table, "vector_axis": axis}
    got_mask, got_values = run("constexpr_lut_to_sparse", **inputs)
    np.testing.assert_array_equal(got_mask.numpy(), wide)
    same(got_values, looked_up[wide == 1])
    same(run("constexpr_sparse_to_dense", nonzero_data=got_values, mask=got_mask), looked_up * wide)


@pytest.mark.parametrize(("shape", "counts"), BLOCKS)
@pytest.mark.parametrize("shifted", [True, False])
def test_sparse_blockwise(shape: tuple[int, ...], counts: tuple[int, ...], shifted: bool) -> None:
    mask, scale = _mask(shape), scales(counts)
    data = numbers((int(mask.sum()),), -8, 8, np.int8)
    shift = numbers(counts, -8, 8, np.int8, 1) if shifted else None
    expected, rest = [], list(data)
    for place in np.ndindex(*shape):
        if mask[place]:
            block = _block(place, shape, counts)
            expected.append((int(rest.pop(0)) - (int(shift[block]) if shifted else 0)) * scale[block])
    inputs = {"data_mask": mask, "nonzero_data": data, "scale": scale, "offset": shift}
    got_mask, got_values = run("constexpr_sparse_blockwise_shift_scale", **inputs)
    np.testing.assert_array_equal(got_mask.numpy(), mask)
    same(got_values, expected)


def test_the_documented_sparse_example() -> None:
    """Per column, as the op set's text shows it."""
    mask = np.array([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 1, 1], [1, 1, 0, 0]], np.uint8)
    data = np.array([10, 11, 3, 4, 5, 6, 7, 8, 9], np.int8)
    scale, offset = np.array([[0.1, 0.2, 0.3, 0.4]], np.float32), np.array([[1, 2, 3, 4]], np.int8)
    values = run(
        "constexpr_sparse_blockwise_shift_scale", data_mask=mask, nonzero_data=data, scale=scale, offset=offset
    )[1]
    np.testing.assert_allclose(values, [0.9, 1.8, 0.2, 0.4, 0.6, 0.9, 1.2, 0.7, 1.4], rtol=1e-6)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (1, 4, 1), (0, 2), (2, 1, 3, 2)])
def test_cast(shape: tuple[int, ...]) -> None:
    x = scales(shape)
    same(run("constexpr_cast", source_val=x.astype(np.float16), output_dtype="fp32"), x)


INDICES = np.zeros((2, 3), np.uint8)


@pytest.mark.parametrize(
    ("operator", "inputs", "text"),
    [
        ("constexpr_cast", {"source_val": 1.0, "output_dtype": "fp16"}, "constexpr_cast to fp16"),
        (
            "constexpr_blockwise_shift_scale",
            {"data": INDICES, "scale": np.ones((2, 2))},
            "2, 3. with .2, 2. per axis: the blocks do not fit",
        ),
        ("constexpr_blockwise_shift_scale", {"data": INDICES, "scale": np.ones(2)}, "2, 3. with .2. per axis"),
        (
            "constexpr_blockwise_shift_scale",
            {"data": INDICES, "scale": np.ones((2, 1)), "offset": np.ones((1, 1))},
            "offsets of .1, 1. with scales of .2, 1.",
        ),
        (
            "constexpr_affine_dequantize",
            {"quantized_data": INDICES, "scale": np.ones(2), "zero_point": 0, "axis": 1},
            "2. scales or zero points along axis 1 of data of .2, 3.",
        ),
        (
            "constexpr_affine_dequantize",
            {"quantized_data": INDICES, "scale": 1.0, "zero_point": 0, "axis": 2},
            "scaled along axis 2",
        ),
        ("constexpr_lut_to_dense", {"indices": INDICES, "lut": np.ones((1, 1, 2, 2))}, "vectors without vector_axis"),
        ("constexpr_lut_to_dense", {"indices": INDICES + 2, "lut": np.ones((1, 1, 2, 1))}, "index 2 .* table of 2"),
        (
            "constexpr_lut_to_dense",
            {"indices": INDICES[0, :1], "lut": np.ones(4), "shape": [100]},
            "1 bytes for 100 numbers of 2 bits",
        ),
        ("constexpr_lut_to_dense", {"indices": INDICES[0], "lut": np.ones(3), "shape": [3]}, "a table of 3 entries"),
        ("constexpr_sparse_to_dense", {"nonzero_data": [1.0], "mask": INDICES}, "1. values for a mask of 0"),
    ],
)
def test_damaged_parameters_are_refused(operator: str, inputs: dict[str, Any], text: str) -> None:
    with pytest.raises((Unsupported, ValueError), match=text):
        run(operator, **inputs)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 40])
def test_streams_of_several_blocks(bits: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgebake_targets._coreml_package._BLOCK", 2)
    values = numbers((count,), 0, 2**bits, np.uint8)
    stream = Payload(dtype=f"uint{bits}", bits=bits, shape=(count,), data=memoryview(packed(values, bits)), key=None)
    np.testing.assert_array_equal(array_of(stream), values, strict=True)


def _peak(evaluate: Callable[[], NDArray[Any]]) -> float:
    """Memory at the highest point, in sizes of the result."""
    tracemalloc.start()
    try:
        result = evaluate()
        return tracemalloc.get_traced_memory()[1] / result.nbytes
    finally:
        tracemalloc.stop()


def test_memory_is_little_more_than_that_of_the_result() -> None:
    """Of large weights at most a fraction is held twice."""
    size = 2**11
    indices = numbers((size, size), 0, 16, np.uint8)
    stream, scale = packed(indices[:8], 4).repeat(size // 8), scales((size, size // 32))
    tables = {width: scales((1, 1, 16, width)) for width in (1, 4)}
    peaks = {
        "blockwise": _peak(lambda: decompress.blockwise(indices, scale, None)),
        "affine": _peak(lambda: decompress.affine(indices, scale[:, 0], indices[:, 0], 0)),
        "table": _peak(lambda: decompress.table(indices, tables[1], None)),
        "vectors": _peak(lambda: decompress.table(indices[: size // 4], tables[4], 0)),
        "packed": _peak(lambda: decompress.packed_table(stream, tables[1].reshape(16), (size, size))),
    }
    assert max(peaks.values()) < 1.4, peaks
