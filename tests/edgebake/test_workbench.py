"""What a worker keeps between the targets of a component."""

from __future__ import annotations

from pathlib import Path

from edgebake import devices
from edgebake.check import check
from edgebake.recipe_yaml import read
from edgebake.store import Store
from edgebake.workbench import Bench, read_samples

RECIPE = """\
name: one
model: {source: python, path: "net:make"}
inputs: {x: {shape: [1, seq]}}
dims: {seq: {min: 4, max: 64}}
samples: {evaluation: {noise: true, count: 8}}
targets:
  - onnx-cpu
  - {target: onnx-cpu, name: fixed, dims: {seq: {min: 64}}}
"""


def test_a_target_that_fixes_a_dimension_gets_samples_of_its_own(tmp_path: Path, store: Store) -> None:
    (tmp_path / "net.py").write_text("def make(): pass\n")
    (tmp_path / "one.yaml").write_text(RECIPE)
    units, _ = check([read(tmp_path / "one.yaml")], trust=False)
    bench = Bench(store=store, emit=lambda *_, **__: None, trust=True, device=devices.row)
    free, fixed = (read_samples(bench, unit, "evaluation") for unit in units)
    assert {sample.calls[0].tensors()["x"].shape for sample in fixed} == {(1, 64)}
    assert len({sample.calls[0].tensors()["x"].shape for sample in free}) > 1
