"""Artifacts opened in this process and in one of their own: same outputs, and memory of the work alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgebake import reference, runclient, signatures, weighing
from edgebake.errors import StageFailed
from edgebake.types import Call, MethodSignature, ReferenceCall, Sample, SampleSet, Signature, TensorSpec
from edgebake_targets.runners import onnxruntime_cpu

MIB = 2**20
ROWS = 4 * MIB  # 16 MiB of float32 in, 16 MiB out
SIGNATURE = Signature(
    methods={
        "forward": MethodSignature(
            inputs=(TensorSpec(name="x", shape=(1, ROWS), dtype="float32"),),
            outputs=(TensorSpec(name="y", shape=(1, ROWS), dtype="float32"),),
        )
    }
)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("artifact")
    nodes = [helper.make_node("Neg", ["x"], ["n"]), helper.make_node("Exp", ["n"], ["y"])]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, ROWS]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, folder / "model.onnx")
    x = np.linspace(-1, 1, ROWS, dtype=np.float32)[None]
    sample = Sample(calls=(Call(method="forward", inputs={"x": x}),), source="0")
    seen = ReferenceCall(method="forward", inputs={"x": x}, outputs={"y": np.exp(-x)})
    (folder / "reference").mkdir()
    reference.write(folder / "reference", SampleSet(samples=(sample,)), [(seen,)], {})
    return folder / "model.onnx", folder / "reference"


def measured(artifact: tuple[Path, Path], *, inside: bool) -> tuple[Mapping[str, Any], np.ndarray]:
    given = signatures.to_json(SIGNATURE)
    with runclient.opened("onnxruntime-cpu", artifact[0], given, artifact[1], inside=inside) as client:
        assert len(client.time(0, 3)) == 3
        return client.opened, client.outputs()["0.0.y"]


def test_both_ways_give_the_same_outputs_and_weigh_the_same(artifact: tuple[Path, Path]) -> None:
    used_before = np.ones(64 * MIB)  # 512 MiB that this process once held must not hide the artifact's 32
    del used_before
    apart, outputs_apart = measured(artifact, inside=False)
    inside, outputs_inside = measured(artifact, inside=True)
    assert np.array_equal(outputs_apart, outputs_inside)
    grown = [(at["peak_bytes"] - at["base_bytes"]) / MIB for at in (apart, inside)]
    assert all(30 < mib < 90 for mib in grown)
    assert abs(grown[0] - grown[1]) < 12


def test_a_runner_that_asks_for_a_process_of_its_own_gets_one(
    artifact: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime_cpu, "APART", True, raising=False)
    monkeypatch.setattr(onnxruntime_cpu, "open", lambda *_: pytest.fail("opened in this process"))
    _, outputs = measured(artifact, inside=True)
    assert outputs.shape == (1, ROWS)


def test_a_process_that_dies_is_one_clear_failure(artifact: tuple[Path, Path], tmp_path: Path) -> None:
    broken = tmp_path / "model.onnx"
    broken.write_bytes(b"no model")
    with pytest.raises(StageFailed, match="ended with exit code 1 while asked to open"):
        measured((broken, artifact[1]), inside=False)


@pytest.mark.skipif(not weighing.forgets(), reason="only Linux lets a process forget its peak memory")
def test_only_what_is_used_after_the_start_counts() -> None:
    np.ones(32 * MIB).sum()  # 256 MiB, freed
    base = weighing.start()
    held = np.ones(8 * MIB)
    assert 60 * MIB < weighing.peak() - base < 72 * MIB
    assert held.all()


def test_a_runner_says_what_its_process_is_started_with(
    artifact: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime_cpu, "environment", lambda: {"PYTHONHOME": "/nowhere"}, raising=False)
    with pytest.raises(StageFailed, match="ended with exit code 1 while asked to open"):
        measured(artifact, inside=False)
