"""From ONNX to ONNX Runtime's own format, the operators that a reduced build needs, and who on a phone takes them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.errors import StageFailed
from edgebake_targets._onnx import EXTERNAL_DATA_FROM_BYTES, first_line
from edgebake_targets._onnx_macs import shapes_of
from edgebake_targets._onnx_units import operator_of
from edgebake_targets._ort_format import canonical

if TYPE_CHECKING:
    import onnx

# Not for phones' processors; and folding would store a tied weight a second time, transposed.
_LEFT_OUT = ["NchwcTransformer", "ConstantFolding"]
# What the XNNPACK provider takes, by operator, with the rank of input that it asks for (0: any).
# https://onnxruntime.ai/docs/execution-providers/Xnnpack-ExecutionProvider.html, "Supported ops"
_XNNPACK = {
    "AveragePool": 4,
    "Conv": 4,
    "ConvTranspose": 4,
    "Gemm": 2,
    "MatMul": 2,
    "MaxPool": 4,
    "QLinearConv": 4,
    "Resize": 4,
    "Softmax": 0,
}


def write(model: onnx.ModelProto, path: Path, optimization: str) -> None:
    """Write ``model`` to ``path``, fused for phones' processors (``all``) or in standard operators (``basic``)."""
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    size = sum(len(i.raw_data) for i in model.graph.initializer)
    if size > EXTERNAL_DATA_FROM_BYTES:
        raise StageFailed(
            f"a .ort file cannot hold {size / 2**30:.1f} GiB of weights",
            fix="a smaller scheme, or the target onnx-cpu, whose files have no such limit",
        )
    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimization == "all" else levels.ORT_ENABLE_BASIC
    # int8 weights stay signed, as Arm's kernels take them; 8-bit weights alone leave activations in float.
    for key in ("session.qdqisint8allowed", "session.qdq_matmulnbits_accuracy_level"):
        options.add_session_config_entry(key, "1")
    options.add_session_config_entry("session.save_model_format", "ORT")
    with tempfile.TemporaryDirectory(prefix="edgebake-ort-") as scratch:
        written = Path(scratch) / "model.ort"
        options.optimized_model_filepath = str(written)
        try:
            onnxruntime.InferenceSession(
                model.SerializeToString(deterministic=True),
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=_LEFT_OUT,
            )
        except (state.Fail, state.InvalidGraph, state.InvalidArgument, state.NotImplemented) as error:
            raise StageFailed(
                f"ONNX Runtime cannot write the network in its own format: {first_line(error)}",
                fix="another opset (options: {opset: ...}) or scheme, or the target onnx-cpu",
            ) from error
        path.write_bytes(canonical(written.read_bytes()))


def required_operators(operators: Iterable[tuple[str, int, str]]) -> str:
    """The configuration of a reduced build: ``domain;version;operators`` by line.

    https://onnxruntime.ai/docs/reference/operators/reduced-operator-config-file.html
    """
    by_set: dict[tuple[str, int], set[str]] = {}
    for domain, version, operator in operators:
        by_set.setdefault((domain, version), set()).add(operator)
    lines = [f"{domain};{version};{','.join(sorted(names))}" for (domain, version), names in sorted(by_set.items())]
    return "\n".join(["# build.sh --minimal_build --include_ops_by_config <this file>", *lines, ""])


def usability(model: onnx.ModelProto) -> dict[str, dict[str, Any]]:
    """Which operators of ``model``, before any fusion, the providers of phones take: by provider.

    ``taken`` of ``operators`` in ``parts``; ``left`` their types, ``dynamic`` how many only for dimensions that vary.
    """
    import onnx
    from onnxruntime.tools.mobile_helpers import usability_checker as checker

    shaped = onnx.shape_inference.infer_shapes(model)
    taken = checker.check_nnapi_partitions(shaped, True)
    programs = checker.check_coreml_partitions(shaped, True, "coreml_supported_mlprogram_ops.md")
    return {"NNAPI": _found(taken), "Core ML": _found(programs), "XNNPACK": _xnnpack(model)}


def _found(info: Any) -> dict[str, Any]:
    return {
        "operators": info.num_nodes,
        "taken": info.num_supported_nodes,
        "parts": info.num_partitions,
        "left": sorted(name.removeprefix("ai.onnx:") for name in info.unsupported_ops | info.ops_with_unsupported_rank),
        "dynamic": info.nodes_unsupported_due_to_dynamic_input,
    }


def _xnnpack(model: onnx.ModelProto) -> dict[str, Any]:
    """Its parts are single operators, together with the rounding around them; shapes may vary."""
    ranks = {name: len(shape) for name, shape in shapes_of(model).items()}
    for value in (*model.graph.input, *model.graph.value_info):
        ranks.setdefault(value.name, len(value.type.tensor_type.shape.dim))
    left: set[str] = set()
    taken = 0
    nodes = [node for node in model.graph.node if node.op_type not in ("QuantizeLinear", "DequantizeLinear")]
    for node in nodes:
        wanted = _XNNPACK.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        fits = wanted is not None and wanted in (0, ranks.get(node.input[0]))
        taken += fits
        left |= set() if fits else {operator_of(node)}
    return {"operators": len(nodes), "taken": taken, "parts": taken, "left": sorted(left), "dynamic": 0}


def notes(found: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """A sentence for each provider; ``parts`` between which data is handed over are what makes it slow."""
    return tuple(map(_note, found, found.values()))


def _note(provider: str, found: Mapping[str, Any]) -> str:
    shown = ", ".join(found["left"][:6]) + (f" and {len(found['left']) - 6} more" if len(found["left"]) > 6 else "")
    parts = "1 part" if found["parts"] == 1 else f"{found['parts']} parts"
    told = f"{provider} takes {found['taken']} of {found['operators']} operators in {parts}"
    told += f"; not {shown}" if shown else ""
    return told + (f"; {found['dynamic']} for dimensions that vary" if found["dynamic"] else "")
