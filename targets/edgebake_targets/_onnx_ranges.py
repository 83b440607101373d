"""What flows between the operators of a float ONNX graph on calibration samples, and the ranges chosen for it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake_targets._ranges import Range, Seen, chosen

# Of the values that alone have 16 bits in a network of 8, over what calibration samples show. What lies beyond a range
# is cut, which costs far more there than one bit: the pooled features of EfficientNet-lite0, calibrated on two
# photographs, cost it 4 dB. Where all values have 16 bits the bit counts: on the HTP's simulator it costs MiniLM 2 dB.
HEADROOM = 2.0

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    Feed = dict[str, NDArray[Any]]


def observed(
    source: Path, calls: Iterable[Feed], options: Mapping[str, Any], types: Collection[str]
) -> dict[str, Seen]:
    """What each float tensor that an operator of ``types`` reads or writes was seen to hold, call after call.

    Of the file ``source``; beside it a second one is written that shows these tensors.
    """
    names, session = watching(source, types)
    seen = {name: Seen(counted=options["calibrate"] != "minmax") for name in names}
    for feed in calls:
        for name, value in zip(names, session.run(names, feed), strict=True):
            seen[name].add(value)
    return seen


def watching(source: Path, types: Collection[str]) -> tuple[list[str], Any]:
    """The float tensors around the operators of ``types``, and a session that has them all among its outputs.

    By files: what is larger than a message of 2 GiB keeps its weights beside it. The runtime's own rewriting of the
    graph is off, since it would compute some of these tensors no longer.
    """
    import onnx
    import onnxruntime

    path = source.with_name("watched.onnx")
    onnx.shape_inference.infer_shapes_path(source, path)
    model = onnx.load_model(path, load_external_data=False)
    infos = _float_infos(model)
    nodes = [node for node in model.graph.node if node.op_type in types]
    names = list(dict.fromkeys(name for node in nodes for name in (*node.input, *node.output) if name in infos))
    there = {value.name for value in model.graph.output}
    model.graph.output.extend(infos[name] for name in names if name not in there)
    onnx.save_model(model, path)
    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    return names, onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _float_infos(model: onnx.ModelProto) -> dict[str, onnx.ValueInfoProto]:
    """Every float tensor that is no constant, with its type."""
    import onnx

    graph = model.graph
    infos = {info.name: info for info in (*graph.input, *graph.value_info, *graph.output)}
    constants = {tensor.name for tensor in graph.initializer}
    kind = onnx.TensorProto.FLOAT
    return {n: i for n, i in infos.items() if i.type.tensor_type.elem_type == kind and n not in constants}


def store(ranges: Mapping[str, Range], path: Path) -> Path:
    """Write ``ranges`` where ONNX Runtime's quantizer finds those of an earlier calibration."""
    import numpy as np
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorsData, save_tensors_data

    found = {n: (np.array(low, np.float32), np.array(high, np.float32)) for n, (low, high) in ranges.items()}
    save_tensors_data(TensorsData(CalibrationMethod.MinMax, found), path)
    return path


def ranges_of(seen: Mapping[str, Seen], options: Mapping[str, Any]) -> dict[str, Range]:
    """The ranges of 8 bits that ``options`` choose."""
    method, share = str(options["calibrate"]), float(options["percentile"])
    return {name: chosen(each, method, 8, share) for name, each in seen.items()}


def wide_range(seen: Seen, options: Mapping[str, Any], ends: Range, room: float) -> Range:
    """A range of 16 bits, ``room`` times what ``options`` choose and not beyond ``ends``."""
    low, high = chosen(seen, str(options["calibrate"]), 16, float(options["percentile"]))
    return max(low * room, ends[0]), min(high * room, ends[1])
