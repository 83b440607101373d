"""An ONNX Runtime file (.ort) as an ONNX model: nodes, types and weights; the optimisations saved for later left out.

Field numbers: onnxruntime/core/flatbuffers/schema/ort.fbs (file identifier ORTM).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgebake_targets.inspectors._flatbuffers import Malformed, Table, root

if TYPE_CHECKING:
    import onnx

MARK = b"ORTM"
_INT, _FLOAT, _STRING, _TENSOR, _GRAPH, _INTS = 2, 1, 3, 4, 5, 7  # AttributeType
_TENSOR_TYPE = 1  # member of the union TypeInfoValue
_SIZE, _NAME = 1, 2  # DimensionValueType


@dataclass(frozen=True)
class OrtFile:
    """``version`` of the ONNX Runtime that wrote it; ``operators``: operator set, version since, type, of each node."""

    version: str
    model: onnx.ModelProto
    operators: frozenset[tuple[str, int, str]]
    outside: int  # weights that lie in another file


def opened(data: memoryview) -> Table:
    """The root table of ``data``; Malformed when it is no .ort file."""
    if bytes(data[4:8]) != MARK:
        raise Malformed(f"it starts with {bytes(data[:8])!r}, not with the mark {MARK.decode()}")
    return root(data)


def read(data: memoryview) -> OrtFile:
    """``data`` with its weights. Malformed when it is no .ort file or is cut short."""
    import onnx

    session = opened(data)
    table = session.table(1)
    graph = table.table(7) if table is not None else None
    if table is None or graph is None:
        raise Malformed("it holds no model")
    model = onnx.ModelProto(ir_version=table.whole(0, "q"))
    for one in table.tables(1):
        model.opset_import.add(domain=one.text(0), version=one.whole(1, "q"))
    model.producer_name, model.producer_version = table.text(2), table.text(3)
    operators: set[tuple[str, int, str]] = set()
    outside = _fill(model.graph, graph, operators)
    return OrtFile(version=session.text(0), model=model, operators=frozenset(operators), outside=outside)


def _fill(graph: onnx.GraphProto, table: Table, operators: set[tuple[str, int, str]]) -> int:
    """Copy ``table`` into ``graph``; how many weights lie in another file."""
    outside = 0
    for held in table.tables(0):
        if held.whole(6, "q", -1) < 0:
            _tensor(graph.initializer.add(), held)
        else:
            outside += 1
    known = {value.text(0): value for value in table.tables(1)}
    for names, values in ((table.texts(5), graph.input), (table.texts(6), graph.output)):
        for name in names:
            _value(values.add(), name, known.get(name))
    for node in table.tables(2):
        made = graph.node.add(op_type=node.text(5), domain=node.text(2), name=node.text(0))
        made.input.extend(node.texts(8))
        made.output.extend(node.texts(9))
        operators.add((node.text(2) or "ai.onnx", node.whole(3, "i"), node.text(5)))
        outside += sum(_attribute(made.attribute.add(), one, operators) for one in node.tables(10))
    return outside


def _tensor(tensor: onnx.TensorProto, held: Table) -> None:
    tensor.name, tensor.data_type = held.text(0), held.whole(3, "i")
    tensor.dims.extend(held.wholes(2, "q"))
    texts = held.texts(5)
    if texts:
        tensor.string_data.extend(text.encode() for text in texts)
    else:
        tensor.raw_data = bytes(held.blob(4))


def _attribute(attribute: onnx.AttributeProto, held: Table, operators: set[tuple[str, int, str]]) -> int:
    import onnx

    kind = held.whole(2, "i")
    attribute.name = held.text(0)
    if kind not in onnx.AttributeProto.AttributeType.values():
        raise Malformed(f"attribute {attribute.name!r} is of kind {kind}")
    attribute.type = kind
    if kind == _INT:
        attribute.i = held.whole(4, "q")
    elif kind == _FLOAT:
        attribute.f = held.real(3)
    elif kind == _STRING:
        attribute.s = bytes(held.blob(5))
    elif kind == _INTS:
        attribute.ints.extend(held.wholes(9, "q"))
    elif kind == _TENSOR and (tensor := held.table(6)) is not None:
        _tensor(attribute.t, tensor)
    elif kind == _GRAPH and (graph := held.table(7)) is not None:
        return _fill(attribute.g, graph, operators)
    return 0


def _value(value: onnx.ValueInfoProto, name: str, held: Table | None) -> None:
    value.name = name
    kind = held.table(2) if held is not None else None
    tensor = kind.table(2) if kind is not None and kind.whole(1, "B") == _TENSOR_TYPE else None
    if tensor is None:
        return
    value.type.tensor_type.elem_type = tensor.whole(0, "i")
    shape = tensor.table(1)
    for place in shape.tables(0) if shape is not None else ():
        dim, size = value.type.tensor_type.shape.dim.add(), place.table(0)
        if size is not None and size.whole(0, "b") == _SIZE:
            dim.dim_value = size.whole(1, "q")
        elif size is not None and size.whole(0, "b") == _NAME:
            dim.dim_param = size.text(2)
