"""Static QDQ of a whole graph for Qualcomm's HTP: every operator between two of integers, weights per channel."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake import scheme as schemes
from edgebake.errors import StageFailed
from edgebake.types import Assignment
from edgebake_targets._onnx import clean_keeping_scopes, module_of
from edgebake_targets._onnx_graph import WEIGHT_SLOT, attribute
from edgebake_targets._onnx_static import Feed, Reader, calibration_methods, silent, turn_weights

if TYPE_CHECKING:
    import onnx


def quantize(
    model: onnx.ModelProto,
    nodes: Mapping[str, str],
    calls: Iterable[Feed],
    count: int,
    assignment: Assignment,
    options: Mapping[str, Any],
) -> onnx.ModelProto:
    """``model`` in integers, but for the modules that ``assignment`` leaves in float; the HTP computes these in half.

    ``nodes``: names of the operators with integer weights and their schemes, of one width of activations. StageFailed
    without calibration calls for this method.
    """
    import onnx
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization import quantize as run
    from onnxruntime.quantization.execution_providers.qnn import get_qnn_qdq_config

    if not count:
        raise StageFailed("static integers need calibration samples for every method", fix="add samples.calibration")
    turn_weights(model, list(nodes))
    bits = {schemes.parse(name).activation_bits for name in nodes.values()}
    activations = {8: QuantType.QUInt8, 16: QuantType.QUInt16}[bits.pop() or 8]
    model.metadata_props.add(key="onnx.infer", value="onnxruntime.quant")  # its preprocessing is done: folded at export
    with tempfile.TemporaryDirectory(prefix="edgebake-") as folder, silent():
        source, result = Path(folder) / "float.onnx", Path(folder) / "integers.onnx"
        onnx.save_model(model, source)
        config = get_qnn_qdq_config(
            source,
            Reader(calls, count),
            calibrate_method=calibration_methods()[options["calibrate"]],
            activation_type=activations,
            weight_type=QuantType.QInt8,
            per_channel=True,
            init_overrides=_weight_types(model, nodes),
            stride=1,
            nodes_to_exclude=_left_float(model, assignment),
        )
        config.extra_options["CalibPercentile"] = options["percentile"]
        run(source, result, config)
        quantized = onnx.load_model(result)
    clean_keeping_scopes(quantized)
    return quantized


def _weight_types(model: onnx.ModelProto, nodes: Mapping[str, str]) -> dict[str, list[dict[str, Any]]]:
    """Overrides by tensor: integer weights per output channel, norms' weights unsigned per tensor.

    Left to itself, ONNX Runtime's quantizer gives MatMul one scale per tensor (MiniLM at w8a16: 12 dB instead of 30),
    and norms signed weights, which HTP's LayerNorm does not take: each then runs on the CPU (13 of MiniLM's).
    """
    from onnxruntime.quantization import QuantType

    types = {4: QuantType.QInt4, 8: QuantType.QInt8}
    constants = {i.name for i in model.graph.initializer}
    found: dict[str, list[dict[str, Any]]] = {}
    for node in model.graph.node:
        if node.name in nodes and node.op_type == "Gather":
            found |= _looked_up(model, node, schemes.parse(nodes[node.name]).activation_bits)
        elif node.name in nodes:
            chosen = types[schemes.parse(nodes[node.name]).weight_bits]
            weight = node.input[WEIGHT_SLOT[node.op_type]]
            found[weight] = [{"quant_type": chosen, "axis": _channels(node), "symmetric": True}]
        elif node.op_type in ("LayerNormalization", "RMSNormalization") and node.input[1] in constants:
            found[node.input[1]] = [{"quant_type": QuantType.QUInt8, "symmetric": False}]
    return found


def _looked_up(model: onnx.ModelProto, node: onnx.NodeProto, bits: int | None) -> dict[str, list[dict[str, Any]]]:
    """A table of 8 bits, and its rows widened to ``bits`` for their readers: the HTP looks up without converting."""
    from onnxruntime.quantization import QuantType

    if bits == 8:
        return {}  # as the activations are
    readers = {reader.name for reader in model.graph.node if node.output[0] in reader.input}
    wider = {"quant_type": QuantType.QUInt16, "recv_nodes": readers}
    return {
        node.input[0]: [{"quant_type": QuantType.QUInt8, "symmetric": False}],
        node.output[0]: [{"quant_type": QuantType.QUInt8, "convert": wider}],
    }


def _channels(node: onnx.NodeProto) -> int:
    """Axis of the output channels in the weight of ``node``."""
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    return {"MatMul": 1, "Conv": 0, "ConvTranspose": 1}[node.op_type]


def _left_float(model: onnx.ModelProto, assignment: Assignment) -> list[str]:
    """Nodes of the modules that have no integer scheme although this target could give them one, or a float one."""
    integer = {m for m, name in assignment.schemes.items() if schemes.parse(name).needs_calibration}
    kept = {m for m, kind in assignment.kinds.items() if m not in integer and kind != "embedding"}
    kept |= {m for m in assignment.schemes if m not in integer}
    return [node.name for node in model.graph.node if module_of(node) in kept]
