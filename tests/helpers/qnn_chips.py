"""Asks QNN what it compiles for: ``python qnn_chips.py 43 57`` writes ``found.json``, soc_model to what it says.

A program of its own: a vendor's compiler does not share a process with tests.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import onnxruntime_qnn
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi.onnxruntime_pybind11_state import Fail

Node = tuple[str, list[str], list[str]]

HALF: list[Node] = [("MatMul", ["x", "w"], ["y"]), ("Relu", ["y"], ["z"])]
QUANTISED: list[Node] = [
    ("QuantizeLinear", ["x", "s", "p"], ["a"]),
    ("DequantizeLinear", ["a", "s", "p"], ["b"]),
    ("DequantizeLinear", ["w", "s", "p"], ["c"]),
    ("MatMul", ["b", "c"], ["d"]),
    ("QuantizeLinear", ["d", "s", "p"], ["e"]),
    ("DequantizeLinear", ["e", "s", "p"], ["z"]),
]


def model(nodes: Sequence[Node], constants: Mapping[str, Any], kind: int) -> bytes:
    """An ONNX model from x to z, both of shape (1, 64)."""
    ends = [helper.make_tensor_value_info(name, kind, [1, 64]) for name in "xz"]
    values = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph([helper.make_node(*node) for node in nodes], "g", ends[:1], ends[1:], values)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return bytes(made.SerializeToString())


def compiled(soc_model: int, what: bytes, name: str) -> str:
    """The context binary as text; empty when QNN refuses to take all of ``what``."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    npus = [device for device in ort.get_ep_devices() if device.ep_name == "QNNExecutionProvider"]
    options.add_provider_for_devices(npus, {"backend_type": "htp", "soc_model": str(soc_model)})
    try:
        ort.ModelCompiler(options, what, embed_compiled_data_into_model=False).compile_to_file(f"{name}.onnx")
    except Fail:
        return ""
    return Path(f"{name}_qnn.bin").read_bytes().decode("latin1")


def told(soc_model: int) -> dict[str, Any]:
    """What QNN writes into the binary of a quantised product, and whether it takes one in float16."""
    values = {"w": np.full((64, 64), 129, np.uint8), "s": np.float32(0.01), "p": np.uint8(128)}
    text = compiled(soc_model, model(QUANTISED, values, TensorProto.FLOAT), f"quantised{soc_model}")
    (arch,), (size,) = (set(re.findall(rf";{key}=([0-9]+);", text)) for key in ("arch", "vtcm_size"))
    half = model(HALF, {"w": np.eye(64, dtype=np.float16)}, TensorProto.FLOAT16)
    takes_half = compiled(soc_model, half, f"half{soc_model}") != ""
    (chip,) = set(re.findall(r"soc_type=(\w+);", text))
    return {"chip": chip, "htp_arch": int(arch), "vtcm_mib": int(size) >> 20, "htp_fp16": takes_half}


if __name__ == "__main__":
    ort.register_execution_provider_library("QNNExecutionProvider", onnxruntime_qnn.get_library_path())
    Path("found.json").write_text(json.dumps({soc: told(int(soc)) for soc in sys.argv[1:]}))
