"""Operators by unit and bytes between parts of ONNX graphs, also of files that other tools compiled."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from edgebake.types import COMPILED, LeftOut
from edgebake_targets._onnx_macs import macs_of, shapes_of
from edgebake_targets._onnx_units import COMPILED_AS, moved_bytes, note, on_the_cpu, outside
from edgebake_targets._units import Tally, border_bytes
from edgebake_targets.inspectors.onnx import inspect

FLOAT = TensorProto.FLOAT


def context(name: str, reads: list[str], makes: list[str], source: str) -> onnx.NodeProto:
    """A part that ``source`` has compiled, its binary in a file of its own."""
    node = helper.make_node("EPContext", reads, makes, name=name, domain="com.microsoft", embed_mode=0)
    node.attribute.append(helper.make_attribute("ep_cache_context", "part.bin"))
    node.attribute.append(helper.make_attribute("source", source))
    return node


def split(source: str) -> onnx.ModelProto:
    """Part, two operators outside, part: ``a`` (12 floats) leaves the first, ``c`` (3 halves) reaches the second."""
    nodes = [
        context("first", ["x"], ["a", "b"], source),
        helper.make_node("TopK", ["a", "k"], ["v", ""], name="top"),
        helper.make_node("Cast", ["v"], ["c"], name="half", to=TensorProto.FLOAT16),
        context("second", ["c", "b"], ["y"], source),
    ]
    x, y = (helper.make_tensor_value_info(name, FLOAT, [1, 12]) for name in "xy")
    inner = {"a": (FLOAT, [1, 12]), "b": (TensorProto.UINT8, [5]), "v": (FLOAT, [3]), "c": (TensorProto.FLOAT16, [3])}
    infos = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inner.items()]
    k = helper.make_tensor("k", TensorProto.INT64, [1], [3])
    graph = helper.make_graph(nodes, "g", [x], [y], [k], value_info=infos)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


@pytest.mark.parametrize(
    ("source", "unit"),
    [
        ("QNNExecutionProvider", "NPU"),
        ("OpenVINOExecutionProvider", "NPU, GPU or CPU"),
        ("SomebodysProvider", "unknown"),
    ],
)
def test_inspect_counts_what_lies_outside_the_parts_of_any_provider(tmp_path: Path, source: str, unit: str) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(split(source).SerializeToString())
    found = inspect(path)
    assert found.delegates == {source: 2}
    compiled, cpu = found.units
    assert (compiled.unit, compiled.by, compiled.subgraphs) == (unit, source, 2)
    assert (dict(compiled.operators), compiled.macs) == ({}, None)
    assert (cpu.unit, dict(cpu.operators), cpu.macs) == ("CPU", {"Cast": 1, "TopK": 1}, 0)
    assert found.border_bytes == 4 * 12 + 2 * 3 + 5  # a and c once, b from the first part to the second


def test_binaries_beside_a_model_count_once_and_none_outside_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    path = folder / "model.onnx"
    model = split("QNNExecutionProvider")
    path.write_bytes(model.SerializeToString())
    assert COMPILED not in {w.dtype for w in inspect(path).weights}  # the file is not there
    for place in (folder, tmp_path):
        (place / "part.bin").write_bytes(bytes(100))
    (part,) = (w for w in inspect(path).weights if w.dtype == COMPILED)
    assert (part.name, part.bytes) == ("part.bin", 100)
    assert inspect(path).total_bytes == path.stat().st_size + 100
    for name in (b"../part.bin", b"a" * 5000, b"\0", b""):
        for node in model.graph.node:
            for attribute in node.attribute:
                if attribute.name == "ep_cache_context":
                    attribute.s = name
        path.write_bytes(model.SerializeToString())
        assert inspect(path).total_bytes == path.stat().st_size


def test_products_outside_count_by_the_shapes_that_the_file_states(tmp_path: Path) -> None:
    model = split("QNNExecutionProvider")
    model.graph.initializer.append(helper.make_tensor("w", FLOAT, [12, 4], [0.0] * 48))
    model.graph.node.append(helper.make_node("MatMul", ["a", "w"], ["m"]))
    model.graph.value_info.append(helper.make_tensor_value_info("m", FLOAT, [1, 4]))
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    assert inspect(path).units[1].macs == 12 * 4
    model.graph.value_info.pop()
    path.write_bytes(model.SerializeToString())
    assert inspect(path).units[1].macs is None


def test_a_tensor_of_unknown_size_leaves_the_bytes_unknown() -> None:
    model = split("QNNExecutionProvider")
    del model.graph.value_info[:]
    assert moved_bytes(model) is None


def test_a_tensor_counts_once_for_every_part_that_reads_it() -> None:
    made_in = {"a": "1", "b": "2"}
    reads = [("1", "a"), ("2", "a"), ("2", "a"), ("3", "a"), ("3", "b"), ("3", "input")]
    assert border_bytes(made_in, reads, {"a": 10, "b": 1}.get) == 10 + 10 + 1


def test_what_is_left_out_is_named_heaviest_first_with_its_commonest_reason() -> None:
    tally = Tally()
    for reason in ("too wide", "no kernel", "no kernel", ""):
        tally.add("MatMul", 5, reason)
    tally.add("TopK", 0)
    first, second = tally.left_out()
    assert (first.op, first.count, first.macs, first.reason) == ("MatMul", 4, 20, "no kernel")
    assert (second.op, second.reason) == ("TopK", "")
    tally.add("Conv", None)
    assert tally.work("CPUExecutionProvider").macs is None  # a number would be too small


def graph_of(nodes: list[onnx.NodeProto], shapes: dict[str, list[int | str]]) -> onnx.ModelProto:
    infos = [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in shapes.items()]
    outs = [onnx.ValueInfoProto(name=name) for name in nodes[-1].output]
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(helper.make_graph(nodes, "g", infos, outs), opset_imports=opsets, ir_version=11)


@pytest.mark.parametrize(
    ("node", "shapes", "wanted"),
    [
        (
            helper.make_node("LSTM", ["x", "w", "r"], ["y"], hidden_size=4),
            {"x": [7, 1, 3], "w": [1, 16, 3], "r": [1, 16, 4]},
            7 * 16 * (3 + 4),
        ),
        (
            helper.make_node("GRU", ["x", "w", "r"], ["y"], hidden_size=4, direction="bidirectional"),
            {"x": [7, 2, 3], "w": [2, 12, 3], "r": [2, 12, 4]},
            7 * 2 * 2 * 12 * (3 + 4),
        ),
        (
            helper.make_node("Attention", ["q", "k", "v"], ["y"]),
            {"q": [1, 2, 5, 8], "k": [1, 2, 6, 8], "v": [1, 2, 6, 3]},
            2 * 5 * 6 * (8 + 3),
        ),
        (
            helper.make_node("Einsum", ["a", "b"], ["y"], equation="bij, bjk -> bik"),
            {"a": [2, 3, 5], "b": [2, 5, 7]},
            2 * 3 * 5 * 7,
        ),
        (
            helper.make_node("MatMulNBits", ["a", "q", "s"], ["y"], domain="com.microsoft", K=32, N=9, bits=4),
            {"a": [1, 6, 32], "q": [9, 1, 16], "s": [9]},
            6 * 32 * 9,
        ),
        (helper.make_node("Einsum", ["a", "b", "a"], ["y"], equation="ij,jk,kl->il"), {"a": [2, 2], "b": [2, 2]}, None),
    ],
)
def test_products_inside_composites_count(
    node: onnx.NodeProto, shapes: dict[str, list[int | str]], wanted: int | None
) -> None:
    assert macs_of(node, shapes_of(graph_of([node], shapes))) == wanted


def test_named_dimensions_count_at_the_size_that_is_given() -> None:
    nodes = [helper.make_node("MatMul", ["a", "b"], ["m"]), helper.make_node("Relu", ["m"], ["y"])]
    model = graph_of(nodes, {"a": [1, "seq", 4], "b": [4, 6]})
    assert macs_of(nodes[0], shapes_of(model)) is None
    (row,) = on_the_cpu({"forward": model}, {"seq": 10})
    assert (row.unit, dict(row.operators), row.macs, row.subgraphs) == ("CPU", {"MatMul": 1, "Relu": 1}, 240, 1)


def test_an_operator_of_another_set_keeps_its_set_in_its_name() -> None:
    node = helper.make_node("MatMulNBits", ["a", "q", "s"], ["y"], domain="com.microsoft", K=32, N=9)
    tally = outside(graph_of([node], {"a": [1, 32]}), {}, {})
    assert dict(tally.operators) == {"com.microsoft.MatMulNBits": 1}


def test_what_lowering_noted_of_the_parts_is_shown_of_the_file_alone(tmp_path: Path) -> None:
    model, path = split("QNNExecutionProvider"), tmp_path / "m.onnx"
    left = (LeftOut(op="TopK", count=1, macs=0, reason="not supported"),)
    note(model, {"Conv2d": 3, "ElementWiseAdd": 1}, left)
    onnx.save_model(model, path)
    found = inspect(path)
    assert found.units[0].operators == {"Conv2d": 3, "ElementWiseAdd": 1}
    assert found.left_out == left


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no",
        "[]",
        "3",
        '{"operators": [1]}',
        '{"operators": {"Conv": "many"}}',
        '{"left_out": [{"op": "TopK"}]}',
        "[" * 9999,
    ],
)
def test_a_note_that_lowering_did_not_write_is_not_shown(tmp_path: Path, text: str) -> None:
    model, path = split("QNNExecutionProvider"), tmp_path / "m.onnx"
    model.metadata_props.add(key=COMPILED_AS, value=text)
    onnx.save_model(model, path)
    found = inspect(path)
    assert (found.units[0].operators, found.left_out) == ({}, ())
