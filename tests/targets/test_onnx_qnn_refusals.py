"""What onnx-qnn refuses before a weight is read, its toolchain's remedy, its rewrites and its counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from edgebake import devices
from edgebake.check import check
from edgebake.recipe_yaml import read
from edgebake.target import Asked
from edgebake_targets import _qnn, onnx_qnn
from edgebake_targets._onnx import export, fixed
from edgebake_targets._onnx_macs import macs_of, shapes_of
from edgebake_targets._onnx_qnn_rewrites import bound_masks, rewrite
from onnx_cases import Wrapper, seeded
from qnn_cases import Normed, text, traced_vector, vector, vectors
from qnn_rules import FIXED, RECIPE, refused


def test_dimensions_that_vary_are_refused_with_the_rule_that_fixes_them(tmp_path: Path) -> None:
    said = refused(tmp_path, "{target: onnx-qnn, device: sm8650, scheme: fp16}")
    assert "the NPU takes fixed shapes only, and 'seq' varies" in said
    assert "dims: {seq: {min: 64, max: 64}}" in said
    assert "one.yaml:4" in said


def test_a_target_may_fix_the_dimension_that_others_keep(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("def make(): pass\n")
    path = tmp_path / "one.yaml"
    path.write_text(RECIPE.format(rule=f"{{target: onnx-qnn, device: sm8650, scheme: fp16, {FIXED}}}\n  - onnx-cpu"))
    units, _ = check([read(path)], trust=False)
    assert [(u.spec.dims["seq"].min, u.spec.dims["seq"].max) for u in units] == [(64, 64), (4, 64)]


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("{target: onnx-qnn, scheme: fp16, %s}", ("onnx-qnn", "device: ")),
        (
            "{target: onnx-qnn, device: m4, scheme: fp16, %s}",
            ("onnx-qnn does not run on m4", "devices that fit: sm8450"),
        ),
        ("{target: onnx-qnn, device: sm1, scheme: fp16, %s}", ("there is no device 'sm1'",)),
        ("{target: onnx-qnn, device: sm8635, scheme: fp16, %s}", ("does not take fp16 on sm8635",)),
        ("{target: onnx-qnn, device: sm8650, scheme: w8a8d, %s}", ("cannot do w8a8d", "w8a16")),
        ("{target: onnx-qnn, device: sm8650, scheme: fp16, %s, options: {soc: 57}}", ("has no option 'soc'",)),
        ("{target: onnx-qnn, device: sm8650, scheme: fp16, %s, options: {vtcm_mib: -1}}", ("cannot be negative",)),
        ("{target: onnx-qnn, device: sm8650, scheme: fp16, %s, options: {vtcm_mib: 64}}", ("which has 8", "at most 8")),
        ("{target: onnx-qnn, device: sm8650, scheme: w8a8, %s, options: {percentile: 0}}", ("percentile", "99.99")),
        (
            "{target: onnx-qnn, device: sm8650, scheme: w8a8, %s, compress: {modules: {'a.*': w8a16}}}",
            ("w8a16 in a network of w8a8", "modules take fp16, w8a8", "options: {wide_activations: auto}"),
        ),
        (
            "{target: onnx-qnn, device: sm8650, scheme: w8a16, %s, options: {wide_activations: auto}}",
            ("widens activations of 8 bits, and those of w8a16 have not 8", "scheme: w8a8, or leave it out"),
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name_with_a_remedy(tmp_path: Path, rule: str, words: tuple[str, ...]) -> None:
    said = refused(tmp_path, rule % FIXED)
    assert all(word in said for word in words), said


def test_several_methods_are_refused_by_name() -> None:
    options = {option.name: option.default for option in onnx_qnn.OPTIONS}
    asked = Asked(
        scheme="fp16",
        module_schemes=(),
        options=options,
        device=devices.row("sm8650"),
        inputs={"prefill": (), "decode": ()},
        varying=(),
        channels=None,
    )
    assert [r.what for r in onnx_qnn.refusals(asked)] == ["onnx-qnn takes networks of one method, not prefill, decode"]


def test_a_toolchain_that_is_not_there_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_qnn, "find_spec", lambda name: None if name == "onnxruntime_qnn" else object())
    monkeypatch.setattr(_qnn.platform, "system", lambda: "Linux")
    found = onnx_qnn.missing()
    assert found is not None
    assert found.reason == "not installed: onnxruntime-qnn"
    assert "pip install" in found.remedy and "onnxruntime-qnn==2.7.0" in found.remedy
    monkeypatch.setattr(_qnn.platform, "system", lambda: "Darwin")
    found = onnx_qnn.missing()
    assert found is not None and "no HTP compiler for Darwin" in found.reason and "Linux x86-64" in found.remedy


# --- rewrites ---------------------------------------------------------------------------------------------------------


def run(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    values: list[np.ndarray] = session.run(None, feed)
    return values


def decibels(wanted: list[np.ndarray], got: list[np.ndarray]) -> float:
    signal = sum(float((w.astype(np.float64) ** 2).sum()) for w in wanted)
    noise = sum(float(((w.astype(np.float64) - g) ** 2).sum()) for w, g in zip(wanted, got, strict=True))
    return float(10 * np.log10(signal / max(noise, 1e-30)))


def test_masks_come_near_the_scores_and_the_outputs_stay(tmp_path: Path) -> None:
    _, traced = text()
    signature = fixed(traced.signature)
    model = export(traced.programs["forward"], signature.methods["forward"], onnx_qnn.OPSET)
    feed = {"input_ids": np.arange(8)[None], "attention_mask": np.array([[1, 1, 1, 1, 1, 0, 0, 0]])}
    wanted = run(model, feed)
    rewrite(model)
    lowest = min(float(numpy_helper.to_array(i).min(initial=0)) for i in model.graph.initializer if i.data_type == 1)
    assert lowest == -100
    assert decibels(wanted, run(model, feed)) > 100


def test_a_large_number_that_is_no_mask_stays() -> None:
    nodes = [
        helper.make_node("Add", ["x", "low"], ["hidden"]),
        helper.make_node("Softmax", ["hidden"], ["y"]),
        helper.make_node("Relu", ["hidden"], ["z"]),
    ]
    low = numpy_helper.from_array(np.array([-1e4, 0, 0, 0], np.float32), "low")
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xyz"]
    graph = helper.make_graph(nodes, "g", infos[:1], infos[1:], [low])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    bound_masks(model)
    assert numpy_helper.to_array(model.graph.initializer[0]).min() == -1e4


class Bare(torch.nn.Module):
    """A norm without a weight, over an axis counted from the front."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(x)
        return x * torch.rsqrt(x.square().mean(2, keepdim=True) + 1e-5)


@pytest.mark.parametrize("network", [Normed, Bare])
def test_norms_written_out_are_fused_and_the_outputs_stay(network: type[torch.nn.Module]) -> None:
    signature = vector(64, 1, 8)
    traced = traced_vector(seeded(network), signature)
    model = export(traced.programs["forward"], signature.methods["forward"], onnx_qnn.OPSET)
    (feed,) = vectors(1, 1, 8)
    wanted = run(model, feed)
    assert "RMSNormalization" not in {node.op_type for node in model.graph.node}
    rewrite(model)
    operators = [node.op_type for node in model.graph.node]
    assert operators.count("RMSNormalization") == 1 and "Sqrt" not in operators
    assert decibels(wanted, run(model, feed)) > 100


def test_the_torch_norm_is_exported_as_the_operator() -> None:
    signature = vector(64, 1, 8)
    traced = traced_vector(Wrapper(torch.nn.RMSNorm(64)).eval(), signature)
    model = export(traced.programs["forward"], signature.methods["forward"], onnx_qnn.OPSET)
    assert [node.op_type for node in model.graph.node] == ["RMSNormalization"]


# --- multiply-accumulates ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("node", "shapes", "wanted"),
    [
        (helper.make_node("MatMul", ["a", "b"], ["y"]), {"a": [2, 3, 5], "b": [2, 5, 7]}, 2 * 3 * 5 * 7),
        (helper.make_node("Gemm", ["a", "b"], ["y"], transB=1), {"a": [3, 5], "b": [7, 5]}, 3 * 5 * 7),
        (helper.make_node("Gemm", ["a", "b"], ["y"], transA=1), {"a": [5, 3], "b": [5, 7]}, 3 * 5 * 7),
        (
            helper.make_node("Conv", ["a", "b"], ["y"], group=2, pads=[1, 1, 1, 1]),
            {"a": [1, 4, 6, 6], "b": [8, 2, 3, 3]},
            8 * 6 * 6 * 2 * 3 * 3,
        ),
        (
            helper.make_node("ConvTranspose", ["a", "b"], ["y"], strides=[2, 2]),
            {"a": [1, 4, 6, 6], "b": [4, 8, 2, 2]},
            4 * 6 * 6 * 8 * 2 * 2,
        ),
        (helper.make_node("Add", ["a", "b"], ["y"]), {"a": [3, 5], "b": [3, 5]}, 0),
    ],
)
def test_multiply_accumulates_are_those_of_the_definition(
    node: onnx.NodeProto, shapes: dict[str, list[int]], wanted: int
) -> None:
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    out = onnx.ValueInfoProto(name="y")
    model = helper.make_model(helper.make_graph([node], "g", infos, [out]), opset_imports=[helper.make_opsetid("", 23)])
    assert macs_of(node, shapes_of(model)) == wanted
