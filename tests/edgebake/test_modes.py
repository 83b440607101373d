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
    overflown = {**masked, "scores": "matmul", "probabilities": "softmax"} if mode == "fp16-worst" else masked
    return outputs, {str(i): overflown if i == 5 else masked for i in samples}


def test_each_mode_is_held_against_the_reference(recorded: Reference) -> None:
    found = modes.measure(["fp32", "declared", "fp16-worst"], recorded, run)
    decibels = {mode: row["outputs"]["y"]["sqnr_db"] for mode, row in found.items()}
    assert decibels == pytest.approx({"fp32": 120.4, "declared": 60.2, "fp16-worst": 24.1}, abs=0.1)
    assert {row["calls"] for row in found.values()} == {8}
    assert found["declared"]["overflow"] is None  # the mask's infinities are meant
    assert found["fp16-worst"]["overflow"] == {"value": "scores", "operator": "matmul", "sample": 5}


def test_warnings_name_the_overflow_and_the_loss(recorded: Reference) -> None:
    said = modes.warnings(modes.measure(["fp32", "declared", "fp16-worst"], recorded, run))
    assert said == [
        "y falls from 120.4 to 60.2 dB in mode declared, which rounds every value to the artifact's types",
        "in mode fp16-worst the value scores (matmul) leaves the range of float16 on sample 5: "
        "keep its module in fp32, or scale its inputs down",
        "y falls from 60.2 to 24.1 dB in mode fp16-worst, where a processor also sums in float16",
    ]


def test_small_losses_and_good_numbers_are_no_warning() -> None:
    rows = {"fp32": 130.0, "declared": 90.0, "fp16-worst": 85.0}
    found = {mode: {"outputs": {"y": {"sqnr_db": db}}, "overflow": None} for mode, db in rows.items()}
    assert modes.warnings(found) == []
    assert modes.warnings({}) == []
