"""Two results held against each other."""

from __future__ import annotations

import math
from typing import Any

import pytest

from edgebake.comparing import Change, compare, flips, numbers
from edgebake.result import Result
from edgebake.types import Verdict, VerdictState


def result(state: VerdictState = "pass", **measurements: Any) -> Result:
    return Result(
        unit="u",
        recipe="r",
        component="c",
        target="t",
        scheme="fp32",
        verdicts=(Verdict(limit="parity.cosine", state=state),),
        measurements=measurements,
    )


def changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Change]:
    return {c.what: c for c in compare({"u": result(**old)}, {"u": result(**new)})}


@pytest.mark.parametrize(
    ("section", "key", "what", "better_is_higher"),
    [
        ("agreement", "value", "agreement", True),
        ("task", "artifact", "task", True),
        ("delegation", "share", "delegated share", True),
        ("size", "bytes", "size bytes", False),
        ("memory", "planned_bytes", "memory planned bytes", False),
        ("memory", "run_peak_bytes", "memory of the run bytes", False),
        ("latency", "median_ms", "latency median ms", False),
        ("latency", "ratio", "latency ratio to float", False),
    ],
)
def test_each_number_knows_which_way_is_better(section: str, key: str, what: str, better_is_higher: bool) -> None:
    found = changes({section: {key: 1}}, {section: {key: 2}})
    assert list(found) == [what]
    assert (found[what].old, found[what].new, found[what].better) == (1.0, 2.0, better_is_higher)


def test_outputs_are_compared_by_name_and_metric() -> None:
    old = {"outputs": {"y": {"sqnr_db": 30.0, "cosine": 0.9, "max_abs": 0.1}}}
    new = {"outputs": {"y": {"sqnr_db": 20.0, "cosine": 0.9, "max_abs": 0.05}, "z": {"cosine": 1.0}}}
    found = changes(old, new)
    assert {what: c.better for what, c in found.items()} == {"y sqnr_db": False, "y max_abs": True, "z cosine": None}


def test_the_memory_of_a_run_is_what_it_added() -> None:
    measured = {"memory": {"run_peak_bytes": 50, "run_base_bytes": 20}}
    assert numbers(measured)["memory of the run bytes"] == 30


def test_equal_numbers_and_two_nans_are_no_change() -> None:
    same = {"agreement": {"value": math.nan}, "size": {"bytes": 3}}
    assert changes(same, {"agreement": {"value": math.nan}, "size": {"bytes": 3.0}}) == {}


def test_a_number_that_only_one_has_is_a_change_without_a_judgement() -> None:
    found = changes({"agreement": {"value": 0.9}}, {})
    assert (found["agreement"].new, found["agreement"].better) == (None, None)


@pytest.mark.parametrize("odd", [None, 3, "x", [], True])
def test_measurements_of_any_shape_are_read(odd: object) -> None:
    assert set(numbers({"outputs": odd, "size": odd, "agreement": {"value": odd}}).values()) <= {None, 3.0}


def test_states_that_changed_appeared_or_went() -> None:
    old, new = {"a": result(), "b": result(), "c": result()}, {"a": result("fail"), "c": result(), "d": result()}
    assert list(flips(old, new)) == [("a", "pass", "fail"), ("b", "pass", "absent"), ("d", "absent", "pass")]
