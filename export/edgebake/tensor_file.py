"""Safetensors written as a stream and read lazily, so that a file never needs to fit in memory.

The same tensors in the same order give the same bytes. Format: 8 bytes little-endian header length, JSON header,
tensors without gaps (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from edgebake.errors import ArtifactDamaged, StageFailed
from edgebake.store_files import storage_errors

if TYPE_CHECKING:
    from numpy.typing import NDArray

DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
}
_CODES = {name: code for code, name in DTYPES.items()}
_ALIGNMENT = 8


class TensorWriter:
    """Collects tensors in the order of :meth:`add`; the file at ``path`` appears when the ``with`` block ends well."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._spool_path = path.with_name(path.name + ".part")
        self._spool = self._spool_path.open("wb")
        self._header: dict[str, Any] = {}
        self.metadata: dict[str, str] = {}

    def add(self, name: str, value: NDArray[Any]) -> None:
        """Append ``value`` (any shape, a dtype of DTYPES) under ``name``, which must be new."""
        if name in self._header:
            raise KeyError(f"{name} is there already")
        if value.dtype.name not in _CODES:
            raise StageFailed(
                f"{name} is {value.dtype.name}, which no artifact can take or give",
                fix=f"let the network take and return one of {', '.join(_CODES)}",
            )
        start = self._spool.tell()
        with storage_errors("write", self._spool_path):
            self._spool.write(np.ascontiguousarray(value).data.cast("B") if value.size else b"")
        self._header[name] = {
            "dtype": _CODES[value.dtype.name],
            "shape": list(value.shape),
            "data_offsets": [start, self._spool.tell()],
        }

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._spool.close()
        if kind is None:
            with storage_errors("write", self._path):
                self._assemble()
        self._spool_path.unlink()

    def _assemble(self) -> None:
        metadata = {"__metadata__": dict(sorted(self.metadata.items()))} if self.metadata else {}
        header = json.dumps({**metadata, **self._header}, separators=(",", ":")).encode("ascii")
        header += b" " * (-len(header) % _ALIGNMENT)
        with self._path.open("wb") as file, self._spool_path.open("rb") as data:
            file.write(len(header).to_bytes(8, "little") + header)
            shutil.copyfileobj(data, file, 1 << 20)


class TensorReader:
    """Tensors of one safetensors file; each is copied out of the mapped file when asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __getitem__(self, name: str) -> NDArray[Any]:
        """A writable copy of the tensor ``name``; ArtifactDamaged when the file does not hold it."""
        _, start, mapped = self._opened
        dtype = self.dtype(name)
        begin, end = self._entry(name)["data_offsets"]
        if end - begin != dtype.itemsize * self.count(name) or start + end > len(mapped):
            raise self._damaged(f"the tensor {name} is cut off")
        # bytes first: a view of another dtype would need an offset that its alignment allows
        data = mapped[start + begin : start + end].tobytes()
        return np.frombuffer(data, dtype).reshape(self._entry(name)["shape"]).copy()

    def dtype(self, name: str) -> np.dtype[Any]:
        """Element type of the tensor ``name``."""
        return np.dtype(DTYPES[self._entry(name)["dtype"]])

    def count(self, name: str) -> int:
        """Number of elements of the tensor ``name``."""
        return math.prod(self._entry(name)["shape"])

    def _entry(self, name: str) -> dict[str, Any]:
        entry: dict[str, Any] | None = self._opened[0].get(name)
        if entry is None:
            raise self._damaged(f"the tensor {name} is missing")
        return entry

    @property
    def metadata(self) -> Mapping[str, str]:
        """The free text fields of the header."""
        return self._opened[0].get("__metadata__") or {}

    @cached_property
    def _opened(self) -> tuple[dict[str, Any], int, NDArray[np.uint8]]:
        try:
            with storage_errors("read", self._path):
                mapped = np.memmap(self._path, np.uint8, "r")
        except (FileNotFoundError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise self._damaged("the file is missing or empty") from error
        start = 8 + int.from_bytes(mapped[:8].tobytes(), "little")
        try:
            header = json.loads(mapped[8:start].tobytes())
        except ValueError as error:
            raise self._damaged("the header is no JSON") from error
        return header, start, mapped

    def _damaged(self, what: str) -> ArtifactDamaged:
        return ArtifactDamaged(what, where=str(self._path), fix="build again")
