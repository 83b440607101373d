"""Predictions held against what builds then write and take: 5 % for the file, 15 % for the memory of this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import baking
from decoder_cases import TINY, Written
from edgebake.llm import fit
from edgebake.recipe_yaml import read
from edgebake.units import units_of

SMALL = {**TINY, "hidden_size": 256, "intermediate_size": 1024, "vocab_size": 4096}
RULES = {"modules": {"*embed_tokens": "w8", "lm_head": "w8a8d"}}


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule",
    [
        {"target": "onnx-cpu"},
        {"target": "onnx-cpu", "scheme": "w4g32"},
        {"target": "onnx-cpu", "scheme": "w8"},
        {"target": "executorch-xnnpack"},
        {"target": "executorch-xnnpack", "scheme": "w4g32a8d", "compress": RULES},
    ],
    ids=lambda rule: f"{rule['target']}-{rule.get('scheme', 'fp32')}",
)
def test_builds_are_as_predicted(decoder_recipe: Written, tmp_path: Path, rule: dict[str, Any]) -> None:
    path = decoder_recipe([rule], SMALL)
    file = read(str(path), ())
    (unit,) = units_of(file.recipe, file.base)
    predicted = fit.predict(unit)
    done = baking.finish(baking.start("build", path, "--store", tmp_path / "store", "--out", tmp_path / "dist"))
    assert done.code == 0, done.err
    (measured,) = (tmp_path / "dist").rglob("measurements.json")
    found = json.loads(measured.read_text("utf-8"))
    assert predicted.size.total == pytest.approx(found["size"]["bytes"], rel=0.05)
    peak = max(stage["peak_mib"] for stage in found["stages"].values()) * 2**20
    assert predicted.export_peak_bytes == pytest.approx(peak, rel=0.15)
