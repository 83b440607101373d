"""The .mlpackage container: reads its specification and weight file without importing coremltools, and writes it.

Layout: ``Manifest.json`` names the root model; ``Data/com.apple.CoreML/model.mlmodel`` is a protobuf ``Model``;
``weights/weight.bin`` beside it holds the large constants (format: ``mlmodel/src/MILBlob`` in coremltools).
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import mmap
import shutil
import struct
import sys
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.errors import ArtifactDamaged, ToolchainMissing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

AUTHOR = "com.apple.CoreML"
_ALIAS = "_edgebake_coremltools_proto"
_SENTINEL = 0xDEADBEEF
_BLOCK = 2**17  # words of eight numbers unpacked at once: each takes 8 bytes on the way
_ENTRY = struct.Struct("<IIQQQ")  # sentinel, dtype, bytes, offset, bits of padding at the end

# BlobDataType of MILBlob/Blob/BlobDataType.hpp: (name, bits of one value).
_BLOB_TYPES = {
    1: ("float16", 16),
    2: ("float32", 32),
    3: ("uint8", 8),
    4: ("int8", 8),
    5: ("bfloat16", 16),
    6: ("int16", 16),
    7: ("uint16", 16),
    8: ("int4", 4),
    9: ("uint1", 1),
    10: ("uint2", 2),
    11: ("uint4", 4),
    12: ("uint3", 3),
    13: ("uint6", 6),
    14: ("int32", 32),
    15: ("uint32", 32),
}


@dataclass(frozen=True, kw_only=True)
class Package:
    """An opened package: ``spec`` is the parsed ``Model``, ``blobs`` the weight files by the name in the spec."""

    path: Path
    spec: Any
    blobs: Mapping[str, memoryview]
    total_bytes: int


@dataclass(frozen=True, kw_only=True)
class Payload:
    """Raw values of one tensor: ``dtype`` as MIL names it (``uint6`` and other narrow ones are packed)."""

    dtype: str
    bits: int
    shape: tuple[int, ...]
    data: memoryview
    key: tuple[str, int] | None  # (weight file, offset); None for a value kept in the specification


def proto(module: str) -> Any:
    """``coremltools.proto.<module>`` in 0.1 s; ``import coremltools`` takes 10 s and brings torch and sklearn.

    Raises ToolchainMissing when coremltools is not installed.
    """
    if "coremltools" in sys.modules:
        return importlib.import_module(f"coremltools.proto.{module}")
    if _ALIAS not in sys.modules:
        found = importlib.util.find_spec("coremltools")
        if found is None or found.origin is None:
            raise ToolchainMissing("coremltools is not installed", fix="pip install coremltools==9.0")
        folder = Path(found.origin).parent / "proto"
        spec = importlib.util.spec_from_file_location(
            _ALIAS, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        if spec is None or spec.loader is None:
            raise ToolchainMissing(
                f"{folder} holds no Python package", fix="pip install --force-reinstall coremltools==9.0"
            )
        package = importlib.util.module_from_spec(spec)
        sys.modules[_ALIAS] = package
        spec.loader.exec_module(package)
    return importlib.import_module(f"{_ALIAS}.{module}")


def _inside(root: Path, relative: str, where: Path) -> Path:
    path = (root / relative).resolve()
    if not path.is_relative_to(root.resolve()):
        raise ArtifactDamaged(f"it refers to a file outside itself: {relative}", where=str(where))
    if not path.is_file():
        raise ArtifactDamaged(f"{relative} is missing", where=str(where), fix="build or copy the package again")
    return path


def _root_model(path: Path) -> Path:
    manifest = _inside(path, "Manifest.json", path)
    try:
        content = json.loads(manifest.read_bytes())
        item = content["itemInfoEntries"][content["rootModelIdentifier"]]["path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactDamaged(f"Manifest.json names no root model ({error})", where=str(path)) from error
    return _inside(path / "Data", str(item), path)


def open_package(path: Path) -> Package:
    """Read the package (or bare ``.mlmodel`` file) at ``path``; ArtifactDamaged when it is not one."""
    if not path.exists():
        raise ArtifactDamaged("there is no such file or folder", where=str(path))
    model = _root_model(path) if path.is_dir() else path
    spec = proto("Model_pb2").Model()
    errors = importlib.import_module("google.protobuf.message")
    try:
        spec.ParseFromString(model.read_bytes())
    except errors.DecodeError as error:
        raise ArtifactDamaged(f"{model.name} is not a Core ML specification", where=str(path)) from error
    if spec.WhichOneof("Type") is None:
        raise ArtifactDamaged(f"{model.name} holds no model", where=str(path))
    blobs = {
        f"@model_path/{file.relative_to(model.parent).as_posix()}": _mapped(_inside(path, str(file.resolve()), path))
        for file in sorted((model.parent / "weights").glob("*"))
        if path.is_dir() and file.is_file()
    }
    files = [f for f in path.rglob("*") if f.is_file()] if path.is_dir() else [path]
    return Package(path=path, spec=spec, blobs=blobs, total_bytes=sum(f.stat().st_size for f in files))


def _mapped(file: Path) -> memoryview:
    """The bytes of ``file``, read when touched; writable as torch wants it, and what is written never gets there."""
    if not file.stat().st_size:
        return memoryview(b"")
    with file.open("rb") as opened:
        return memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY))


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a method lies: a package, and its function there where it has several. ``key`` names it in records."""

    path: Path
    function: str | None = None

    @property
    def key(self) -> str:
        """The package's name, with the function's where there is one."""
        return self.path.name + (f":{self.function}" if self.function else "")


def places_of(entry: Path, methods: Iterable[str]) -> dict[str, Place]:
    """Where each method lies: in the only package, in packages named after them, or in functions of one package."""
    names = list(methods)
    if len(names) == 1 and entry.suffix == ".mlpackage":
        return {names[0]: Place(path=entry)}
    if entry.suffix == ".mlpackage" and entry.stem not in names:
        return {name: Place(path=entry, function=name) for name in names}
    folder = entry.parent if entry.suffix == ".mlpackage" else entry
    return {name: Place(path=folder / f"{name}.mlpackage") for name in names}


def payload_of(package: Package, value: Any) -> Payload:
    """The raw bytes of a MIL ``Value`` that holds a tensor of numbers; ArtifactDamaged when they do not add up."""
    tensor = value.type.tensorType
    shape = tuple(int(d.constant.size) for d in tensor.dimensions)
    count = 1
    for size in shape:
        count *= size
    if value.WhichOneof("value") == "immediateValue":
        return _immediate(package, value, shape, count)
    name, start = str(value.blobFileValue.fileName), int(value.blobFileValue.offset)
    blob = package.blobs.get(name)
    if blob is None:
        raise ArtifactDamaged(f"the weight file {name} is missing", where=str(package.path))
    if start + _ENTRY.size > len(blob):
        raise ArtifactDamaged(f"{name} ends before byte {start}", where=str(package.path))
    sentinel, kind, size, offset, padding = _ENTRY.unpack_from(blob, start)
    dtype, bits = _BLOB_TYPES.get(kind, ("", 0))
    fits = (size * 8 - padding if bits < 8 else size * 8) == count * bits
    if sentinel != _SENTINEL or not bits or not fits or offset + size > len(blob):
        raise ArtifactDamaged(f"{name} is damaged at byte {start}", where=str(package.path))
    return Payload(dtype=dtype, bits=bits, shape=shape, data=blob[offset : offset + size], key=(name, start))


def _immediate(package: Package, value: Any, shape: tuple[int, ...], count: int) -> Payload:
    import numpy as np

    names = proto("MIL_pb2").DataType
    dtype = names.Name(value.type.tensorType.dataType).lower()
    tensor = value.immediateValue.tensor
    field = tensor.WhichOneof("value")
    digits = "".join(c for c in dtype if c.isdigit())
    if field == "bytes":
        data = bytes(tensor.bytes.values)
        bits = int(digits or 8)
    elif field in ("floats", "ints", "bools", "longInts", "doubles"):
        stored = {"floats": "<f4", "ints": "<i4", "bools": "?", "longInts": "<i8", "doubles": "<f8"}[field]
        array = np.asarray(getattr(tensor, field).values, stored)
        data, bits = array.tobytes(), array.dtype.itemsize * 8
        dtype = {"floats": "float32", "ints": "int32", "bools": "bool", "longInts": "int64", "doubles": "float64"}[
            field
        ]
    else:
        raise ArtifactDamaged("a constant of numbers holds none", where=str(package.path))
    if len(data) < (count * bits + 7) // 8:
        raise ArtifactDamaged("a constant holds fewer values than its shape says", where=str(package.path))
    return Payload(dtype=dtype, bits=bits, shape=shape, data=memoryview(data), key=None)


def array_of(payload: Payload) -> NDArray[Any]:
    """The values of ``payload``, unpacked; sub-byte ones lie in a little-endian stream of bits, as uint8 or int8."""
    import numpy as np

    count = int(np.prod(payload.shape, dtype=np.int64))
    if payload.bits >= 8:
        flat: NDArray[Any] = np.frombuffer(payload.data, np.dtype(payload.dtype), count)
        return flat.reshape(payload.shape)
    values = _unpacked(np.frombuffer(payload.data, np.uint8), payload.bits, count)
    if payload.dtype.startswith("int"):
        half = 1 << (payload.bits - 1)
        return np.asarray((values.astype(np.int8) ^ half) - half, np.int8).reshape(payload.shape)
    return values.reshape(payload.shape)


def _unpacked(packed: NDArray[np.uint8], width: int, count: int) -> NDArray[np.uint8]:
    """``count`` numbers of ``width`` bits. Eight of them fill ``width`` bytes, which one 64-bit word holds."""
    import numpy as np

    values = np.empty((-(-count // 8), 8), np.uint8)
    for start in range(0, len(values), _BLOCK):
        part = values[start : start + _BLOCK]
        stored = packed[start * width : (start + len(part)) * width]
        whole = np.pad(stored, (0, len(part) * width - len(stored))).reshape(-1, width)
        words = np.zeros(len(part), np.uint64)
        for byte in range(width):
            words |= whole[:, byte].astype(np.uint64) << np.uint64(8 * byte)
        for place in range(8):
            part[:, place] = (words >> np.uint64(width * place)) & np.uint64(2**width - 1)
    return values.reshape(-1)[:count]


def write_package(path: Path, spec: Any, weights: Path | None) -> None:
    """Write ``spec`` and the weight file; the same content gives the same bytes (coremltools draws random UUIDs)."""
    model = spec.SerializeToString(deterministic=True)
    data = path / "Data" / AUTHOR
    (data / "weights").mkdir(parents=True)
    (data / "model.mlmodel").write_bytes(model)
    if weights is not None:
        shutil.copyfile(weights, data / "weights" / "weight.bin")
    else:
        (data / "weights" / "weight.bin").write_bytes(b"")
    digest = sha256(model)
    digest.update((data / "weights" / "weight.bin").read_bytes())
    names = {part: _identifier(digest.hexdigest(), part) for part in ("model", "weights")}
    manifest = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": {
            names["model"]: _item("CoreML Model Specification", "model.mlmodel"),
            names["weights"]: _item("CoreML Model Weights", "weights"),
        },
        "rootModelIdentifier": names["model"],
    }
    (path / "Manifest.json").write_text(json.dumps(manifest, indent=4, sort_keys=True) + "\n")


def _identifier(digest: str, part: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"edgebake:mlpackage:{digest}:{part}")).upper()


def _item(description: str, name: str) -> dict[str, str]:
    return {"author": AUTHOR, "description": description, "name": name, "path": f"{AUTHOR}/{name}"}
