"""The ONNX inspector on files of ours, of others, cut short, and hostile."""

from __future__ import annotations

import hashlib
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgebake.errors import ArtifactDamaged
from edgebake_targets.inspectors import onnx as inspector


def product(*, quantized: bool = False) -> onnx.ModelProto:
    """``y = x @ w`` with w (4, 8), float or int8 with a scale per column."""
    weight = np.arange(32, dtype=np.float32).reshape(4, 8)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    initializers = [numpy_helper.from_array(weight, "w")]
    if quantized:
        initializers = [
            numpy_helper.from_array(weight.astype(np.int8), "q"),
            numpy_helper.from_array(np.ones(8, np.float32), "scale"),
        ]
        nodes.insert(0, helper.make_node("DequantizeLinear", ["q", "scale"], ["w"], axis=1))
    return model_of(nodes, initializers)


def model_of(nodes: list[onnx.NodeProto], initializers: list[TensorProto]) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8])
    graph = helper.make_graph(nodes, "g", [x], [y], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def written(folder: Path, model: onnx.ModelProto) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def external(folder: Path, location: str, **place: int) -> Path:
    model = product()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **place}.items():
        tensor.external_data.add(key=key, value=str(value))
    return written(folder, model)


def test_reads_interface_operators_and_weights(tmp_path: Path) -> None:
    path = written(tmp_path, product())
    found = inspector.inspect(path)
    assert [(i.name, i.shape, i.dtype) for i in found.inputs] == [("x", ("batch", 4), "float32")]
    assert [(o.name, o.shape) for o in found.outputs] == [("y", ("batch", 8))]
    assert dict(found.operators) == {"MatMul": 1} and dict(found.delegates) == {}
    (weight,) = found.weights
    data = np.arange(32, dtype=np.float32).tobytes()
    assert (weight.name, weight.shape, weight.dtype, weight.bytes) == ("w", (4, 8), "float32", 128)
    assert weight.digest == hashlib.sha256(data).hexdigest()
    assert found.total_bytes == path.stat().st_size
    assert found.facts["opsets"] == {"ai.onnx": 20}


def test_scales_are_counted_with_their_weight(tmp_path: Path) -> None:
    (weight,) = inspector.inspect(written(tmp_path, product(quantized=True))).weights
    assert (weight.name, weight.dtype, weight.bytes, weight.scale_bytes) == ("q", "int8", 32, 32)


def test_the_scale_of_an_integer_product_is_found_behind_the_cast(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["a", "a_scale", "a_zero"]),
        helper.make_node("MatMulInteger", ["a", "q", "a_zero"], ["i"]),
        helper.make_node("Cast", ["i"], ["f"], to=1),
        helper.make_node("Mul", ["a_scale", "scale"], ["s"]),
        helper.make_node("Mul", ["f", "s"], ["y"]),
    ]
    weights = [np.ones((4, 8), np.int8), np.ones(8, np.float32)]
    tensors = [numpy_helper.from_array(value, name) for value, name in zip(weights, ("q", "scale"), strict=True)]
    (weight,) = inspector.inspect(written(tmp_path, model_of(nodes, tensors))).weights
    assert (weight.name, weight.bytes, weight.scale_bytes) == ("q", 32, 32)


def test_packed_blocks_show_their_true_shape_and_type(tmp_path: Path) -> None:
    attributes = {"K": 32, "N": 8, "bits": 4, "block_size": 32}
    node = helper.make_node("MatMulNBits", ["x", "q", "s"], ["y"], domain="com.microsoft", **attributes)
    tensors = [
        numpy_helper.from_array(np.zeros((8, 1, 16), np.uint8), "q"),
        numpy_helper.from_array(np.ones(8, np.float32), "s"),
    ]
    found = inspector.inspect(written(tmp_path, model_of([node], tensors)))
    (weight,) = found.weights
    assert (weight.shape, weight.dtype, weight.bytes, weight.scale_bytes) == ((8, 32), "int4", 128, 32)
    assert dict(found.operators) == {"com.microsoft.MatMulNBits": 1}


def test_four_bit_tensors_count_half_bytes(tmp_path: Path) -> None:
    four = helper.make_tensor("q", TensorProto.INT4, [5], [1, 2, 3, 4, 5])
    model = product()
    model.graph.initializer.append(four)
    record = next(w for w in inspector.inspect(written(tmp_path, model)).weights if w.name == "q")
    assert (record.dtype, record.bytes) == ("int4", 3)


def test_weights_inside_branches_are_seen(tmp_path: Path) -> None:
    inner = helper.make_graph(
        [helper.make_node("MatMul", ["x", "inner_w"], ["inner_y"])],
        "then",
        [],
        [helper.make_tensor_value_info("inner_y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.ones((4, 8), np.float32), "inner_w")],
    )
    node = helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
    found = inspector.inspect(written(tmp_path, model_of([node], [])))
    assert dict(found.operators) == {"If": 1, "MatMul": 2}
    assert [weight.name for weight in found.weights] == ["inner_w", "inner_w"]


def test_external_data_is_read_and_counted(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"\0" * 16 + np.arange(32, dtype=np.float32).tobytes())
    path = external(tmp_path, "weights.bin", offset=16, length=128)
    found = inspector.inspect(path)
    assert found.weights[0].digest == hashlib.sha256(np.arange(32, dtype=np.float32).tobytes()).hexdigest()
    assert found.total_bytes == path.stat().st_size + 144


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "sub/../../secret", "link", ""])
def test_external_data_outside_the_folder_is_refused(tmp_path: Path, location: str) -> None:
    (tmp_path / "secret").write_bytes(b"\0" * 128)
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(ArtifactDamaged, match="outside the model's folder"):
        inspector.inspect(external(folder, location))


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"offset": 64, "length": 128}, "ends beyond the 128 bytes"),
        ({"offset": 4}, "should hold 128 bytes"),
        ({"offset": 10**18}, "ends beyond"),
        ({"offset": -4}, "damaged place"),
    ],
)
def test_external_data_with_a_wrong_place_is_refused(tmp_path: Path, place: dict[str, int], message: str) -> None:
    (tmp_path / "weights.bin").write_bytes(b"\0" * 128)
    with pytest.raises(ArtifactDamaged, match=message):
        inspector.inspect(external(tmp_path, "weights.bin", **place))


def _short(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].raw_data = b"\0" * 100


def _negative(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[0] = -4


def _huge(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[0] = 2**62


def _unknown_type(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].data_type = 77


def _no_outputs(model: onnx.ModelProto) -> None:
    del model.graph.output[:]


@pytest.mark.parametrize("harm", [_short, _negative, _huge, _unknown_type, _no_outputs])
def test_a_graph_that_contradicts_itself_is_damaged(tmp_path: Path, harm: Callable[[onnx.ModelProto], None]) -> None:
    model = product()
    harm(model)
    with pytest.raises(ArtifactDamaged):
        inspector.inspect(written(tmp_path, model))


def test_cut_empty_and_foreign_files_are_damaged_not_a_traceback(tmp_path: Path) -> None:
    whole = product().SerializeToString()
    rng = np.random.default_rng(0)
    for number, data in enumerate([b"", whole[:60], whole[:-3], b"PK\x03\x04" * 50, rng.bytes(500), b"\x08" * 90]):
        path = tmp_path / f"{number}.onnx"
        path.write_bytes(data)
        with pytest.raises(ArtifactDamaged) as caught:
            inspector.inspect(path)
        assert caught.value.problems[0].fix
    with pytest.raises(ArtifactDamaged, match="no such file"):
        inspector.inspect(tmp_path / "absent.onnx")


def test_any_flipped_byte_gives_an_inspection_or_damage(tmp_path: Path) -> None:
    whole = bytearray(product(quantized=True).SerializeToString())
    path = tmp_path / "model.onnx"
    for position in range(len(whole)):
        for value in (0, 255, whole[position] ^ 1):
            path.write_bytes(bytes(whole[:position]) + bytes([value]) + bytes(whole[position + 1 :]))
            try:
                inspector.inspect(path)
            except ArtifactDamaged:
                continue


def test_memory_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    count, size = 24, 1 << 18
    weights = [
        helper.make_tensor(f"w{n}", TensorProto.FLOAT, [size], bytes([n]) * 4 * size, raw=True) for n in range(count)
    ]
    out = helper.make_tensor_value_info("w0", TensorProto.FLOAT, [size])
    graph = helper.make_graph([], "held", [], [out], weights)
    path = tmp_path / "model.onnx"
    onnx.save_model(helper.make_model(graph), path, save_as_external_data=True, location="model.data", size_threshold=0)
    tracemalloc.start()
    try:
        found = inspector.inspect(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len({record.digest for record in found.weights}) == count
    assert peak < 4 * (4 * size)
