"""Rounding modes as a diagnosis: what is measured, and when it is worth a warning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgebake import modes, runclient, signatures
from edgebake.reference import Reference, write
from edgebake.types import Call, MethodSignature, ReferenceCall, Sample, SampleSet, Signature, TensorSpec
from edgebake_targets.runners import onnxruntime_cpu

OUTPUT = np.linspace(-1, 1, 32, dtype=np.float32)


@pytest.fixture
def recorded(tmp_path: Path) -> Reference:
    return written(tmp_path / "reference", 20, 1)


def written(folder: Path, samples: int, calls: int) -> Reference:
    """Every call of sample i gives i + 1 times OUTPUT."""
    folder.mkdir()
    inputs = {"x": np.zeros(2, np.float32)}
    given = SampleSet(
        samples=tuple(Sample(calls=(Call(inputs=inputs),) * calls, source=f"s{i}") for i in range(samples))
    )
    gave = (ReferenceCall(method="forward", inputs=inputs, outputs={"y": OUTPUT * (i + 1)}) for i in range(samples))
    write(folder, given, ((call,) * calls for call in gave), {"model": {}})
    return Reference(folder)


def test_a_few_samples_are_spread_over_all(recorded: Reference) -> None:
    assert modes.chosen(recorded) == [0, 2, 5, 7, 10, 12, 15, 17]
    assert modes.budget(recorded)[0] == modes.chosen(recorded)


@pytest.mark.parametrize(
    ("samples", "calls", "taken", "each"), [(20, 4, 8, 4), (3, 5, 3, 10), (5, 24, 1, 32), (2, 40, 1, 32)]
)
def test_of_sequences_a_few_are_run_as_far_as_the_budget_goes(
    tmp_path: Path, samples: int, calls: int, taken: int, each: int
) -> None:
    chosen, most = modes.budget(written(tmp_path / "reference", samples, calls))
    assert (len(chosen), most) == (taken, each)
    assert taken * min(calls, each) <= modes.IN_SEQUENCES


def run(mode: str, samples: list[int], _calls: int) -> tuple[Mapping[str, Any], Mapping[str, Mapping[str, str]]]:
    noise = {"fp32": 2**-20, "declared": 2**-10, "fp16-worst": 2**-4}[mode]
    outputs = {f"{i}.0.y": OUTPUT * (i + 1) * np.float32(1 + noise) for i in samples}
    masked = {"mask": "select"}
    overflown = (
        {**masked, "scores": "matmul of encoder.attention", "probabilities": "softmax"}
        if mode == "fp16-worst"
        else masked
    )
    return outputs, {f"{i}.0": overflown if i == 5 else masked for i in samples}


def test_each_mode_is_held_against_the_reference(recorded: Reference) -> None:
    found = modes.measure(["fp32", "declared", "fp16-worst"], recorded, run)
    decibels = {mode: row["outputs"]["y"]["sqnr_db"] for mode, row in found.items()}
    assert decibels == pytest.approx({"fp32": 120.4, "declared": 60.2, "fp16-worst": 24.1}, abs=0.1)
    assert {row["calls"] for row in found.values()} == {8}
    assert found["declared"]["overflow"] is None  # the mask's infinities are meant
    assert found["fp16-worst"]["overflow"] == {
        "value": "scores",
        "operator": "matmul",
        "module": "encoder.attention",
        "sample": 5,
        "call": 0,
    }


def test_warnings_name_the_overflow_and_a_great_loss(recorded: Reference) -> None:
    said = modes.warnings(modes.measure(["fp32", "declared", "fp16-worst"], recorded, run))
    assert said == [
        "in mode fp16-worst the value scores (matmul of encoder.attention) leaves the range of float16 on sample 5: "
        'options: {keep_float32: "encoder.attention"}, or auto',
        "y falls from 60.2 to 24.1 dB in mode fp16-worst, where a processor also sums in float16",
    ]
    unknown = {"fp16-worst": {"overflow": {"value": "scores", "operator": "matmul", "sample": 5}}}
    assert modes.warnings(unknown) == [
        "in mode fp16-worst the value scores (matmul) leaves the range of float16 on sample 5: "
        "options: {keep_float32: auto}"
    ]


def test_an_infinity_that_spoils_an_output_unrounded_is_named(recorded: Reference) -> None:
    def stored(mode: str, samples: list[int], _calls: int) -> tuple[Mapping[str, Any], Mapping[str, Mapping[str, str]]]:
        values = {f"{i}.0.y": np.full_like(OUTPUT, np.nan) for i in samples}
        return values, {f"{i}.0": {"scores": "mul of encoder"} for i in samples}

    found = modes.measure(["fp32", "declared"], recorded, stored)
    assert {mode: row["overflow"]["module"] for mode, row in found.items()} == {
        "fp32": "encoder",
        "declared": "encoder",
    }


class Summing:
    """Adds to a buffer of its own and to a state that comes in, in half precision where the mode says so."""

    modes = ("fp32", "declared")

    def begin(self) -> None:
        self.seen = np.zeros(1, np.float32)

    def call_mode(
        self, mode: str, _method: str, inputs: Mapping[str, NDArray[Any]]
    ) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
        held = np.float16 if mode == "declared" else np.float32
        self.seen = (self.seen + inputs["x"]).astype(held)
        state = (inputs["state"] + inputs["x"]).astype(held)
        return {"y": self.seen, "next": state}, {} if state < 8 or mode == "fp32" else {"sum": "add of head"}

    def call(self, method: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return self.call_mode("declared", method, inputs)[0]


def test_states_are_carried_through_the_calls_of_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = [TensorSpec(name=name, shape=(1,), dtype="float32") for name in ("x", "state", "y", "next")]
    state = replace(specs[1], role="state", state_from="next")
    method = MethodSignature(inputs=(specs[0], state), outputs=tuple(specs[2:]))
    x = np.array([1.001], np.float32)
    (tmp_path / "reference").mkdir()
    sums = [x * np.float32(n + 1) for n in range(10)]
    recorded = [
        ReferenceCall(method="forward", inputs={"x": x, "state": before}, outputs={"y": after, "next": after})
        for before, after in zip([x * 0, *sums], sums, strict=False)
    ]
    samples = SampleSet(samples=(Sample(calls=(Call(inputs={"x": x}),) * 10, source="s"),) * 2)
    write(tmp_path / "reference", samples, (tuple(recorded) for _ in range(2)), {"model": {}})
    monkeypatch.setattr(onnxruntime_cpu, "open", lambda _entry, _signature: Summing())
    given = signatures.to_json(Signature(methods={"forward": method}))
    folder = tmp_path / "reference"
    with runclient.opened("onnxruntime-cpu", folder, given, folder, inside=True) as client:
        found = modes.measure(client.opened["modes"], Reference(folder), client.in_mode)
    assert {row["calls"] for row in found.values()} == {20}
    for name in ("y", "next"):  # 1.001 lies between two values of float16
        assert found["fp32"]["outputs"][name]["sqnr_db"] > 120
        assert 40 < found["declared"]["outputs"][name]["sqnr_db"] < 80
    assert found["declared"]["overflow"] == {
        "value": "sum",
        "operator": "add",
        "module": "head",
        "sample": 0,
        "call": 7,
    }
    assert "leaves the range of float16 on sample 0, call 7: options" in modes.warnings(found)[0]


def rows(**decibels: dict[str, float]) -> dict[str, Any]:
    return {
        mode.replace("_", "-"): {"outputs": {name: {"sqnr_db": db} for name, db in of.items()}, "overflow": None}
        for mode, of in decibels.items()
    }


def test_what_float16_costs_by_nature_is_no_warning() -> None:
    assert modes.warnings(rows(fp32={"y": 130.0}, declared={"y": 41.9}, fp16_worst={"y": 23.0})) == []
    assert modes.warnings({}) == []


def test_several_outputs_that_fall_are_one_line() -> None:
    found = rows(fp32={"a": 130.0, "b": 120.0, "c": 90.0}, declared={"a": 39.0, "b": 30.0, "c": 70.0})
    assert modes.warnings(found) == [
        "b falls from 120.0 to 30.0 dB in mode declared, which rounds every value to the artifact's types"
        " (1 more output likewise)"
    ]


def test_what_was_stored_by_name_warns_as_what_was_measured(recorded: Reference) -> None:
    measured = modes.measure(["fp32", "declared", "fp16-worst"], recorded, run)
    stored = dict(sorted(measured.items()))
    assert list(stored) != list(measured)
    assert modes.warnings(stored) == modes.warnings(measured) != []
