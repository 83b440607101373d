"""Rewrites that keep what a float graph computes and let Qualcomm's HTP compute it in integers and half precision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgebake_targets._onnx_graph import Graph, attribute
from edgebake_targets._onnx_macs import shapes_of

if TYPE_CHECKING:
    import onnx

    Readers = dict[str, list[onnx.NodeProto]]

FLOAT = 1  # TensorProto.FLOAT
# exp(-100) is 0 in float32 against any score of the same row that is not 84 lower. A mask of -1e4 spreads the range of
# 16-bit scores so far that little is left of them (18 dB on an attention layer; 40 with small masks).
MASKED = -100.0
_LOWEST = -1000.0  # no score is this low: what is lower hides a key
_CARRY = frozenset({"Add", "Where", "Mul", "Cast", "Expand", "Unsqueeze", "Reshape", "Transpose", "Slice", "Squeeze"})


def rewrite(model: onnx.ModelProto) -> None:
    """All rewrites, in place."""
    bound_masks(model)
    fuse_rms_norms(model)


def _readers(model: onnx.ModelProto) -> Readers:
    found: Readers = {}
    for node in model.graph.node:
        for name in node.input:
            found.setdefault(name, []).append(node)
    return found


# --- masks ------------------------------------------------------------------------------------------------------------


def bound_masks(model: onnx.ModelProto) -> None:
    """Raise constants that hide keys from a softmax (-inf, the lowest float, -1e4) to -100, which hides them as well.

    Only constants whose every way through the graph ends in a Softmax: elsewhere such a number may mean something.
    """
    import numpy as np
    from onnx import numpy_helper

    graph, readers = Graph(model), _readers(model)
    outputs = {value.name for value in model.graph.output}
    for name, tensor in list(graph.initializers.items()):
        if tensor.data_type != FLOAT or not _only_masks(name, readers, outputs):
            continue
        value = graph.value(name)
        if value.size and float(value.min()) < _LOWEST:
            tensor.CopyFrom(numpy_helper.from_array(np.maximum(value, np.float32(MASKED)), name))


def _only_masks(name: str, readers: Readers, outputs: set[str]) -> bool:
    pending, seen, ends = [name], {name}, 0
    while pending:
        for node in readers.get(pending.pop(), ()):
            if node.op_type == "Softmax":
                ends += 1
            elif node.op_type not in _CARRY or node.output[0] in outputs:
                return False
            elif node.output[0] not in seen:
                seen.add(node.output[0])
                pending.append(node.output[0])
    return ends > 0


# --- root mean square norms -------------------------------------------------------------------------------------------


def fuse_rms_norms(model: onnx.ModelProto) -> None:
    """``x / sqrt(mean(x^2) + eps) * weight`` written out (Zhang, Sennrich 2019, eq. 4) becomes RMSNormalization.

    Written out, the squares overflow in half precision, and in integers they leave small values no resolution (0.2 dB
    on the HTP). The exporter knows one way to write it; this takes the others, with or without the weight.
    """
    import numpy as np

    walk = _Walk(graph=Graph(model), readers=_readers(model), shapes=shapes_of(model))
    for square in list(model.graph.node):
        found = walk.norm(square)
        if found is None:
            continue
        last, weight, epsilon = found
        if not weight:
            width = walk.shapes[square.input[0]][-1]
            weight = walk.graph.add(f"{last.output[0]}_ones", np.ones(width, np.float32))
        inputs, more = [square.input[0], weight], {"axis": -1, "epsilon": epsilon, "name": last.name}
        walk.graph.replace(last, walk.graph.make(last, "RMSNormalization", inputs, list(last.output), **more))
    walk.graph.commit()


@dataclass(frozen=True, kw_only=True)
class _Walk:
    """The search for norms in one graph."""

    graph: Graph
    readers: Readers
    shapes: Mapping[str, tuple[int, ...]]

    def norm(self, square: onnx.NodeProto) -> tuple[onnx.NodeProto, str, float] | None:
        """(the last node, the weight's name or none, epsilon) where ``square`` begins a norm over the last axis."""
        if not self.squares(square):
            return None
        mean = self.next(square, "ReduceMean")
        added = self.next(mean, "Add") if mean is not None and self.over_last_axis(mean) else None
        root = self.next(added, "Sqrt") if added is not None else None
        if mean is None or added is None or root is None:
            return None
        epsilon = self.scalar(next(n for n in added.input if n != mean.output[0]))
        scaled = next(self.scalings(square.input[0], root), None)
        if epsilon is None or scaled is None:
            return None
        last = self.next(scaled, "Mul")
        weights = [n for n in last.input if len(self.shapes.get(n, ())) == 1] if last is not None else []
        if last is not None and len(weights) == 1 and weights[0] in self.graph.initializers:
            return last, weights[0], epsilon
        return scaled, "", epsilon

    def squares(self, node: onnx.NodeProto) -> bool:
        """Whether ``node`` is ``x * x`` or ``x ** 2``, of a known shape."""
        known = len(node.input) == 2 and node.input[0] in self.shapes
        if node.op_type == "Mul":
            return known and bool(node.input[0] == node.input[1])
        return known and node.op_type == "Pow" and self.scalar(node.input[1]) == 2.0

    def over_last_axis(self, mean: onnx.NodeProto) -> bool:
        """Whether ``mean`` reduces the last axis alone, and keeps it."""
        if len(mean.input) < 2 or mean.input[1] not in self.graph.initializers:
            return False
        axes = self.graph.value(mean.input[1]).tolist()
        last = len(self.shapes.get(mean.input[0], ())) - 1
        return bool(attribute(mean, "keepdims", 1)) and axes in ([-1], [last])

    def next(self, node: onnx.NodeProto, op_type: str) -> onnx.NodeProto | None:
        """The one reader of ``node``, where it is an ``op_type``."""
        after = self.readers.get(node.output[0], [])
        return after[0] if len(after) == 1 and after[0].op_type == op_type else None

    def scalar(self, name: str) -> float | None:
        """The constant ``name`` where it holds one number."""
        if name not in self.graph.initializers or self.graph.value(name).size != 1:
            return None
        return float(self.graph.value(name).reshape(-1)[0])

    def scalings(self, data: str, root: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """``data / root``, or ``data * (1 / root)``."""
        for node in self.readers.get(root.output[0], ()):
            if node.op_type == "Div" and node.input[0] == data:
                yield node
            elif node.op_type == "Reciprocal":
                yield from (n for n in self.readers.get(node.output[0], ()) if n.op_type == "Mul" and data in n.input)
