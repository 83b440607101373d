"""Runs ONNX files, and those in ONNX Runtime's own format, with its CPU provider on this machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.errors import ArtifactDamaged
from edgebake.target import Missing, NotMeasured
from edgebake.types import MethodSignature, RunnerKind, Signature

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

RUNS = ("onnx-cpu", "onnx-mobile")
KIND: RunnerKind = "executed"
DISTRIBUTIONS = ("onnx", "onnxruntime", "numpy")
SOURCES = ("edgebake_targets.inspectors._flatbuffers", "edgebake_targets.inspectors._ort_model")
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


def missing() -> Missing | None:
    """Whether onnxruntime and onnx are installed."""
    absent = [name for name in ("onnxruntime", "onnx") if find_spec(name) is None]
    if not absent:
        return None
    return Missing(reason=f"not installed: {', '.join(absent)}", remedy=f"pip install {' '.join(absent)}")


def warm_up() -> None:
    """Import ONNX Runtime."""
    import onnxruntime  # noqa: F401


def open(entry: Path, signature: Signature) -> OnnxSession | OrtSession:  # noqa: A001 - the contract's name
    """Open ``entry``; where ``signature`` has several methods, ``<method>.onnx`` beside it for each."""
    if entry.suffix == ".ort":
        return OrtSession(entry, signature)
    several = len(signature.methods) > 1
    paths = {m: entry.with_name(f"{m}.onnx") if several else entry for m in signature.methods}
    for path in paths.values():
        if not path.is_file():
            raise ArtifactDamaged("the artifact's file is not there", where=str(path), fix="build it again")
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
            self.sessions[method] = _session(self.paths[method])
        return _run(self.sessions[method], self.signature.methods[method], inputs)

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
        session = _session(model)
        wanted = sorted(set(results.values()))
        taken = {i.name for i in session.get_inputs()}
        values = dict(zip(wanted, session.run(wanted, {k: v for k, v in inputs.items() if k in taken}), strict=True))
        return {module: np.asarray(values[name], np.float32) for module, name in results.items()}


class OrtSession:
    """A file in ONNX Runtime's own format; its graph was fused when it was written and shows no modules."""

    def __init__(self, path: Path, signature: Signature) -> None:
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as state

        if not path.is_file():
            raise ArtifactDamaged("the artifact's file is not there", where=str(path), fix="build it again")
        if not has_vnni():
            _refuse_saturation(path)
        self.signature = signature
        onnxruntime.disable_telemetry_events()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except (state.Fail, state.InvalidArgument, state.InvalidGraph, state.InvalidProtobuf) as error:
            first = str(error).strip().splitlines()[0]
            what = f"ONNX Runtime cannot load the file: {first}"
            raise ArtifactDamaged(what, where=str(path), fix="build it again") from error

    def call(self, method: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run once; outputs by the signature's names in the signature's dtypes."""
        return _run(self.session, self.signature.methods[method], inputs)


def _refuse_saturation(path: Path) -> None:
    """NotMeasured for int8 products, which the file fixes in a form that this processor computes wrongly."""
    from edgebake_targets.inspectors import _ort_model

    operators = {operator for _, _, operator in _ort_model.read(memoryview(path.read_bytes())).operators}
    found = sorted(operators & _INT8_PRODUCTS)
    if found:
        raise NotMeasured(f"{found[0]} in int8 saturates on this processor, which lacks VNNI; phones' do not")


def _run(session: Any, method: MethodSignature, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    import numpy as np

    taken = {i.name for i in session.get_inputs()}
    feed = {name: np.ascontiguousarray(value) for name, value in inputs.items() if name in taken}
    values = session.run([spec.name for spec in method.outputs], feed)
    named = zip(method.outputs, values, strict=True)
    return {spec.name: value.astype(spec.dtype, copy=False) for spec, value in named}


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


def _session(model: Path | onnx.ModelProto) -> Any:
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    exact_int8(options, onnxruntime, model)
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def exact_int8(options: Any, onnxruntime: Any, model: Path | onnx.ModelProto) -> None:
    """Keep int8 products exact on x86 processors without VNNI, whose 16-bit sums saturate (phones' do not).

    ``session.x64quantprecision`` makes ONNX Runtime choose unsigned weights; it crashes where two nodes share int8
    weights, and there all optimization is off instead (QDQ is then computed in float).
    """
    if has_vnni():
        return
    if _shares_int8(model):
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    else:
        options.add_session_config_entry("session.x64quantprecision", "1")


def has_vnni() -> bool:
    """Whether int8 products are exact here: VNNI on x86, always on other processors."""
    import platform

    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    info = Path("/proc/cpuinfo")
    return info.is_file() and "vnni" in info.read_text(encoding="utf-8", errors="replace")


def _shares_int8(model: Path | onnx.ModelProto) -> bool:
    import onnx

    loaded = onnx.load_model(model, load_external_data=False) if isinstance(model, Path) else model
    int8 = {i.name for i in loaded.graph.initializer if i.data_type == onnx.TensorProto.INT8 and len(i.dims) > 1}
    reads = [name for node in loaded.graph.node for name in node.input if name in int8]
    return len(reads) > len(set(reads))
