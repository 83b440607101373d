"""Graphs and nodes in a context binary of Qualcomm's HTP, read without the vendor's libraries.

Layout, as QAIRT 2.48, 2.49 and 2.51 write it (nobody documents it; the vendor's own QnnSystemContext_getBinaryInfo
tells graphs and tensors, no nodes): big-endian version and, at byte 24, the offset of a directory. A directory is a
header of 32 bytes, the last eight of them its length, and a flatbuffer of entries: name, bytes and offset from the
directory. The entry ROOT is a flatbuffer with a table for each graph: its nodes, each a number and a name, and its own
name. Types of nodes are not kept: a name is what the tool that made the graph called the node.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgebake_targets.inspectors._flatbuffers import Malformed, Table, integer, root

_MAGIC = bytes.fromhex("0000000200000003")
_PREFIX = 256  # ExecuTorch puts a header of its own before the binary
_DIRECTORY, _HEADER, _ROOT = 24, 32, "ROOT"
_MOST, _LONGEST = 1 << 20, 1 << 12  # nodes of a graph, bytes of a name
INSIDE = "operators_inside"  # among the facts of an inspection: how they were counted, or why they were not


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A graph and the names of its nodes, in the order in which they were added to it."""

    name: str
    nodes: tuple[str, ...]


def graphs(blob: memoryview) -> tuple[Graph, ...]:
    """The graphs that ``blob`` holds. Malformed for anything but a whole binary of a layout that is known here."""
    start = next((at for at in (0, _PREFIX) if blob[at : at + len(_MAGIC)] == _MAGIC), None)
    if start is None:
        raise Malformed("it is no context binary of a layout that is known here (QAIRT 2.48 to 2.51)")
    context = blob[start:]
    found = tuple(_graph(wrapped.table(1)) for wrapped in _context(_entry(context, _ROOT)).tables(3))
    if not found:
        raise Malformed("it holds no graph where known layouts have them")
    return found


def _entry(context: memoryview, name: str) -> memoryview:
    """The content of the directory's entry ``name``."""
    start = integer(context, _DIRECTORY, "Q")
    length = integer(context, start + _HEADER - 8, "Q")
    listed = root(_part(context, start + _HEADER, length))
    for entry in listed.tables(2):
        if entry.text(0) == name:
            return _part(context, start + entry.whole(4, "Q"), entry.whole(1, "Q"))
    raise Malformed(f"its directory has no {name}")


def _part(data: memoryview, start: int, length: int) -> memoryview:
    if start + length > len(data):
        raise Malformed(f"a part ends at {start + length}, beyond its {len(data)} bytes")
    return data[start : start + length]


def _context(content: memoryview) -> Table:
    held = root(content).table(1)
    if held is None:
        raise Malformed("its root is empty")
    return held


def _graph(held: Table | None) -> Graph:
    if held is None or not held.text(3):
        raise Malformed("a graph has no name where known layouts have it")
    if held.count(0) > _MOST:
        raise Malformed(f"a graph claims {held.count(0)} nodes")
    if any(node.count(1, 1) > _LONGEST for node in held.tables(0)):
        raise Malformed("a node's name is longer than names are")
    nodes = tuple(node.text(1) for node in held.tables(0))
    if not nodes or not all(name and name.isprintable() for name in nodes):
        raise Malformed(f"the graph {held.text(3)!r} names no nodes where known layouts do")
    return Graph(name=held.text(3), nodes=nodes)
