"""Which tensors of a file that grows are whole: what a killed process wrote of it is taken over, and never trusted.

A line is added when the bytes it tells of are in the file, with their SHA-256: lines, or bytes, that a power failure
took with it end what is taken over.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO, NamedTuple

JOURNAL = "weights.journal"
_READ = 1 << 22  # bytes at a time


class Place(NamedTuple):
    """Where a tensor's bytes are, and their SHA-256."""

    begin: int
    end: int
    digest: str


_Line = tuple[list[str], list[Place]]


class Journal:
    """The journal at ``path``: one line for tensors that were written together."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._kept: list[_Line] = []
        self._taken: list[_Line] = []
        self._file = path.open("a+", encoding="utf-8")

    def whole(self, data: Path) -> int:
        """How many lines tell of bytes that are in ``data`` as they were written; the rest is forgotten."""
        self._file.seek(0)
        if data.is_file():
            with data.open("rb") as file:
                for names, places in map(_parsed, self._file):
                    if not names or any(_digest(file, place) != place.digest for place in places):
                        break
                    self._kept.append((names, places))
        self._rewrite(self._kept)
        return len(self._kept)

    def next(self, names: list[str]) -> list[Place]:
        """Where the tensors ``names``, which come next, are already; [] when they have to be written."""
        if not self._kept:
            return []
        if self._kept[0][0] != names:  # another order: what follows is of no use
            self._kept = []
            self._rewrite(self._taken)
            return []
        self._taken.append(self._kept.pop(0))
        return self._taken[-1][1]

    def add(self, names: Sequence[str], places: Sequence[Place]) -> None:
        """Note tensors whose bytes have been written."""
        self._file.write(json.dumps([names, places]) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Let go of the file, which stays."""
        self._file.close()

    def _rewrite(self, lines: Sequence[_Line]) -> None:
        self._file.truncate(0)
        for names, places in lines:
            self.add(names, places)


def _parsed(line: str) -> _Line:
    """Names and places of ``line``; none where it is not whole."""
    with suppress(ValueError, TypeError):
        names, places = json.loads(line)
        return names, [Place(*place) for place in places]
    return [], []


def _digest(file: BinaryIO, place: Place) -> str:
    digest = sha256()
    file.seek(place.begin)
    left = place.end - place.begin
    while left and (some := file.read(min(left, _READ))):
        digest.update(some)
        left -= len(some)
    return digest.hexdigest()
