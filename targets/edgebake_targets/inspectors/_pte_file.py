"""The parts of an ExecuTorch program (.pte): its tables, instructions, delegates' bytes and constants' bytes.

Needs neither torch nor executorch. Field numbers: executorch/exir/_serialize/program.fbs (file identifier ET12) and
the extended header eh00 of executorch/schema/extended_header.h.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from mmap import ACCESS_COPY, mmap
from pathlib import Path
from typing import Any

from edgebake_targets.inspectors._flatbuffers import Malformed, Table, integer, root

# ScalarType of scalar_type.fbs: (numpy's name, bytes).
SCALARS = {
    0: ("uint8", 1),
    1: ("int8", 1),
    2: ("int16", 2),
    3: ("int32", 4),
    4: ("int64", 8),
    5: ("float16", 2),
    6: ("float32", 4),
    7: ("float64", 8),
    11: ("bool", 1),
    12: ("int8", 1),
    13: ("uint8", 1),
    14: ("int32", 4),
    15: ("bfloat16", 2),
    23: ("float8_e5m2", 1),
    24: ("float8_e4m3fn", 1),
    27: ("uint16", 2),
    28: ("uint32", 4),
    29: ("uint64", 8),
}
# Members of the union KernelTypes.
NULL, INT, BOOL, DOUBLE, TENSOR, STRING, INTS, DOUBLES, BOOLS, TENSORS, OPTIONALS = range(1, 12)
# Members of the union InstructionArguments.
KERNEL, DELEGATE, MOVE, JUMP_FALSE = 1, 2, 3, 4
_INLINE = 0  # DataLocation
_EXTERNAL = 1  # TensorDataLocation


def mapped(path: Path) -> memoryview:
    """The file's bytes, read when they are looked at: a language model's file need not fit in memory twice.

    Writable, as torch wants memory to be; what is written never gets into the file.
    """
    with path.open("rb") as file:
        if not path.stat().st_size:  # an empty file cannot be mapped
            return memoryview(b"")
        return memoryview(mmap(file.fileno(), 0, access=ACCESS_COPY))


@dataclass(frozen=True)
class Program:
    """A program's root table, its segments and its shared data."""

    table: Table
    segments: tuple[memoryview, ...]
    named: Mapping[str, memoryview]
    size: int


def opened(data: memoryview) -> Program:
    """The program in ``data``; Malformed when it is none or is cut short."""
    if bytes(data[4:6]) != b"ET":
        raise Malformed(f"it starts with {bytes(data[:8])!r}, not with the mark ET12")
    end, base = len(data), len(data)
    if bytes(data[8:12]) == b"eh00":
        end, base = integer(data, 16, "Q"), integer(data, 24, "Q")
        held = integer(data, 32, "Q") if integer(data, 12, "I") >= 32 else 0
        base = base or len(data)
        if end > len(data) or base > len(data) or base + held > len(data):
            raise Malformed(f"it has {len(data)} bytes and its header speaks of {max(end, base + held)}")
    table = root(data[:end])
    segments = []
    for segment in table.tables(4):
        start, size = base + segment.whole(0, "Q"), segment.whole(1, "Q")
        if start + size > len(data):
            raise Malformed(f"a segment of {size} bytes reaches beyond the file's {len(data)}")
        segments.append(data[start : start + size])
    named = {entry.text(0): at(segments, entry.whole(1, "I"), "segment") for entry in table.tables(7)}
    return Program(table=table, segments=tuple(segments), named=named, size=len(data))


def at(items: Any, index: int, what: str) -> Any:
    """``items[index]``; Malformed when there is no such item."""
    if not 0 <= index < len(items):
        raise Malformed(f"{what} {index} of {len(items)} is named")
    return items[index]


def instructions(plan: Table) -> Iterator[tuple[int, Table]]:
    """Kind and arguments of every instruction."""
    for chain in plan.tables(5):
        for instruction in chain.tables(2):
            arguments = instruction.table(1)
            if arguments is not None:
                yield instruction.whole(0, "B"), arguments


def place_of(delegate: Table) -> str:
    """Names where the data of a delegate lies: methods may share it."""
    reference = delegate.table(1)
    return "" if reference is None else f"{reference.whole(0, 'b')}.{reference.whole(1, 'I')}"


def blob_of(program: Program, delegate: Table) -> memoryview:
    """What a delegate is built from."""
    reference = delegate.table(1)
    if reference is None:
        return memoryview(b"")
    index = reference.whole(1, "I")
    if reference.whole(0, "b") == _INLINE:
        inline: Table = at(program.table.tables(3), index, "inline delegate")
        return inline.blob(0)
    segment: memoryview = at(program.segments, index, "segment")
    return segment


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor whose data the program carries: ``key`` is equal for shared data, ``name`` is that of shared data."""

    key: str
    name: str
    data: memoryview
    mutable: bool


def stored(program: Program, tensor: Table, label: str) -> Stored | None:
    """Where the data of ``tensor`` lies, ``label`` telling mutable ones apart; None for activations."""
    index, extra = tensor.whole(5, "I"), tensor.table(9)
    name = extra.text(1) if extra is not None else ""
    external = extra is not None and extra.whole(2, "b") == _EXTERNAL
    mutable = tensor.table(6) is not None
    if not index and not external:
        return None
    size = prod(tensor.wholes(2, "i")) * SCALARS.get(tensor.whole(0, "b"), ("unknown", 0))[1]
    if external:
        return Stored(
            key=f"named:{name}", name=name, data=program.named.get(name, memoryview(b""))[:size], mutable=mutable
        )
    if mutable:
        data, key = _mutable(program, extra.whole(0, "Q") if extra is not None else 0, index, size), f"mutable:{label}"
    else:
        data, key = _in_constants(program, index, size), f"constant:{index}"
    if len(data) < size:
        raise Malformed(f"constant {index} of {size} bytes reaches beyond its segment")
    return Stored(key=key, name=name, data=data, mutable=mutable)


def _in_constants(program: Program, index: int, size: int) -> memoryview:
    held = program.table.table(5)
    offsets = held.wholes(1, "Q") if held is not None else ()
    if held is None or not offsets:
        inline: Table = at(program.table.tables(2), index, "constant")
        return inline.blob(0)
    start = at(offsets, index, "constant")
    segment: memoryview = at(program.segments, held.whole(0, "I"), "segment")
    return segment[start : start + size]


def _mutable(program: Program, group: int, index: int, size: int) -> memoryview:
    held: Table = at(program.table.tables(6), group, "mutable segment")
    start = at(held.wholes(1, "Q"), index, "mutable tensor")
    segment: memoryview = at(program.segments, held.whole(0, "I"), "segment")
    return segment[start : start + size]
