"""Verbs that list what there is: targets, devices, schema, doctor; and init, which writes a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from edgebake import devices
from edgebake.errors import EXIT_RECIPE, EXIT_TOOLCHAIN
from edgebake.target import TARGETS, Missing, find_target
from verbs import Edgebake, config, refused

BERT = {"vocab_size": 99, "model_type": "bert", "max_position_embeddings": 64}


def test_targets_are_listed_with_their_schemes(edgebake: Edgebake) -> None:
    said = edgebake("targets")
    assert said.code == 0
    for name in TARGETS.names():
        assert name in said.out
    found = {row["target"]: row for row in edgebake("targets", "--json").json}
    assert set(found) == set(TARGETS.names())
    assert max(map(len, said.out.splitlines())) < 120
    assert "8da4w" in next(s for s in found["onnx-cpu"]["schemes"] if s["scheme"] == "w4g32a8d")["aliases"]


def test_a_target_in_full_explains_its_schemes_and_options(edgebake: Edgebake) -> None:
    full = edgebake("targets", "onnx-cpu").out
    assert full.startswith("onnx-cpu  ready\n  runs here: onnxruntime-cpu (executed)\n")
    assert "\n  w4g32a8d (8da4w" in full
    assert "\n  option calibrate=minmax: " in full
    assert "coreml" not in full
    one = edgebake("targets", "onnx-cpu", "--json").json
    assert [row["target"] for row in one] == ["onnx-cpu"]
    refused(edgebake("targets", "onnx-cup"), EXIT_RECIPE, "did you mean 'onnx-cpu'")


def test_devices_in_short_are_a_table(edgebake: Edgebake) -> None:
    head, *rows = edgebake("devices").out.splitlines()
    assert head.split() == ["device", "vendor", "NPU", "GiB", "GB/s"]
    table = {row.split()[0]: row for row in rows}
    assert set(table) == set(devices.names())
    assert table["m4-max"].split() == ["m4-max", "Apple", "M4", "Max", "apple", "neural-engine-16", "128", "546"]
    assert table["a14"].endswith("  -     -")
    assert max(map(len, rows)) < 100


def test_a_device_in_full_names_its_sources_and_what_fits_it(edgebake: Edgebake) -> None:
    full = edgebake("devices", "sm8650").out
    assert full.startswith("sm8650: Snapdragon 8 Gen 3, qualcomm, android\n  npu hexagon-v75: ")
    assert "  soc_model 57: QNN's number of the chip\n    ExecuTorch 1.4.1, QcomChipset" in full
    assert "\n  -  coreml does not run on sm8650 (Snapdragon 8 Gen 3): its vendor is qualcomm, not apple\n" in full
    assert "\n  ok onnx-cpu: fp32, fp16, w8" in full
    phone = edgebake("devices", "a17-pro").out
    assert "  ram_gib not known: Apple does not publish" in phone
    line = next(line for line in phone.splitlines() if line.startswith("       w4, "))
    assert ": with minimum_os iOS18 or macOS15; a17-pro (Apple A17 Pro) came with iOS17" in line


def test_devices_for_programs(edgebake: Edgebake) -> None:
    one = edgebake("devices", "m4", "--json").json["m4"]
    assert (one["vendor"], one["ram_gib"]) == ("apple", 32)
    assert one["sources"]["ram_gib"].startswith("Apple, ")
    assert one["targets"]["coreml"]["schemes"]["w4"]["options"] == {"minimum_os": ["iOS18", "macOS15"]}
    every = edgebake("devices", "--json").json
    assert every["sm8650"]["targets"]["coreml"]["fits"] is False
    assert "its vendor is qualcomm" in every["sm8650"]["targets"]["coreml"]["why_not"]
    assert every["m4"] == one


def test_an_unknown_device_is_refused_with_the_nearest(edgebake: Edgebake) -> None:
    refused(edgebake("devices", "sm865"), EXIT_RECIPE, "did you mean 'sm8650'")
    refused(edgebake("devices", "Snapdragon 8 Elite"), EXIT_RECIPE, "did you mean 'sm8750' (Snapdragon 8 Elite)")


def test_the_schema_is_json_whether_asked_or_not(edgebake: Edgebake) -> None:
    assert edgebake("schema").json == edgebake("schema", "--json").json


def test_doctor_finds_everything_or_says_what_to_do(edgebake: Edgebake, monkeypatch: pytest.MonkeyPatch) -> None:
    here = edgebake("doctor", "--json")
    gaps = [name for name, target in here.json["targets"].items() if target["missing"]]
    assert here.code == (EXIT_TOOLCHAIN if gaps else 0)
    target: Any = find_target("onnx-cpu")
    monkeypatch.setattr(target, "missing", lambda: Missing(reason="no onnx", remedy="pip install 'edgebake[onnx]'"))
    said = edgebake("doctor")
    assert said.code == EXIT_TOOLCHAIN
    assert "MISSING onnx-cpu" in said.out
    assert "remedy: pip install 'edgebake[onnx]'" in said.out


def test_init_writes_a_recipe_that_check_takes(
    edgebake: Edgebake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file({"one": np.zeros(1, np.float32)}, config(tmp_path / "own/Big BERT!", BERT) / "model.safetensors")
    said = edgebake("init", "own/Big BERT!")
    assert said.code == 0, said.err
    assert said.out == "wrote big-bert.yaml; next: edgebake check big-bert.yaml, then edgebake build big-bert.yaml\n"
    checked = edgebake("check", "big-bert.yaml")
    assert checked.code == 0, checked.err
    assert "noise" in checked.out


def test_a_recipe_in_another_folder_still_finds_its_model(
    edgebake: Edgebake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file({"one": np.zeros(1, np.float32)}, config(tmp_path / "bert", BERT) / "model.safetensors")
    (tmp_path / "recipes").mkdir()
    assert edgebake("init", "bert", "-o", "recipes/mine.yaml", "--json").json["recipe"] == "recipes/mine.yaml"
    assert 'path: "../bert"' in (tmp_path / "recipes/mine.yaml").read_text()
    assert edgebake("check", "recipes/mine.yaml").code == 0


def test_init_overwrites_only_when_told(edgebake: Edgebake, tmp_path: Path) -> None:
    model, recipe = config(tmp_path / "bert", BERT), tmp_path / "bert.yaml"
    recipe.write_text("mine")
    refused(edgebake("init", model, "-o", recipe), EXIT_RECIPE, "exists already", "--force")
    assert recipe.read_text() == "mine"
    assert edgebake("init", model, "-o", recipe, "--force").code == 0
    refused(edgebake("init", model, "-o", tmp_path), EXIT_RECIPE, "is a folder")
    refused(edgebake("init", model, "-o", tmp_path / "no/x.yaml"), EXIT_RECIPE, "there is no folder")


def test_what_init_says_to_type_next_can_be_typed(
    edgebake: Edgebake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = config(tmp_path / "bert", BERT)
    monkeypatch.chdir(tmp_path)
    assert "then edgebake build 'my model.yaml'" in edgebake("init", model, "-o", "my model.yaml").out
    assert "notes" in edgebake("init", model, "-o", "second.yaml", "--json").json
    spaced = config(tmp_path / "my bert", BERT)
    refused(edgebake("build", spaced.relative_to(tmp_path)), EXIT_RECIPE, "edgebake init 'my bert'")


def test_init_of_what_is_no_model(edgebake: Edgebake, tmp_path: Path) -> None:
    refused(edgebake("init", tmp_path), EXIT_RECIPE, "has no config.json")
    for name, hint in (
        ("model.onnx", "a .onnx is what edgebake makes"),
        ("model.safetensors", "the folder with the config.json that these weights belong to"),
        ("net.py", "for a network in Python code, write the recipe by hand"),
        ("tiny.yaml", "a recipe is built as it is"),
        ("notes.txt", "a hub id"),
    ):
        (tmp_path / name).write_bytes(b"")
        refused(edgebake("init", tmp_path / name), EXIT_RECIPE, "no model that edgebake reads", hint)
    refused(edgebake("init", "pkg://"), EXIT_RECIPE, "'pkg://' names no package", "pkg://package/folder")
    refused(edgebake("init", tmp_path / "none"), EXIT_RECIPE, "there is no")
