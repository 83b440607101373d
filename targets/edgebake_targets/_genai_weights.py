"""Weights of a decoder streamed from safetensors through quantisation into ONNX external data, some rows at a time.

Memory holds a few rows and the scales of one tensor, whatever the model's size; only a float matrix, which MatMul
wants transposed, is held whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from edgebake.errors import RecipeError
from edgebake.types import Tensors
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


class WeightWriter:
    """Appends tensors of a checkpoint to ``folder``/model.onnx.data and collects the initializers that point there.

    A tensor asked for twice in one form is stored once (tied embeddings).
    """

    def __init__(self, tensors: Tensors, folder: Path) -> None:
        self._tensors = tensors
        self._file = (folder / DATA).open("wb")
        self.initializers: dict[str, onnx.TensorProto] = {}

    def __enter__(self) -> WeightWriter:
        return self

    def __exit__(self, _kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._file.close()

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """``value`` under ``name``, stored as it is; a small one in the graph, whose shape inference may ask for it."""
        from onnx import numpy_helper

        if name not in self.initializers:
            if value.nbytes <= INLINE:
                self.initializers[name] = numpy_helper.from_array(value, name)
            else:
                self._add(name, value.dtype, value.shape, [value])
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
        self._expect(name, shape)
        key = f"{name}.T.half" if half else f"{name}.T"
        if key in self.initializers:
            return key
        whole = self._tensors.whole(name).T
        return self.constant(key, to_half(whole) if half else whole)

    def table(self, name: str, shape: tuple[int, int], *, half: bool = False) -> str:
        """The matrix ``name`` row by row, in float32 or half; for a float embedding."""
        import numpy as np

        self._expect(name, shape)
        key = f"{name}.half" if half else name
        if key not in self.initializers:
            rows = self._tensors.rows(name)
            self._add(key, np.dtype(np.float16 if half else np.float32), shape, map(to_half, rows) if half else rows)
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

        self._add(keys[0], np.dtype(np.uint8), (rows, groups, block * bits // 8), packed())
        self._add(keys[1], np.dtype(np.float32), (rows, groups), beside[0])
        for key, offsets in zip(keys[2:], beside[1:], strict=True):
            self._add(key, np.dtype(np.float32), (groups, rows), [np.concatenate(offsets).reshape(rows, groups).T])
        return keys

    def _expect(self, name: str, shape: tuple[int, ...]) -> None:
        if self._tensors.shape(name) != shape:
            what = f"the tensor {name!r} is {self._tensors.shape(name)}, where config.json makes it {shape}"
            raise RecipeError(what, where="model.path", fix="config.json and weights must be of one model")

    def _add(self, name: str, dtype: np.dtype[Any], shape: Sequence[int], chunks: Iterable[NDArray[Any]]) -> None:
        import numpy as np
        import onnx

        self._file.seek(-self._file.tell() % ALIGNMENT, 1)
        begin = self._file.tell()
        for chunk in chunks:
            self._file.write(np.ascontiguousarray(chunk).data.cast("B"))
        end = self._file.tell()
        tensor = onnx.TensorProto(name=name, dims=shape, data_type=onnx.helper.np_dtype_to_tensor_dtype(dtype))
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", DATA), ("offset", begin), ("length", end - begin)):
            tensor.external_data.add(key=key, value=str(value))
        self.initializers[name] = tensor


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
