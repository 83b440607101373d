"""Rounding modes as a diagnosis: what is measured, and when it is worth a warning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgebake import modes
from edgebake.reference import Reference, write
from edgebake.types import Call, ReferenceCall, Sample, SampleSet

OUTPUT = np.linspace(-1, 1, 32, dtype=np.float32)


@pytest.fixture
def recorded(tmp_path: Path) -> Reference:
    inputs = {"x": np.zeros(2, np.float32)}
    (tmp_path / "reference").mkdir()
    samples = SampleSet(samples=tuple(Sample(calls=(Call(inputs=inputs),), source=f"s{i}") for i in range(20)))
    calls = ((ReferenceCall(method="forward", inputs=inputs, outputs={"y": OUTPUT * (i + 1)}),) for i in range(20))
    write(tmp_path / "reference", samples, calls, {"model": {}})
    return Reference(tmp_path / "reference")


def test_a_few_samples_are_spread_over_all(recorded: Reference) -> None:
    assert modes.chosen(recorded) == [0, 2, 5, 7, 10, 12, 15, 17]


def run(mode: str, samples: list[int]) -> tuple[Mapping[str, Any], Mapping[str, Mapping[str, str]]]:
    noise = {"fp32": 2**-20, "declared": 2**-10, "fp16-worst": 2**-4}[mode]
    outputs = {f"{i}.y": OUTPUT * (i + 1) * np.float32(1 + noise) for i in samples}
    masked = {"mask": "select"}
    overflown = (
        {**masked, "scores": "matmul of encoder.attention", "probabilities": "softmax"}
        if mode == "fp16-worst"
        else masked
    )
    return outputs, {str(i): overflown if i == 5 else masked for i in samples}


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
    def stored(mode: str, samples: list[int]) -> tuple[Mapping[str, Any], Mapping[str, Mapping[str, str]]]:
        values = {f"{i}.y": np.full_like(OUTPUT, np.nan) for i in samples}
        return values, {str(i): {"scores": "mul of encoder"} for i in samples}

    found = modes.measure(["fp32", "declared"], recorded, stored)
    assert {mode: row["overflow"]["module"] for mode, row in found.items()} == {
        "fp32": "encoder",
        "declared": "encoder",
    }


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
