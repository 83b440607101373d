"""The process that compiles one ONNX model for one chip with Qualcomm's libraries, and ends.

``python -m edgebake_targets._qnn_compiler REQUEST``: REQUEST is a JSON file with ``model``, ``out``, ``provider`` (the
provider's options), ``cpu_fallback``, ``embed`` (the binary inside the file, or beside it), ``trace`` (an empty folder)
and ``answer`` (where the JSON answer goes). The binary depends on the model's path and on what the process compiled
before: so it compiles from bytes, once.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from edgebake_targets._qnn import session_options, unknown_options

TRACE = "qnn_op_trace.json"


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Compile; ``{"unknown": [...], "refused": text, "left_out": [...], "taken": [...]}``.

    The first three are empty when everything is on the NPU; ``taken`` are the types of the NPU's own operators.
    """
    import onnxruntime
    import onnxruntime_qnn
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    provider = {**request["provider"], "enable_framework_op_trace": "1", "framework_op_trace_dir": request["trace"]}
    unknown = unknown_options(provider, Path(onnxruntime_qnn.get_library_path()))
    if unknown:
        return {"unknown": unknown, "refused": "", "left_out": [], "taken": []}
    options = session_options(provider, cpu_fallback=request["cpu_fallback"])
    refused = ""
    try:
        data = Path(request["model"]).read_bytes()
        compiler = onnxruntime.ModelCompiler(options, data, embed_compiled_data_into_model=request["embed"])
        compiler.compile_to_file(request["out"])
    except (state.Fail, state.EPFail, state.InvalidArgument, state.InvalidGraph, state.NotImplemented) as error:
        refused = str(error)
    taken, left_out = traced(Path(request["trace"]))
    return {"unknown": [], "refused": refused, "left_out": left_out, "taken": taken}


def traced(folder: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """What the provider's trace in ``folder`` says: types of the NPU's operators, and the nodes that stay outside."""
    trace = folder / TRACE
    told = json.loads(trace.read_text(encoding="utf-8")) if trace.is_file() else {}
    parts = told.get("subgraph_traces", [])
    taken = [operator["dst_qnn_op_type"] for part in parts for operator in part["op_mappings"]]
    return taken, told.get("unsupported_nodes", [])


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(asked["answer"]).write_text(json.dumps(main(asked)), encoding="utf-8")
