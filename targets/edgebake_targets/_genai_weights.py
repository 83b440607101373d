"""Weights of a decoder streamed from safetensors through quantisation into ONNX external data, some rows at a time.

Memory holds a few rows and the scales of one tensor, whatever the model's size; only a float matrix, which MatMul
wants transposed, is held whole. Of a folder that a killed build left, tensors that are whole are not made again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import sha256
from math import prod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from edgebake.errors import RecipeError
from edgebake.types import Tensors
from edgebake_targets._genai_journal import JOURNAL, Journal, Place
from edgebake_targets._onnx_half import to_half
from edgebake_targets._onnx_quantize import rounded_blocks, symmetric_int4_blocks

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray

DATA = "model.onnx.data"
ALIGNMENT = 4096  # so that a runtime can map each tensor from the file
INLINE = 1024  # bytes
Rounded = tuple["NDArray[np.uint8]", "NDArray[np.float32]"]
_Rounding = Callable[["NDArray[np.float32]", int], tuple[Any, ...]]  # rows, group: bytes, scales, perhaps offsets
Part = tuple[str, "np.dtype[Any]", Sequence[int], Iterable["NDArray[Any]"]]  # name, type, shape and rows of a tensor


class WeightWriter:
    """Appends tensors of a checkpoint to ``folder``/model.onnx.data and collects the initializers that point there.

    A tensor asked for twice in one form is stored once (tied embeddings). What a killed process wrote there of the
    same tensors in the same order is kept.
    """

    def __init__(self, tensors: Tensors, folder: Path) -> None:
        self._tensors = tensors
        self._journal = Journal(folder / JOURNAL)
        kept = self._journal.whole(folder / DATA)
        self._file = (folder / DATA).open("r+b" if kept else "wb")
        self.initializers: dict[str, onnx.TensorProto] = {}

    def __enter__(self) -> WeightWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._file.close()
        self._journal.close()
        if kind is None:
            self._journal.path.unlink()

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """``value`` under ``name``, stored as it is; a small one in the graph, whose shape inference may ask for it."""
        from onnx import numpy_helper

        if name not in self.initializers:
            if value.nbytes <= INLINE:
                self.initializers[name] = numpy_helper.from_array(value, name)
            else:
                self._add((name, value.dtype, value.shape, [value]))
        return name

    def vector(self, name: str, size: int, plus: float = 0.0) -> str:
        """A norm's weight or a bias of ``size`` values, in float32, ``plus`` added to each."""
        import numpy as np

        self._expect(name, (size,))
        if name in self.initializers:
            return name
        value = self._tensors.whole(name)
        return self.constant(name, value + np.float32(plus) if plus else value)

    def transposed(self, name: str, shape: tuple[int, int], *, half: bool = False) -> str:
        """The matrix ``name`` of ``shape`` (outputs, inputs) as MatMul wants it, (inputs, outputs); float32 or half."""
        import numpy as np

        self._expect(name, shape)
        key = f"{name}.T.half" if half else f"{name}.T"
        if key in self.initializers:
            return key

        def whole() -> Iterator[NDArray[Any]]:
            found = self._tensors.whole(name).T
            yield to_half(found) if half else found

        dtype = np.dtype(np.float16 if half else np.float32)
        if dtype.itemsize * prod(shape) <= INLINE:
            return self.constant(key, next(whole()))
        self._add((key, dtype, shape[::-1], whole()))
        return key

    def table(self, name: str, shape: tuple[int, int], *, half: bool = False) -> str:
        """The matrix ``name`` row by row, in float32 or half; for a float embedding."""
        import numpy as np

        self._expect(name, shape)
        key = f"{name}.half" if half else name
        if key not in self.initializers:
            rows = self._tensors.rows(name)
            dtype = np.dtype(np.float16 if half else np.float32)
            self._add((key, dtype, shape, map(to_half, rows) if half else rows))
        return key

    def blocks(self, name: str, shape: tuple[int, int], bits: int, block: int) -> tuple[str, ...]:
        """The matrix ``name`` in ``bits`` (4 or 8) and groups of ``block`` inputs, and its scales, for MatMulNBits.

        (outputs, inputs / block, block · bits / 8) bytes and (outputs, inputs / block) float32.
        """
        key = f"{name}.w{bits}g{block}"
        return self._grouped(name, shape, (bits, block), _ROUND[bits], (key, f"{key}.scale"))

    def affine(self, name: str, shape: tuple[int, int], block: int) -> tuple[str, ...]:
        """Like :meth:`blocks` with 4 bits, and what is added to each group, (inputs / block, outputs) float32."""
        keys = tuple(f"{name}.w4g{block}z{part}" for part in ("", ".scale", ".offset"))
        return self._grouped(name, shape, (4, block), affine_int4_blocks, keys)

    def _grouped(
        self, name: str, shape: tuple[int, int], sizes: tuple[int, int], rounding: _Rounding, keys: tuple[str, ...]
    ) -> tuple[str, ...]:
        """Add what ``rounding`` makes of the matrix ``name`` under ``keys``: bytes, scales, perhaps offsets."""
        import numpy as np

        self._expect(name, shape)
        (rows, columns), (bits, block) = shape, sizes
        if columns % block:
            what = f"groups of {block} do not divide the {columns} inputs of {name!r}"
            raise RecipeError(what, where="compress.scheme", fix="choose a group that does")
        if keys[0] in self.initializers:
            return keys
        groups = columns // block
        beside: list[list[NDArray[np.float32]]] = [[] for _ in keys[1:]]

        def packed() -> Iterator[NDArray[np.uint8]]:
            for some in self._tensors.rows(name):
                values, *others = rounding(some, block)
                for kept, other in zip(beside, others, strict=True):
                    kept.append(other)
                yield values

        def offsets(of: list[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
            yield np.concatenate(of).reshape(rows, groups).T

        self._add(
            (keys[0], np.dtype(np.uint8), (rows, groups, block * bits // 8), packed()),
            (keys[1], np.dtype(np.float32), (rows, groups), beside[0]),
            *(
                (key, np.dtype(np.float32), (groups, rows), offsets(of))
                for key, of in zip(keys[2:], beside[1:], strict=True)
            ),
        )
        return keys

    def _expect(self, name: str, shape: tuple[int, ...]) -> None:
        if self._tensors.shape(name) != shape:
            what = f"the tensor {name!r} is {self._tensors.shape(name)}, where config.json makes it {shape}"
            raise RecipeError(what, where="model.path", fix="config.json and weights must be of one model")

    def _add(self, *parts: Part) -> None:
        """Write ``parts``, of which one may be known only when those before it are written; or pass by kept ones."""
        kept = self._journal.next([name for name, *_ in parts])
        places = kept or [self._written(chunks) for *_, chunks in parts]
        self._file.seek(places[-1].end)
        if not kept:
            self._file.flush()
            self._journal.add([name for name, *_ in parts], places)
        for (name, dtype, shape, _), place in zip(parts, places, strict=True):
            self.initializers[name] = _external(name, dtype, shape, place)

    def _written(self, chunks: Iterable[NDArray[Any]]) -> Place:
        import numpy as np

        self._file.seek(-self._file.tell() % ALIGNMENT, 1)
        self._file.truncate()
        begin, digest = self._file.tell(), sha256()
        for chunk in chunks:
            data = np.ascontiguousarray(chunk).data.cast("B")
            self._file.write(data)
            digest.update(data)
        return Place(begin, self._file.tell(), digest.hexdigest())


def _external(name: str, dtype: np.dtype[Any], shape: Sequence[int], place: Place) -> onnx.TensorProto:
    import onnx

    tensor = onnx.TensorProto(name=name, dims=shape, data_type=onnx.helper.np_dtype_to_tensor_dtype(dtype))
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", DATA), ("offset", place.begin), ("length", place.end - place.begin)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def symmetric_int8_blocks(weight: NDArray[np.float32], block: int) -> Rounded:
    """Rows (N, K) as MatMulNBits with 8 bits wants them: (N, K / block, block) and scales (N · K / block,).

    Unsigned with the implied zero point 128 (ONNX Runtime, docs/ContribOperators.md); the value of largest magnitude
    of a block becomes 1 or 255. A block that already is such integers times a scale keeps both.
    """
    import numpy as np

    rows, columns = weight.shape
    blocks = weight.reshape(rows, columns // block, block)
    peak = np.abs(blocks).max(-1, keepdims=True)
    scale = np.where(peak > 0, peak / np.float32(127.0), np.float32(1.0)).astype(np.float32)
    signed, scale = rounded_blocks(blocks, scale, 8)
    return (signed + 128).astype(np.uint8), scale.reshape(-1)


def affine_int4_blocks(
    weight: NDArray[np.float32], block: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:
    """Rows (N, K) as ``(q - 8) * scale + offset``: packed (N, K / block, block / 2), the others (N · K / block,).

    The least value of a block becomes -8, the greatest 7. Weights that llama.cpp's Q4_1 holds, ``q * d + m`` with q in
    0..15 and both ends in use, come back to the rounding of float32. Integer zero points, as MatMulNBits has them,
    would move each block by up to half a step; float ones make its CPU kernel (ONNX Runtime 1.31) unpack the whole
    matrix at every call, at a twentieth of the speed, so that the offset stays apart.
    """
    import numpy as np

    rows, columns = weight.shape
    blocks = weight.reshape(rows, columns // block, block).astype(np.float32)
    least = blocks.min(-1, keepdims=True)
    step = (blocks.max(-1, keepdims=True) - least) / np.float32(15)
    flat = step == 0
    scale = np.where(flat, np.float32(1), step)
    q: NDArray[Any] = np.where(flat, 8, np.clip(np.rint((blocks - least) / scale), 0, 15)).astype(np.uint8)
    offset = np.where(flat, least, least + 8 * scale).astype(np.float32)
    return q[..., 0::2] | (q[..., 1::2] << 4), scale.reshape(-1), offset.reshape(-1)


_ROUND: dict[int, _Rounding] = {
    4: symmetric_int4_blocks,
    8: symmetric_int8_blocks,
}
