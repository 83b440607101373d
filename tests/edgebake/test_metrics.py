"""Parity sums: against formulas by hand, over splits, and where the numbers run out."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgebake.errors import StageFailed
from edgebake.metrics import CAP_DB, CHUNK, OutputMeter, ParityMeter, ratio_db, sqnr_db, to_json


def _noisy(seed: int, shape: tuple[int, ...], noise: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    reference = rng.standard_normal(shape).astype(np.float32)
    return reference, (reference + noise * rng.standard_normal(shape)).astype(np.float32)


def test_metrics_equal_the_formulas() -> None:
    pairs = [_noisy(seed, (2, 7), 0.1 * (seed + 1)) for seed in range(5)]
    meter = OutputMeter(name="y")
    for index, (r, a) in enumerate(pairs):
        meter.add(index, f"doc{index}", r, a)
    found = meter.measurements()
    r64 = np.concatenate([r for r, _ in pairs]).astype(np.float64).ravel()
    a64 = np.concatenate([a for _, a in pairs]).astype(np.float64).ravel()
    assert found["sqnr_db"] == pytest.approx(10 * math.log10((r64**2).sum() / ((r64 - a64) ** 2).sum()))
    assert found["cosine"] == pytest.approx(r64 @ a64 / np.linalg.norm(r64) / np.linalg.norm(a64))
    assert found["max_abs"] == pytest.approx(np.abs(r64 - a64).max())
    assert found["mean_abs"] == pytest.approx(np.abs(r64 - a64).mean())
    assert found["relative_l2"] == pytest.approx(np.linalg.norm(r64 - a64) / np.linalg.norm(r64))
    assert found["elements"] == 70
    assert found["undefined"] == {}


def test_energy_is_summed_over_samples_not_averaged_per_sample() -> None:
    meter = OutputMeter(name="y")
    meter.add(0, "loud", np.array([100.0]), np.array([99.0]))
    meter.add(1, "quiet", np.array([1.0]), np.array([2.0]))
    found = meter.measurements()
    assert found["sqnr_db"] == pytest.approx(10 * math.log10(10001 / 2))
    assert found["worst_sample"] == {"index": 1, "source": "quiet", "sqnr_db": pytest.approx(0.0)}


def test_calls_of_one_sample_add_up_to_its_worst_number() -> None:
    meter = OutputMeter(name="y")
    for r, a in ((3.0, 3.0), (4.0, 5.0)):
        meter.add(7, "clip", np.array([r]), np.array([a]))
    assert meter.measurements()["worst_sample"]["sqnr_db"] == pytest.approx(10 * math.log10(25))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 2**32 - 1))
def test_how_samples_are_cut_does_not_change_the_whole(cuts: list[int], seed: int) -> None:
    r, a = _noisy(seed, (sum(cuts),), 0.3)
    whole, parts = OutputMeter(name="y"), OutputMeter(name="y")
    whole.add(0, "s", r, a)
    start = 0
    for index, size in enumerate(cuts):
        parts.add(index, "s", r[start : start + size], a[start : start + size])
        start += size
    left, right = whole.measurements(), parts.measurements()
    for metric in ("sqnr_db", "cosine", "max_abs", "mean_abs", "relative_l2"):
        if left[metric] is None:
            assert right[metric] is None
        else:
            assert right[metric] == pytest.approx(left[metric], rel=1e-12)


def test_outputs_larger_than_a_chunk_are_summed_whole() -> None:
    r, a = _noisy(0, (CHUNK + 3,), 0.01)
    r[-1], a[-1] = 1000.0, 0.0
    meter = OutputMeter(name="y")
    meter.add(0, "s", r, a)
    found = meter.measurements()
    assert found["max_abs"] == 1000.0
    assert found["sqnr_db"] == pytest.approx(10 * math.log10((r.astype(np.float64) ** 2).sum() / 1e6), abs=0.01)


def test_float32_sums_would_lose_what_float64_keeps() -> None:
    r = np.full(1_000_000, 1e3, np.float32)
    r[0] = 0.0
    a = r.copy()
    a[1:] = np.nextafter(a[1:], np.float32(np.inf))
    step = float(a[1]) - 1e3
    assert sqnr_db(r, a) == pytest.approx(20 * math.log10(1e3 / step), rel=1e-9)


def test_exact_outputs_are_capped_for_json() -> None:
    r, _ = _noisy(1, (4,), 0)
    assert math.isinf(sqnr_db(r, r))
    meter = OutputMeter(name="y")
    meter.add(0, "s", r, r.copy())
    found = meter.measurements()
    assert (found["sqnr_db"], found["max_abs"]) == (CAP_DB, 0.0)
    assert found["cosine"] == pytest.approx(1.0)
    assert found["worst_sample"]["sqnr_db"] == CAP_DB


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["artifact", "reference", "both"])
def test_a_value_that_is_not_finite_spoils_every_number(bad: float, side: str) -> None:
    meter = OutputMeter(name="y")
    r, a = np.ones(4, np.float32) * np.arange(4, dtype=np.float32), np.arange(4, dtype=np.float32)
    meter.add(0, "fine", r, a)
    r, a = r.copy(), a.copy()
    if side != "artifact":
        r[2] = bad
    if side != "reference":
        a[2] = bad
    meter.add(1, "spoilt", r, a)
    found = meter.measurements()
    assert [found[m] for m in ("sqnr_db", "cosine", "max_abs", "mean_abs", "relative_l2")] == [None] * 5
    assert found["nonfinite"] == (side != "reference")
    assert found["reference_nonfinite"] == (side != "artifact")
    assert found["worst_sample"] == {"index": 1, "source": "spoilt", "sqnr_db": None}
    json.dumps(found, allow_nan=False)


def test_zero_reference_supports_no_ratio() -> None:
    meter = OutputMeter(name="y")
    meter.add(0, "s", np.zeros(3), np.zeros(3))
    found = meter.measurements()
    assert set(found["undefined"]) == {"sqnr_db", "cosine", "relative_l2"}
    assert found["sqnr_db"] is None
    assert found["max_abs"] == 0.0
    assert found["worst_sample"] is None


def test_noise_over_a_zero_reference_is_the_worst_there_is() -> None:
    meter = OutputMeter(name="y")
    meter.add(0, "s", np.zeros(3), np.full(3, 1e-6))
    found = meter.measurements()
    assert found["sqnr_db"] == -CAP_DB
    assert (found["cosine"], found["relative_l2"]) == (None, None)
    assert found["undefined"] == {}


def test_cosine_of_a_constant_reference_is_no_evidence() -> None:
    meter = OutputMeter(name="y")
    meter.add(0, "s", np.full(8, 5.0), np.full(8, 900.0))
    found = meter.measurements()
    assert found["cosine"] == pytest.approx(1.0)
    assert set(found["undefined"]) == {"cosine"}
    assert found["sqnr_db"] < 0


def test_a_dead_artifact_has_no_cosine() -> None:
    meter = OutputMeter(name="y")
    meter.add(0, "s", np.arange(4.0), np.zeros(4))
    found = meter.measurements()
    assert found["cosine"] is None
    assert found["sqnr_db"] == pytest.approx(0.0)


def test_an_empty_output_is_no_evidence() -> None:
    meter = OutputMeter(name="y")
    meter.add(0, "s", np.zeros((0, 3)), np.zeros((0, 3)))
    assert len(meter.measurements()["undefined"]) == 5


@pytest.mark.parametrize(
    ("reference", "artifact", "text"),
    [
        (np.zeros((1, 3)), np.zeros((3, 1)), r"shape \[3, 1\].*\[1, 3\]"),
        (np.zeros(3, np.float32), np.zeros(3, np.int32), "int32.*float32"),
        (np.zeros(3, np.bool_), np.zeros(3, np.float32), "float32.*bool"),
        (np.zeros(3, np.complex64), np.zeros(3, np.complex64), "complex64"),
    ],
)
def test_outputs_that_cannot_be_compared_say_so(
    reference: NDArray[np.generic], artifact: NDArray[np.generic], text: str
) -> None:
    meter = ParityMeter()
    with pytest.raises(StageFailed, match=text) as caught:
        meter.add(0, "s", {"y": reference}, {"y": artifact})
    assert "output 'y'" in str(caught.value)
    assert caught.value.problems[0].fix


@pytest.mark.parametrize(
    ("reference", "artifact"),
    [(np.float32, np.float16), (np.int64, np.int32), (np.int64, np.uint8), (np.bool_, np.bool_)],
)
def test_widths_of_one_kind_compare(reference: type[np.generic], artifact: type[np.generic]) -> None:
    meter = OutputMeter(name="y")
    meter.add(0, "s", np.array([0, 1, 1]).astype(reference), np.array([0, 1, 1]).astype(artifact))
    assert meter.measurements()["sqnr_db"] == CAP_DB


@pytest.mark.parametrize("artifact", [{"x": 1.0}, {"x": 1.0, "y": 1.0, "z": 1.0}])
def test_missing_and_unknown_outputs_are_errors(artifact: dict[str, float]) -> None:
    arrays = {name: np.array([value]) for name, value in artifact.items()}
    with pytest.raises(StageFailed, match=r"\['x', 'y'\]"):
        ParityMeter().add(0, "s", {"x": np.array([1.0]), "y": np.array([1.0])}, arrays)


def test_parity_keeps_outputs_apart() -> None:
    meter = ParityMeter()
    meter.add(
        0, "s", {"x": np.array([1.0, 2.0]), "y": np.array([1.0])}, {"x": np.array([1.0, 2.0]), "y": np.array([3.0])}
    )
    found = meter.measurements()
    assert list(found) == ["x", "y"]
    assert found["x"]["sqnr_db"] == CAP_DB
    assert found["y"]["sqnr_db"] == pytest.approx(-10 * math.log10(4))


@pytest.mark.parametrize(
    ("signal", "noise", "expected"),
    [(1, 0, math.inf), (0, 1, -math.inf), (100, 1, 20.0), (0, 0, None), (math.nan, 1, None)],
)
def test_ratio_in_decibels(signal: float, noise: float, expected: float | None) -> None:
    found = ratio_db(signal, noise)
    assert math.isnan(found) if expected is None else found == expected


def test_json_numbers() -> None:
    assert to_json(math.nan, 200) is None
    assert to_json(math.inf) is None
    assert to_json(math.inf, 200) == 200
    assert to_json(-math.inf, 200) == -200
    assert to_json(300.0, 200) == 200
    assert to_json(1.5) == 1.5
