"""The .aimodel container: metadata and the blobs of its program, read with the standard library alone.

Layout: ``metadata.json``; ``main.mlirb``, the program as MLIR bytecode; ``main.hash``, the SHA-256 of the program.
Bytecode: https://mlir.llvm.org/docs/BytecodeFormat/, versions 5 and later. Only its strings and resources are read
here; what the operators are is left to Core AI's own reader.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from edgebake.errors import ArtifactDamaged

PROGRAM = "main.mlirb"
HASH = "main.hash"
METADATA = "metadata.json"
_MAGIC = b"ML\xefR"
_STRINGS, _RESOURCES, _OFFSETS = 0, 5, 6
_KNOWN_SECTIONS = 9  # identifiers from 0; others are damage
_BLOB = 0  # the kinds of a resource: blob, boolean, string
_AGAIN = "build or copy the whole folder again"


@dataclass(frozen=True, kw_only=True)
class Asset:
    """An opened asset. ``blobs``: the large constants of its program by name, mapped and not copied."""

    path: Path
    metadata: Mapping[str, Any]
    blobs: Mapping[str, memoryview]
    total_bytes: int


def open_asset(path: Path) -> Asset:
    """Read the asset at ``path``; ArtifactDamaged when it is none, or not whole."""
    if not path.exists():
        raise ArtifactDamaged("there is no such folder", where=str(path))
    if not path.is_dir():
        raise ArtifactDamaged("it is a file; a Core AI model is a folder", where=str(path), fix=_AGAIN)
    program = _mapped(_inside(path, PROGRAM))
    _refuse_other_hash(path, program)
    files = [file for file in path.rglob("*") if file.is_file()]
    return Asset(
        path=path,
        metadata=_metadata(path),
        blobs=dict(_blobs(program, path)),
        total_bytes=sum(file.stat().st_size for file in files),
    )


def _inside(path: Path, name: str) -> Path:
    file = (path / name).resolve()
    if not file.is_relative_to(path.resolve()):
        raise ArtifactDamaged(f"{name} leads outside of it", where=str(path), fix=_AGAIN)
    if not file.is_file():
        raise ArtifactDamaged(f"{name} is missing", where=str(path), fix=_AGAIN)
    return file


def _mapped(file: Path) -> memoryview:
    if not file.stat().st_size:
        return memoryview(b"")
    with file.open("rb") as opened:
        return memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))


def _refuse_other_hash(path: Path, program: memoryview) -> None:
    """Before Core AI's reader sees it: that one may bring the process down over a damaged program."""
    if (path / HASH).exists() and _inside(path, HASH).read_bytes() != sha256(program).digest():
        raise ArtifactDamaged(f"{PROGRAM} is not the program that {HASH} names", where=str(path), fix=_AGAIN)


def _metadata(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(_inside(path, METADATA).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ArtifactDamaged(f"{METADATA} is not JSON ({error})", where=str(path), fix=_AGAIN) from error
    if not isinstance(found, dict):
        raise ArtifactDamaged(f"{METADATA} holds no object", where=str(path), fix=_AGAIN)
    return found


class _Bytes:
    """Reads numbers from ``data``, of which nothing behind ``end`` is looked at."""

    def __init__(self, data: memoryview, at: int, end: int, path: Path) -> None:
        self.data, self.at, self.end, self.path = data, at, end, path

    def damaged(self) -> ArtifactDamaged:
        return ArtifactDamaged(f"{PROGRAM} is damaged at byte {self.at}", where=str(self.path), fix=_AGAIN)

    def byte(self) -> int:
        if self.at >= self.end:
            raise self.damaged()
        self.at += 1
        return int(self.data[self.at - 1])

    def number(self) -> int:
        """A PrefixVarInt: the zeros below the lowest set bit of the first byte say how many bytes follow."""
        first = self.byte()
        follow = 8 if first == 0 else (first & -first).bit_length() - 1
        if self.at + follow > self.end:
            raise self.damaged()
        rest = int.from_bytes(self.data[self.at : self.at + follow], "little")
        self.at += follow
        return rest if first == 0 else ((rest << 8) | first) >> (follow + 1)

    def part(self, size: int) -> _Bytes:
        """The next ``size`` bytes."""
        if size > self.end - self.at:
            raise self.damaged()
        self.at += size
        return _Bytes(self.data, self.at - size, self.at, self.path)

    def align(self, to: int) -> None:
        if to <= 0 or self.at + -self.at % to > self.end:
            raise self.damaged()
        self.at += -self.at % to


def _blobs(program: memoryview, path: Path) -> Iterator[tuple[str, memoryview]]:
    """Name and bytes of each blob."""
    sections = _sections(_Bytes(program, 0, len(program), path))
    if not {_STRINGS, _RESOURCES, _OFFSETS} <= sections.keys():
        return
    strings, data, entries = _strings(sections[_STRINGS]), sections[_RESOURCES], sections[_OFFSETS]
    groups = entries.number()  # of resources that belong to no dialect; all others follow to the end
    while entries.at < entries.end:
        entries.number()  # key of the group
        for _ in range(entries.number()):
            key, size, kind = entries.number(), entries.number(), entries.byte()
            held = data.part(size)
            if key >= len(strings):
                raise entries.damaged()
            if kind == _BLOB and groups <= 0:
                yield strings[key], _blob(held)
        groups -= 1


def _blob(held: _Bytes) -> memoryview:
    alignment, size = held.number(), held.number()
    held.align(alignment)
    payload = held.part(size)
    return held.data[payload.at : payload.end]


def _sections(reader: _Bytes) -> dict[int, _Bytes]:
    if bytes(reader.part(len(_MAGIC)).data[: len(_MAGIC)]) != _MAGIC:
        raise ArtifactDamaged(f"{PROGRAM} is no MLIR bytecode", where=str(reader.path), fix=_AGAIN)
    reader.number()  # version
    while reader.byte():  # who wrote it, up to a zero
        pass
    found: dict[int, _Bytes] = {}
    while reader.at < reader.end:
        identifier = reader.byte()
        size = reader.number()
        if identifier & 0x80:
            reader.align(reader.number())
        if identifier & 0x7F >= _KNOWN_SECTIONS:
            raise reader.damaged()
        found[identifier & 0x7F] = reader.part(size)
    return found


def _strings(section: _Bytes) -> list[str]:
    """Their sizes, of the last one first, then all of them, the first one first, each with a zero behind it."""
    count = section.number()
    if count > section.end - section.at:
        raise section.damaged()
    sizes = [section.number() for _ in range(count)]
    found = []
    for size in reversed(sizes):
        text = section.part(size)
        found.append(bytes(section.data[text.at : max(text.at, text.end - 1)]).decode("utf-8", "replace"))
    return found
