"""Shapes of an ONNX graph's tensors, and multiply-accumulates of its nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import TYPE_CHECKING

from edgebake_targets._onnx_graph import MICROSOFT, attribute

if TYPE_CHECKING:
    import onnx

Shapes = Mapping[str, tuple[int, ...]]

# Larger constants are no shapes, axes or sizes, which are all that inference reads.
_SMALL_CONSTANT = 1024


def shapes_of(model: onnx.ModelProto, sizes: Mapping[str, int] | None = None) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that ONNX's shape inference knows in full, constants included.

    ``sizes``: what named dimensions of the inputs count as.
    """
    import onnx

    inferred = onnx.shape_inference.infer_shapes(_light(model, sizes or {}), data_prop=True)
    return {**stated_shapes(inferred), **stated_shapes(model)}


def stated_shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of which ``model`` says it in full."""
    found = {i.name: tuple(i.dims) for i in model.graph.initializer}
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(d.HasField("dim_value") for d in dims):
            found.setdefault(value.name, tuple(d.dim_value for d in dims))
    return found


def _light(model: onnx.ModelProto, sizes: Mapping[str, int]) -> onnx.ModelProto:
    """``model`` without its weights: inference serialises it, and a message with all of them may exceed 2 GiB."""
    from onnx import helper

    graph = model.graph  # with sizes given, what it says of shapes with names is left out
    large = {i.name: i for i in graph.initializer if prod(i.dims) > _SMALL_CONSTANT}
    inputs = [_sized(value, sizes) for value in graph.input if value.name not in large]
    weights = [helper.make_tensor_value_info(i.name, i.data_type, list(i.dims)) for i in large.values()]
    extra: list[onnx.ValueInfoProto] = []
    nodes = [_standard(node, extra) for node in graph.node]
    return helper.make_model(
        helper.make_graph(
            nodes,
            "shapes",
            [*inputs, *weights, *extra],
            [helper.make_empty_tensor_value_info(o.name) if sizes else o for o in graph.output],
            [i for i in graph.initializer if i.name not in large],
            value_info=[] if sizes else graph.value_info,
        ),
        opset_imports=model.opset_import,
        ir_version=model.ir_version,
    )


def _sized(value: onnx.ValueInfoProto, sizes: Mapping[str, int]) -> onnx.ValueInfoProto:
    copied = type(value)()
    copied.CopyFrom(value)
    for dim in copied.type.tensor_type.shape.dim:
        if dim.dim_param in sizes:
            dim.dim_value = sizes[dim.dim_param]
    return copied


def _standard(node: onnx.NodeProto, inputs: list[onnx.ValueInfoProto]) -> onnx.NodeProto:
    """A product that ONNX's inference knows for ONNX Runtime's packed one, its unpacked weight among ``inputs``."""
    from onnx import TensorProto, helper

    if node.domain != MICROSOFT or node.op_type != "MatMulNBits":
        return node
    weight = f"{node.output[0]}.unpacked"
    shape = [attribute(node, "K", 0), attribute(node, "N", 0)]
    inputs.append(helper.make_tensor_value_info(weight, TensorProto.FLOAT, shape))
    return helper.make_node("MatMul", [node.input[0], weight], [node.output[0]])


def macs_of(node: onnx.NodeProto, shapes: Shapes) -> int | None:
    """Multiply-accumulates of ``node``: products of matrices, convolutions, recurrences, attention; 0 for all else.

    None for one of these whose shapes are not known.
    """
    count = _MACS.get(node.op_type)
    if count is None:
        return 0
    try:
        return count(node, shapes)
    except LookupError:  # a tensor without a shape, a node without its inputs
        return None


def _product(node: onnx.NodeProto, shapes: Shapes) -> int:
    return prod(shapes[node.output[0]]) * shapes[node.input[0]][-1]


def _gemm(node: onnx.NodeProto, shapes: Shapes) -> int:
    left = shapes[node.input[0]]
    return prod(shapes[node.output[0]]) * (left[0] if attribute(node, "transA", 0) else left[-1])


def _convolution(node: onnx.NodeProto, shapes: Shapes) -> int:
    """Each output value: one product per weight of its channel."""
    return prod(shapes[node.output[0]]) * prod(shapes[node.input[1]][1:])


def _quantized_convolution(node: onnx.NodeProto, shapes: Shapes) -> int:
    return prod(shapes[node.output[0]]) * prod(shapes[node.input[3]][1:])


def _transposed_convolution(node: onnx.NodeProto, shapes: Shapes) -> int:
    """Each input value meets every weight of its channel."""
    return prod(shapes[node.input[0]]) * prod(shapes[node.input[1]][1:])


def _recurrence(node: onnx.NodeProto, shapes: Shapes) -> int:
    """Each step multiplies by the weights of all gates and directions, W and R."""
    steps = prod(shapes[node.input[0]][:2])
    return steps * (prod(shapes[node.input[1]]) + prod(shapes[node.input[2]]))


def _attention(node: onnx.NodeProto, shapes: Shapes) -> int:
    """Queries against every key, past ones included, and weights against every value."""
    query, key, out = shapes[node.input[0]], shapes[node.input[1]], shapes[node.output[0]]
    past = shapes[node.input[4]][-2] if len(node.input) > 4 and node.input[4] else 0
    return (prod(query) + prod(out)) * (key[-2] + past)


def _einsum(node: onnx.NodeProto, shapes: Shapes) -> int:
    """Of two operands: one product for every combination of the letters."""
    operands = [shapes[name] for name in node.input]
    letters = attribute(node, "equation", b"").decode().replace(" ", "").split("->")[0].split(",")
    if len(operands) != 2 or [len(one) for one in letters] != [len(shape) for shape in operands]:
        raise LookupError(node.op_type)
    return prod(dict(zip("".join(letters), (*operands[0], *operands[1]), strict=True)).values())


_MACS: Mapping[str, Callable[[onnx.NodeProto, Shapes], int]] = {
    "Attention": _attention,
    "Conv": _convolution,
    "ConvInteger": _convolution,
    "ConvTranspose": _transposed_convolution,
    "Einsum": _einsum,
    "GRU": _recurrence,
    "Gemm": _gemm,
    "LSTM": _recurrence,
    "MatMul": _product,
    "MatMulInteger": _product,
    "MatMulNBits": _product,
    "QLinearConv": _quantized_convolution,
    "QLinearMatMul": _product,
    "RNN": _recurrence,
}
