"""Runs ONNX files, and those in ONNX Runtime's own format, with its CPU provider on this machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.target import NotMeasured
from edgebake.types import RunnerKind, Signature
from edgebake_targets import _onnxruntime
from edgebake_targets._onnxruntime import has_vnni, loading, opened, refuse_absent, run

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

RUNS = ("onnx-cpu", "onnx-mobile")
KIND: RunnerKind = "executed"
DISTRIBUTIONS = _onnxruntime.DISTRIBUTIONS
SOURCES = tuple(
    f"edgebake_targets.{name}" for name in ("_onnxruntime", "inspectors._flatbuffers", "inspectors._ort_model")
)
# Products whose sums saturate where has_vnni() is false.
_INT8_PRODUCTS = frozenset(
    {
        "ConvInteger",
        "DynamicQuantizeMatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "QGemm",
        "QLinearConv",
        "QLinearMatMul",
    }
)


missing = _onnxruntime.missing
warm_up = _onnxruntime.warm_up


def open(entry: Path, signature: Signature) -> OnnxSession | OrtSession:  # noqa: A001 - the contract's name
    """Open ``entry``; where ``signature`` has several methods, ``<method>.onnx`` beside it for each."""
    if entry.suffix == ".ort":
        return OrtSession(entry, signature)
    several = len(signature.methods) > 1
    paths = {m: entry.with_name(f"{m}.onnx") if several else entry for m in signature.methods}
    for path in paths.values():
        refuse_absent(path)
    return OnnxSession(paths, signature)


class OnnxSession:
    """One ONNX Runtime session per method, opened at the first call."""

    def __init__(self, paths: Mapping[str, Path], signature: Signature) -> None:
        self.paths = paths
        self.signature = signature
        self.sessions: dict[str, Any] = {}

    def call(self, method: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run once; outputs by the signature's names in the signature's dtypes."""
        if method not in self.sessions:
            self.sessions[method] = opened(self.paths[method])
        return run(self.sessions[method], self.signature.methods[method], inputs)

    def intermediates(
        self, method: str, inputs: Mapping[str, NDArray[Any]], modules: Iterable[str]
    ) -> dict[str, NDArray[Any]]:
        """Value that each of ``modules`` hands on, float32; modules that the graph no longer shows are absent.

        A convolution that swallowed its BatchNorm shows under the BatchNorm's name.
        """
        import numpy as np
        import onnx

        model = onnx.load_model(self.paths[method])
        results = {module: name for module in modules if (name := result_of(model, module))}
        present = {value.name for value in model.graph.output}
        for name in sorted(set(results.values()) - present):
            model.graph.output.append(onnx.ValueInfoProto(name=name))
        session = opened(model)
        wanted = sorted(set(results.values()))
        taken = {i.name for i in session.get_inputs()}
        values = dict(zip(wanted, session.run(wanted, {k: v for k, v in inputs.items() if k in taken}), strict=True))
        return {module: np.asarray(values[name], np.float32) for module, name in results.items()}


class OrtSession:
    """A file in ONNX Runtime's own format; its graph was fused when it was written and shows no modules."""

    def __init__(self, path: Path, signature: Signature) -> None:
        import onnxruntime

        self.signature = signature
        onnxruntime.disable_telemetry_events()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        with loading(path):
            if not has_vnni():
                _refuse_saturation(path)
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def call(self, method: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run once; outputs by the signature's names in the signature's dtypes."""
        return run(self.session, self.signature.methods[method], inputs)


def _refuse_saturation(path: Path) -> None:
    """NotMeasured for int8 products, which the file fixes in a form that this processor computes wrongly."""
    from edgebake_targets.inspectors import _ort_model

    operators = {operator for _, _, operator in _ort_model.read(memoryview(path.read_bytes())).operators}
    found = sorted(operators & _INT8_PRODUCTS)
    if found:
        raise NotMeasured(f"{found[0]} in int8 saturates on this processor, which lacks VNNI; phones' do not")


def result_of(model: onnx.ModelProto, module: str) -> str:
    """Name of the tensor that ``module`` hands to the rest of the graph, after its rounding to int8 if any."""
    from edgebake_targets._onnx import module_of

    inside = [n for n in model.graph.node if f"{module_of(n) or '.'}.".startswith(f"{module}.")]
    if not inside:
        return ""
    own = {id(node) for node in inside}
    outputs = {value.name for value in model.graph.output}
    read_outside = outputs | {name for node in model.graph.node if id(node) not in own for name in node.input}
    handed = [name for node in inside for name in node.output if name in read_outside]
    name: str = handed[-1] if handed else inside[-1].output[0]
    for operator in ("QuantizeLinear", "DequantizeLinear"):
        follower = next((n for n in model.graph.node if n.op_type == operator and n.input[0] == name), None)
        name = follower.output[0] if follower is not None else name
    return name
