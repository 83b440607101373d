"""Operators read from context binaries of Qualcomm's, compiled here by its provider of ONNX Runtime alone."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgebake.commands import inspect as command
from edgebake.types import LeftOut
from edgebake_targets import onnx_qnn
from edgebake_targets._onnx_units import note
from edgebake_targets.inspectors import _qnn_binary, _qnn_delegate
from edgebake_targets.inspectors._flatbuffers import Malformed
from edgebake_targets.inspectors._qnn_context import word
from edgebake_targets.inspectors.onnx import inspect

compiles = pytest.mark.skipif(onnx_qnn.missing() is not None, reason="onnxruntime-qnn is not installed")


@dataclass(frozen=True)
class Built:
    """A model that the provider compiled, and the names of the nodes that its own trace says it took."""

    path: Path
    traced: tuple[str, ...]

    def binary(self) -> bytes:
        (node,) = onnx.load_model(self.path).graph.node
        return bytes(next(a.s for a in node.attribute if a.name == "ep_cache_context"))


def network(names: list[str]) -> onnx.ModelProto:
    """A product, a clamp, a product and a softmax, named so."""
    rng = np.random.default_rng(0)
    weights = [numpy_helper.from_array(rng.normal(size=(16, 16)).astype(np.float32), name) for name in ("v", "w")]
    kinds = [("MatMul", ["x", "v"]), ("Relu", ["a"]), ("MatMul", ["b", "w"]), ("Softmax", ["c"])]
    nodes = [
        helper.make_node(kind, reads, [made], name=name)
        for (kind, reads), made, name in zip(kinds, ["a", "b", "c", "y"], names, strict=True)
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 16]) for name in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def compiled(folder: Path, names: list[str], *, embed: bool = True) -> Built:
    (folder / "trace").mkdir(parents=True)
    onnx.save_model(network(names), folder / "plain.onnx")
    asked = {
        "model": str(folder / "plain.onnx"),
        "out": str(folder / "model.onnx"),
        "provider": {"soc_model": "57"},
        "cpu_fallback": False,
        "embed": embed,
        "trace": str(folder / "trace"),
        "answer": str(folder / "answer.json"),
    }
    (folder / "request.json").write_text(json.dumps(asked))
    run = [sys.executable, "-m", "edgebake_targets._qnn_compiler", str(folder / "request.json")]
    subprocess.run(run, check=True, capture_output=True, cwd=folder)
    told = json.loads((folder / "trace/qnn_op_trace.json").read_text())
    parts = told["subgraph_traces"]
    return Built(folder / "model.onnx", tuple(op["dst_name"] for part in parts for op in part["op_mappings"]))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return compiled(tmp_path_factory.mktemp("foreign"), ["/up/MatMul_3", "node_relu_1", "/down/MatMul", "mine"])


@compiles
def test_the_nodes_of_a_binary_are_those_of_the_vendors_trace(foreign: Built) -> None:
    (graph,) = _qnn_binary.graphs(memoryview(foreign.binary()))
    assert graph.nodes == foreign.traced
    assert len(graph.nodes) >= 4


@compiles
def test_a_foreign_file_shows_operators_by_unit_and_graph(foreign: Built) -> None:
    found = inspect(foreign.path)
    (npu,) = found.units
    assert npu.unit == "NPU"
    assert sum(npu.operators.values()) == len(foreign.traced)
    assert {name: npu.operators[name] for name in ("MatMul", "relu", "mine")} == {"MatMul": 2, "relu": 1, "mine": 1}
    (graph,) = found.facts["graphs"].values()
    assert graph == {"nodes": len(foreign.traced), "operators": dict(npu.operators)}
    assert found.facts["operators_inside"].startswith("counted by the names of the nodes")


@compiles
def test_text_and_json_show_the_operators(foreign: Built, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run(path=foreign.path, as_json=False) == 0
    told = capsys.readouterr().out
    assert f"NPU by QNNExecutionProvider: 1 part, {len(foreign.traced)} operators" in told
    assert "MatMul 2" in told
    assert command.run(path=foreign.path, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["units"][0]["operators"]["MatMul"] == 2


@compiles
def test_a_binary_beside_the_model_is_read_and_a_lost_one_is_not_measured(tmp_path: Path, foreign: Built) -> None:
    apart = compiled(tmp_path, ["/up/MatMul_3", "node_relu_1", "/down/MatMul", "mine"], embed=False)
    assert inspect(apart.path).units[0].operators == inspect(foreign.path).units[0].operators
    name = apart.binary().decode()
    (tmp_path / name).unlink()
    lost = inspect(apart.path)
    assert lost.units[0].operators == {}
    assert lost.facts["operators_inside"] == f"not measured: no file {name!r} beside the model"


@compiles
def test_a_note_of_other_operators_than_the_binary_holds_is_not_believed(tmp_path: Path, foreign: Built) -> None:
    count = len(foreign.traced)
    for noted, believed in (({"FullyConnected": count}, True), ({"FullyConnected": count + 1}, False)):
        model = onnx.load_model(foreign.path)
        note(model, noted, (LeftOut(op="TopK", count=1, macs=0, reason=""),))
        onnx.save_model(model, tmp_path / "noted.onnx")
        assert (inspect(tmp_path / "noted.onnx").units[0].operators == noted) is believed


@compiles
def test_damaged_binaries_are_read_or_refused_but_never_crash(foreign: Built) -> None:
    whole, chance, refused = foreign.binary(), random.Random(0), 0
    for _ in range(600):
        data = bytearray(whole)
        for _ in range(6):
            data[chance.randrange(12000)] = chance.randrange(256)
        try:
            _qnn_binary.graphs(memoryview(data))
        except Malformed:
            refused += 1
    assert refused > 20
    for length in (0, 7, 31, 40, 4096, 4136, 8192):
        with pytest.raises(Malformed):
            _qnn_binary.graphs(memoryview(whole[:length]))
    with pytest.raises(Malformed, match="beyond its 8300 bytes"):
        _qnn_binary.graphs(memoryview(whole[:8300]))


@compiles
def test_a_damaged_binary_in_a_whole_model_is_not_measured(tmp_path: Path, foreign: Built) -> None:
    model = onnx.load_model(foreign.path)
    for attribute in model.graph.node[0].attribute:
        if attribute.name == "ep_cache_context":
            attribute.s = b"\0" * 64 + attribute.s
    onnx.save_model(model, tmp_path / "other.onnx")
    found = inspect(tmp_path / "other.onnx")
    assert found.units[0].operators == {}
    known = "it is no context binary of a layout that is known here (QAIRT 2.48 to 2.51)"
    assert found.facts["operators_inside"] == f"not measured: {known}"


@compiles
def test_names_of_executorchs_nodes_become_its_operators(tmp_path: Path) -> None:
    names = ["aten_linear_default_12", "aten_relu_default", "quantized_decomposed_dequantize_per_tensor_default", "own"]
    built = compiled(tmp_path, names)
    found = _qnn_delegate.operators(memoryview(bytes(256) + built.binary()))
    wanted = Counter({"aten.linear": 1, "aten.relu": 1, "quantized_decomposed.dequantize_per_tensor": 1, "own": 1})
    assert found & wanted == wanted
    assert found.total() == len(built.traced)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("/block.0/attention/MatMul_12", "MatMul"),
        ("node_Conv_435_token_1", "Conv"),
        ("embedding_1_DequantizeLinear_2", "DequantizeLinear"),
        ("input_idsCast", "Cast"),
        ("node_layer_norm_3", "layer_norm"),
        ("node_", "node_"),
        ("n4_2", "n4"),
        ("_12", "_12"),
    ],
)
def test_a_node_counts_under_the_type_that_its_name_ends_in(name: str, wanted: str) -> None:
    assert word(name, frozenset({"MatMul", "Conv", "Linear", "DequantizeLinear", "Cast"})) == wanted
