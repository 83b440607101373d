"""Compute units of a device: each held against the reference, timed, and missing with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgebake import compute_units, runclient, signatures
from edgebake.reference import Reference, write
from edgebake.target import NotMeasured, Session
from edgebake.types import (
    Call,
    MethodSignature,
    ReferenceCall,
    Sample,
    SampleSet,
    Signature,
    TensorSpec,
)
from edgebake_targets.runners import onnxruntime_cpu

OUTPUT = np.linspace(-1, 1, 32, dtype=np.float32)
SIGNATURE = Signature(
    methods={
        "forward": MethodSignature(
            inputs=(TensorSpec(name="x", shape=(32,), dtype="float32"),),
            outputs=(TensorSpec(name="y", shape=(32,), dtype="float32"),),
        )
    }
)
PLACED = {"GPU": {"operators": {"conv": 3}, "cost": 0.9}, "CPU": {"operators": {"gather": 1}, "cost": None}}


class Doubling:
    """Twice its input: exactly on the cpu, in float16 on the gpu, not at all on the npu."""

    units = ("cpu", "gpu", "npu")

    def call(self, method: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        assert method == "forward"
        return {"y": inputs["x"] * 2}

    def call_unit(self, unit: str, method: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        if unit == "npu":
            raise NotMeasured("Core ML cannot run it there: no such unit")
        exact = self.call(method, inputs)
        return exact if unit == "cpu" else {name: value.astype(np.float16) for name, value in exact.items()}

    def placement(self) -> dict[str, dict[str, Any]]:
        return PLACED


@pytest.fixture
def recorded(tmp_path: Path) -> Reference:
    (tmp_path / "reference").mkdir()
    inputs = [{"x": OUTPUT * (i + 1)} for i in range(10)]
    samples = SampleSet(samples=tuple(Sample(calls=(Call(inputs=each),), source="s") for each in inputs))
    calls = ((ReferenceCall(method="forward", inputs=each, outputs={"y": each["x"] * 2}),) for each in inputs)
    write(tmp_path / "reference", samples, calls, {"model": {}})
    return Reference(tmp_path / "reference")


def test_each_unit_is_measured_or_says_why_not(recorded: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(_entry: Path, _signature: Signature) -> Session:
        return Doubling()

    monkeypatch.setattr(onnxruntime_cpu, "open", opened)
    given = signatures.to_json(SIGNATURE)
    with runclient.opened("onnxruntime-cpu", recorded.folder, given, recorded.folder, inside=True) as client:
        assert client.opened["units"] == ["cpu", "gpu", "npu"]
        found = compute_units.measure(client.opened["units"], recorded, 3, client)
        assert client.placement() == PLACED
    assert found["cpu"]["outputs"]["y"]["sqnr_db"] == 200
    assert 60 < found["gpu"]["outputs"]["y"]["sqnr_db"] < 90
    assert found["gpu"]["calls"] == 8
    assert found["gpu"]["median_ms"] > 0
    assert found["npu"] == {"reason": "Core ML cannot run it there: no such unit"}
