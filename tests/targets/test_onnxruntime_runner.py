"""The ONNX Runtime runner on hand-made graphs: names, dtypes, files per method, intermediate values, exact int8."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from baking import environment
from edgebake.errors import ArtifactDamaged
from edgebake.target import runners_of
from edgebake.types import MethodSignature, Signature, TensorSpec
from edgebake_targets import _onnxruntime
from edgebake_targets._onnx import set_module
from edgebake_targets.runners import onnxruntime_cpu as runner

METHOD = MethodSignature(
    inputs=(TensorSpec(name="x", shape=(1, 4), dtype="float32"), TensorSpec(name="unused", shape=(1,), dtype="int64")),
    outputs=(TensorSpec(name="y", shape=(1, 4), dtype="float32"),),
)
X = np.array([[1, -2, 3, -4]], np.float32)
UNUSED = np.zeros(1, np.int64)


def two_layers(factor: float) -> onnx.ModelProto:
    """first: Mul then Add; act: Relu; last: QuantizeLinear and DequantizeLinear around a Neg."""
    nodes = [
        helper.make_node("Mul", ["x", "two"], ["a"], name="mul"),
        helper.make_node("Add", ["a", "one"], ["b"], name="add"),
        helper.make_node("Relu", ["b"], ["c"], name="relu"),
        helper.make_node("QuantizeLinear", ["c", "step", "zero"], ["q"], name="q"),
        helper.make_node("DequantizeLinear", ["q", "step", "zero"], ["d"], name="dq"),
        helper.make_node("Neg", ["d"], ["y"], name="neg"),
    ]
    for node, module in zip(nodes, ("block.first", "block.first", "block.act", None, None, "last"), strict=True):
        if module:
            set_module(node, module, node.name)
    given = {"two": np.float32(factor), "one": np.float32(1), "step": np.float32(2), "zero": np.uint8(0)}
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in given.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])
    graph = helper.make_graph(nodes, "g", [x], [y], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_runs_a_file_and_ignores_inputs_that_the_graph_dropped(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(two_layers(2).SerializeToString())
    session = runner.open(path, Signature(methods={"forward": METHOD}))
    out = session.call("forward", {"x": X, "unused": UNUSED})
    assert list(out) == ["y"] and out["y"].dtype == np.float32
    assert out["y"].tolist() == [[-4, 0, -8, 0]]  # relu(2x + 1) is 3, 0, 7, 0; in steps of 2, ties go to even


def test_takes_arrays_that_are_not_contiguous(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(two_layers(2).SerializeToString())
    session = runner.open(path, Signature(methods={"forward": METHOD}))
    strided = np.repeat(X, 2, axis=1)[:, ::2]
    assert session.call("forward", {"x": strided})["y"].tolist() == [[-4, 0, -8, 0]]


def test_methods_lie_beside_each_other(tmp_path: Path) -> None:
    for name, factor in (("prefill", 2), ("decode", -2)):
        (tmp_path / f"{name}.onnx").write_bytes(two_layers(factor).SerializeToString())
    session = runner.open(tmp_path / "prefill.onnx", Signature(methods={"prefill": METHOD, "decode": METHOD}))
    assert session.call("prefill", {"x": X})["y"].tolist() == [[-4, 0, -8, 0]]
    assert session.call("decode", {"x": X})["y"].tolist() == [[0, -4, 0, -8]]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "prefill.onnx").write_bytes(two_layers(2).SerializeToString())
    with pytest.raises(ArtifactDamaged, match=r"decode\.onnx"):
        runner.open(tmp_path / "prefill.onnx", Signature(methods={"prefill": METHOD, "decode": METHOD}))


def test_intermediates_give_what_each_module_hands_on(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(two_layers(2).SerializeToString())
    session = runner.open(path, Signature(methods={"forward": METHOD}))
    found = session.intermediates("forward", {"x": X}, ["block.first", "block.act", "block", "last", "absent", "bloc"])
    assert sorted(found) == ["block", "block.act", "block.first", "last"]
    assert found["block.first"].tolist() == [[3, -3, 7, -7]]
    assert found["block.act"].tolist() == found["block"].tolist() == [[4, 0, 8, 0]]  # after rounding to int8
    assert found["last"].tolist() == [[-4, 0, -8, 0]]


def test_int8_products_are_exact_where_plain_avx2_would_saturate(tmp_path: Path) -> None:
    # 255 * 127 * 2 exceeds 16 bits: the pairwise sums of vpmaddubsw would clip.
    nodes = [helper.make_node("MatMulInteger", ["x", "w"], ["y"])]
    weight = numpy_helper.from_array(np.full((64, 8), 127, np.int8), "w")
    x = helper.make_tensor_value_info("x", TensorProto.UINT8, [1, 64])
    y = helper.make_tensor_value_info("y", TensorProto.INT32, [1, 8])
    graph = helper.make_graph(nodes, "g", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    method = MethodSignature(
        inputs=(TensorSpec(name="x", shape=(1, 64), dtype="uint8"),),
        outputs=(TensorSpec(name="y", shape=(1, 8), dtype="int32"),),
    )
    session = runner.open(path, Signature(methods={"forward": method}))
    assert set(session.call("forward", {"x": np.full((1, 64), 255, np.uint8)})["y"].ravel()) == {255 * 127 * 64}


def test_processors_without_vnni_get_exact_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(_onnxruntime, "has_vnni", lambda: False)
    plain = onnxruntime.SessionOptions()
    _onnxruntime.exact_int8(plain, onnxruntime, two_layers(2))
    assert plain.get_session_config_entry("session.x64quantprecision") == "1"
    shared = two_layers(2)
    shared.graph.initializer.append(numpy_helper.from_array(np.ones((4, 4), np.int8), "w"))
    for name in "ab":
        shared.graph.node.append(helper.make_node("DequantizeLinear", ["w", "step"], [f"w{name}"]))
    options = onnxruntime.SessionOptions()
    _onnxruntime.exact_int8(options, onnxruntime, shared)
    assert options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL


def test_the_runner_is_found_for_its_target() -> None:
    assert [name for name, _ in runners_of("onnx-cpu")] == ["onnxruntime-cpu"]
    assert runner.missing() is None and runner.KIND == "executed"


def test_the_first_session_of_a_process_weighs_no_more_than_the_next(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(two_layers(2).SerializeToString())
    code = f"""
from pathlib import Path
from edgebake import weighing
from edgebake.types import MethodSignature, Signature, TensorSpec
from edgebake_targets.runners import onnxruntime_cpu as runner
import numpy as np
method = MethodSignature(inputs=({METHOD.inputs[0]!r},), outputs={METHOD.outputs!r})
runner.warm_up()
base = weighing.start()
session = runner.open(Path({str(path)!r}), Signature(methods={{"forward": method}}))
session.call("forward", {{"x": np.ones((1, 4), "f4")}})
print((weighing.peak() - base) / 2**20)
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert float(done.stdout) < 3  # 9 without the first session's own
