"""Multiply-accumulates of the nodes of an ONNX graph whose shapes are fixed."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING

from edgebake_targets._onnx_graph import attribute

if TYPE_CHECKING:
    import onnx

Shapes = Mapping[str, tuple[int, ...]]


def shapes_of(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that ONNX's shape inference knows in full, constants included."""
    import onnx

    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    found = {i.name: tuple(i.dims) for i in model.graph.initializer}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(d.HasField("dim_value") for d in dims):
            found.setdefault(value.name, tuple(d.dim_value for d in dims))
    return found


def macs_of(node: onnx.NodeProto, shapes: Shapes) -> int:
    """Multiply-accumulates of ``node``: products of matrices and convolutions; 0 for all else, and without shapes."""
    if node.op_type not in ("MatMul", "Gemm", "Conv", "ConvTranspose"):
        return 0
    left, right, out = (shapes.get(name, ()) for name in (*node.input[:2], node.output[0]))
    if not (left and right and out):
        return 0
    if node.op_type == "Conv":  # each output value: one product per weight of its channel
        return prod(out) * prod(right[1:])
    if node.op_type == "ConvTranspose":  # each input value meets every weight of its channel
        return prod(left) * prod(right[1:])
    return prod(out) * (left[0] if attribute(node, "transA", 0) else left[-1])
