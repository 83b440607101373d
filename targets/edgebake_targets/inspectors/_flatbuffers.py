"""A bounds-checked reader of flatbuffers by field number, for files that nobody vouches for.

Format: https://flatbuffers.dev/internals/. Field numbers never change within a schema, so that older and newer files
read alike; a union takes two numbers, its type first.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass


class Malformed(ValueError):
    """An offset or length that leads out of the buffer."""


_SIZES = {"b": 1, "B": 1, "?": 1, "h": 2, "H": 2, "i": 4, "I": 4, "f": 4, "q": 8, "Q": 8, "d": 8}


def number(data: memoryview, offset: int, kind: str) -> int | float:
    """The little-endian scalar of ``struct`` format ``kind`` at ``offset``."""
    if offset < 0 or offset + _SIZES[kind] > len(data):
        raise Malformed(f"offset {offset} is outside of its {len(data)} bytes")
    value: int | float = struct.unpack_from(f"<{kind}", data, offset)[0]
    return value


def integer(data: memoryview, offset: int, kind: str) -> int:
    """As ``number``, for integer kinds."""
    return int(number(data, offset, kind))


@dataclass(frozen=True)
class Table:
    """A table at ``position`` of ``data``."""

    data: memoryview
    position: int

    def _field(self, field: int) -> int:
        """Offset of field number ``field``, 0 when the table leaves it at its default."""
        vtable = self.position - integer(self.data, self.position, "i")
        slot = 4 + 2 * field
        if slot + 2 > integer(self.data, vtable, "H"):
            return 0
        offset = integer(self.data, vtable + slot, "H")
        return self.position + offset if offset else 0

    def _target(self, field: int) -> int:
        offset = self._field(field)
        return offset + integer(self.data, offset, "I") if offset else 0

    def whole(self, field: int, kind: str, default: int = 0) -> int:
        """An integer field."""
        offset = self._field(field)
        return integer(self.data, offset, kind) if offset else default

    def real(self, field: int, kind: str = "f") -> float:
        """A floating-point field, 0.0 by default."""
        offset = self._field(field)
        return float(number(self.data, offset, kind)) if offset else 0.0

    def table(self, field: int) -> Table | None:
        """A sub-table (also the value of a union)."""
        target = self._target(field)
        return Table(self.data, target) if target else None

    def struct(self, field: int, kind: str) -> int | None:
        """The first integer of a structure, which lies inside the table; None where it is left out."""
        offset = self._field(field)
        return integer(self.data, offset, kind) if offset else None

    def text(self, field: int) -> str:
        """A UTF-8 string; bytes that are none are replaced."""
        return bytes(self.blob(field)).decode("utf-8", "replace")

    def blob(self, field: int) -> memoryview:
        """A vector of bytes, without copying."""
        start, count = self._vector(field, 1)
        return self.data[start : start + count]

    def wholes(self, field: int, kind: str) -> tuple[int, ...]:
        """A vector of integers."""
        start, count = self._vector(field, _SIZES[kind])
        return struct.unpack_from(f"<{count}{kind}", self.data, start) if count else ()

    def count(self, field: int, size: int = 4) -> int:
        """Elements of a vector of ``size`` bytes each."""
        return self._vector(field, size)[1]

    def texts(self, field: int) -> tuple[str, ...]:
        """A vector of strings."""
        found = []
        for place in self.tables(field):  # a string lies where a table would: its length, then its bytes
            end = place.position + 4 + integer(self.data, place.position, "I")
            if end > len(self.data):
                raise Malformed(f"a text reaches beyond its {len(self.data)} bytes")
            found.append(bytes(self.data[place.position + 4 : end]).decode("utf-8", "replace"))
        return tuple(found)

    def tables(self, field: int) -> tuple[Table, ...]:
        """A vector of tables."""
        start, count = self._vector(field, 4)
        places = range(start, start + 4 * count, 4)
        return tuple(Table(self.data, place + integer(self.data, place, "I")) for place in places)

    def _vector(self, field: int, size: int) -> tuple[int, int]:
        target = self._target(field)
        if not target:
            return 0, 0
        count = integer(self.data, target, "I")
        if target + 4 + count * size > len(self.data):
            raise Malformed(f"a list of {count} elements reaches beyond its {len(self.data)} bytes")
        return target + 4, count


def root(data: memoryview) -> Table:
    """The root table of a flatbuffer."""
    return Table(data, integer(data, 0, "I"))
