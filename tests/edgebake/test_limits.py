"""Verdicts: what passes, what fails, and what must stay unmeasured."""

from __future__ import annotations

import math
from typing import Any

import pytest

from edgebake.limits import AT_MOST, LABELLED_MIN, judge
from edgebake.recipe import Limits
from edgebake.types import Verdict

RUNNER = {"name": "executorch-runtime", "kind": "executed"}
OUTPUT = {
    "sqnr_db": 30.0,
    "cosine": 0.999,
    "max_abs": 0.1,
    "relative_l2": 0.03,
    "nonfinite": 0,
    "reference_nonfinite": 0,
}


def _judge(limits: dict[str, Any], **measurements: Any) -> tuple[Verdict, ...]:
    return judge(Limits.model_validate(limits), {"runner": RUNNER, **measurements})


def _one(limits: dict[str, Any], **measurements: Any) -> Verdict:
    (verdict,) = _judge(limits, **measurements)
    return verdict


EVERYTHING = {
    "parity": {"cosine": 0.99, "sqnr_db": 25, "max_abs": 1, "relative_l2": 0.1},
    "agreement": {"metric": "top1", "min": 0.9},
    "task": {"metric": "top1", "max_drop": 0.02},
    "size": {"mib": 30, "of_float": 0.35},
    "memory": {"peak_mib": 100, "planned_mib": 10},
    "delegated": "95%",
}
GOOD: dict[str, Any] = {
    "outputs": {"logits": OUTPUT},
    "agreement": {"metric": "top1", "value": 0.95, "output": "logits"},
    "task": {"metric": "top1", "float": 0.8, "artifact": 0.79, "count": 500},
    "size": {"bytes": 2**20 * 20, "of_float": 0.25, "reasons": []},
    "memory": {"planned_bytes": 2**20 * 5, "run_peak_bytes": 2**20 * 150, "run_base_bytes": 2**20 * 90},
    "delegation": {"share": 0.99, "left_out": []},
}
LIMITS = [
    "parity.cosine",
    "parity.sqnr_db",
    "parity.max_abs",
    "parity.relative_l2",
    "agreement.top1",
    "task.top1",
    "size.mib",
    "size.of_float",
    "memory.peak_mib",
    "memory.planned_mib",
    "delegated",
]


def test_no_limit_no_verdict() -> None:
    assert _judge({}, **GOOD) == ()
    assert _judge({"task": {"metric": "top1"}}, **GOOD) == ()


def test_every_limit_given_becomes_a_verdict_and_passes_on_good_numbers() -> None:
    verdicts = _judge(EVERYTHING, **GOOD)
    assert [v.limit for v in verdicts] == LIMITS
    assert {v.state for v in verdicts} == {"pass"}
    assert {v.limit: v.value for v in verdicts}["memory.peak_mib"] == 60


def test_every_limit_fails_on_bad_numbers() -> None:
    verdicts = _judge(
        EVERYTHING,
        outputs={"logits": {"sqnr_db": 20.0, "cosine": 0.9, "max_abs": 2.0, "relative_l2": 0.2}},
        agreement={"metric": "top1", "value": 0.8},
        task={"metric": "top1", "float": 0.8, "artifact": 0.7, "count": 500},
        size={"bytes": 2**20 * 40, "of_float": 0.5, "reasons": [{"why": "stays fp32: embeddings", "bytes": 9}]},
        memory={"planned_bytes": 2**20 * 50, "run_peak_bytes": 2**20 * 150},
        delegation={"share": 0.5, "left_out": [{"op": "softmax", "count": 2, "macs": 7, "reason": "no kernel"}]},
    )
    assert [v.limit for v in verdicts] == LIMITS
    assert {v.state for v in verdicts} == {"fail"}
    reasons = {v.limit: v.reason for v in verdicts}
    assert reasons["size.mib"] == "stays fp32: embeddings"
    assert reasons["delegated"] == "outside the backend: softmax x2 (no kernel)"


def test_nothing_measured_passes_nothing() -> None:
    for measurements in ({}, {"runner": None, "not_measured": "no runner for coreml here"}):
        verdicts = judge(Limits.model_validate(EVERYTHING), measurements)
        assert [v.limit for v in verdicts] == LIMITS
        assert {v.state for v in verdicts} == {"not measured"}
        assert all(v.reason and v.bound is not None for v in verdicts)
    assert verdicts[0].reason == "no runner for coreml here"


def test_without_a_runner_size_and_delegation_are_still_judged() -> None:
    states = {v.limit: v.state for v in judge(Limits.model_validate(EVERYTHING), {**GOOD, "runner": None})}
    passed = {limit for limit, state in states.items() if state == "pass"}
    assert passed == {"size.mib", "size.of_float", "memory.planned_mib", "delegated"}


@pytest.mark.parametrize("scale", [1, 1000])
def test_a_stand_in_neither_passes_nor_fails(scale: int) -> None:
    measurements = {**GOOD, "runner": {"name": "eager", "kind": "stand-in"}}
    measurements["outputs"] = {"logits": {**OUTPUT, "sqnr_db": 30.0 / scale}}
    verdicts = {v.limit: v for v in judge(Limits.model_validate(EVERYTHING), measurements)}
    for limit in ("parity.sqnr_db", "agreement.top1", "task.top1", "memory.peak_mib"):
        assert verdicts[limit].state == "not measured"
        assert verdicts[limit].reason == (
            "eager stands in for a runtime that is not here: its numbers are information only"
        )
    assert verdicts["parity.sqnr_db"].value == 30.0 / scale


@pytest.mark.parametrize("kind", ["device", "executed", "simulated", "interpreted"])
def test_faithful_runners_can_pass(kind: str) -> None:
    verdict = _one({"parity": {"cosine": 0.9}}, outputs={"y": OUTPUT}, runner={"name": "r", "kind": kind})
    assert verdict.state == "pass"


def test_each_output_is_judged_by_itself() -> None:
    verdicts = _judge({"parity": {"sqnr_db": 25}}, outputs={"a": OUTPUT, "b": {**OUTPUT, "sqnr_db": 24.999}})
    assert [(v.subject, v.state) for v in verdicts] == [("a", "pass"), ("b", "fail")]


@pytest.mark.parametrize("nothing", [None, math.nan])
@pytest.mark.parametrize("metric", ["cosine", "sqnr_db", "max_abs", "relative_l2"])
def test_nan_never_passes_parity(metric: str, nothing: float | None) -> None:
    bound = -1 if metric == "cosine" else 1e9 if metric in ("max_abs", "relative_l2") else -1e9
    verdict = _one({"parity": {metric: bound}}, outputs={"y": {**OUTPUT, metric: nothing, "nonfinite": 3}})
    assert (verdict.state, verdict.value) == ("fail", None)
    assert verdict.reason == "the artifact returned 3 values that are NaN or infinite"


@pytest.mark.parametrize("nothing", [None, math.nan])
def test_nan_never_passes_elsewhere(nothing: float | None) -> None:
    limits = {
        "agreement": {"metric": "top1", "min": -1},
        "task": {"metric": "top1", "max_drop": 1},
        "delegated": 0,
        "memory": {"peak_mib": 1e9, "planned_mib": 1e9},
        "size": {"mib": 1e9, "of_float": 1e9},
    }
    verdicts = _judge(
        limits,
        agreement={"metric": "top1", "value": nothing},
        task={"metric": "top1", "float": nothing, "artifact": 0.5, "count": 1000},
        delegation={"share": nothing},
        memory={"run_peak_bytes": nothing, "planned_bytes": nothing},
        size={"bytes": nothing, "of_float": nothing},
    )
    assert len(verdicts) == 7
    assert "pass" not in {v.state for v in verdicts}


def test_a_pass_without_evidence_is_not_measured_but_a_miss_fails() -> None:
    blind = {**OUTPUT, "cosine": 1.0, "undefined": {"cosine": "constant"}}
    verdict = _one({"parity": {"cosine": 0.99}}, outputs={"y": blind})
    assert (verdict.state, verdict.value, verdict.reason) == ("not measured", 1.0, "constant")
    verdict = _one({"parity": {"cosine": 0.99}}, outputs={"y": {**blind, "cosine": 0.5}})
    assert verdict.state == "fail"
    verdict = _one({"parity": {"sqnr_db": 9}}, outputs={"y": {"sqnr_db": None, "undefined": {"sqnr_db": "zero"}}})
    assert (verdict.state, verdict.reason) == ("not measured", "zero")
    found = {"metric": "top1", "value": 1.0, "undefined": "one class"}
    assert _one({"agreement": {"metric": "top1", "min": 0.9}}, agreement=found).state == "not measured"
    assert _one({"agreement": {"metric": "top1", "min": 0.9}}, agreement={**found, "value": 0.1}).state == "fail"


def test_agreement_on_noise_is_judged_and_says_so() -> None:
    verdict = _one(
        {"agreement": {"metric": "top1", "min": 0.9}},
        agreement={"metric": "top1", "value": 0.95},
        notes=["weights are random (seed 0): numbers say nothing about quality"],
        samples={"noise": True},
    )
    assert verdict.state == "pass"
    assert "weights are random" in verdict.reason
    assert "noise" in verdict.reason


def test_agreement_is_gated_on_its_value_not_on_its_interval() -> None:
    limits = {"agreement": {"metric": "spearman", "min": 0.98}}
    found = {"metric": "spearman", "value": 0.981, "low": 0.9, "high": 0.99}
    assert _one(limits, agreement=found).state == "pass"
    assert _one(limits, agreement={**found, "value": 0.979}).state == "fail"


def test_another_metric_than_the_limit_is_not_measured() -> None:
    verdict = _one({"agreement": {"metric": "spearman", "min": 0.5}}, agreement={"metric": "top1", "value": 1.0})
    assert (verdict.limit, verdict.state, verdict.reason) == (
        "agreement.spearman",
        "not measured",
        "what was measured is top1",
    )
    task = {"metric": "top5", "float": 0.9, "artifact": 0.9, "count": 1000}
    assert _one({"task": {"metric": "top1", "max_drop": 0.5}}, task=task).state == "not measured"


@pytest.mark.parametrize("artifact", [0.9, 0.1])
def test_few_labels_are_printed_not_gated(artifact: float) -> None:
    limits = {"task": {"metric": "top1", "max_drop": 0.01}}
    verdict = _one(limits, task={"metric": "top1", "float": 0.85, "artifact": artifact, "count": LABELLED_MIN - 1})
    assert verdict.state == "not measured"
    assert verdict.reason == "99 labelled samples; a drop is judged from 100 on"
    assert verdict.value == pytest.approx(0.85 - artifact)
    verdict = _one(limits, task={"metric": "top1", "float": 0.85, "artifact": artifact, "count": LABELLED_MIN})
    assert verdict.state == ("pass" if artifact == 0.9 else "fail")


def test_a_float_model_that_is_always_wrong_cannot_drop() -> None:
    task = {"metric": "top1", "float": 0.0, "artifact": 0.0, "count": 1000}
    assert _one({"task": {"metric": "top1", "max_drop": 0.01}}, task=task).state == "not measured"


def test_all_delegated_means_no_operator_outside() -> None:
    left = {"op": "reshape", "count": 1, "macs": 0, "reason": ""}
    assert _one({"delegated": "100%"}, delegation={"share": 1.0, "left_out": []}).state == "pass"
    assert _one({"delegated": "99%"}, delegation={"share": 1.0, "left_out": [left]}).state == "pass"
    verdict = _one({"delegated": "100%"}, delegation={"share": 1.0, "left_out": [left]})
    assert (verdict.state, verdict.value, verdict.reason) == ("fail", 1.0, "outside the backend: reshape x1")


def test_an_unknown_share_is_not_measured_and_says_why() -> None:
    verdict = _one({"delegated": "95%"}, delegation={"share": None, "reason": "only the phone's compiler decides"})
    assert (verdict.state, verdict.reason) == ("not measured", "only the phone's compiler decides")


def test_left_out_operators_are_named_heaviest_first() -> None:
    left = [{"op": f"op{i}", "count": 1, "macs": i, "reason": ""} for i in range(5)]
    verdict = _one({"delegated": 0.9}, delegation={"share": 0.5, "left_out": left})
    assert verdict.reason == "outside the backend: op4 x1, op3 x1, op2 x1 and 2 more operators"


def test_bounds_are_inclusive() -> None:
    assert _one({"parity": {"sqnr_db": 30}}, outputs={"y": OUTPUT}).state == "pass"
    assert _one({"size": {"mib": 20}}, **GOOD).state == "pass"


def test_directions_cover_the_limits() -> None:
    assert set(LIMITS) - AT_MOST == {"parity.cosine", "parity.sqnr_db", "agreement.top1", "delegated"}
