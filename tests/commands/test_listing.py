"""Verbs that list what there is: targets, devices, schema, doctor; and init, which writes a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

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
    assert "8da4w" in next(s for s in found["onnx-cpu"]["schemes"] if s["scheme"] == "w4g32a8d")["aliases"]


def test_devices_in_short_and_in_full(edgebake: Edgebake) -> None:
    assert "m4-max    Apple M4 Max" in edgebake("devices").out
    full = edgebake("devices", "sm8650").out
    assert full.startswith("sm8650\n  title: Snapdragon 8 Gen 3\n")
    assert "  sources:\n    npu: " in full
    assert edgebake("devices", "m4", "--json").json["m4"]["vendor"] == "apple"
    refused(edgebake("devices", "sm865"), EXIT_RECIPE, "did you mean 'sm8650'")


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
    config(tmp_path / "own/Big BERT!", BERT, "model.safetensors")
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
    config(tmp_path / "bert", BERT, "model.safetensors")
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
