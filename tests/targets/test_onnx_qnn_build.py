"""Whole builds for a Snapdragon's NPU with the command line: what is delivered, said and measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from baking import digests, finish, kitchen, start
from edgebake_targets import onnx_qnn

RULE: dict[str, Any] = {"target": "onnx-qnn", "device": "sm8650", "scheme": "w8a16"}
installed = pytest.mark.skipif(onnx_qnn.missing() is not None, reason="onnxruntime-qnn is not installed")


@installed
@pytest.mark.slow
def test_a_build_delivers_binary_and_plain_file_and_judges_on_the_simulator(tmp_path: Path) -> None:
    # Random weights and 8 samples to calibrate with: outputs beyond their ranges are cut (17.8 dB).
    made = kitchen(tmp_path, [RULE], limits={"parity": {"cosine": 0.98}, "delegated": "100%"})
    done = made.build()
    assert done.code == 0, done.out
    (result,) = done.results
    folder = made.out / "tiny" / "model" / "onnx-qnn" / "sm8650" / "w8a16"
    assert {path.name for path in folder.iterdir()} >= {"model.onnx", "model.plain.onnx", "manifest.json"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["encodings"]["runtime"]["soc_model"] == "57"
    assert {file["path"] for file in manifest["files"]} == {"model.onnx", "model.plain.onnx"}
    measured = json.loads((folder / "measurements.json").read_text())
    assert measured["runner"] == {"name": "onnxruntime-qnn", "kind": "simulated"}
    assert measured["latency"]["median_ms"] is None
    assert measured["latency"]["reason"] == "onnxruntime-qnn simulates the artifact: its speed says nothing"
    assert measured["delegation"]["share"] == 1.0
    assert result["unit"] == "tiny/model@onnx-qnn+sm8650#w8a16"


@installed
@pytest.mark.slow
def test_other_folders_stores_and_processes_give_the_same_bytes(tmp_path: Path) -> None:
    found = []
    for folder in (tmp_path / "here", tmp_path / "quite" / "somewhere else"):
        made = kitchen(folder, [RULE])
        assert made.build().code == 0
        found.append(digests(made.out))
    assert found[0] == found[1]
    assert any(name.endswith("model.onnx") for name in found[0])


@pytest.mark.skipif(onnx_qnn.missing() is None, reason="onnxruntime-qnn is installed")
def test_without_the_toolchain_the_build_says_what_to_install_and_does_the_rest(tmp_path: Path) -> None:
    made = kitchen(tmp_path, ["onnx-cpu", RULE])
    done = made.build()
    assert done.code == 3, done.err
    assert "pip install" in done.out + done.err and "onnxruntime-qnn==2.7.0" in done.out + done.err
    assert (made.out / "tiny" / "model" / "onnx-cpu" / "any" / "fp32" / "model.onnx").is_file()


DETERMINED = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 8)

    def forward(self, x):
        hidden = self.first(x)
        return self.second(hidden * torch.linalg.det(hidden.reshape(1, 8, 8)))

def build():
    return Net()
"""


@installed
@pytest.mark.slow
def test_an_operator_that_the_npu_lacks_ends_one_unit_and_shows_in_the_other(tmp_path: Path) -> None:
    """Stage, operator and remedy; with fallback the limit of 100 % names what lies outside, and the table its unit."""
    half = {**RULE, "scheme": "fp16"}
    rules = [half, {**half, "name": "fallback", "options": {"cpu_fallback": True}}]
    made = kitchen(tmp_path, rules, model={"source": "python", "path": "det_net:build"}, limits={"delegated": "100%"})
    (made.recipe.parent / "det_net.py").write_text(DETERMINED)
    done = made.build()
    assert done.code == 4, done.err
    refused, fallback = done.results
    (problem,) = refused["failure"]["problems"]
    assert refused["failure"]["stage"] == "lower"
    assert "1 operators do not run on the NPU of sm8650: Det " in problem["what"]
    assert "options: {cpu_fallback: true}" in problem["fix"]
    (verdict,) = (v for v in fallback["verdicts"] if v["limit"] == "delegated")
    assert (verdict["state"], verdict["value"]) == ("fail", 1.0)
    assert "outside the backend: Det x1" in verdict["reason"]
    folder = made.out / "tiny" / "model" / "onnx-qnn" / "sm8650" / "fallback"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [(row["unit"], row["subgraphs"]) for row in manifest["delegation"]["units"]] == [("NPU", 2), ("CPU", 0)]
    assert manifest["delegation"]["border_bytes"] > 0
    size = json.loads((folder / "measurements.json").read_text())["size"]
    assert size["compiled"] > size["compiled_from"] >= 2 * (32 * 64 + 64 * 8)
    assert size["beside"] == (folder / "model.plain.onnx").stat().st_size
    assert size["bytes"] == sum(size[part] for part in ("weights", "scales", "graph", "compiled", "beside"))
    said = finish(start("inspect", folder))
    assert "  CPU by CPUExecutionProvider: 1 operator (Det 1), 0 MACs\n" in said.out
    assert "  outside: Det x1, Operators of type `Det` are not supported by QNN EP" in said.out
