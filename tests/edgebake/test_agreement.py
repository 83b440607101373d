"""Agreement: counting rules by hand, rank correlation against SciPy, intervals against known coverage."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from edgebake.agreement import (
    BinaryMeter,
    SpearmanMeter,
    TaskMeter,
    Top1Meter,
    average_ranks,
    meter_of,
    pairing,
    spearman,
)
from edgebake.bootstrap import difference_interval, product_interval, share_interval
from edgebake.errors import StageFailed
from edgebake.recipe import Agreement


def _row(*scores: float) -> NDArray[np.float32]:
    return np.array([scores], np.float32)


def _top1(*calls: tuple[NDArray[Any], NDArray[Any]], tie_margin: float = 0.01) -> dict[str, Any]:
    meter = Top1Meter(output="logits", tie_margin=tie_margin)
    for index, (reference, artifact) in enumerate(calls):
        meter.add(f"image{index}", reference, artifact)
    return meter.measurements()


def test_top1_counts_same_decisions() -> None:
    found = _top1(
        (_row(1, 5, 2), _row(0, 9, 1)),
        (_row(7, 1, 2), _row(1, 0, 3)),
        (_row(1, 2, 9), _row(0, 1, 2)),
        (_row(1, 5, 2), _row(0, 4, 3)),
    )
    assert (found["metric"], found["output"], found["value"], found["raw"]) == ("top1", "logits", 0.75, 0.75)
    assert (found["count"], found["sources"], found["near_ties"]) == (4, 4, 0)
    assert found["low"] < 0.75 < found["high"]
    assert "undefined" not in found
    assert "top5" not in found


def test_a_flip_between_near_equal_classes_is_counted_apart() -> None:
    close = (_row(10, 9.99, 0), _row(9.99, 10, 0))  # margin 0.01; scale 10 - 6.66
    clear = (_row(1, 5, 0), _row(1, 5, 0))
    flip = (_row(10, 5, 0), _row(5, 10, 0))
    found = _top1(close, clear, flip)
    assert (found["near_ties"], found["count"], found["value"]) == (1, 3, 0.5)
    assert found["raw"] == pytest.approx(1 / 3)
    assert _top1(close, clear, flip, tie_margin=0)["near_ties"] == 0


def test_near_ties_that_agree_stay_agreement() -> None:
    found = _top1((_row(10, 9.99, 0), _row(10, 9.99, 0)), (_row(0, 1, 0), _row(0, 1, 0)))
    assert (found["near_ties"], found["value"]) == (0, 1.0)


@pytest.mark.parametrize("bad", [_row(0, 0, 0), _row(math.nan, 0, 0), _row(math.inf, 0, 0), _row(5, 5, 5)])
def test_a_dead_artifact_never_agrees_with_class_zero(bad: NDArray[Any]) -> None:
    found = _top1((_row(9, 1, 0), bad), (_row(0, 9, 1), _row(0, 9, 1)))
    assert (found["value"], found["near_ties"]) == (0.5, 0)


def test_nan_on_both_sides_does_not_agree() -> None:
    assert _top1((_row(math.nan, 1, 0), _row(math.nan, 1, 0)))["value"] == 0.0


def test_a_float_model_that_decides_nothing_is_no_evidence() -> None:
    found = _top1((_row(2, 2, 2), _row(2, 2, 2)))
    assert (found["value"], found["count"], found["undecided"]) == (None, 0, 1)
    assert "decides nothing" in found["undefined"]


def test_one_class_on_every_sample_is_no_evidence() -> None:
    found = _top1((_row(9, 1), _row(3, 1)), (_row(8, 1), _row(2, 1)))
    assert found["value"] == 1.0
    assert "one class" in found["undefined"]


def test_rows_of_a_sequence_are_decisions_of_their_own() -> None:
    reference = np.array([[[1, 5, 0], [9, 1, 0], [0, 1, 7], [3, 0, 0]]], np.float32)
    artifact = reference.copy()
    artifact[0, 3] = [0, 0, 3]
    found = _top1((reference, artifact), (reference, reference))
    assert (found["count"], found["sources"], found["value"]) == (8, 2, 7 / 8)


def test_top5_of_the_artifact_holds_the_float_class() -> None:
    reference = np.eye(10, dtype=np.float32)[[0, 1]]
    artifact = np.zeros((2, 10), np.float32)
    artifact[0, 4:9] = 2.0
    artifact[0, 0] = 1.0  # sixth
    artifact[1, 5:9] = 2.0
    artifact[1, 1] = 1.0  # fifth
    found = _top1((reference[:1], artifact[:1]), (reference[1:], artifact[1:]))
    assert (found["value"], found["top5"]) == (0.0, 0.5)


def test_top1_needs_classes() -> None:
    with pytest.raises(StageFailed, match="two classes") as caught:
        _top1((np.zeros((4, 1)), np.zeros((4, 1))))
    assert "binary" in caught.value.problems[0].fix


def test_binary_agrees_on_a_side_of_the_threshold() -> None:
    meter = BinaryMeter(output="speech", threshold=0.5)
    meter.add("clip1", np.array([[0.9]]), np.array([[0.6]]))
    meter.add("clip1", np.array([[0.1]]), np.array([[0.6]]))
    meter.add("clip2", np.array([[0.2]]), np.array([[0.1]]))
    meter.add("clip2", np.array([[0.2]]), np.array([[math.nan]]))
    found = meter.measurements()
    assert (found["value"], found["count"], found["sources"], found["threshold"]) == (0.5, 4, 2, 0.5)
    assert "undefined" not in found


def test_binary_on_one_side_only_is_no_evidence() -> None:
    meter = BinaryMeter(output="speech")
    for _ in range(3):
        meter.add("clip", np.array([0.1]), np.array([0.2]))
    assert "one side of 0.5" in meter.measurements()["undefined"]


@settings(deadline=None)  # scipy's first call imports
@given(st.lists(st.integers(-4, 4), min_size=3, max_size=40), st.integers(0, 1000))
def test_ranks_and_spearman_equal_scipy(values: list[int], seed: int) -> None:
    left = np.array(values, np.float64)
    right = np.round(left + np.random.default_rng(seed).normal(0, 2, len(left)))
    np.testing.assert_allclose(average_ranks(left), stats.rankdata(left))
    if np.ptp(left) and np.ptp(right):
        assert spearman(left, right) == pytest.approx(stats.spearmanr(left, right).statistic, abs=1e-12)
    else:
        assert math.isnan(spearman(left, right))


@given(st.integers(0, 400), st.integers(0, 5))
def test_pairs_are_distinct_and_use_every_sample_alike(samples: int, seed: int) -> None:
    pairs = pairing(samples, seed)
    assert len({frozenset(p) for p in pairs.tolist()}) == len(pairs)
    assert (pairs[:, 0] != pairs[:, 1]).all()
    if samples > 2:
        uses = np.bincount(pairs.ravel(), minlength=samples)
        assert len(pairs) >= samples
        assert uses.min() == uses.max()


def _embeddings(noise: float, samples: int = 60, sources: int = 12) -> SpearmanMeter:
    rng = np.random.default_rng(3)
    meter = SpearmanMeter(output="embedding")
    for index in range(samples):
        vector = rng.standard_normal((1, 32)).astype(np.float32)
        meter.add(f"doc{index % sources}", vector, (vector + noise * rng.standard_normal((1, 32))).astype(np.float32))
    return meter


def test_spearman_of_similarities_equals_scipy_over_all_pairs() -> None:
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((20, 8))
    artifact = reference + 0.3 * rng.standard_normal((20, 8))
    meter = SpearmanMeter(output="embedding")
    for i in range(20):
        meter.add(f"s{i}", reference[i : i + 1], artifact[i : i + 1])
    found = meter.measurements()

    def cosines(x: NDArray[np.float64]) -> NDArray[np.float64]:
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        return np.asarray((unit @ unit.T)[np.triu_indices(20, 1)], np.float64)

    expected = stats.spearmanr(cosines(reference), cosines(artifact)).statistic
    assert found["value"] == pytest.approx(expected)
    assert (found["count"], found["samples"], found["sources"]) == (190, 20, 20)
    assert found["low"] < expected < found["high"]


def test_spearman_falls_with_noise_and_has_a_narrow_interval_without() -> None:
    exact, noisy = _embeddings(0.0).measurements(), _embeddings(1.0).measurements()
    assert exact["value"] == pytest.approx(1.0)
    assert exact["low"] == pytest.approx(1.0)
    assert noisy["low"] < noisy["value"] < noisy["high"] < 0.9


def test_sequences_are_averaged_into_one_embedding() -> None:
    rng = np.random.default_rng(1)
    long, short = SpearmanMeter(output="h"), SpearmanMeter(output="h")
    for index in range(10):
        states = rng.standard_normal((1, 3 + index, 8))
        other = states + 0.5 * rng.standard_normal(states.shape)
        long.add(f"s{index}", states, other)
        short.add(f"s{index}", states.mean(axis=1), other.mean(axis=1))
    assert long.measurements()["value"] == pytest.approx(short.measurements()["value"])


@pytest.mark.parametrize("bad", [np.zeros((1, 32)), np.full((1, 32), math.nan)])
def test_an_embedding_without_direction_spoils_spearman(bad: NDArray[Any]) -> None:
    meter = _embeddings(0.1)
    meter.add("doc0", np.ones((1, 32)), bad)
    found = meter.measurements()
    assert found["value"] is None
    assert "undefined" not in found


def test_spearman_without_enough_or_different_samples_is_no_evidence() -> None:
    meter = SpearmanMeter(output="e")
    assert "pairs" in meter.measurements()["undefined"]
    for index in range(5):
        meter.add(f"s{index}", np.array([[1.0, 2.0]]), np.array([[1.0, 2.0]]))
    found = meter.measurements()
    assert (found["value"], found["low"]) == (None, None)
    assert "equally similar" in found["undefined"]


def test_intervals_are_seeded_and_fast() -> None:
    meter = _embeddings(0.5, samples=512, sources=512)
    start = time.process_time()
    first = meter.measurements(seed=1)
    assert time.process_time() - start < 2.0
    assert first["count"] == 2048
    assert first == meter.measurements(seed=1)
    assert first["low"] != meter.measurements(seed=2)["low"]


def test_clusters_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    per_source = (rng.random(20) < 0.8).astype(float)
    hits = np.repeat(per_source, 25)
    alone = share_interval(hits, np.ones(500), seed=0)
    clustered = share_interval(per_source * 25, np.full(20, 25.0), seed=0)
    assert clustered[1] - clustered[0] > 3 * (alone[1] - alone[0])


def test_interval_of_a_share_equals_the_binomial_one() -> None:
    hits = (np.arange(400) < 300).astype(float)
    low, high = share_interval(hits, np.ones(400), seed=0)
    exact = stats.binom.ppf([0.025, 0.975], 400, 0.75) / 400
    assert low == pytest.approx(exact[0], abs=0.006)
    assert high == pytest.approx(exact[1], abs=0.006)


def test_interval_of_a_correlation_covers_the_truth() -> None:
    covered = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal(300)
        y = 0.6 * x + 0.8 * rng.standard_normal(300)
        sources = np.stack([np.arange(300), (np.arange(300) + 1) % 300], axis=1)
        low, high = product_interval(x, y, sources, 300, seed)
        covered += low < 0.6 < high
    assert covered >= 35


def test_full_agreement_is_not_certainty() -> None:
    low, high = share_interval(np.ones(20), np.ones(20), seed=0)
    assert high == 1.0
    assert low == pytest.approx(stats.binomtest(20, 20).proportion_ci().low)
    low, high = share_interval(np.zeros(20), np.ones(20), seed=0)
    assert low == 0.0
    assert high == pytest.approx(stats.binomtest(0, 20).proportion_ci().high)
    low, high = difference_interval(np.zeros(20), np.ones(20), seed=0)
    assert -low == high == pytest.approx(0.1684, abs=1e-4)


def test_one_source_has_no_interval() -> None:
    assert all(math.isnan(x) for x in share_interval(np.array([9.0]), np.array([10.0]), seed=0))
    found = _top1((_row(0, 1), _row(0, 1)))
    assert (found["low"], found["high"]) == (None, None)


def _task(metric: str = "top1") -> TaskMeter:
    return TaskMeter(metric=metric, output="logits")


def test_task_compares_float_and_artifact_on_labels() -> None:
    meter = _task()
    for index, (label, reference, artifact) in enumerate(
        [(1, _row(0, 5, 1), _row(0, 5, 1)), (2, _row(0, 1, 5), _row(5, 1, 0)), (0, _row(0, 1, 5), _row(0, 1, 5))]
    ):
        meter.add(f"i{index}", label, reference, artifact)
    found = meter.measurements()
    assert (found["metric"], found["count"], found["sources"]) == ("top1", 3, 3)
    assert (found["float"], found["artifact"]) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert found["drop"] == pytest.approx(1 / 3)
    assert found["drop_low"] <= found["drop"] <= found["drop_high"]


def test_task_top5_and_dead_rows() -> None:
    meter = _task("top5")
    ramp = np.arange(10, dtype=np.float32)[None]
    meter.add("a", 5, ramp, ramp)
    meter.add("b", 4, ramp, ramp)
    meter.add("c", 0, ramp[:, ::-1], np.zeros((1, 10), np.float32))
    found = meter.measurements()
    assert (found["float"], found["artifact"]) == (pytest.approx(2 / 3), pytest.approx(1 / 3))


@pytest.mark.parametrize(("metric", "label", "classes"), [("top1", 3, 3), ("top1", -1, 3), ("top5", 0, 5)])
def test_labels_must_fit_the_classes(metric: str, label: int, classes: int) -> None:
    scores = np.arange(classes, dtype=np.float32)[None]
    with pytest.raises(StageFailed, match=f"label {label}"):
        _task(metric).add("a", label, scores, scores)


def test_no_labels_give_no_task_numbers() -> None:
    found = _task().measurements()
    assert (found["float"], found["artifact"], found["drop"], found["count"]) == (None, None, None, 0)


@pytest.mark.parametrize("metric", ["top1", "binary", "spearman"])
def test_the_recipe_names_the_meter(metric: Any) -> None:
    meter = meter_of(Agreement(metric=metric, min=0.5, threshold=0.25, tie_margin=0.5), "out")
    rng = np.random.default_rng(0)
    for index in range(6):
        x = rng.standard_normal((1, 4))
        meter.add(f"s{index}", x, x)
    found = meter.measurements()
    assert (found["metric"], found["output"], found["value"]) == (metric, "out", pytest.approx(1.0))
