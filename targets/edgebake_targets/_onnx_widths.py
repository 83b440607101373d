"""Activations of 8 and 16 bits in one graph: which values and operators are wide, said in ONNX Runtime's overrides.

An operator computes in one width: what makes or reads a wide value is wide, and takes its narrow inputs converted. That
a value passes through unchanged (reshaped, transposed) alters nothing of its width.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from edgebake_targets._onnx import module_of
from edgebake_targets._onnx_graph import Graph, producers
from edgebake_targets._wide import ITSELF

if TYPE_CHECKING:
    import onnx

PASSING = frozenset(
    ("Expand", "Flatten", "Gather", "MaxPool", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")
)
CLAMPS = frozenset(("Clip", "Relu"))
Overrides = dict[str, list[dict[str, Any]]]


def home(node: onnx.NodeProto) -> str:
    """The module that ``node`` belongs to."""
    return module_of(node) or ITSELF


def modules_of(model: onnx.ModelProto) -> list[str]:
    """The modules that have operators in the graph."""
    return sorted({home(node) for node in model.graph.node})


def values_of(model: onnx.ModelProto, modules: Collection[str], floats: Collection[str]) -> set[str]:
    """Those of ``floats`` that operators of ``modules`` make, and the same values where they only pass through."""
    wide = {name for node in model.graph.node if home(node) in modules for name in node.output if name in floats}
    passing = [{node.input[0], *node.output} & set(floats) for node in model.graph.node if node.op_type in PASSING]
    while found := {name for same in passing if same & wide for name in same} - wide:
        wide |= found
    return wide


def overrides(
    model: onnx.ModelProto, wide: Collection[str], floats: Collection[str], left_float: Collection[str]
) -> Overrides:
    """What ONNX Runtime's quantizer is told, so that the values ``wide`` have 16 bits in a graph of 8.

    ``floats``: the values that are rounded at all; ``left_float``: names of the operators that compute in float.
    """
    from onnxruntime.quantization import QuantType

    operators = {node.name for node in model.graph.node if set(wide) & {*node.input, *node.output}} - set(left_float)
    made_by = {name: node.name for node in model.graph.node for name in node.output}
    found: Overrides = {}
    for value in floats:
        types = (QuantType.QUInt16, QuantType.QUInt8)
        own, other = types if made_by.get(value) in operators else types[::-1]
        readers = {node.name for node in model.graph.node if value in node.input} - set(left_float)
        parted = readers - operators if own is QuantType.QUInt16 else readers & operators
        if own is QuantType.QUInt16 or parted:
            convert = {"convert": {"quant_type": other, "recv_nodes": parted}} if parted else {}
            found[value] = [{"quant_type": own, **convert}]
    return found


def ends_of(model: onnx.ModelProto) -> list[str]:
    """Modules that make the outputs, and those that make what is read for them."""
    made_by = producers(model)

    def maker(name: str) -> onnx.NodeProto | None:
        node = made_by.get(name)
        while node is not None and node.op_type in PASSING:
            node = made_by.get(node.input[0])
        return node

    last = [maker(value.name) for value in model.graph.output]
    before = [maker(name) for node in last if node is not None for name in node.input]
    return list(dict.fromkeys(home(node) for node in (*last, *before) if node is not None))


def fold_clamps(
    model: onnx.ModelProto, left_float: Collection[str]
) -> tuple[onnx.ModelProto, dict[str, tuple[float, float]]]:
    """A copy without each Relu, and each Clip around zero, behind an operator that feeds it alone: ranges do its work.

    Also the ends, by value, that a range must not go beyond.

    ONNX Runtime's quantizer does this too, except where widths change behind it: a range chosen in front of the clamp
    would then leave most of the levels to what is thrown away.
    """
    folded = type(model)()
    folded.CopyFrom(model)
    graph, made_by = Graph(folded), producers(folded)
    readers = Counter(name for node in folded.graph.node for name in node.input)
    readers.update(value.name for value in folded.graph.output)
    kept = []
    ends: dict[str, tuple[float, float]] = {}
    for node in folded.graph.node:
        source = made_by.get(node.input[0]) if node.op_type in CLAMPS else None
        alone = source is not None and readers[node.input[0]] == 1 and source.op_type not in PASSING
        low, high = _ends(graph, node)
        if source is None or not alone or {node.name, source.name} & set(left_float) or not low <= 0.0 <= high:
            kept.append(node)
            continue
        inner = ends.pop(node.input[0], (-math.inf, math.inf))
        ends[node.output[0]] = (max(low, inner[0]), min(high, inner[1]))
        source.output[list(source.output).index(node.input[0])] = node.output[0]
        made_by[node.output[0]] = source
    copies = [type(node).FromString(node.SerializeToString()) for node in kept]
    del folded.graph.node[:]
    folded.graph.node.extend(copies)
    return folded, ends


def _ends(graph: Graph, node: onnx.NodeProto) -> tuple[float, float]:
    """Between what ``node`` clamps; nan where that is no constant."""
    if node.op_type != "Clip":
        return 0.0, math.inf
    low, high = (*node.input[1:], "", "")[:2]
    return _number(graph, low, -math.inf), _number(graph, high, math.inf)


def _number(graph: Graph, name: str, absent: float) -> float:
    if not name:
        return absent
    return float(graph.value(name)) if name in graph.initializers else math.nan
