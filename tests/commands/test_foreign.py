"""`edgebake verify` of model files that edgebake did not make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper

from edgebake.errors import EXIT_LIMIT, EXIT_RECIPE
from mil_packages import function, held, model, operation, save
from verbs import Baked, Edgebake, refused

RNG = np.random.default_rng(5)
WEIGHT = RNG.standard_normal((4, 3), dtype=np.float32)
INPUT = RNG.standard_normal((6, 4), dtype=np.float32)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An .onnx of one matrix, with a row count of any size."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "one",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["rows", 4])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["rows", 3])],
        [onnx.numpy_helper.from_array(WEIGHT, "w")],
    )
    path = tmp_path_factory.mktemp("foreign") / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def recorded(folder: Path, **arrays: NDArray[Any]) -> Path:
    path = folder / "calls.npz"
    np.savez(path, **arrays)
    return path


def half(folder: Path, factor: float) -> Path:
    """A Core ML package that multiplies in float16."""
    given = {"x": ("float32", (1, 4))}
    body = [
        operation("cast", {"low": ("float16", (1, 4))}, x="%x", dtype="fp16"),
        operation("mul", {"more": ("float16", (1, 4))}, x="%low", y=held(np.float16(factor))),
        operation("cast", {"y": ("float32", (1, 4))}, x="%more", dtype="fp32"),
    ]
    return save(folder / "half.mlpackage", model(function(given, body, ["y"])))


def test_outputs_that_are_right_pass_and_wrong_ones_fail(edgebake: Edgebake, network: Path, tmp_path: Path) -> None:
    right = recorded(tmp_path, x=INPUT, y=INPUT @ WEIGHT)
    said = edgebake("verify", network, "--against", right, "--limit", "sqnr_db=100")
    assert said.code == 0, said.err
    assert "1 passed" in said.out
    swapped = WEIGHT[::-1]
    wrong = recorded(tmp_path, x=INPUT, y=INPUT @ swapped)
    said = edgebake("verify", network, "--against", wrong, "--limit", "sqnr_db=20")
    assert said.code == EXIT_LIMIT
    assert "parity.sqnr_db" in said.out


def test_without_outputs_a_package_is_held_against_itself_unrounded(edgebake: Edgebake, tmp_path: Path) -> None:
    said = edgebake("verify", half(tmp_path / "fine", 1.5), "--limit", "sqnr_db=50")
    assert said.code == 0, said.out
    assert "held against itself without rounding" in said.out
    said = edgebake("verify", half(tmp_path / "large", 60000.0), "--json")
    (row,) = said.json["results"]
    assert row["measurements"]["modes"]["declared"]["overflow"]["operator"] == "mul"
    assert row["measurements"]["modes"]["fp32"]["overflow"] is None


def test_nothing_is_judged_without_a_measure(edgebake: Edgebake, network: Path) -> None:
    said = edgebake("verify", network)
    assert said.code != 0
    assert "net.onnx computes in float32 or has no runner that computes without rounding" in said.out
    assert "give --against FILE.npz" in said.out


def test_a_file_of_an_artifact_folder_is_better_judged_with_its_folder(edgebake: Edgebake, baked: Baked) -> None:
    (result,) = edgebake("verify", baked.artifact / "model.onnx", "--json").json["results"]
    fix = result["failure"]["problems"][0]["fix"]
    assert fix.startswith(f"edgebake verify {baked.artifact} judges the artifact that it is of; or give --against")


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": INPUT, "z": INPUT}, "has the arrays x, z; the model takes x and returns y"),
        ({"x": INPUT}, "has the arrays x; the model takes x and returns y"),
        ({"x": INPUT, "y": INPUT[:2]}, "differ in their first axis: [2, 6]"),
        ({"x": INPUT[:, :2], "y": INPUT}, "x holds rows of [2], [dim0, 4] is declared"),
        ({"x": INPUT, "y": INPUT[:, None, None]}, "an output array holds rows of [1, 1, 4]"),
    ],
)
def test_arrays_that_do_not_fit_are_named(
    edgebake: Edgebake, network: Path, tmp_path: Path, arrays: dict[str, NDArray[Any]], words: str
) -> None:
    said = edgebake("verify", network, "--against", recorded(tmp_path, **arrays), "--json")
    (row,) = said.json["results"]
    assert words in row["failure"]["problems"][0]["what"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--limit", "sqnr=3"), "--limit 'sqnr=3': no limit 'sqnr'"),
        (("--limit", "cosine=much"), "'much' is not a number"),
        (("--against", "nowhere.npz"), "--against nowhere.npz does not exist"),
        (("--against", __file__), "is no .npz or .safetensors file"),
    ],
)
def test_wrong_options_are_refused(edgebake: Edgebake, network: Path, options: tuple[str, ...], words: str) -> None:
    refused(edgebake("verify", network, *options), EXIT_RECIPE, words)


def test_inputs_of_other_types_are_named(edgebake: Edgebake, tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "one",
        [helper.make_tensor_value_info("x", onnx.TensorProto.DOUBLE, [1])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.DOUBLE, [1])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "d.onnx")
    said = edgebake("verify", tmp_path / "d.onnx", "--against", recorded(tmp_path, x=INPUT, y=INPUT))
    assert "the input x is of type float64, which cannot be fed here" in said.out


def test_artifact_folders_know_their_own_limits(edgebake: Edgebake, tmp_path: Path) -> None:
    refused(edgebake("verify", tmp_path, "--limit", "cosine=0.9"), EXIT_RECIPE, "--limit is for model files")
