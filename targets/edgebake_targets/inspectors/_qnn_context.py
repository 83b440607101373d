"""What the compiled parts of an EPContext model compute, read from Qualcomm's context binaries in it or beside it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from edgebake_targets._onnx_units import CONTEXT
from edgebake_targets._qnn import SOURCES
from edgebake_targets.inspectors._flatbuffers import Malformed
from edgebake_targets.inspectors._pte_file import mapped
from edgebake_targets.inspectors._qnn_binary import Graph, graphs

if TYPE_CHECKING:
    import onnx

_LONGEST_NAME = 256  # bytes; file systems take no more
# Numbers that ONNX Runtime and exporters put behind a name that is taken, and what they put before it.
_BEHIND, _BEFORE = re.compile(r"(_token)?_\d+$"), "node_"


@dataclass(frozen=True, kw_only=True)
class Inside:
    """Graphs of the parts by name, with their nodes counted by operator; or why a part cannot be told."""

    graphs: Mapping[str, Counter[str]] = field(default_factory=dict)
    unread: str = ""

    def operators(self) -> Counter[str]:
        """Of all parts; empty where one of them could not be read."""
        return Counter() if self.unread else sum(self.graphs.values(), Counter())


def inside(model: onnx.ModelProto, path: Path) -> Inside:
    """What the parts that Qualcomm's provider compiled hold; ``model`` was read from ``path``.

    The binary keeps names of nodes and no types. A node counts under the ONNX operator that its name ends in, else
    under its name without numbers. A binary may hold graphs of other models, too: a part is the graph that it names.
    """
    nodes = [_attributes(node) for node in model.graph.node if node.op_type == CONTEXT]
    parts = [given for given in nodes if given.get("source", b"") in SOURCES]
    found: dict[str, Graph] = {}
    try:
        for blob in _binaries(parts, path):
            found |= {graph.name: graph for graph in graphs(blob)}
        chosen = [_chosen(given, found) for given in parts]
    except Malformed as error:
        return Inside(unread=str(error))
    types = _types() if chosen else frozenset[str]()
    return Inside(graphs={g.name: Counter(word(name, types) for name in g.nodes) for g in chosen})


def word(name: str, types: frozenset[str]) -> str:
    """``Conv`` of ``/block/Conv_12`` and ``layer_norm`` of ``node_layer_norm_3``."""
    plain = name.rpartition("/")[2] or name
    while shorter := _BEHIND.sub("", plain):
        if shorter == plain:
            break
        plain = shorter
    ends = [plain[at:] for at in range(len(plain)) if plain[at:] in types]
    return ends[0] if ends else plain.removeprefix(_BEFORE) or plain


def beside(path: Path, held: bytes) -> Path | None:
    """The file in the folder of ``path`` that ``held`` names; None for a name that leads elsewhere, or to none."""
    name = held.decode("utf-8", "replace")
    plain = PurePath(name).name == name and len(held) < _LONGEST_NAME and (path.parent / name).is_file()
    return path.parent / name if plain else None


def _binaries(parts: Sequence[Mapping[str, Any]], path: Path) -> Iterator[memoryview]:
    """Each binary once: a part may lie in another's."""
    files = set()
    for given in parts:
        held = given.get("ep_cache_context", b"")
        if not given.get("main_context", 1):
            continue
        if given.get("embed_mode", 1):
            yield memoryview(held)
        elif held not in files:
            files.add(held)
            file = beside(path, held)
            if file is None:
                raise Malformed(f"no file {held[:_LONGEST_NAME].decode('utf-8', 'replace')!r} beside the model")
            yield mapped(file)


def _chosen(given: Mapping[str, Any], found: Mapping[str, Graph]) -> Graph:
    """The graph of a part: the one that it names, or the only one there is."""
    name = given.get("partition_name", b"").decode("utf-8", "replace")
    if name in found:
        return found[name]
    if len(found) == 1:
        return next(iter(found.values()))
    raise Malformed(f"none of the graphs {', '.join(sorted(found)) or '(none)'} is the part {name!r}")


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: a.s if a.type == a.STRING else a.i for a in node.attribute}


def _types() -> frozenset[str]:
    import onnx

    return frozenset(schema.name for schema in onnx.defs.get_all_schemas())
