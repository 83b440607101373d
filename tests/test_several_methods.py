"""A component of two methods that share weights, built, run, judged and judged again on every format."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import baking

pytestmark = pytest.mark.slow

NETWORK = """
import torch
from torch import nn


class Encode(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(x)


class Decode(Encode):
    def forward(self, x, y):
        return self.body(x) * y


def build():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 8))
    return {"encode": Encode(body), "decode": Decode(body)}
"""
RECIPE = {
    "name": "two",
    "model": {"source": "python", "path": "two_net:build"},
    "methods": {"encode": {"x": {"shape": [1, 16]}}, "decode": {"x": {"shape": [1, 16]}, "y": {"shape": [1, 8]}}},
    "samples": {"evaluation": {"noise": True, "count": 4}},
    "limits": {"parity": {"sqnr_db": 30}},
    "targets": ["onnx-cpu", {"target": "onnx-cpu", "scheme": "w8"}, "executorch-xnnpack", "coreml"],
}


def test_two_methods_are_built_and_judged_by_every_format(tmp_path: Path) -> None:
    (tmp_path / "two_net.py").write_text(NETWORK)
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    store, out = tmp_path / "store", tmp_path / "dist"
    done = baking.finish(baking.start("build", path, "--store", store, "--out", out))
    assert done.code == 0, done.err
    assert "4 passed" in done.out
    again = baking.finish(baking.start("verify", out))
    assert again.code == 0, again.err
    files = {p.name for p in (out / "two/model/onnx-cpu/any/fp32").iterdir()}
    assert {"encode.onnx", "decode.onnx"} <= files
