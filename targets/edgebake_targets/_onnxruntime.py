"""ONNX Runtime's sessions on this machine's CPU: what its runners share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.errors import ArtifactDamaged
from edgebake.target import Missing
from edgebake.types import MethodSignature

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

DISTRIBUTIONS = ("onnx", "onnxruntime", "numpy")


def missing() -> Missing | None:
    """Whether onnxruntime and onnx are installed."""
    absent = [name for name in ("onnxruntime", "onnx") if find_spec(name) is None]
    if not absent:
        return None
    return Missing(reason=f"not installed: {', '.join(absent)}", remedy=f"pip install {' '.join(absent)}")


def warm_up() -> None:
    """Import ONNX Runtime and run one operator: the first session of a process takes 9 MiB that no artifact needs."""
    import numpy as np
    from onnx import TensorProto, helper

    value = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")}
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "warm", [value["x"]], [value["y"]])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    opened(model).run(None, {"x": np.zeros(1, np.float32)})


def refuse_absent(path: Path) -> None:
    """ArtifactDamaged where there is no file at ``path``."""
    if not path.is_file():
        raise ArtifactDamaged("the artifact's file is not there", where=str(path), fix="build it again")


@contextmanager
def loading(path: Path) -> Iterator[None]:
    """ArtifactDamaged where there is no file at ``path``, or, with its first line, where ONNX Runtime refuses it."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    refuse_absent(path)
    try:
        yield
    except (state.Fail, state.InvalidArgument, state.InvalidGraph, state.InvalidProtobuf) as error:
        first = str(error).strip().splitlines()[0]
        what = f"ONNX Runtime cannot load the file: {first}"
        raise ArtifactDamaged(what, where=str(path), fix="build it again") from error


def opened(model: Path | onnx.ModelProto) -> Any:
    """A session on the CPU, with telemetry off and int8 products exact."""
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    exact_int8(options, onnxruntime, model)
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run(session: Any, method: MethodSignature, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Run ``session`` once; outputs by the names of ``method`` in its dtypes."""
    import numpy as np

    taken = {i.name for i in session.get_inputs()}
    feed = {name: np.ascontiguousarray(value) for name, value in inputs.items() if name in taken}
    values = session.run([spec.name for spec in method.outputs], feed)
    named = zip(method.outputs, values, strict=True)
    return {spec.name: value.astype(spec.dtype, copy=False) for spec, value in named}


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
