"""Packages with several functions: one per method, every weight stored once whichever functions use it.

Each method is converted to a package of its own; their programs become functions of one specification, and their weight
files one file in which equal payloads lie once (format: ``mlmodel/src/MILBlob`` in coremltools). The functions stay as
they were converted and compressed; the same packages give the same bytes.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

from edgebake.errors import ArtifactDamaged
from edgebake_targets._coreml_package import Package, open_package, write_package

MAIN = "main"  # what the converter calls the only function
_WEIGHTS = "@model_path/weights/weight.bin"
_HEADER = struct.Struct("<II")  # number of payloads, version of the format
_ENTRY = struct.Struct("<IIQQQ")  # sentinel, dtype, bytes, offset, bits of padding at the end
_LINE = 64  # header, entries and payloads begin at multiples


@dataclass(kw_only=True)
class _Weights:
    """A weight file that is being written."""

    file: IO[bytes]
    known: dict[tuple[int, int, int, bytes], int] = field(default_factory=dict)

    def add(self, blob: memoryview, start: int) -> int:
        """The offset of the payload whose entry lies at ``start`` of another file; written unless it is there."""
        sentinel, dtype, size, offset, padding = _ENTRY.unpack_from(blob, start)
        data = blob[offset : offset + size]
        key = (dtype, size, padding, sha256(data).digest())
        if key not in self.known:
            self.file.seek(0, 2)
            self.file.write(b"\0" * (-self.file.tell() % _LINE))
            self.known[key] = self.file.tell()
            entry = _ENTRY.pack(sentinel, dtype, size, self.known[key] + _LINE, padding)
            self.file.write(entry.ljust(_LINE, b"\0"))
            self.file.write(data)
        return self.known[key]


def merge(path: Path, packages: Mapping[str, Path]) -> None:
    """Write the package ``path`` with a function for each of ``packages``, of which the first is the default."""
    opened = {name: open_package(package) for name, package in packages.items()}
    first = next(iter(opened))
    spec = type(opened[first].spec)()
    spec.CopyFrom(opened[first].spec)
    for part in ("input", "output", "state"):
        spec.description.ClearField(part)
    spec.specificationVersion = max(package.spec.specificationVersion for package in opened.values())
    spec.description.defaultFunctionName = first
    del spec.mlProgram.functions[MAIN]
    with tempfile.TemporaryDirectory(prefix="edgebake-") as scratch:
        weights = Path(scratch) / "weight.bin"
        with weights.open("w+b") as file:
            file.write(b"\0" * _LINE)
            writer = _Weights(file=file)
            for name, package in opened.items():
                _append(spec, name, package, writer)
            file.seek(0)
            file.write(_HEADER.pack(len(writer.known), 2))
        write_package(path, spec, weights if writer.known else None)


def _append(spec: Any, name: str, package: Package, weights: _Weights) -> None:
    described = package.spec.description
    function = spec.description.functions.add(name=name)
    function.input.extend(described.input)
    function.output.extend(described.output)
    function.state.extend(described.state)
    program = spec.mlProgram.functions[name]
    program.CopyFrom(package.spec.mlProgram.functions[MAIN])
    for block in program.block_specializations.values():
        for value in _values(block):
            if value.WhichOneof("value") == "blobFileValue":
                stored = value.blobFileValue
                stored.offset = weights.add(package.blobs[stored.fileName], stored.offset)
                stored.fileName = _WEIGHTS


def _values(block: Any) -> Iterator[Any]:
    """Every value that ``block`` and its nested blocks hold themselves."""
    for operation in block.operations:
        yield from operation.attributes.values()
        for argument in operation.inputs.values():
            yield from (bound.value for bound in argument.arguments if bound.WhichOneof("binding") == "value")
        for nested in operation.blocks:
            yield from _values(nested)


def functions_of(package: Package) -> tuple[str, ...]:
    """Names of the functions, the default one first; empty for a package with a single one or without a program."""
    described = package.spec.description
    names = [function.name for function in described.functions]
    return tuple(sorted(names, key=lambda name: name != described.defaultFunctionName))


def function_of(package: Package, name: str) -> Package:
    """``package`` as if the function ``name`` were its only one. Weights are not copied."""
    described = next((f for f in package.spec.description.functions if f.name == name), None)
    if described is None or name not in package.spec.mlProgram.functions:
        raise ArtifactDamaged(f"it has no function {name}", where=str(package.path), fix="build again")
    spec = type(package.spec)()
    spec.specificationVersion = package.spec.specificationVersion
    spec.description.metadata.CopyFrom(package.spec.description.metadata)
    for part in ("input", "output", "state"):
        getattr(spec.description, part).extend(getattr(described, part))
    spec.mlProgram.version = package.spec.mlProgram.version
    spec.mlProgram.functions[MAIN].CopyFrom(package.spec.mlProgram.functions[name])
    return replace(package, spec=spec)
