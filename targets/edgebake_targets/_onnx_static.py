"""Static int8: QuantizeLinear/DequantizeLinear pairs with scales from calibration, through ONNX Runtime's quantizer."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.errors import StageFailed
from edgebake.types import SampleSet, Signature
from edgebake_targets._onnx import EXTERNAL_DATA_FROM_BYTES, TRANSPOSED, clean_keeping_scopes, dimensions
from edgebake_targets._onnx_graph import Graph, producers
from edgebake_targets._onnx_ranges import observed, ranges_of, store

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

Feed = dict[str, "NDArray[Any]"]


def feeds(
    models: Mapping[str, onnx.ModelProto], samples: SampleSet, signature: Signature, method: str
) -> Iterator[Feed]:
    """Inputs of every call of ``method``, states included: zeros first, then what the network itself returned."""
    stateful = any(spec.state_from for m in signature.methods.values() for spec in m.inputs)
    sessions = {name: open_session(model) for name, model in models.items()} if stateful else {}
    for sample in samples:
        carried: dict[str, NDArray[Any]] = {}
        for call in sample.calls:
            feed = _with_states(call.tensors(), carried, signature, call.method)
            if call.method == method:
                yield feed
            if stateful:
                names = [spec.name for spec in signature.methods[call.method].outputs]
                carried |= dict(zip(names, sessions[call.method].run(names, feed), strict=True))


def _with_states(given: Feed, carried: Mapping[str, NDArray[Any]], signature: Signature, method: str) -> Feed:
    import numpy as np

    specs = signature.methods[method].inputs
    known = {name: bounds.min for name, bounds in signature.dims.items()}
    for spec in specs:
        if spec.name in given:
            pairs = zip(spec.shape, given[spec.name].shape, strict=True)
            known |= {dim: size for dim, size in pairs if isinstance(dim, str)}
    feed = {}
    for spec in specs:
        if spec.state_from and spec.name not in given:
            zeros = np.zeros(dimensions(spec, known), spec.dtype)
            feed[spec.name] = carried.get(spec.state_from, zeros)
        elif spec.name in given:
            feed[spec.name] = given[spec.name]
    return feed


def open_session(model: onnx.ModelProto) -> Any:
    """An ONNX Runtime session over a model in memory."""
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def quantize(
    model: onnx.ModelProto, nodes: Sequence[str], calls: Iterable[Feed], count: int, options: Mapping[str, Any]
) -> onnx.ModelProto:
    """``model`` with ``nodes`` (and what lies between them alone) in int8: weights per channel, activations per tensor.

    StageFailed without calibration calls for this method.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    if not count:
        raise StageFailed("static int8 needs calibration samples for every method", fix="add samples.calibration")
    turn_weights(model, nodes)
    chosen = [*nodes, *between(model, nodes)]
    types = sorted({node.op_type for node in model.graph.node if node.name in chosen})
    model.metadata_props.add(key="onnx.infer", value="onnxruntime.quant")  # its preprocessing is done: folded at export
    with tempfile.TemporaryDirectory(prefix="edgebake-") as folder, silent():
        source, result = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        large = sum(len(i.raw_data) for i in model.graph.initializer) > EXTERNAL_DATA_FROM_BYTES
        onnx.save_model(model, source, save_as_external_data=large, location="float.data")
        seen = observed(source, calls, options, types)
        quantize_static(
            source,
            result,
            None,
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=types,
            per_channel=True,
            # Unsigned: x86 does not fuse a signed tensor that several products read (query, key, value).
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_quantize=chosen,
            use_external_data_format=large,
            calibrate_method=CalibrationMethod.MinMax,
            calibration_cache_path=store(ranges_of(seen, options), Path(folder) / "ranges.json"),
            extra_options={
                # A product whose result stays float needs no range and keeps its precision (MatMulIntegerToFloat).
                "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"],
                "MatMulConstBOnly": True,
            },
        )
        quantized = onnx.load_model(result)
    restore_float(quantized, chosen)
    clean_keeping_scopes(quantized)
    return quantized


def turn_weights(model: onnx.ModelProto, nodes: Sequence[str]) -> None:
    """Give ``nodes`` their transposed weights as constants, since the quantizer takes a Transpose for an activation."""
    graph = Graph(model)
    made_by = producers(model)
    for node in model.graph.node:
        if node.name in nodes:
            source = made_by.get(node.input[1])
            if source is not None and source.op_type == "Transpose" and source.input[0] in graph.initializers:
                name = f"{source.input[0]}{TRANSPOSED}"
                node.input[1] = graph.add(name, graph.value(source.input[0]).T)
    graph.commit()


def restore_float(model: onnx.ModelProto, chosen: Sequence[str]) -> None:
    """Let float operators read the float tensor where the quantizer made them read its rounded value (residuals).

    A tensor that a chosen node makes stays rounded: its kernel writes int8, the float value never exists.
    """
    made_by = producers(model)
    for node in model.graph.node:
        if node.name in chosen or node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue
        for index, name in enumerate(node.input):
            rounded = made_by.get(name)
            if rounded is None or rounded.op_type != "DequantizeLinear" or rounded.input[0] not in made_by:
                continue
            origin = made_by[rounded.input[0]].input[0]
            if origin not in made_by or made_by[origin].name not in chosen:
                node.input[index] = origin


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Keep the quantizer's progress off stdout, which belongs to the worker's messages."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        root.setLevel(level)


REMOVABLE = frozenset({"Relu", "Clip"})
JOINING = frozenset({"Add", "MaxPool", "AveragePool", "GlobalAveragePool", "Concat"})


def between(model: onnx.ModelProto, nodes: Sequence[str]) -> list[str]:
    """Names of activations and joins whose every input comes out of int8 convolutions: they can stay in int8 as well.

    Activations (Relu, Clip) vanish into the convolution's output range. Joins of anything else stay float.
    """
    convolutions = [node for node in model.graph.node if node.op_type == "Conv" and node.name in set(nodes)]
    integer = {name for node in convolutions for name in node.output}
    readers: dict[str, int] = {}
    for node in model.graph.node:
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
    made_by = producers(model)
    found = []
    for node in model.graph.node:
        data = [node.input[0]] if node.op_type in REMOVABLE else list(node.input)
        if node.op_type not in REMOVABLE | JOINING or not all(name in integer for name in data):
            continue
        if node.op_type in REMOVABLE and (readers[data[0]] > 1 or made_by[data[0]].op_type == "MaxPool"):
            continue
        found.append(node.name)
        integer.update(node.output)
    return found
