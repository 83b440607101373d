"""The onnx-mobile target on tiny networks: written in ONNX Runtime's own format, read back, and executed."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from asking import defaults, lower_request
from edgebake.errors import ArtifactDamaged, StageFailed
from edgebake.target import NotMeasured, runners_of
from edgebake.types import Assignment, Lowered, Traced
from edgebake_targets import _onnx_mobile, onnx_cpu, onnx_mobile
from edgebake_targets._ort_format import canonical
from edgebake_targets.inspectors import ort
from edgebake_targets.runners import onnxruntime_cpu as runner
from onnx_cases import (
    Wrapper,
    image_inputs,
    kinds_of,
    samples,
    sqnr,
    text_inputs,
    traced_image,
    traced_text,
    uniform,
)

pytestmark = pytest.mark.skipif(onnx_mobile.missing() is not None, reason="onnx or onnxruntime is not installed")


def lower(
    traced: Traced, module: torch.nn.Module, folder: Path, scheme: str, inputs: Any = (), **options: Any
) -> Lowered:
    assignment = Assignment(schemes=uniform(module, scheme), kinds=kinds_of(module))
    given = defaults(onnx_mobile) | options
    request = lower_request(folder, given, scheme=scheme, assignment=assignment, calibration=samples(list(inputs)))
    return onnx_mobile.lower(traced, request)


@pytest.fixture(scope="module")
def text() -> tuple[Wrapper, Traced]:
    return traced_text()


@pytest.fixture(scope="module")
def image() -> tuple[Wrapper, Traced]:
    return traced_image()


@pytest.fixture(scope="module")
def built(
    text: tuple[Wrapper, Traced], image: tuple[Wrapper, Traced], tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, tuple[Wrapper, Path, Lowered]]:
    found = {}
    for name, (module, traced), scheme, inputs, options in (
        ("text", text, "fp32", (), {}),
        ("image", image, "w8a8", image_inputs(8, seed=2), {}),
        ("basic", image, "fp32", (), {"optimization": "basic"}),
    ):
        folder = tmp_path_factory.mktemp(name)
        found[name] = module, folder, lower(traced, module, folder, scheme, inputs, **options)
    return found


def test_every_scheme_but_half_is_that_of_the_processor() -> None:
    able = {row.scheme for row in onnx_mobile.SUPPORTS}
    assert [row.scheme for row in onnx_cpu.SUPPORTS if row.scheme not in able] == ["fp16"]
    assert [name for name, _ in runners_of("onnx-mobile")] == ["onnxruntime-cpu"]


# Floors are 4-6 dB below what was measured on a processor with VNNI.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "floor"), [("w8", 38), ("w8a8", 36), ("w8a8d", 37), ("w4g32", 18), ("w4g32a8d", 18)]
)
def test_every_scheme_keeps_a_text_network_close(
    text: tuple[Wrapper, Traced], tmp_path: Path, scheme: str, floor: float
) -> None:
    module, traced = text
    lowered = lower(traced, module, tmp_path, scheme, text_inputs(16, seed=2))
    assert sqnr(module, tmp_path, lowered, text_inputs(6)) > floor


@pytest.mark.slow
@pytest.mark.parametrize(("name", "inputs", "floor"), [("text", text_inputs, 110), ("image", image_inputs, 30)])
def test_the_file_computes_what_the_network_does(
    built: Mapping[str, tuple[Wrapper, Path, Lowered]], name: str, inputs: Any, floor: float
) -> None:
    module, folder, lowered = built[name]
    assert sqnr(module, folder, lowered, inputs(4)) > floor


@pytest.mark.slow
def test_inspect_reads_interface_operators_and_weights(built: Mapping[str, tuple[Wrapper, Path, Lowered]]) -> None:
    _, folder, lowered = built["image"]
    found = ort.inspect(folder / lowered.entry)
    assert [(i.name, i.shape, i.dtype) for i in found.inputs] == [("image", (1, 3, 16, 16), "float32")]
    assert [(o.name, o.shape, o.dtype) for o in found.outputs] == [("classes", (1, 8), "float32")]
    assert found.operators["com.microsoft.QLinearConv"] == 3  # in the order of axes that phones' kernels want
    large = {w.shape: w for w in found.weights if len(w.shape) == 4}
    assert {w.dtype for w in large.values()} == {"int8"}
    assert large[(16, 3, 3, 3)].bytes == 16 * 3 * 9
    assert large[(16, 3, 3, 3)].scale_bytes == 16 * (4 + 1)  # a scale and a zero point for each channel
    assert found.total_bytes == (folder / lowered.entry).stat().st_size
    assert found.format == "ort" and int(found.facts["format_version"]) >= 6


@pytest.mark.slow
def test_a_tied_weight_is_stored_once_and_dimensions_keep_their_names(
    built: Mapping[str, tuple[Wrapper, Path, Lowered]],
) -> None:
    found = ort.inspect(built["text"][1] / "model.ort")
    assert [w.shape for w in found.weights if 96 in w.shape] == [(96, 64)]
    assert [i.shape for i in found.inputs] == [(1, "seq"), (1, "seq")]


@pytest.mark.slow
def test_the_configuration_names_each_operator_of_the_file_and_no_folder(
    built: Mapping[str, tuple[Wrapper, Path, Lowered]],
) -> None:
    _, folder, lowered = built["image"]
    assert lowered.files == ("model.ort", "required_operators.config")
    told = (folder / "required_operators.config").read_text()
    comment, *lines = told.splitlines()
    assert comment.startswith("# ") and str(folder) not in told
    sets = {tuple(line.split(";")[:2]): line.split(";")[2].split(",") for line in lines}
    named = {name for names in sets.values() for name in names}
    assert named == {name.removeprefix("com.microsoft.") for name in ort.inspect(folder / "model.ort").operators}
    assert {"QLinearConv", "QGemm"} <= set(sets["com.microsoft", "1"])
    assert "QuantizeLinear" in sets["ai.onnx", "19"]


@pytest.mark.slow
def test_onnx_runtimes_own_tool_reads_the_same_operators(
    built: Mapping[str, tuple[Wrapper, Path, Lowered]], tmp_path: Path
) -> None:
    """In a process of its own: it puts a folder of its package on the module path."""
    folder, out = built["image"][1], tmp_path / "theirs.config"
    code = (
        "import sys, pathlib; from onnxruntime.tools.ort_format_model import create_config_from_models as make;"
        "make([pathlib.Path(sys.argv[1])], pathlib.Path(sys.argv[2]), False)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder / "model.ort"), str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    theirs = [line for line in out.read_text().splitlines() if not line.startswith("#")]
    ours = (folder / "required_operators.config").read_text().splitlines()[1:]
    assert sorted(ours) == sorted(theirs)


@pytest.mark.slow
def test_basic_keeps_the_operators_that_providers_of_phones_take(
    built: Mapping[str, tuple[Wrapper, Path, Lowered]],
) -> None:
    module, folder, lowered = built["basic"]
    assert not any("." in name for name in ort.inspect(folder / "model.ort").operators)
    assert any("." in name for name in ort.inspect(built["text"][1] / "model.ort").operators)
    found = lowered.encodings["providers"]["NNAPI"]
    assert 0 < found["taken"] <= found["operators"]
    assert sqnr(module, folder, lowered, image_inputs(2)) > 110


def test_the_same_bytes_on_every_writing(image: tuple[Wrapper, Traced], tmp_path: Path) -> None:
    """ONNX Runtime itself writes a table in the order of a hash table: it hardly ever writes 4 equal files."""
    model = onnx.load_model(_plain(tmp_path, image))
    found = set()
    for number in range(4):
        _onnx_mobile.write(model, tmp_path / f"{number}.ort", "all")
        found.add((tmp_path / f"{number}.ort").read_bytes())
    (data,) = found
    assert canonical(data) == data


def _plain(folder: Path, image: tuple[Wrapper, Traced]) -> Path:
    module, traced = image
    given = defaults(onnx_cpu)
    assignment = Assignment(schemes={}, kinds=kinds_of(module))
    onnx_cpu.lower(traced, lower_request(folder, given, assignment=assignment))
    return folder / "model.onnx"


# --- what providers of phones take ------------------------------------------------------------------------------------


def model_of(nodes: list[onnx.NodeProto], shape: list[int | str]) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    weight = helper.make_tensor("w", TensorProto.FLOAT, [4, 4], list(range(16)))
    graph = helper.make_graph(nodes, "g", [x], [y], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_findings_name_what_each_provider_leaves_and_why() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Det", ["a"], ["b"]),
        helper.make_node("Relu", ["b"], ["y"]),
    ]
    found = _onnx_mobile.usability(model_of(nodes, [4, 4]))
    assert found["NNAPI"] == {"operators": 3, "taken": 2, "parts": 2, "left": ["Det"], "dynamic": 0}
    assert found["XNNPACK"] == {"operators": 3, "taken": 1, "parts": 1, "left": ["Det", "Relu"], "dynamic": 0}
    assert _onnx_mobile.notes(found)[0] == "NNAPI takes 2 of 3 operators in 2 parts; not Det"


def test_dimensions_that_vary_are_told_apart_from_operators_that_are_not_taken() -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["a"]), helper.make_node("Relu", ["a"], ["y"])]
    found = _onnx_mobile.usability(model_of(nodes, ["batch", 4]))
    assert (found["NNAPI"]["taken"], found["NNAPI"]["left"], found["NNAPI"]["dynamic"]) == (0, [], 2)
    assert "2 for dimensions that vary" in _onnx_mobile.notes(found)[0]
    assert found["XNNPACK"]["taken"] == 1  # a product of matrices, whatever their sizes


# --- refusals and damage ----------------------------------------------------------------------------------------------


def test_a_network_beyond_the_formats_limit_is_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_onnx_mobile, "EXTERNAL_DATA_FROM_BYTES", 10)
    model = model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], [4, 4])
    model.graph.initializer[0].raw_data = bytes(64)
    with pytest.raises(StageFailed, match=r"(?s)a .ort file cannot hold .* GiB of weights.*onnx-cpu"):
        _onnx_mobile.write(model, tmp_path / "m.ort", "all")


def test_an_operator_that_onnx_runtime_lacks_is_one_clear_failure(tmp_path: Path) -> None:
    model = model_of([helper.make_node("Nothing", ["x"], ["y"], domain="com.nobody")], [4, 4])
    model.opset_import.add(domain="com.nobody", version=1)
    with pytest.raises(StageFailed, match=r"(?s)cannot write the network in its own format: .*Nothing.*opset"):
        _onnx_mobile.write(model, tmp_path / "m.ort", "all")


def test_several_methods_are_refused_by_name() -> None:
    from edgebake.target import Asked

    asked = Asked(
        scheme="fp32",
        module_schemes=(),
        options=defaults(onnx_mobile),
        device=None,
        inputs={"prefill": (), "decode": ()},
        varying=(),
        channels=None,
    )
    (refusal,) = onnx_mobile.refusals(asked)
    assert refusal.what == "onnx-mobile takes networks of one method, not prefill, decode"
    assert "a component of each method" in refusal.fix
    assert list(onnx_mobile.refusals(replace(asked, inputs={"forward": ()}))) == []


@pytest.mark.slow
def test_int8_products_are_not_judged_where_they_saturate(
    built: Mapping[str, tuple[Wrapper, Path, Lowered]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "has_vnni", lambda: False)
    _, folder, lowered = built["image"]
    with pytest.raises(NotMeasured, match="QGemm in int8 saturates on this processor, which lacks VNNI"):
        runner.open(folder / lowered.entry, lowered.signature)
    _, folder, lowered = built["text"]
    assert runner.open(folder / lowered.entry, lowered.signature).call("forward", text_inputs(1)[0])


@pytest.mark.slow
def test_cut_empty_and_foreign_files_are_damaged(
    built: Mapping[str, tuple[Wrapper, Path, Lowered]], tmp_path: Path
) -> None:
    _, folder, lowered = built["image"]
    data = (folder / "model.ort").read_bytes()
    for content in (b"", data[:100], data[: len(data) // 2], b"\0\0\0\0ET12" + bytes(64)):
        (tmp_path / "model.ort").write_bytes(content)
        with pytest.raises(ArtifactDamaged, match="no whole ONNX Runtime file"):
            ort.inspect(tmp_path / "model.ort")
        with pytest.raises(ArtifactDamaged, match="ONNX Runtime cannot load the file"):
            runner.open(tmp_path / "model.ort", lowered.signature)
    with pytest.raises(ArtifactDamaged, match="cannot be read"):
        ort.inspect(tmp_path / "none.ort")
    with pytest.raises(ArtifactDamaged, match="is not there"):
        runner.open(tmp_path / "none.ort", lowered.signature)
    with pytest.raises(StageFailed, match=r"wrote no whole \.ort file"):
        canonical(b"\0\0\0\0ET12" + bytes(64))


@pytest.mark.slow
def test_flipped_bytes_are_read_or_refused_but_never_crash(
    built: Mapping[str, tuple[Wrapper, Path, Lowered]], tmp_path: Path
) -> None:
    data = (built["image"][1] / "model.ort").read_bytes()
    chance = random.Random(0)
    refused = 0
    path = tmp_path / "flipped.ort"
    for _ in range(150):
        flipped = bytearray(data)
        for _ in range(4):
            flipped[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(flipped)
        try:
            ort.inspect(path)
        except ArtifactDamaged:
            refused += 1
    assert refused > 20
